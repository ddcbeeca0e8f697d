"""Intervals against scipy and formulas by another route, laws they must obey, and the coverage of the default one."""

import gc
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.meta_analysis import effectsize_smd

from lnjac.comparing import intervals as stats
from lnjac.comparing.intervals import Inference

Array = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]

quick = settings(max_examples=40, deadline=None)  # the first example imports scipy
finite = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))
samples = st.lists(finite, min_size=3, max_size=8).filter(lambda x: np.std(x) > 1e-2)


@quick
@given(samples, st.sampled_from([0.8, 0.95, 0.99]))
def test_paired_interval_is_students(x: list[float], confidence: float):
    found = stats.paired(x, Inference(confidence=confidence))
    test = scipy.stats.ttest_1samp(x, 0)
    low, high = test.confidence_interval(confidence)
    np.testing.assert_allclose([found.low, found.high, found.p], [low, high, test.pvalue], rtol=1e-8, atol=1e-10)
    assert found.n == len(x)
    np.testing.assert_allclose(found.effect, np.mean(x) / np.std(x, ddof=1), rtol=1e-9, atol=1e-12)


@quick
@given(samples, samples)
def test_unpaired_is_welchs_with_hedges_g(a: list[float], b: list[float]):
    x, y = np.array(a), np.array(b)
    found = stats.unpaired([math.nan, *x], [*y, math.nan])
    test = scipy.stats.ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high, found.p], [low, high, test.pvalue], rtol=1e-7, atol=1e-9)
    g, _ = effectsize_smd(x.mean(), x.std(ddof=1), len(x), y.mean(), y.std(ddof=1), len(y))
    np.testing.assert_allclose(found.effect, g, rtol=1e-7, atol=1e-9)
    assert found.n == min(len(x), len(y))


@quick
@given(samples, finite, st.sampled_from([0.5, 2.0, -3.0]))
def test_laws_of_shift_scale_and_sign(x: list[float], shift: float, factor: float):
    one, other = stats.paired(x), stats.paired(np.array(x) * factor + shift)
    ends = sorted([float(one.low) * factor + shift, float(one.high) * factor + shift])
    np.testing.assert_allclose([other.low, other.high], ends, rtol=1e-7, atol=1e-6)


@quick
@given(samples)
def test_seeds_are_exchangeable_and_missing_ones_do_not_count(x: list[float]):
    one = stats.paired(x)
    other = stats.paired([math.nan, *reversed(x), math.nan])
    for name in ("estimate", "low", "high", "p", "effect", "n"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-7, atol=1e-7)


@quick
@given(st.lists(samples, min_size=1, max_size=5))
def test_many_rows_at_once_are_as_each_alone(rows: list[list[float]]):
    table = np.full((len(rows), 1, 8), math.nan)
    for row, x in zip(table, rows, strict=True):
        row[0, : len(x)] = x
    found = stats.paired(table)
    assert found.low.shape == (len(rows), 1)
    alone = [stats.paired(x) for x in rows]
    for name in ("estimate", "low", "high", "p", "effect", "n"):
        np.testing.assert_allclose(getattr(found, name)[:, 0], [getattr(one, name) for one in alone], rtol=1e-9)


@pytest.mark.parametrize("method", stats.METHODS)
def test_one_seed_has_an_estimate_only_and_none_has_nothing(method: str):
    how = Inference(method, rng=np.random.default_rng(0))
    found = stats.paired([[2.0, math.nan], [math.nan, math.nan]], how)
    np.testing.assert_array_equal(found.estimate, [2.0, math.nan])
    np.testing.assert_array_equal(found.n, [1, 0])
    for part in (found.low, found.high, found.p, found.effect):
        assert np.isnan(part).all()
    assert np.isnan(stats.unpaired([1.0], [2.0, 3.0], how).low)


@pytest.mark.parametrize("method", stats.METHODS)
@pytest.mark.filterwarnings("error")
def test_an_infinite_value_leaves_no_p(method: str):
    how = Inference(method, rng=np.random.default_rng(0))
    rows = [[math.inf, 1.0, 2.0], [math.inf, -math.inf, 1.0], [-math.inf] * 3]
    assert np.isnan(stats.paired(rows, how).p).all()
    assert np.isnan(stats.unpaired(rows, [[1.0, 2.0, 4.0]] * 3, how).p).all()
    assert np.isnan(stats.unpaired([[1.0, 2.0, 4.0]] * 3, rows, how).p).all()


