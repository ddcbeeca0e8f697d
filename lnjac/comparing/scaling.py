"""Slopes of log metric against log width or log steps, and whether a line describes the points."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import (
    FEW,
    LAYER_METRICS,
    RUN_METRICS,
    Moving,
    about,
    capped,
    confounded,
    few_seeds,
    interval_name,
    row_key,
)
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.study import Study, Values, gather, named, word
from lnjac.errors import ConfigError
from lnjac.text import listed

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Scaling:
    """Slopes of log metric against log x, and whether lines describe the points.

    `slopes`: a row for each cell, metric and site: `slope` with its interval over seeds, `p` (of slope 0), `agreement`, `n`.
    `r2` is the mean over seeds of the share of log metric's spread that the line takes up; `curvature`, with
    `curvature_low` and `curvature_high`, the change of the slope from one e-fold of x to the next; `p_line` is small where
    seeds leave their lines at the same points. `bends` where the curvature's interval excludes 0, or `p_line` is below
    1 − confidence. Of two points, through which any line goes, none of these is known.

    `points`: the `mean` of the metric at each `x` with its interval; `seeds`: `slope`, `r2`, `curvature` of each seed.
    """

    x: str
    cells: list[str]
    slopes: "pd.DataFrame"
    points: "pd.DataFrame"
    seeds: "pd.DataFrame"
    notes: list[str]


def scaling(
    study: Study,
    x: str,
    *,
    metrics: Sequence[str] = (),
    table: str = "layers",
    at: int | None = None,
    where: str | None = None,
    how: Inference = STUDENT,
) -> Scaling:
    """The slope of log metric against log x of each seed, and its mean over seeds.

    `x` is a config column of numbers, such as model.n_embd or steps, or the measured `step` of layers.
    """
    import pandas as pd

    chosen = metrics or (LAYER_METRICS if table == "layers" else RUN_METRICS)
    values = gather(study, [x], chosen, table=table, at=at, where=where)
    levels = values.levels[0]
    if not all(isinstance(level, (int, float)) and 0 < level < math.inf for level in levels):
        raise ConfigError(
            f"{x} has levels without a logarithm ({listed([word(level) for level in levels])}): "
            f'choose positive ones by --where "{x} > 0"'
        )
    lines = np.moveaxis(values.data, -2, -1)  # (metric, site, cell, seed, x)
    fits = stats.log_lines(levels, lines)
    of_slope = stats.paired(fits.slope, how, fits.slope_size)
    of_curvature = stats.paired(fits.curvature, how, fits.curvature_size)
    misfit = stats.misfit(fits)
    bends = (of_curvature.low > 0) | (of_curvature.high < 0) | (misfit.p < 1 - how.confidence)
    bends |= misfit.agreement == stats.SAME
    with warnings.catch_warnings(action="ignore"):  # the mean of nothing is NaN
        r2 = np.nanmean(fits.r2, -1)
    of_point = stats.paired(values.data, how._replace(method="t"))
    metric, site, cell = (part.ravel() for part in np.indices(of_slope.n.shape))
    key = row_key(values, values.cells, metric, site, cell)
    rows = key.assign(
        slope=of_slope.estimate.ravel(),
        low=of_slope.low.ravel(),
        high=of_slope.high.ravel(),
        p=of_slope.p.ravel(),
        agreement=of_slope.agreement.ravel(),
        n=of_slope.n.ravel(),
        r2=r2.ravel(),
        curvature=of_curvature.estimate.ravel(),
        curvature_low=of_curvature.low.ravel(),
        curvature_high=of_curvature.high.ravel(),
        p_line=misfit.p.ravel(),
        bends=bends.ravel(),
    )
    at_x = pd.concat([key.assign(**{x: level}) for level in levels], ignore_index=True)
    columns = {"mean": of_point.estimate, "low": of_point.low, "high": of_point.high, "n": of_point.n}
    points = at_x.assign(**{name: np.moveaxis(part, -1, 0).ravel() for name, part in columns.items()})
    line, slot = np.nonzero(~np.isnan(fits.slope.reshape(len(key), -1)))
    of_seed = {name: getattr(fits, name).reshape(len(key), -1)[line, slot] for name in ("slope", "r2", "curvature")}
    number = np.cumsum(of_slope.n.ravel() > 0) - 1  # of the row in slopes
    seeds = key.iloc[line].assign(seed=values.seeds[slot], **of_seed).set_axis(number[line])
    notes = [f"slope of log metric against log {x} of each seed; its mean over seeds with a {interval_name(how)}"]
    not_positive = int(((lines <= 0).any(-1)).sum())
    known = rows["n"] > 0
    notes += _straight(rows[known], list(map(str, key)), how)
    notes += confounded([("", named(values.cells, i), _along(values, i)) for i in range(len(values.cells))])
    if not_positive:
        notes.append(f"{not_positive} lines of a seed have a value that is not positive, so no slope")
    of_line = (~np.isnan(lines)).sum(-1)
    if n := int(((of_line > 1) & (of_line < of_line.max(-1, keepdims=True))).sum()):
        notes.append(f"{n} lines of a seed lack a point that another seed has: their slopes are of the rest")
    few = rows[(rows["n"] > 0) & (rows["n"] < FEW)]
    if len(few):
        notes.append(few_seeds(len(few), len(rows)))
    notes += about(values)
    return Scaling(
        x,
        list(map(str, values.cells)),
        rows[known].reset_index(drop=True),
        points[points["n"] > 0].reset_index(drop=True),
        seeds,
        notes,
    )


def _straight(rows: "pd.DataFrame", key: Sequence[str], how: Inference) -> list[str]:
    """Which rows a line does not describe, as far as that can be told."""
    if not len(rows):
        return []
    if rows["curvature"].isna().all():
        return [
            "two points a line at most, through which any line goes: whether one describes the metric cannot be told"
        ]
    bent = [
        f"{' '.join(word(row[name]) for name in key)} {row['curvature']:+.3g}"
        for row in rows[rows["bends"]].to_dict("records")
    ]
    return capped(
        f"a line does not describe {len(bent)} of {len(rows)} rows (the curvature's interval excludes 0, or seeds leave the "
        f"line at the same points, p < {1 - how.confidence:.2g}): read their points, not their slope; curvatures",
        bent,
    )


def _along(values: Values, cell: int) -> Moving:
    """The columns that move with the level in one cell."""
    moving = values.moving([int(arm) for arm in values.arm[cell]])
    return [(values.by[0], moving)] if moving else []
