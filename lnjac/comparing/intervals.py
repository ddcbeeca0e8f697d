"""Compute intervals and tests of numbers by seed: arrays whose last axis is the seed, NaN where a seed is missing.

The seed is the unit. What is nested in it (layers, tokens, steps) is reduced to one number per seed beforehand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

METHODS = ("t", "signflip")
"""Student's t; and t with the p value of a sign-flip permutation test."""

RESAMPLES = 9999

ROUNDING = 8 * 2.0**-52
"""Relative size of a difference that rounding alone may make: 8 units in the last place of the stored float64."""

MOST_SEEDS = 10_000
"""Seeds beyond which `seeds_for` looks no further."""

EQUIVALENT, DIFFERENT, UNDECIDED = "equivalent", "different", "undecided"

IDENTICAL = "identical"
SAME = "the same in every seed"


@dataclass(frozen=True)
class Inference:
    """How intervals are made.

    Attributes:
        method: One of METHODS.
        confidence: The probability with which an interval holds the true mean.
        rng: The randomness of the permutations that are drawn where there are too many to count them all.
    """

    method: str = "t"
    confidence: float = 0.95
    rng: np.random.Generator | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"{self.method} is no interval: choose one of {', '.join(METHODS)}")

    @property
    def one_sided(self) -> "Inference":
        """The interval of confidence 1 − 2α, by which two one-sided tests at level α = 1 − confidence are made."""
        return replace(self, method="t", confidence=2 * self.confidence - 1)

    @property
    def name(self) -> str:
        """The interval in words: `95% t interval`."""
        return f"{100 * self.confidence:g}% t interval" + " and sign-flip p" * (self.method == "signflip")


STUDENT = Inference()


class Interval(NamedTuple):
    """Estimates with their intervals: arrays of one shape, the axis of seeds gone.

    `p` is two-sided against 0. `effect` is in standard deviations: d_z of paired differences, Hedges' g of two groups. With
    one seed all but the estimate are NaN.

    `agreement` is IDENTICAL where no seed's difference is larger than rounding, SAME where the differences of two or more
    seeds spread no wider than rounding, else "". Such rows have no `p` and no `effect`, since a spread of rounding errors
    is no sample of anything, and an interval of no width.
    """

    estimate: Array
    low: Array
    high: Array
    p: Array
    effect: Array
    n: npt.NDArray[np.int64]
    agreement: npt.NDArray[np.str_]


def paired(differences: npt.ArrayLike, how: Inference = STUDENT, size: npt.ArrayLike | None = None) -> Interval:
    """Return the mean over seeds of differences within a seed, or of one level's values, with its t interval.

    The effect is d_z = mean / sd. A sign-flip test of n seeds cannot give a p below 2^(1−n): 0.0625 at n = 5.

    Args:
        differences: (…, seeds), NaN where a seed is missing.
        how: The kind of interval.
        size: (…, seeds), the largest magnitude among the stored numbers that each difference was made of; the
            differences' own magnitude unless given.
    """
    values = np.asarray(differences, dtype=np.float64)
    n, mean, sd = _moments(values)
    with np.errstate(all="ignore"):  # where all seeds agree, or there are too few
        low, high, p = _t(mean, sd / np.sqrt(n), n - 1, how.confidence)
        effect = mean / sd
    if how.method == "signflip":
        p = _permuted([values], lambda x, axis: x.mean(axis), "samples", how)
    bound = _bound(values, size)
    return _agreeing([mean, low, high, p, effect, n], _within(values, bound), _constant(values, bound))


