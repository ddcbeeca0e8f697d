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

CASES = [*zoo.TRANSFORMERS, *zoo.TIMM, *zoo.TORCHVISION]


def params() -> list[object]:
    return [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
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
