"""Intervals and paired comparison: pure functions of arrays whose last axis is the seed, NaN where a seed is missing.

The unit is the seed: what is nested in it (layers, tokens, steps) is reduced to one number per seed beforehand. scipy and
statsmodels are imported where they are used, since together they take longer to start than a comparison to compute.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

METHODS = ("t", "signflip")
"""Of an interval: Student's t; t with the p value of a sign-flip permutation test."""

RESAMPLES = 9999

ROUNDING = 8 * 2.0**-52
"""Relative size of a difference that rounding alone may make: 8 units in the last place of the stored float64."""

IDENTICAL = "identical"
SAME = "the same in every seed"


class Inference(NamedTuple):
    """How intervals are made: one of METHODS, the confidence, and the randomness of what is resampled."""

    method: str = "t"
    confidence: float = 0.95
    rng: np.random.Generator | None = None


STUDENT = Inference()


class Interval(NamedTuple):
    """Estimates with their intervals: arrays of one shape, the axis of seeds gone.

    `p` is two-sided against 0. `effect` is in standard deviations: d_z of
    paired differences, Hedges' g of two groups. With one seed all but the estimate are NaN.

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
    method: str


def paired(differences: npt.ArrayLike, how: Inference = STUDENT, size: npt.ArrayLike | None = None) -> Interval:
    """Return the mean of (…, seeds) values: of differences within a seed, or of one level's values.

    d_z = mean/sd. A sign-flip test of n seeds cannot give a p below 2^(1−n): 0.0625 at n = 5.

    Args:
        differences: (…, seeds), NaN where a seed is missing.
        how: The kind of interval.
        size: (…, seeds), the largest magnitude among the stored numbers that each difference was made of; the
            differences' own magnitude unless given.
    """
    values = np.asarray(differences, dtype=np.float64)
    bound = _bound(values, size)
    found = _by_size([values], lambda parts: _one_sample(parts[0], how), how)
    return _agreeing(found, _within(values, bound, 0.0), _constant(values, bound))


def unpaired(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    how: Inference = STUDENT,
    sizes: tuple[npt.ArrayLike | None, npt.ArrayLike | None] = (None, None),
) -> Interval:
    """Return mean(a) − mean(b) of (…, seeds) values of different seeds: Welch's t, unequal variances.

    `n` counts the seeds of the side that has fewer. `sizes` are as in `paired`, of each side.
    """
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    bounds = _bound(one, sizes[0]), _bound(other, sizes[1])
    found = _by_size([one, other], lambda parts: _two_samples(parts[0], parts[1], how), how)
    identical = _constant(np.concatenate([one, other], -1), np.concatenate(bounds, -1)) & (found.n > 0)
    return _agreeing(found, identical, _constant(one, bounds[0]) & _constant(other, bounds[1]))


def either(first: npt.NDArray[np.bool_], one: Interval, other: Interval) -> Interval:
    """The one where `first` holds, elsewhere the other."""
    estimate, low, high, p, effect, n = (np.where(first, *two) for two in zip(one[:6], other[:6], strict=True))
    agreement = np.where(first, one.agreement, other.agreement)
    return Interval(estimate, low, high, p, effect, n, agreement, one.method)


def _bound(values: Array, size: npt.ArrayLike | None) -> Array:
    """The largest difference that rounding may make, of each seed; NaN, within which nothing is, where that is infinite."""
    size = np.abs(values if size is None else np.asarray(size, dtype=np.float64))
    return np.where(np.isfinite(size), ROUNDING * size, np.nan)


def _within(values: Array, bound: Array, center: float) -> npt.NDArray[np.bool_]:
    """Whether every known value of a row, and at least one, is no further than its bound from the center."""
    known = ~np.isnan(values)
    near = ~known | (np.abs(values - center) <= bound)
    return np.asarray(near.all(-1) & known.any(-1))


def _constant(values: Array, bound: Array) -> npt.NDArray[np.bool_]:
    """Whether two or more values are known, no two of them further apart than the mean of their bounds."""
    known = ~np.isnan(values)
    lowest = np.where(known, values + bound / 2, np.inf).min(-1, initial=np.inf)
    highest = np.where(known, values - bound / 2, -np.inf).max(-1, initial=-np.inf)
    return np.asarray((known.sum(-1) > 1) & (highest <= lowest))


def _agreeing(found: Interval, identical: npt.NDArray[np.bool_], same: npt.NDArray[np.bool_]) -> Interval:
    """The intervals with what rounding made taken out of them: a difference that is none is 0."""
    estimate = np.where(identical, 0.0, found.estimate)
    agree = identical | same
    low, high = (np.where(agree, estimate, end) for end in (found.low, found.high))
    p, effect = (np.where(agree, np.nan, part) for part in (found.p, found.effect))
    agreement = np.where(identical, IDENTICAL, np.where(same, SAME, ""))
    return Interval(estimate, low, high, p, effect, found.n, agreement, found.method)


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
    from scipy.stats import f

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
    p = np.where(told & ~identical & ~same, f.sf(ratio, 1, np.maximum(n - 1, 1)), np.nan)
    return Misfit(p, np.where(identical, IDENTICAL, np.where(same, SAME, "")))


def _one_sample(values: Array, how: Inference) -> list[Array]:
    """Estimate, low, high, p, effect of (rows, n) values without NaN."""
    from scipy import stats

    estimate = values.mean(-1)
    unknown = np.full_like(estimate, np.nan)
    if values.shape[-1] < 2:
        return [estimate, unknown, unknown, unknown, unknown]
    effect = estimate / values.std(-1, ddof=1)
    test = stats.ttest_1samp(values, 0, axis=-1)
    low, high = test.confidence_interval(how.confidence)
    p = test.pvalue
    if how.method == "signflip":
        p = _permuted([values], _mean, "samples", how)
    return [estimate, low, high, p, effect]


def _two_samples(a: Array, b: Array, how: Inference) -> list[Array]:
    """Estimate, low, high, p, effect of (rows, n) and (rows, m) values without NaN."""
    from scipy import stats
    from statsmodels.stats.meta_analysis import effectsize_smd

    estimate = a.mean(-1) - b.mean(-1)
    unknown = np.full_like(estimate, np.nan)
    n, m = a.shape[-1], b.shape[-1]
    if min(n, m) < 2:
        return [estimate, unknown, unknown, unknown, unknown]
    effect = effectsize_smd(a.mean(-1), a.std(-1, ddof=1), n, b.mean(-1), b.std(-1, ddof=1), m)[0]
    test = stats.ttest_ind(a, b, axis=-1, equal_var=False)
    low, high = test.confidence_interval(how.confidence)
    p = _permuted([a, b], _mean_difference, "independent", how) if how.method == "signflip" else test.pvalue
    return [estimate, low, high, p, effect]


def _mean(values: Array, axis: int) -> Any:
    return values.mean(axis)


def _mean_difference(a: Array, b: Array, axis: int) -> Any:
    return a.mean(axis) - b.mean(axis)


def _permuted(parts: list[Array], statistic: Callable[..., Any], kind: str, how: Inference) -> Array:
    """Two-sided p of every row: over all sign flips or splits where these are no more than RESAMPLES."""
    from scipy import stats

    settings = {"n_resamples": RESAMPLES, "permutation_type": kind}
    rows = zip(*parts, strict=True)
    return np.array([stats.permutation_test(row, statistic, rng=how.rng, **settings).pvalue for row in rows])


def _by_size(parts: list[Array], test: Callable[[list[Array]], list[Array]], how: Inference) -> Interval:
    """Apply `test` to all rows at once that hold equally many seeds: (…, seeds) of each part, NaN left out."""
    if how.method not in METHODS:
        raise ValueError(f"{how.method} is no interval: choose one of {', '.join(METHODS)}")
    shape = parts[0].shape[:-1]
    rows = [_gathered(part.reshape(-1, part.shape[-1])) for part in parts]
    sizes = np.stack([(~np.isnan(part)).sum(-1) for part in rows], -1)
    found = np.full((5, len(sizes)), np.nan)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):  # where all seeds agree
        for size in np.unique(sizes, axis=0):
            if size.all():
                same = (sizes == size).all(-1)
                found[:, same] = test([part[same, :n] for part, n in zip(rows, size, strict=True)])
    estimate, low, high, p, effect = found.reshape(5, *shape)
    return Interval(estimate, low, high, p, effect, sizes.min(-1).reshape(shape), np.full(shape, ""), how.method)


def _gathered(rows: Array) -> Array:
    """Each row's known values first, in their order, its NaNs last."""
    return np.take_along_axis(rows, np.argsort(np.isnan(rows), axis=-1, kind="stable"), -1)
