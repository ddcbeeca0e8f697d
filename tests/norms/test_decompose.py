"""The backward taken apart, against explicit vectors per token and against autograd, in float64."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lnjac.columns import evaluate
from lnjac.norms import decompose as jacobian
from lnjac.norms.decompose import Tokens
from lnjac.norms.formulas import EXACT, SURROGATES, Backward, flat_cos, gain

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


def measure(case: Case, **more: object) -> Tokens:
    return jacobian.decompose(case.x, case.grad, case.eps, weight=case.weight, rms=case.rms, **more)  # type: ignore[arg-type]


def total(case: Case, **more: object) -> jacobian.Sums:
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


def test_the_seven_surrogates_are_those_of_the_table() -> None:
    assert {name: tuple(switches) for name, switches in SURROGATES.items()} == NAMES
    assert tuple(EXACT) == (True, True, True)


# the maps


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


# energies


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


# sums and what follows from them


@laws
@given(cases, st.integers(1, 9))
def test_sums_weigh_energies_by_powers_of_rstd(case: Case, loss_tokens: int) -> None:
    e, found = explicit(case), total(case, loss_tokens=loss_tokens)
    slack, sigma = 1 - e.rho.squeeze(-1), e.sigma.squeeze(-1)
    a, b = sq(e.mean), sq(e.along_z)
    c = sq(e.g - e.mean - e.along_z)
    for name, energy in {"A": a, "B": b, "C": c, "B1": slack * b, "B2": slack**2 * b}.items():
        for power, suffix in enumerate(["", "_rstd", "_rstd2"]):
            expected = loss_tokens**2 * (energy / sigma**power).sum()
            close(found[f"sum_{name}{suffix}"], expected, rtol=1e-7, atol=1e-9)
    close(found["sum_sigma"], sigma.sum())
    close(found["sum_rho"], e.rho.sum())
    assert (found["n_tokens"], found["n_zero"]) == (len(sigma), 0)


@laws
@given(cases)
def test_shares_are_ratios_of_sums_over_tokens(case: Case) -> None:
    e = not_annihilated(case)
    d = case.x.shape[-1]
    found = jacobian.ratios(total(case), d, rms=case.rms)
    g_sq, a, b = sq(e.g).sum(), sq(e.mean).sum(), sq(e.along_z).sum()
    c = sq(e.g - e.mean - e.along_z).sum()
    mean = math.nan if case.rms else a / g_sq
    expected = {
        "r_mean": mean,
        "r_radial": sq(e.radial).sum() / g_sq,
        "r_kept": sq(e.u).sum() / g_sq,
        "share_mean": mean,
        "share_radial": b / g_sq,
        "share_kept": c / g_sq,
        "radial_share": b / (b + c),
        "enrichment_mean": d * mean,
        "enrichment_radial": d * sq(e.radial).sum() / g_sq,
        "enrichment_radial_share": (d if case.rms else d - 1) * b / (b + c),
    }
    for name in expected:
        close(found[name], expected[name], rtol=1e-7)
    exact = [found[f"share_{part}"] for part in ("mean", "radial", "kept")]
    close(sum(exact[1:] if case.rms else exact), 1.0)
    naive = [found["r_radial"], found["r_kept"], 0.0 if case.rms else found["r_mean"]]
    rho = e.rho.squeeze(-1)
    close(1 - sum(naive), 2 * (rho * (1 - rho) * sq(e.along_z)).sum() / g_sq, rtol=1e-6, atol=1e-9)


@laws
@given(cases, st.sampled_from([*sorted(NAMES), "exact"]), st.integers(1, 9))
def test_flattened_is_the_long_vector(case: Case, name: str, loss_tokens: int) -> None:
    e = not_annihilated(case)
    t = autograd(case).flatten()
    long = t if name == "exact" else e.surrogate(name).flatten()
    found = flattened(total(case, loss_tokens=loss_tokens), SURROGATES.get(name, EXACT))
    close(found.cos, (long @ t) / (long.norm() * t.norm()), rtol=1e-7)
    close(found.gain, long.norm() / t.norm(), rtol=1e-7)


def test_flattened_where_sigma_varies_a_hundredfold_and_eps_is_of_its_size() -> None:
    case = draw(11, 200, 6, 0.3, spread=2.0)
    e = explicit(case)
    assert e.sigma.max() > 100 * e.sigma.min()
    assert e.rho.min() < 0.1
    t, seen = autograd(case).flatten(), set()
    for name, switches in SURROGATES.items():
        long = e.surrogate(name).flatten()
        found = flattened(total(case), switches)
        close(found.cos, (long @ t) / (long.norm() * t.norm()))
        close(found.gain, long.norm() / t.norm())
        seen.add(round(found.cos, 6))
    assert len(seen) == len(SURROGATES)  # so that no two formulas could be confused here
    weight = sq(e.u)  # projected: 1/√(1 + CV²(1/σ)), weights ‖u‖²
    rstd = 1 / e.sigma.squeeze(-1)
    mean = (weight * rstd).sum() / weight.sum()
    cv_sq = (weight * (rstd - mean) ** 2).sum() / weight.sum() / mean**2
    close(flattened(total(case), SURROGATES["projected"]).cos, 1 / (1 + cv_sq).sqrt())


def test_rmsnorm_has_four_distinct_backwards() -> None:
    case = draw(11, 20, 6, 0.3, rms=True)
    found = {s: flattened(total(case), Backward(*s)) for s in [tuple(EXACT), *NAMES.values()]}
    assert len(found) == 8
    for (_, radial, scaled), flat in found.items():
        assert flat == found[(True, radial, scaled)]
    assert len(set(found.values())) == 4


# merging


def part(case: Case, rows: slice) -> jacobian.Sums:
    """A micro-batch of these tokens, its loss the mean over them: case.grad is the summed loss's gradient."""
    n = len(case.x[rows])
    one = case._replace(x=case.x[rows], grad=case.grad[rows] / n)
    return total(one, replayed=autograd(one), loss_tokens=n)