def unpaired(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    how: Inference = STUDENT,
    sizes: tuple[npt.ArrayLike | None, npt.ArrayLike | None] = (None, None),
) -> Interval:
    """Return mean(a) − mean(b) of values of different seeds, with Welch's t interval for unequal variances.

    The effect is Hedges' g = (mean(a) − mean(b)) / pooled sd · (1 − 3 / (4 (n + m) − 9)).

    Args:
        a: (…, seeds), NaN where a seed is missing.
        b: (…, seeds of b).
        how: The kind of interval.
        sizes: As in `paired`, of each side.

    Returns:
        The differences. Their `n` counts the seeds of the side that has fewer.
    """
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    (n, mean_a, sd_a), (m, mean_b, sd_b) = _moments(one), _moments(other)
    difference = mean_a - mean_b
    with np.errstate(all="ignore"):  # where all seeds agree, or there are too few
        var_a, var_b = sd_a**2 / n, sd_b**2 / m
        df = (var_a + var_b) ** 2 / (var_a**2 / (n - 1) + var_b**2 / (m - 1))
        low, high, p = _t(difference, np.sqrt(var_a + var_b), df, how.confidence)
        pooled = np.sqrt(((n - 1) * sd_a**2 + (m - 1) * sd_b**2) / (n + m - 2))
        effect = difference / pooled * (1 - 3 / (4 * (n + m) - 9))
    if how.method == "signflip":
        p = _permuted([one, other], lambda x, y, axis: x.mean(axis) - y.mean(axis), "independent", how)
    fewer, bounds = np.minimum(n, m), (_bound(one, sizes[0]), _bound(other, sizes[1]))
    identical = _constant(np.concatenate([one, other], -1), np.concatenate(bounds, -1)) & (fewer > 0)
    same = _constant(one, bounds[0]) & _constant(other, bounds[1])
    return _agreeing([difference, low, high, p, effect, fewer], identical, same)


def _moments(values: Array) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """Return the number of known values along the last axis, their mean, and their standard deviation."""
    known = ~np.isnan(values)
    n = known.sum(-1)
    with np.errstate(all="ignore"):
        mean = np.where(known, values, 0.0).sum(-1) / n
        away = np.where(known, values - mean[..., None], 0.0)
        return n, mean, np.sqrt((away**2).sum(-1) / (n - 1))


def _t(estimate: Array, error: Array, df: npt.ArrayLike, confidence: float) -> tuple[Array, Array, Array]:
    """Return low, high and two-sided p of an estimate with this standard error, by Student's distribution."""
    from scipy import special  # not scipy.stats, which takes longer to import than most comparisons to compute

    width = special.stdtrit(df, 0.5 + confidence / 2) * error
    return estimate - width, estimate + width, 2 * special.stdtr(df, -np.abs(estimate / error))


def _permuted(parts: Sequence[Array], statistic: Callable[..., Any], kind: str, how: Inference) -> Array:
    """Return the two-sided p of every row, over all sign flips or splits where these are no more than RESAMPLES."""
    from scipy import stats

    def p(*row: Array) -> float:
        known = [part[~np.isnan(part)] for part in row]
        if min(map(len, known)) < 2 or not all(np.isfinite(part).all() for part in known):
            return np.nan  # flips of an infinite value have NaN means, which no mean exceeds: a p of 0
        test = stats.permutation_test(known, statistic, permutation_type=kind, n_resamples=RESAMPLES, rng=how.rng)
        return float(test.pvalue)

    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return np.array([p(*row) for row in zip(*rows, strict=True)]).reshape(parts[0].shape[:-1])


def _bound(values: Array, size: npt.ArrayLike | None) -> Array:
    """Return the largest difference that rounding may make, of each seed; NaN, within which nothing is, if it is infinite."""
    size = np.abs(values if size is None else np.asarray(size, dtype=np.float64))
    return np.where(np.isfinite(size), ROUNDING * size, np.nan)


def _within(values: Array, bound: Array) -> npt.NDArray[np.bool_]:
    """Return whether a row has a known value, and each is no further than its bound from 0."""
    known = ~np.isnan(values)
    return np.asarray((~known | (np.abs(values) <= bound)).all(-1) & known.any(-1))


def _constant(values: Array, bound: Array) -> npt.NDArray[np.bool_]:
    """Return whether a row has two or more known values, no two of them further apart than the mean of their bounds."""
    known = ~np.isnan(values)
    lowest = np.where(known, values + bound / 2, np.inf).min(-1, initial=np.inf)
    highest = np.where(known, values - bound / 2, -np.inf).max(-1, initial=-np.inf)
    return np.asarray((known.sum(-1) > 1) & (highest <= lowest))


