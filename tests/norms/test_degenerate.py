"""Gradients and tokens that are tiny, zero, constant or far from zero bias no number and leave no NaN."""

import math

import pytest
import torch
from support.decomposed import (
    autograd,
    close,
    draw,
    explicit,
    measure,
    measured,
    sq,
    total,
)

from lnjac.norms import decompose as jacobian


@pytest.mark.parametrize("scale", [1e-12, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_gradients_are_not_biased(dtype: torch.dtype, scale: float) -> None:
    case = draw(4, 30, 16, 1e-5)
    case = case._replace(x=case.x.to(dtype), grad=(case.grad * scale).to(dtype))
    exact = case._replace(x=case.x.double(), grad=case.grad.double() / scale)
    assert float(case.grad.double().norm()) < 1e3 * scale
    found, expected = measure(case), measure(exact)
    assert found.measurable.all()
    for name, value in jacobian.cosines(expected).items():
        close(jacobian.cosines(found)[name], value, rtol=1e-7)
    for name, ratio in jacobian.ratios(jacobian.sums(expected), 16).items():
        close(jacobian.ratios(jacobian.sums(found), 16)[name], ratio)


def test_a_gradient_with_itself_has_cosine_one_however_small() -> None:
    case = draw(4, 5, 8, 1e-5)
    case = case._replace(grad=case.grad * 1e-9)
    close(measure(case, replayed=autograd(case)).cos_projected, torch.ones(5))


def test_zero_gradients_are_counted_and_left_out_of_the_means() -> None:
    case = draw(6, 10, 8, 1e-3)
    grad = case.grad.clone()
    grad[[2, 5, 6]] = 0.0
    holed = case._replace(grad=grad)
    tokens = measure(holed, replayed=autograd(holed))
    assert tokens.measurable.logical_not().nonzero().flatten().tolist() == [2, 5, 6]
    assert jacobian.cosines(tokens)["cos_center_vs_true"].isnan().nonzero().flatten().tolist() == [2, 5, 6]
    found = jacobian.sums(tokens)
    assert (found["n_tokens"], found["n_zero"]) == (10, 3)
    rest = [i for i in range(10) if i not in (2, 5, 6)]
    kept = case._replace(x=case.x[rest], grad=case.grad[rest])
    row, other = (measured(total(c, replayed=autograd(c)), measure(c).sigma, 8) for c in (holed, kept))
    for name in row:
        if name.startswith(("cos_", "r_", "share_", "flat_", "gain_", "sum_")):
            close(row[name], other[name])


def test_a_batch_of_zero_gradients_has_no_ratio() -> None:
    case = draw(6, 4, 8, 1e-3)
    case = case._replace(grad=torch.zeros_like(case.grad))
    row = measured(total(case, replayed=autograd(case)), measure(case).sigma, 8)
    assert row["n_zero"] == 4
    for name in ("cos_center_vs_true", "r_mean", "radial_share", "flat_cos_ste", "gain_ste", "jacobian_residual"):
        assert math.isnan(row[name]), name
    assert row["sum_A"] == 0.0
    assert row["sigma_mean"] > 0


@pytest.mark.parametrize("d", [3, 16, 48, 100])
@pytest.mark.parametrize("value", [1.0, 0.3, -7.1])
def test_a_constant_gradient_is_annihilated_and_counted_as_zero(value: float, d: int) -> None:
    """t = 0 for g ∝ 1, whatever ε: a cosine with it would be one of rounding errors."""
    case = draw(8, 20, d, 1e-5)
    case = case._replace(grad=torch.full_like(case.grad, value))
    found = total(case)
    assert found["n_zero"] == 20
    assert found["sum_cos_center_vs_true"] == 0.0
    close(jacobian.ratios(found, d)["share_mean"], 1.0)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.25])  # σ² − ε comes out above, below and exactly 0
@pytest.mark.parametrize("rms", [False, True])
def test_constant_tokens_leave_no_nan(rms: bool, eps: float) -> None:
    case = draw(7, 6, 8, eps, rms=rms)
    x = case.x.clone()
    x[1], x[4] = (0.0, 0.0) if rms else (2.5, 0.0)
    case = case._replace(x=x)
    tokens = measure(case, replayed=autograd(case))
    close(tokens.B[[1, 4]], torch.zeros(2))
    close(tokens.rho[[1, 4]], torch.zeros(2))
    close(tokens.C[[1, 4]], sq(case.grad if rms else jacobian.center(case.grad))[[1, 4]])
    close(tokens.residual_sq / sq(autograd(case)), torch.zeros(6), atol=1e-24)
    found = jacobian.sums(tokens, rms=rms)
    finite = {name for name, value in found.items() if math.isfinite(value)}
    assert set(found) - finite == ({"sum_cos_center_vs_ste"} if rms else set())
    close(jacobian.cosines(tokens, rms=rms)["cos_center_vs_true"][[1, 4]], torch.ones(2))


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-8, 1e-10])
def test_radial_part_of_a_nearly_constant_token(spread: float) -> None:
    """ρ = v/(v+ε) must not come from 1 − ε/(v+ε), which has no digits left when v ≪ ε; B divides by it."""
    case = draw(9, 20, 16, 1e-5)
    case = case._replace(x=(case.x - case.x.mean(-1, keepdim=True)) * spread)
    e, tokens = explicit(case), measure(case)
    close(tokens.rho / e.rho.squeeze(-1), torch.ones(20), rtol=1e-6)
    close(tokens.B, sq(e.along_z), rtol=1e-6)
    close(tokens.C, sq(e.g - e.mean - e.along_z), rtol=1e-6)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_large_offset_leaves_the_variance_alone(offset: float) -> None:
    case = draw(10, 20, 16, 1e-5, spread=0.0)
    shifted = case._replace(x=(case.x + offset).float())
    tokens, expected = measure(shifted), measure(shifted._replace(x=shifted.x.double() - offset))
    for name in ("sigma", "A", "B", "C"):
        close(getattr(tokens, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