@laws
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans())
def test_unequal_micro_batches_add_up_to_the_whole_batch(seed: int, sizes: list[int], rms: bool) -> None:
    case = draw(seed, sum(sizes), 6, 0.1, rms=rms)
    not_annihilated(case)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    merged = jacobian.add([part(case, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)])
    whole = part(case, slice(None))
    assert merged.keys() == whole.keys()
    for name in merged:
        close(merged[name], whole[name], atol=1e-9)


def test_averaging_ratios_is_not_merging() -> None:
    case = draw(1, 10, 6, 0.1)
    parts = [part(case, slice(0, 3)), part(case, slice(3, 10))]
    whole = jacobian.ratios(part(case, slice(None)), 6)["r_radial"]
    averaged = sum(jacobian.ratios(p, 6)["r_radial"] for p in parts) / 2
    assert abs(averaged - whole) > 1e-3
    close(jacobian.ratios(jacobian.add(parts), 6)["r_radial"], whole)


def test_concatenated_tokens_are_the_tokens_together() -> None:
    case = draw(2, 9, 5, 1e-3)
    halves = [measure(case._replace(x=case.x[rows], grad=case.grad[rows])) for rows in (slice(0, 4), slice(4, 9))]
    both, whole = jacobian.concatenate(halves), measure(case)
    for name in ("sigma", "rho", "A", "B", "C", "measurable"):
        close(getattr(both, name), getattr(whole, name))


# invariances and chance


def test_gauge_of_the_next_layer_moves_r_mean_but_no_headline_number() -> None:
    d, out, c = 8, 5, 4.0
    generator = torch.Generator().manual_seed(0)
    x, w, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, d), (out, d), (out, 3))
    )
    gamma = torch.rand(d, generator=generator, dtype=torch.float64) + 0.5
    beta = torch.randn(d, generator=generator, dtype=torch.float64)
    eps = 1e-2

    def run(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tokens]:
        y = F.layer_norm(x, (d,), gamma, beta, eps).requires_grad_()
        logits = torch.tanh(y @ weight.T + bias) @ head
        grad = torch.autograd.grad(logits.logsumexp(-1).sum(), y)[0]
        return logits.detach(), jacobian.decompose(x, grad, eps, weight=gamma)

    # adding c·(1/γ)ᵀ to every row adds c·Σ(z + β/γ) = c·Σβ/γ to every output: the bias takes it off again
    logits, plain = run(w, torch.zeros(out, dtype=torch.float64))
    moved_logits, moved = run(w + c / gamma, (-c * (beta / gamma).sum()).expand(out))
    close(moved_logits, logits)
    a, b = (jacobian.ratios(jacobian.sums(t), d) for t in (plain, moved))
    assert abs(a["r_mean"] - b["r_mean"]) > 0.3
    assert abs(a["r_radial"] - b["r_radial"]) > 0.01
    close(a["radial_share"], b["radial_share"])
    cosines = [jacobian.cosines(t) for t in (plain, moved)]
    close(cosines[0]["cos_center_vs_true"], cosines[1]["cos_center_vs_true"], rtol=1e-8)
    assert (cosines[0]["cos_ste_vs_true"] - cosines[1]["cos_ste_vs_true"]).abs().max() > 0.1


