"""The backward taken apart, against explicit vectors per token and against autograd, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.decomposed import (
    NAMES,
    Case,
    autograd,
    cases,
    close,
    cos,
    draw,
    explicit,
    laws,
    measure,
    not_annihilated,
    sq,
    total,
)
from torch import Tensor

from lnjac.norms import decompose as jacobian
from lnjac.norms.decompose import Tokens
from lnjac.norms.formulas import EXACT, SURROGATES


def test_the_seven_surrogates_are_those_of_the_table() -> None:
    assert {name: tuple(switches) for name, switches in SURROGATES.items()} == NAMES
    assert tuple(EXACT) == (True, True, True)


@laws
@given(cases)
def test_normalise_and_exact_pull_back_are_autograd(case: Case) -> None:
    e = explicit(case)
    z, rstd = jacobian.normalise(case.x, case.eps, rms=case.rms)
    close(z, e.z)
    close(rstd, 1 / e.sigma)
    close(jacobian.pull_back(e.g, z, rstd, rms=case.rms), autograd(case), atol=1e-9)
    close(e.t, autograd(case), atol=1e-9)


@laws
@given(cases, st.sampled_from(sorted(NAMES)))
def test_each_surrogate_leaves_out_its_factors(case: Case, name: str) -> None:
    e = explicit(case)
    found = jacobian.pull_back(e.g, e.z, 1 / e.sigma, SURROGATES[name], rms=case.rms)
    close(found, e.surrogate(name))


@laws
@given(cases)
def test_center_and_remove_radial(case: Case) -> None:
    e = explicit(case)
    close(jacobian.center(e.g), e.g - e.g.mean(-1, keepdim=True))
    close(jacobian.remove_radial(e.z, e.g), e.g - e.radial)


@pytest.mark.parametrize("eps", [1e-6, 0.5, 20.0])
@pytest.mark.parametrize("rms", [False, True])
def test_spectrum_of_the_dense_jacobian(rms: bool, eps: float) -> None:
    d = 7
    case = draw(3, 1, d, eps, rms=rms)
    x = case.x[0]
    norm: Callable[[Tensor], Tensor] = (
        (lambda a: F.rms_norm(a, (d,), None, eps)) if rms else (lambda a: F.layer_norm(a, (d,), None, None, eps))
    )
    dense = torch.autograd.functional.jacobian(norm, x)
    z, rstd = jacobian.normalise(x, eps, rms=rms)
    close(jacobian.pull_back(torch.eye(d, dtype=torch.float64), z, rstd, rms=rms), dense)
    close(dense, dense.T)
    sigma = float(1 / rstd)
    expected = [eps / sigma**3] + [1 / sigma] * (d - 1) if rms else [0.0, eps / sigma**3] + [1 / sigma] * (d - 2)
    close(torch.linalg.eigvalsh(dense), torch.tensor(sorted(expected), dtype=torch.float64))
    close(dense @ z, eps / sigma**3 * z)
    if not rms:
        close(dense.sum(-1), torch.zeros(d))
        close(dense.square().sum(), (d - 2) / sigma**2 + (eps / sigma**3) ** 2)


@laws
@given(cases.filter(lambda c: not c.rms))
def test_what_the_pullback_leaves_on_its_two_special_directions(case: Case) -> None:
    t = jacobian.pull_back((e := explicit(case)).g, *jacobian.normalise(case.x, case.eps))
    m = (e.g * e.z).mean(-1)
    close(t.sum(-1), torch.zeros(len(t)), atol=1e-9)
    centred = case.x - case.x.mean(-1, keepdim=True)
    close((t * centred).sum(-1), case.eps * case.x.shape[-1] * m / e.sigma.squeeze(-1) ** 2, atol=1e-8)


@laws
@given(cases)
def test_energies_are_those_of_the_orthogonal_parts(case: Case) -> None:
    e, tokens = explicit(case), measure(case)
    close(tokens.sigma, e.sigma.squeeze(-1))
    close(tokens.rho, e.rho.squeeze(-1), atol=1e-14)
    close(tokens.rho, sq(e.z) / case.x.shape[-1])
    close(tokens.A, sq(e.mean))
    close(tokens.B, sq(e.along_z), rtol=1e-8)
    close(tokens.C, sq(e.g - e.mean - e.along_z), rtol=1e-8, atol=1e-8)
    close(tokens.A + tokens.B + tokens.C, sq(e.g))
    slack = 1 - tokens.rho
    close(tokens.C + slack**2 * tokens.B, sq(e.u), rtol=1e-8, atol=1e-8)
    close(tokens.rho**2 * tokens.B, sq(e.radial), rtol=1e-8)


@laws
@given(cases)
def test_cosines_are_those_of_the_vectors(case: Case) -> None:
    e = not_annihilated(case)
    found = jacobian.cosines(measure(case, replayed=autograd(case)), rms=case.rms)
    t = autograd(case)
    expected = {
        "cos_center_vs_true": cos(e.surrogate("center_scale"), t),
        "cos_ste_vs_true": cos(e.surrogate("ste"), t),
        "cos_center_vs_ste": cos(e.surrogate("center_scale"), e.surrogate("ste")),
        "cos_projected_vs_true": cos(e.surrogate("projected"), t),
        "cos_radial_vs_true": cos(e.surrogate("radial_scale"), t),
    }
    if case.rms:
        expected["cos_center_vs_ste"] = torch.full((len(t),), math.nan)
    assert found.keys() == expected.keys()
    for name in expected:
        close(found[name], expected[name], rtol=1e-7, atol=1e-7)
    close(found["cos_projected_vs_true"], torch.ones(len(t)))


@laws
@given(cases)
def test_cosine_to_ste_is_that_to_center_without_the_mean(case: Case) -> None:
    not_annihilated(case)
    tokens = measure(case)
    found = jacobian.cosines(tokens, rms=case.rms)
    share = tokens.A / (tokens.A + tokens.B + tokens.C)
    close(found["cos_ste_vs_true"], found["cos_center_vs_true"] * (1 - share).sqrt())


def test_cosines_without_eps_are_ratios_of_energies() -> None:
    tokens = measure(draw(5, 50, 8, 0.0))
    found = jacobian.cosines(tokens)
    close(found["cos_center_vs_true"], (tokens.C / (tokens.B + tokens.C)).sqrt())
    close(found["cos_ste_vs_true"], (tokens.C / (tokens.A + tokens.B + tokens.C)).sqrt())


def test_cosines_of_tokens_that_were_not_replayed_are_nan_for_projected() -> None:
    assert jacobian.cosines(measure(draw(5, 4, 8, 1e-5)))["cos_projected_vs_true"].isnan().all()


@laws
@given(cases, st.integers(0, 1000))
def test_replay_is_compared_with_the_formula(case: Case, seed: int) -> None:
    e = not_annihilated(case)
    other = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = measure(case, replayed=other, loss_tokens=3)
    close(tokens.residual_sq, 9 * sq(e.t - other), rtol=1e-8)
    close(tokens.cos_projected, cos(e.u, other), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measurement_is_in_float64_whatever_the_inputs(dtype: torch.dtype) -> None:
    case = draw(12, 6, 8, 1e-5, affine=True)
    assert case.weight is not None
    case = case._replace(x=case.x.to(dtype), grad=case.grad.to(dtype), weight=case.weight.to(dtype))
    assert case.weight is not None
    double = case._replace(x=case.x.double(), grad=case.grad.double(), weight=case.weight.double())
    found, e = measure(case), explicit(double)
    assert found.A.dtype == found.sigma.dtype == torch.float64
    close(found.sigma, e.sigma.squeeze(-1))
    close(found.B, sq(e.along_z))
    close(found.C, sq(e.g - e.mean - e.along_z))


def test_leading_axes_are_tokens() -> None:
    case = draw(13, 24, 5, 1e-5)
    replayed = autograd(case)
    flat = total(case, replayed=replayed)
    for shape in ((4, 6, 5), (2, 3, 4, 5)):
        shaped = case._replace(x=case.x.view(shape), grad=case.grad.view(shape))
        assert total(shaped, replayed=replayed.view(shape)) == flat
    strided = case._replace(x=case.x.view(4, 6, 5).transpose(0, 1), grad=case.grad.view(4, 6, 5).transpose(0, 1))
    order = torch.arange(24).view(4, 6).T.flatten()
    close(measure(strided).B, measure(case).B[order])
    one = case._replace(x=case.x[0], grad=case.grad[0])
    close(measure(one).C, measure(case).C[:1])


@pytest.mark.parametrize("n", [1, 6, 7, 8, 14, 15])
def test_chunks_join_without_a_seam(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(14, n, 5, 1e-5, affine=True)
    replayed = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = measure(case, replayed=replayed)
    monkeypatch.setattr(jacobian, "CHUNK_ELEMENTS", 7 * 5 + 3)
    chunked = measure(case, replayed=replayed)
    for name in Tokens.__dataclass_fields__:
        assert len(getattr(chunked, name)) == n
        close(getattr(chunked, name), getattr(whole, name))


def test_more_tokens_than_one_chunk() -> None:
    d = 64
    n = 2 * (jacobian.CHUNK_ELEMENTS // d) + 3
    case = draw(15, n, d, 1e-5)
    e, tokens = explicit(case), measure(case)
    close(tokens.sigma, e.sigma.squeeze(-1))
    close(tokens.C, sq(e.g - e.mean - e.along_z))