def _agreeing(
    found: Sequence[npt.NDArray[Any]], identical: npt.NDArray[np.bool_], same: npt.NDArray[np.bool_]
) -> Interval:
    """Return estimate, low, high, p, effect and n as an interval, with what rounding made taken out of them."""
    estimate, low, high, p, effect, n = found
    estimate, agree = np.where(identical, 0.0, estimate), identical | same
    low, high = (np.where(agree, estimate, end) for end in (low, high))
    p, effect = (np.where(agree, np.nan, part) for part in (p, effect))
    return Interval(estimate, low, high, p, effect, n, np.where(identical, IDENTICAL, np.where(same, SAME, "")))


def seeds_for(half_width: float, sd: float, how: Inference = STUDENT, *, df_per_seed: float = 1.0) -> int | None:
    """Return the fewest seeds whose t interval is expected to reach no further than `half_width` to either side.

    The interval of n seeds reaches t(df_per_seed·(n − 1))·sd/√n. Seeds are taken to spread as the ones known do, so of few
    known seeds the answer is a rough one.

    Args:
        half_width: Half of the wanted interval's width, in the metric's unit; positive.
        sd: Standard deviation over seeds, of paired differences; of two groups √(sd_a² + sd_b²).
        how: The kind of interval.
        df_per_seed: Degrees of freedom that each seed but the first brings: 1 for paired differences, of two groups Welch's
            (sd_a² + sd_b²)² / (sd_a⁴ + sd_b⁴).

    Returns:
        The number of seeds, of each group; None if MOST_SEEDS are too few.
    """
    from scipy import special

    n = np.arange(2, MOST_SEEDS + 1)
    reach = special.stdtrit(df_per_seed * (n - 1), 0.5 + how.confidence / 2) * sd / np.sqrt(n)
    enough = np.flatnonzero(reach <= half_width)
    return int(n[enough[0]]) if len(enough) else None


def equivalence(low: npt.ArrayLike, high: npt.ArrayLike, margin: float) -> npt.NDArray[np.str_]:
    """Judge differences against a margin by two one-sided tests, given intervals of confidence 1 − 2α: 90 % for α = 5 %.

    EQUIVALENT where the interval lies within (−margin, margin), DIFFERENT where it lies wholly beyond the margin on one side,
    UNDECIDED otherwise, so also where there is no interval.
    """
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    inside, beyond = (low > -margin) & (high < margin), (low > margin) | (high < -margin)
    return np.where(inside, EQUIVALENT, np.where(beyond, DIFFERENT, UNDECIDED))