@pytest.mark.parametrize("d", [3, 16])
def test_chance_level_is_a_beta_distribution(d: int) -> None:
    n = 40_000
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = jacobian.decompose(x, grad, 1e-12)
    g_sq = tokens.A + tokens.B + tokens.C
    for energy in (tokens.A, tokens.B):
        share = energy / g_sq
        mean, variance = 1 / d, 2 * (d - 1) / (d**2 * (d + 2))
        assert abs(share.mean() - mean) < 5 * math.sqrt(variance / n)
        close(share.var(), variance, rtol=0.05)
        if d == 3:  # Beta(½, 1) has the distribution function √s: Kolmogorov's distance
            steps = torch.arange(1, n + 1, dtype=torch.float64) / n
            assert (share.sort().values.sqrt() - steps).abs().max() < 1.95 / math.sqrt(n)
    found = jacobian.ratios(jacobian.sums(tokens), d)
    for name in ("enrichment_mean", "enrichment_radial", "enrichment_radial_share"):
        assert abs(found[name] - 1) < 0.05, name


# small, zero and constant


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
    row, other = (jacobian.summary(total(c, replayed=autograd(c)), measure(c).sigma, 8) for c in (holed, kept))
    for name in row:
        if name.startswith(("cos_", "r_", "share_", "flat_", "gain_", "sum_")):
            close(row[name], other[name])


def test_a_batch_of_zero_gradients_has_no_ratio() -> None:
    case = draw(6, 4, 8, 1e-3)
    case = case._replace(grad=torch.zeros_like(case.grad))
    row = jacobian.summary(total(case, replayed=autograd(case)), measure(case).sigma, 8)
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


# shapes, dtypes, chunks


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


# the row


@pytest.mark.parametrize("rms", [False, True])
def test_summary_against_plain_formulas(rms: bool) -> None:
    case = draw(16, 41, 8, 0.05, affine=True, rms=rms)
    e, t = explicit(case), autograd(case)
    off = t * (1 + 1e-3 * torch.sin(torch.arange(8, dtype=torch.float64)))
    tokens = measure(case, replayed=off)
    found = jacobian.summary(jacobian.sums(tokens, rms=rms), tokens.sigma, 8, rms=rms)
    sigma = e.sigma.squeeze(-1)
    close(found["sigma_mean"], sigma.mean())
    close(found["sigma_std"], sigma.std(unbiased=True))
    close(found["rho_mean"], e.rho.mean())
    ordered = sigma.sort().values
    for name, q in {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}.items():
        close(found[f"sigma_{name}"], ordered[round(q * 40)])  # 41 tokens: each quantile is one of them
    close(found["jacobian_residual"], (t - off).norm() / t.norm())
    close(found["cos_center_vs_true"], cos(e.surrogate("center_scale"), t).mean())
    close(found["cos_ste_vs_true"], cos(e.g, t).mean())
    close(found["cos_center_vs_ste"], math.nan if rms else cos(e.surrogate("center"), e.g).mean())
    close(found["cos_projected_vs_true"], cos(e.u, off).mean())
    close(found["cos_radial_vs_true"], cos(e.surrogate("radial_scale"), t).mean())
    for name in NAMES:
        long = e.surrogate(name).flatten()
        close(found[f"flat_cos_{name}"], (long @ t.flatten()) / (long.norm() * t.norm()))
        close(found[f"gain_{name}"], long.norm() / t.norm())
    close(found["r_mean"], math.nan if rms else sq(e.mean).sum() / sq(e.g).sum())
    close(found["r_radial"], sq(e.radial).sum() / sq(e.g).sum())
    assert (found["n_tokens"], found["n_zero"]) == (41, 0)
    assert isinstance(found["n_tokens"], int)


def test_one_token_has_no_standard_deviation() -> None:
    case = draw(17, 1, 8, 1e-5)
    assert math.isnan(jacobian.summary(total(case), measure(case).sigma, 8)["sigma_std"])


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_standard_deviation_of_nearly_equal_sigmas(spread: float) -> None:
    case = draw(18, 30, 16, 0.0, spread=0.0)
    z = explicit(case).z * 100.0
    case = case._replace(x=z * (1 + spread * torch.linspace(-1, 1, 30, dtype=torch.float64))[:, None])
    sigma = explicit(case).sigma.squeeze(-1)
    found = jacobian.summary(total(case), sigma, 16)
    close(found["sigma_std"], sigma.std(), rtol=1e-4, atol=1e-5)
