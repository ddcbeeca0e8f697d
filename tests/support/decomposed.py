"""The backward of one norm as explicit vectors per token, the oracle of its decomposition, in float64."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

from lnjac.columns import evaluate
from lnjac.norms import decompose as jacobian
from lnjac.norms.decompose import Tokens
from lnjac.norms.formulas import Backward, flat_cos, gain

laws = settings(deadline=None, max_examples=40, derandomize=True)

NAMES = {
    "center_scale": (True, False, True),
    "projected": (True, True, False),
    "ste": (False, False, False),
    "scale": (False, False, True),
    "radial_scale": (False, True, True),
    "center": (True, False, False),
    "radial": (False, True, False),
}
"""name -> (subtract ḡ, subtract z·m, divide by σ): the table of docs/maths.md, written down a second time."""


class Case(NamedTuple):
    """x, grad: (n, d); sigma varies between tokens by up to e^±spread."""

    x: Tensor
    grad: Tensor
    eps: float
    weight: Tensor | None
    rms: bool


def draw(
    seed: int, n: int, d: int, eps: float, *, spread: float = 1.0, affine: bool = False, rms: bool = False
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n, d) * (spread * normal(n, 1)).exp() + 3 * normal(n, 1)
    # a gradient with a mean and a radial part worth measuring
    grad = normal(n, d) + normal(n, 1) + normal(n, 1) * (x - x.mean(-1, keepdim=True))
    return Case(x, grad, eps, normal(d) if affine else None, rms)


cases = st.builds(
    draw,
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    d=st.integers(3, 12),
    eps=st.sampled_from([1e-12, 1e-5, 1e-2, 1.0, 30.0]),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
    affine=st.booleans(),
    rms=st.booleans(),
)


class Explicit(NamedTuple):
    """Every vector of docs/maths.md, (n, d), and every scalar, (n, 1)."""

    z: Tensor
    sigma: Tensor
    rho: Tensor
    g: Tensor
    mean: Tensor
    """ḡ·1: zero for RMSNorm, which removes no mean."""
    radial: Tensor
    """z·m"""
    along_z: Tensor
    """The orthogonal projection of g on z."""

    @property
    def u(self) -> Tensor:
        return self.g - self.mean - self.radial

    @property
    def t(self) -> Tensor:
        return self.u / self.sigma

    def surrogate(self, name: str) -> Tensor:
        centered, radial, scaled = NAMES[name]
        vector = self.g - (self.mean if centered else 0.0) - (self.radial if radial else 0.0)
        return vector / self.sigma if scaled else vector


def explicit(case: Case) -> Explicit:
    mu = torch.zeros_like(case.x[:, :1]) if case.rms else case.x.mean(-1, keepdim=True)
    v = ((case.x - mu) ** 2).mean(-1, keepdim=True)
    sigma = (v + case.eps).sqrt()
    z = (case.x - mu) / sigma
    g = case.grad if case.weight is None else case.grad * case.weight
    mean = torch.zeros_like(g) if case.rms else g.mean(-1, keepdim=True).expand_as(g)
    along_z = z * (g * z).sum(-1, keepdim=True) / (z * z).sum(-1, keepdim=True)
    return Explicit(z, sigma, v / (v + case.eps), g, mean, z * (g * z).mean(-1, keepdim=True), along_z)


def autograd(case: Case) -> Tensor:
    """∂L/∂x through the norm, by autograd: (n, d)."""
    x = case.x.clone().requires_grad_()
    if case.rms:
        y = F.rms_norm(x, x.shape[-1:], case.weight, case.eps)
    else:
        y = F.layer_norm(x, x.shape[-1:], case.weight, None, case.eps)
    return torch.autograd.grad(y, x, case.grad)[0]


def measure(case: Case, loss_tokens: int = 1, **more: object) -> Tokens:
    tokens = jacobian.decompose(case.x, case.grad, case.eps, weight=case.weight, rms=case.rms, **more)  # type: ignore[arg-type]
    return jacobian.scaled_tokens(tokens, loss_tokens)


def total(case: Case, **more: Any) -> jacobian.Sums:
    return jacobian.sums(measure(case, **more), rms=case.rms)


class Flattened(NamedTuple):
    cos: float
    gain: float


def flattened(sums: jacobian.Sums, backward: Backward) -> Flattened:
    return Flattened(float(evaluate(flat_cos(backward), sums)), float(evaluate(gain(backward), sums)))


def sq(v: Tensor) -> Tensor:
    """‖·‖² per token: (n, d) -> (n,)."""
    return (v * v).sum(-1)


def cos(a: Tensor, b: Tensor) -> Tensor:
    """Per token, without F.cosine_similarity's clamp."""
    return (a * b).sum(-1) / (sq(a) * sq(b)).sqrt()


def close(found: Tensor | float, expected: Tensor | float, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
    )


def not_annihilated(case: Case) -> Explicit:
    """Leave out gradients of which next to nothing is kept: there any formula is noise."""
    e = explicit(case)
    assume(bool((sq(e.u) > 1e-5 * sq(e.g)).all()))
    return e


def measured(total: jacobian.Sums, sigma: Tensor, d: int, *, rms: bool = False) -> dict[str, Any]:
    """Every measured column of one row."""
    return jacobian.summary(total, sigma) | jacobian.ratios(total, d, rms=rms)