@pytest.mark.parametrize("method", stats.METHODS)
@pytest.mark.filterwarnings("error")
def test_differences_of_rounding_size_have_no_p_and_no_effect(method: str):
    how, eps = Inference(method, rng=np.random.default_rng(0)), 2.0**-52
    rows = [
        ([0.5, 0.5, 0.5], 1.0, stats.SAME, 0.5),
        ([0.3, 0.3 + eps, 0.3 - eps], 2.3, stats.SAME, 0.3),
        ([0.0, 0.0, 0.0], 1.2, stats.IDENTICAL, 0.0),
        ([eps, eps, eps], 1.2, stats.IDENTICAL, 0.0),
        ([8 * eps, -8 * eps, 8 * eps], 1.0, stats.IDENTICAL, 0.0),  # at the bound
        ([eps, math.nan, math.nan], 1.2, stats.IDENTICAL, 0.0),
        ([0.5, math.nan, math.nan], 1.2, "", 0.5),
        ([17 * eps, 8 * eps, 8 * eps], 1.0, "", 11 * eps),  # spread over the bound
        ([math.inf, math.inf, math.inf], math.inf, "", math.inf),
        ([math.nan, math.nan, math.nan], 1.2, "", math.nan),
    ]
    found = stats.paired([row[0] for row in rows], how, [[row[1]] * 3 for row in rows])
    assert found.agreement.tolist() == [row[2] for row in rows]
    np.testing.assert_allclose(found.estimate, [row[3] for row in rows], rtol=1e-15)
    agree = found.agreement != ""
    assert np.isnan(found.p[agree]).all()
    assert np.isnan(found.effect[agree]).all()
    np.testing.assert_array_equal(found.low[agree], found.estimate[agree])
    np.testing.assert_array_equal(found.high[agree], found.estimate[agree])
    assert np.isfinite(found.effect[7])


def test_a_seed_of_large_numbers_does_not_excuse_the_spread_of_small_ones():
    found = stats.paired([1e-10, 3e-10, 1e-10], size=[1.0, 1.0, 1e9])
    assert found.agreement == ""
    assert stats.paired([1e-10, 1e-10, 3e-10], size=[1.0, 1.0, 1e9]).agreement == stats.SAME


