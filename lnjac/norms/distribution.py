"""How a norm's per-token quantities spread: quantiles over tokens, profiles over positions. Pure functions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lnjac.columns import KEY, Column
from lnjac.norms.decompose import Tokens, per_token
from lnjac.norms.formulas import CALL

COLUMNS = [
    *CALL,
    Column(
        "quantity",
        "string",
        "",
        "what is distributed over tokens: sigma, rho, radial_share (B/(B+C)), or a cosine by its column in layers",
        KEY,
    ),
    Column(
        "statistic",
        "string",
        "",
        "quantile; or position: over the tokens at positions from `at` to the next bin's, a mean, or for radial_share a "
        "ratio of sums",
        KEY,
    ),
    Column("at", "float64", "", "the quantile's level in [0, 1], or the bin's first position in the context", KEY),
    Column("value", "float64", "", "the statistic; NaN where no token has the quantity"),
    Column(
        "n_tokens",
        "int64",
        "tokens",
        "tokens it was taken over: all for sigma and rho, else those that count in a mean cosine",
    ),
]
"""The measured columns of `distributions`."""

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


class Quantity(NamedTuple):
    """One scalar per token: values: (n,), weights: (n,) or None for a plain mean, counted: (n,) bool."""

    name: str
    values: Tensor
    weights: Tensor | None
    counted: Tensor


def quantities(tokens: Tokens, *, rms: bool = False) -> Iterator[Quantity]:
    """σ, ρ, the radial share B/(B+C), each cosine and metric. Tokens whose g or t vanishes do not count."""
    everywhere = tokens.sigma > 0
    yield Quantity("sigma", tokens.sigma, None, everywhere)
    yield Quantity("rho", tokens.rho, None, everywhere)
    energy = tokens.B + tokens.C
    yield Quantity("radial_share", tokens.B / energy, energy, tokens.measurable)
    for name, values in per_token(tokens, rms=rms).items():
        yield Quantity(name, values, None, tokens.measurable & ~values.isnan())


class Statistic(NamedTuple):
    """One number about a quantity; at: the quantile's level, or the first position of the bin."""

    quantity: str
    statistic: str
    at: float
    value: float
    n_tokens: int


def spread(quantity: Quantity) -> Iterator[Statistic]:
    """The quantiles of QUANTILES by linear interpolation between order statistics; NaN where no token counts."""
    values = _numpy(quantity.values[quantity.counted])
    found = np.quantile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
    for level, value in zip(QUANTILES, found.tolist(), strict=True):
        yield Statistic(quantity.name, "quantile", level, value, len(values))


def profile(quantity: Quantity, positions: npt.NDArray[np.int64], bins: int) -> Iterator[Statistic]:
    """Mean over the tokens of each bin of positions, by the quantity's weights: a share's mean is a ratio of sums.

    positions: (n,), each token's in its sequence; the bins split 0 … the last one as evenly as whole positions allow.
    """
    length = int(positions.max()) + 1
    values, counted = _numpy(quantity.values), _numpy(quantity.counted)
    weights = np.ones_like(values) if quantity.weights is None else _numpy(quantity.weights)
    weights = np.where(counted, weights, 0.0)
    starts = np.unique(np.linspace(0, length, min(bins, length), endpoint=False).astype(int))
    which = np.searchsorted(starts, positions, side="right") - 1
    n = np.bincount(which, weights=counted, minlength=len(starts))
    below = np.bincount(which, weights=weights, minlength=len(starts))
    above = np.bincount(which, weights=weights * np.where(counted, values, 0.0), minlength=len(starts))
    for i, start in enumerate(starts.tolist()):
        value = float(above[i] / below[i]) if below[i] > 0 else np.nan
        yield Statistic(quantity.name, "position", float(start), value, int(n[i]))


def _numpy(values: Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = values.cpu().double().numpy()
    return found
