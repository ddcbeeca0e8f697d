"""Matrix products against float64's, by each way that a CPU may need."""

import os
import subprocess
import sys

import pytest
import torch

from lnjac.gpt import products


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_products_are_those_of_fp32_rounded_once(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bf16", lambda: bf16)
    a, b, bias = (torch.randn(shape).bfloat16() for shape in ((3, 5, 64), (64, 7), (7,)))
    made = products.product(a, b, bias)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), a.double() @ b.double() + bias.double(), rtol=2**-8, atol=2**-8)
    batch = products.batched(a, a.transpose(1, 2))
    assert batch.dtype == torch.bfloat16
    torch.testing.assert_close(batch.double(), a.double() @ a.double().transpose(1, 2), rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_the_sums_that_they_stand_for(dtype: torch.dtype) -> None:
    a, b, bias = torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, 7, dtype=dtype), torch.randn(7, dtype=dtype)
    with torch.no_grad():
        made = products.product(a, b, bias)
    torch.testing.assert_close(made.double(), a.double() @ b.double() + bias.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "fp32", "bf16"), [("avx2", "torch", "torch-fp32"), ("", None, None)])
def test_the_choice_follows_what_the_cpu_can_do(isa: str, fp32: str | None, bf16: str | None) -> None:
    """Held to AVX2, any CPU of today's is an older one."""
    code = (
        "import torch; from lnjac.gpt import products\n"
        "for dtype in (torch.float32, torch.bfloat16): print(products.chosen(dtype, torch.device('cpu')))"
    )
    held = {"ATEN_CPU_CAPABILITY": isa, "ONEDNN_MAX_CPU_ISA": isa.upper()} if isa else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | held, capture_output=True, text=True, check=True
    )
    cpu = torch.device("cpu")
    here = [products.chosen(torch.float32, cpu), products.chosen(torch.bfloat16, cpu)]
    assert done.stdout.split() == [fp32 or here[0], bf16 or here[1]]
