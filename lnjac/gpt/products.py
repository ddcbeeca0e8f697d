"""Matrix products by what this machine does best, chosen by what its CPU can do and never by a timing.

Another choice rounds otherwise, so that a run's row names its choice (`chosen`).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a·b + bias, (…, m).

    Args:
        a: (…, n).
        b: (n, m).
        bias: (m,), or None for none.
    """
    if rounded(a):
        with torch.autocast("cpu", enabled=False):
            return F.linear(a.float(), b.t().float(), None if bias is None else bias.float()).to(a.dtype)
    if _by_onednn(a):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return out
    return F.linear(a, b.t(), bias)


def batched(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b, (…, n, m), of a batch of matrices, a: (…, n, k) and b: (…, k, m)."""
    if rounded(a):
        with torch.autocast("cpu", enabled=False):
            return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def rounded(a: Tensor) -> bool:
    """Return whether products of `a` are made in fp32 and rounded to bf16, as on a CPU that multiplies no bf16 itself.

    The numbers are those of bf16 products, which add up in fp32 too. Torch's own take ten times as long there.
    """
    return a.dtype == torch.bfloat16 and a.device.type == "cpu" and not multiplies_bf16()


def chosen(dtype: torch.dtype, device: torch.device) -> str:
    """Return what makes the linear layers' products in a run: onednn, torch, or torch-fp32 for bf16 made in fp32."""
    with torch.no_grad():
        a = torch.empty(0, dtype=dtype, device=device)
        return "torch-fp32" if rounded(a) else "onednn" if _by_onednn(a) else "torch"


def _by_onednn(a: Tensor) -> bool:
    """Return whether oneDNN makes the product: in fp32, where no graph is recorded.

    oneDNN uses AVX-512 on any CPU that has it; MKL, which torch would choose, on Intel's alone. Without AVX-512 it gains
    nothing.
    """
    plain = a.dtype == torch.float32 and a.device.type == "cpu" and not torch.is_grad_enabled()
    return plain and not torch.compiler.is_compiling() and _has_avx512()


@cache
def _has_avx512() -> bool:
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def multiplies_bf16() -> bool:
    """Return whether oneDNN has bf16 products for this CPU (from AVX-512 on, in x86); True where torch has no oneDNN."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not there or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
