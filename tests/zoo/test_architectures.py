"""Every norm of tiny models of many architectures: its rows are the oracle's numbers, or it is refused by name."""

from collections.abc import Callable

import pytest
import torch
from support import zoo
from support.walking import walk

transformers = pytest.importorskip("transformers", reason="needs the extra [zoo]: make test-zoo installs it")
pytest.importorskip("timm", reason="needs the extra [zoo]: make test-zoo installs it")
pytest.importorskip("torchvision", reason="needs the extra [zoo]: make test-zoo installs it")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

UPCAST = "its norms compute in float32, so that their output in a float64 model is 1e-8 of its size from the formula's"
UPCASTING = {
    *(
        "T5",
        "LongT5",
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Qwen3Next",
        "Gemma",
        "Gemma2",
        "Gemma3Text",
        "Gemma3nText",
    ),
    *("Mixtral", "DeepseekV3", "Llama4Text", "GptOss", "Phi3", "Cohere", "Cohere2", "Olmo", "Olmo2", "Glm4", "Granite"),
    *("Helium", "NanoChat", "Mamba", "Mamba2", "RecurrentGemma", "Zamba2", "Bamba", "Jamba"),
}
FAILS: dict[tuple[str, torch.dtype], str] = {
    **{(name, torch.float64): UPCAST for name in UPCASTING},
    ("Cohere", torch.float32): "a γ of two axes, (heads, d), of which the last is normalised, is not recognised",
    ("Cohere", torch.bfloat16): "a γ of two axes, (heads, d), of which the last is normalised, is not recognised",
    (
        "Persimmon",
        torch.float32,
    ): "rounding noise of up to 18 ε in the gradient of a query that sees one key counts as one",
}

CASES = [*zoo.TRANSFORMERS, *zoo.TIMM, *zoo.TORCHVISION]


def params() -> list[object]:
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.xfail(strict=True, reason=why)] if (why := FAILS.get((case.name, dtype))) else [],
        )
        for case in CASES
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("case", "dtype"), params())
def test_each_norm_has_the_true_rows_or_is_refused(
    case: zoo.Case, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    model, batch = zoo.prepared(case, dtype)
    seen = walk(model, batch, zoo.loss)
    record_property("zoo", seen.cells(case.name, dtype))
    assert seen.faults == []
    assert seen.measured or seen.refused