def test_groups_of_one_value_each_differ_the_same_in_every_seed():
    found = stats.unpaired(
        [[1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [1.0, math.nan]], [[0.5, 0.5], [1.0, 1.0], [0.5, 0.5], [0.5, 0.5]]
    )
    assert found.agreement.tolist() == [stats.SAME, stats.IDENTICAL, "", ""]
    np.testing.assert_array_equal(found.estimate, [0.5, 0.0, 1.0, 0.5])
    np.testing.assert_array_equal(np.isnan(found.p), [True, True, False, True])
    assert stats.unpaired([1.0], [1.0]).agreement == stats.IDENTICAL


@pytest.mark.parametrize(("n", "p"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_sign_flips_are_exact_where_few(n: int, p: float):
    found = stats.paired(np.arange(1.0, n + 1), Inference("signflip"))
    assert found.p == pytest.approx(p)  # only the two all-equal signs are as extreme: 2/2^n
    assert found.low == stats.paired(np.arange(1.0, n + 1)).low


def test_sign_flip_of_many_seeds_is_drawn_and_near_the_t_test():
    x = np.random.default_rng(1).normal(0.4, 1, 30)
    one, again = (stats.paired(x, Inference("signflip", rng=np.random.default_rng(2))) for _ in range(2))
    assert one.p == again.p
    assert one.p == pytest.approx(float(stats.paired(x).p), abs=0.02)


def test_permutation_of_unpaired_seeds_is_exact_where_few():
    found = stats.unpaired([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], Inference("signflip"))
    assert found.p == pytest.approx(2 / math.comb(6, 3))


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="magic is no interval: choose one of t, signflip"):
        stats.paired([1.0, 2.0], Inference("magic"))


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_steps_down_reject(p: list[float]):
    """Against statsmodels', and against the procedure itself: reject the smallest as long as p ≤ α/(tests left)."""
    from statsmodels.stats.multitest import multipletests

    found = stats.holm([math.nan, *p])
    assert np.isnan(found[0])
    with patch.object(gc, "collect"):  # statsmodels sweeps the memory at every call, most of this test's time
        np.testing.assert_allclose(found[1:], multipletests(p, method="holm")[1], rtol=1e-12, atol=1e-15)
    for alpha in (0.01, 0.05, 0.5):
        rejected = set()
        for left, i in zip(range(len(p), 0, -1), np.argsort(p, kind="stable"), strict=True):
            if p[i] * left > alpha:
                break
            rejected.add(i)
        assert {i for i in range(len(p)) if found[1 + i] <= alpha} == rejected
    assert stats.holm([]).shape == (0,)


@quick
@given(st.floats(-3, 3), st.floats(0.1, 10), st.integers(2, 5))
def test_a_power_law_has_its_exponent_as_slope(exponent: float, factor: float, n: int):
    x = 2.0 ** np.arange(n)
    lines = np.stack([factor * x**exponent, np.where(x > 1, factor * x**exponent, math.nan)])
    found = stats.log_lines(x, lines)
    assert found.slope[0] == pytest.approx(exponent, abs=1e-8)
    assert math.isnan(found.slope[1]) if n == 2 else found.slope[1] == pytest.approx(exponent, abs=1e-8)
    size = stats.ROUNDING * found.curvature_size
    assert math.isnan(found.curvature[0]) if n == 2 else abs(found.curvature[0]) <= size[0]
    of_seeds = stats.paired(found.slope, size=found.slope_size)  # of the same points but one
    assert n == 2 or of_seeds.agreement in (stats.SAME, stats.IDENTICAL)


@quick
@given(st.lists(st.lists(st.floats(0.01, 100), min_size=4, max_size=6), min_size=1, max_size=1), st.integers(0, 3))
def test_lines_and_parabolas_are_those_of_polyfit(y: list[list[float]], gap: int):
    line = np.array(y[0])
    x = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])[: len(line)]
    line[gap] = math.nan
    known = ~np.isnan(line)
    u, v = np.log(x[known]), np.log(line[known])
    found = stats.log_lines(x, line)
    slope, start = np.polyfit(u, v, 1)
    np.testing.assert_allclose(found.slope, slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.curvature, 2 * np.polyfit(u, v, 2)[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.residuals[known], v - slope * u - start, rtol=1e-6, atol=1e-9)
    if v.std() > 1e-6:
        np.testing.assert_allclose(found.r2, np.corrcoef(u, v)[0, 1] ** 2, rtol=1e-6, atol=1e-9)
    assert np.isnan(found.residuals[gap])


def test_a_line_without_a_logarithm_has_no_slope():
    found = stats.log_lines([1, 2, 4], [[1, 0, 4], [1, -1, 4], [1, math.nan, math.nan], [math.nan] * 3])
    for part in (found.slope, found.r2, found.curvature, found.residuals):
        assert np.isnan(part).all()


def test_a_constant_metric_has_slope_0_and_no_r2():
    found = stats.log_lines([64, 128, 256], [[0.3, 0.3, 0.3], [7.0, 7.0, 7.0]])
    assert np.isnan(found.r2).all()
    assert stats.paired(found.slope, size=found.slope_size).agreement == stats.IDENTICAL
    assert stats.paired(found.curvature, size=found.curvature_size).agreement == stats.IDENTICAL
    assert stats.misfit(found).agreement == stats.IDENTICAL


def test_misfit_of_three_points_is_the_t_test_of_the_curvature():
    x, y = [1.0, 3.0, 4.0], np.exp(np.random.default_rng(0).normal(size=(5, 4, 3)))
    found = stats.log_lines(x, y)
    np.testing.assert_allclose(stats.misfit(found).p, stats.paired(found.curvature).p, rtol=1e-9)
    y[:, 0, 1] = math.nan  # a seed without a point of the others
    again, rest = stats.log_lines(x, y), stats.log_lines(x, y[:, 1:])
    np.testing.assert_allclose(stats.misfit(again).p, stats.misfit(rest).p, rtol=1e-12)
    assert np.isnan(stats.misfit(stats.log_lines(x, y[:, :2])).p).all()  # one seed is left
    assert np.isnan(stats.misfit(stats.log_lines(x[:2], y[:, 1:, :2])).p).all()


def test_misfit_sees_an_s_that_has_no_curvature():
    x = np.exp(np.arange(-2.0, 3.0))
    bent = 0.5 * np.log(x) + 0.2 * np.array([1.0, -2.0, 0.0, 2.0, -1.0])  # odd about the middle
    noise = 0.02 * np.random.default_rng(1).normal(size=(4, 5))
    found = stats.log_lines(x, np.exp(bent + noise))
    assert stats.paired(found.curvature).p > 0.05
    assert stats.misfit(found).p < 0.001
    assert stats.misfit(stats.log_lines(x, np.exp(0.5 * np.log(x) + noise))).p > 0.05
    same = stats.misfit(stats.log_lines(x, np.exp(np.stack([bent] * 3))))
    assert (same.agreement, np.isnan(same.p)) == (stats.SAME, True)


@pytest.mark.parametrize("correlated", [False, True])
def test_straight_lines_are_seldom_called_bent(correlated: bool):
    """At most at the nominal rate, also where the noise of neighbouring points goes together, as along the steps of a run."""
    noise = np.random.default_rng(2).normal(size=(4000, 4, 6))
    noise = noise.cumsum(-1) if correlated else noise
    p = stats.misfit(stats.log_lines(2.0 ** np.arange(6), np.exp(0.05 * noise))).p
    assert (p < 0.05).mean() < 0.06


# Coverage


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.normal(0.0, 2.0, shape)


def gumbel(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Differences of two skewed values of unequal spread, as losses at two levels are: skewness 0.75."""
    return (rng.gumbel(scale=2, size=shape) - rng.gumbel(scale=1, size=shape)) - np.euler_gamma


def lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Most seeds near each other and now and then a very unlucky one: skewness 6.2."""
    return rng.lognormal(size=shape) - math.exp(0.5)


def coverage(draw: Draw, n: int, how: Inference = stats.STUDENT, samples: int = 40_000) -> float:
    """How often an interval of n seeds holds the true mean, 0."""
    found = stats.paired(draw(np.random.default_rng(n), (samples, n)), how)
    return float(((found.low <= 0) & (found.high >= 0)).mean())


SIMULATED = {
    "t, normal": lambda n: coverage(normal, n),
    "t, difference of skewed losses": lambda n: coverage(gumbel, n),
    "t, log-normal": lambda n: coverage(lognormal, n),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_default_interval_covers_at_its_nominal_rate(n: int):
    assert coverage(normal, n) == pytest.approx(0.95, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_documented_coverage_is_what_is_simulated(root: Path, name: str):
    found = [SIMULATED[name](n) for n in (3, 5, 10)]
    print(f"\n| {name} | " + " | ".join(f"{rate:.2f}" for rate in found) + " |")
    text = (root / "docs" / "statistics.md").read_text()
    said = re.search(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)
    assert said, f"docs/statistics.md has no line for {name}"
    np.testing.assert_allclose([float(cell) for cell in said[1].split("|")], found, atol=0.011)


@quick
@given(st.floats(0.01, 10), st.floats(0.01, 3), st.sampled_from([0.8, 0.95, 0.99]), st.floats(1, 2))
def test_the_seeds_needed_are_the_fewest(reach: float, sd: float, confidence: float, rate: float):
    def half(n: int) -> float:
        return float(scipy.stats.t.ppf(0.5 + confidence / 2, rate * (n - 1)) * sd / math.sqrt(n))

    found = stats.seeds_for(reach, sd, Inference(confidence=confidence), df_per_seed=rate)
    if found is None:
        assert half(stats.MOST_SEEDS) > reach
    else:
        assert half(found) <= reach * (1 + 1e-9)
        assert found == 2 or half(found - 1) > reach * (1 - 1e-9)


def test_welchs_degrees_of_freedom_grow_by_the_rate():
    """The rate that `seeds_for` documents, against scipy's interval of two groups of n seeds each."""
    rng = np.random.default_rng(0)
    for n in (3, 8):
        a, b = rng.normal(size=n), 3 * rng.normal(size=n)
        x, y = a.var(ddof=1), b.var(ddof=1)
        low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        rate = (x + y) ** 2 / (x**2 + y**2)
        half = scipy.stats.t.ppf(0.975, rate * (n - 1)) * math.sqrt((x + y) / n)
        assert half == pytest.approx((high - low) / 2)
        assert stats.seeds_for(half * (1 + 1e-9), math.sqrt(x + y), df_per_seed=rate) == n


@quick
@given(samples, st.floats(0.01, 2e3), st.sampled_from([0.9, 0.95]))
def test_equivalence_is_that_of_two_one_sided_tests(x: list[float], margin: float, confidence: float):
    found = stats.paired(x, Inference(confidence=confidence).one_sided)
    judged = str(stats.equivalence(found.low, found.high, margin))
    above, below = (
        scipy.stats.ttest_1samp(x, bound, alternative=way).pvalue
        for bound, way in ((-margin, "greater"), (margin, "less"))
    )
    beyond = [
        scipy.stats.ttest_1samp(x, bound, alternative=way).pvalue
        for bound, way in ((margin, "greater"), (-margin, "less"))
    ]
    alpha = 1 - confidence
    assert (judged == stats.EQUIVALENT) == (max(above, below) < alpha)
    assert (judged == stats.DIFFERENT) == (min(beyond) < alpha)


def test_without_an_interval_equivalence_is_undecided():
    found = stats.equivalence([math.nan, 0.0, 0.5], [math.nan, 0.0, 0.5], 0.1)
    assert found.tolist() == [stats.UNDECIDED, stats.EQUIVALENT, stats.DIFFERENT]