def holm(p: npt.ArrayLike) -> Array:
    """Adjust the (m,) p values of one family by Holm's step-down method; NaN stays NaN and does not count.

    The i-th smallest of m becomes the largest of (m + 1 − j)·p_j over j ≤ i, at most 1: rejecting what is below α then
    keeps the probability of any false rejection in the family at or below α, however the tests depend on each other.
    """
    p = np.asarray(p, dtype=np.float64)
    found = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    found[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return found


class Lines(NamedTuple):
    """Least-squares fits of log y against log x, one of each line: arrays of one shape, NaN where there is no fit.

    `slope` of a straight line, and the share `r2` of the spread of log y that it takes up; `curvature`, d² log y / d (log x)²
    of a parabola: the change of the slope from one e-fold of x to the next. `residuals` (…, points) are log y minus the
    line. `size`, `slope_size` and `curvature_size` are the magnitudes that residuals, slope and curvature are made of, as
    `paired` takes them.
    """

    slope: Array
    r2: Array
    curvature: Array
    residuals: Array
    size: Array
    slope_size: Array
    curvature_size: Array


class Misfit(NamedTuple):
    """Whether seeds leave their lines at the same points: arrays of one shape.

    `p` of a lack of fit. `agreement` is IDENTICAL where the mean residuals are of rounding size, SAME where they are not but
    are the same in every seed: neither has a `p`.
    """

    p: Array
    agreement: npt.NDArray[np.str_]


def log_lines(x: npt.ArrayLike, y: npt.ArrayLike) -> Lines:
    """Fit a line and a parabola in logarithms to each line: x (points,), y (…, points) -> (…).

    NaN points are left out. A line of two points has a slope and nothing else; one of fewer, or with a point that has no
    logarithm, has nothing. Points that do not spread have no `r2`.
    """
    values = np.asarray(y, dtype=np.float64)
    known = ~np.isnan(values)
    n = known.sum(-1, keepdims=True)
    fits = (n > 1) & ~(known & (values <= 0)).any(-1, keepdims=True)
    v = np.log(np.where(known & (values > 0), values, 1.0))
    with np.errstate(invalid="ignore", divide="ignore"):  # no point, or too few for a parabola: NaN
        u = np.where(known, np.log(np.asarray(x, dtype=np.float64)), 0.0)
        centred = np.where(known, u - u.sum(-1, keepdims=True) / n, 0.0)
        first = centred / (centred**2).sum(-1, keepdims=True)  # weights of v whose sum is the slope
        bent = np.where(known, centred**2 - (centred**2).sum(-1, keepdims=True) / n, 0.0)
        bent = bent - centred * (first * bent).sum(-1, keepdims=True)
        second = 2 * bent / (bent**2).sum(-1, keepdims=True)
        away = np.where(known, v - v.sum(-1, keepdims=True) / n, 0.0)
        slope, curvature = (first * away).sum(-1), (second * away).sum(-1)
        spread = (away**2).sum(-1)
        residuals = away - slope[..., None] * centred
        left = (residuals**2).sum(-1)
        size = 1 + np.abs(v).max(-1) + np.abs(slope) * np.abs(u).max(-1)
        r2 = np.where(np.abs(away).max(-1) > ROUNDING * size, 1 - left / spread, np.nan)
    fit, three = fits[..., 0], fits[..., 0] & (n > 2)[..., 0]
    return Lines(
        np.where(fit, slope, np.nan),
        np.where(three, r2, np.nan),
        np.where(three, curvature, np.nan),
        np.where(known & fits, residuals, np.nan),
        size,
        size * np.abs(first).sum(-1),
        size * np.abs(second).sum(-1),
    )


def misfit(lines: Lines) -> Misfit:
    """Test whether straight lines describe points that several seeds have: lines (…, seeds) -> (…).

    F compares the residuals' mean over seeds with their spread about it. Its degrees of freedom are Geisser and
    Greenhouse's lower bound, 1 and seeds − 1, as the residuals at neighbouring points may go together; of three points this
    is the t test of the curvature. Seeds that lack a point of another are left out.
    """
    from scipy import special

    known = ~np.isnan(lines.residuals)
    points = np.asarray(known.any(-2))
    full = np.asarray((known == points[..., None, :]).all(-1) & known.any(-1))
    n = full.sum(-1)
    residuals = np.where(full[..., None] & known, lines.residuals, 0.0)
    bound = ROUNDING * np.where(full, lines.size, 0.0).max(-1, initial=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):  # no seed, or one alone: NaN
        mean = residuals.sum(-2) / n[..., None]
        apart = np.where(full[..., None], residuals - mean[..., None, :], 0.0)
        ratio = n * (n - 1) * (mean**2).sum(-1) / (apart**2).sum((-2, -1))
    told = (n > 1) & (points.sum(-1) > 2)
    identical = told & (np.abs(mean).max(-1) <= bound)
    same = told & ~identical & (np.abs(apart).max((-2, -1)) <= bound)
    p = np.where(told & ~identical & ~same, special.fdtrc(1, np.maximum(n - 1, 1), ratio), np.nan)
    return Misfit(p, np.where(identical, IDENTICAL, np.where(same, SAME, "")))
