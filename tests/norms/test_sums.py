"""Sums over tokens, the ratios that follow from them, how sums merge, what leaves them alone, and the row they make."""

import math

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
    flattened,
    laws,
    measure,
    measured,
    not_annihilated,
    sq,
    total,
)
from torch import Tensor

from lnjac.norms import decompose as jacobian
from lnjac.norms.decompose import Tokens
from lnjac.norms.formulas import EXACT, SURROGATES, Backward


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


@pytest.mark.parametrize("rms", [False, True])
def test_summary_against_plain_formulas(rms: bool) -> None:
    case = draw(16, 41, 8, 0.05, affine=True, rms=rms)
    e, t = explicit(case), autograd(case)
    off = t * (1 + 1e-3 * torch.sin(torch.arange(8, dtype=torch.float64)))
    tokens = measure(case, replayed=off)
    found = measured(jacobian.sums(tokens, rms=rms), tokens.sigma, 8, rms=rms)
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
    assert math.isnan(measured(total(case), measure(case).sigma, 8)["sigma_std"])


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_standard_deviation_of_nearly_equal_sigmas(spread: float) -> None:
    case = draw(18, 30, 16, 0.0, spread=0.0)
    z = explicit(case).z * 100.0
    case = case._replace(x=z * (1 + spread * torch.linspace(-1, 1, 30, dtype=torch.float64))[:, None])
    sigma = explicit(case).sigma.squeeze(-1)
    found = measured(total(case), sigma, 16)
    close(found["sigma_std"], sigma.std(), rtol=1e-4, atol=1e-5)
