"""Fit slopes of log metric against log width or log steps, and test whether a line describes the points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import LAYER_METRICS, RUN_METRICS
from lnjac.comparing.experiment import arrange, by_seed, words
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.notes import about, capped, confounded, few_seeds
from lnjac.comparing.shown import Shown
from lnjac.comparing.tables import Sources, open_tables
from lnjac.errors import ConfigError
from lnjac.text import listed, word


@dataclass(frozen=True)
class Scaling(Shown):
    """Slopes of log metric against log x, and whether lines describe the points.

    Attributes:
        slopes: A row for each cell, metric and norm: `slope` with its interval over seeds, `p` (of slope 0), `agreement`,
            `n` seeds. `r2` is the mean over seeds of the share of log metric's spread that the line takes up. `curvature`,
            with `curvature_low` and `curvature_high`, is the change of the slope from one e-fold of x to the next. `p_line`
            is small where seeds leave their lines at the same points. `bends` where the curvature's interval excludes 0, or
            `p_line` is below 1 − confidence. Of two points, through which any line goes, none of these is known.
        points: A row for each slope and `x`: the `mean` of the metric with its interval.
        seeds: A row for each slope and seed: `slope`, `r2`, `curvature`. The index is the number of the row in `slopes`.
        x: The name of the column x.
        cells: The columns that make cells.
        how: The kind of interval.
        runs: The number of runs chosen.
        diverged: How many of them diverged, and are in no slope.
        notes: What a reader must know.
    """

    x: str
    cells: list[str]
    slopes: pd.DataFrame
    points: pd.DataFrame
    seeds: pd.DataFrame
    how: Inference
    runs: int
    diverged: int
    notes: list[str]


def scaling(
    sources: Sources,
    x: str,
    *,
    metrics: Sequence[str] = (),
    table: str = "layers",
    at: int | None = None,
    where: str | None = None,
    how: Inference = STUDENT,
) -> Scaling:
    """Return the slope of log metric against log x: that of each seed, and its mean over seeds.

    Args:
        sources: A path, or several: of merged tables, sweeps and runs; or tables opened by `open_tables`.
        x: A config column of positive numbers, such as model.n_embd or steps, or, of layers, the measured `step`.
        metrics: Columns of numbers of the table; a choice of the usual ones unless given.
        table: `layers`, for the metrics of each norm, or `runs`, for losses.
        at: The measured step of layers; each run's last unless given.
        where: Only rows for which this holds, such as `"method == 'bp'"`.
        how: The kind of interval and its confidence.

    Returns:
        Slopes, points, every seed's slope, and notes.

    Raises:
        ConfigError: A source, column or step does not exist, or a level of x has no logarithm.

    Example:
        >>> found = lnjac.scaling("all.parquet", "model.n_embd", metrics=["radial_share"])
        >>> found.slopes[["site", "slope", "low", "high", "bends", "n"]]
    """
    chosen = metrics or (LAYER_METRICS if table == "layers" else RUN_METRICS)
    found = arrange(open_tables(sources), [x], chosen, table=table, at=at, where=where)
    levels = found.levels[x]
    if not all(isinstance(level, (int, float)) and 0 < level < math.inf for level in levels):
        raise ConfigError(
            f"{x} has levels without a logarithm ({listed([word(level) for level in levels])}): "
            f'choose positive ones by --where "{x} > 0"'
        )
    tidy = found.values.merge(found.runs, on="run").join(found.arms, on="arm")
    wide = tidy.pivot(index=["metric", "site", "cell"], columns=["seed", x], values="value")
    seeds = sorted(found.runs["seed"].unique())
    columns = pd.MultiIndex.from_product([seeds, range(len(levels))])
    place, wide = wide.index.to_frame(index=False), wide.reindex(columns=columns)
    values = wide.to_numpy().reshape(len(wide), len(seeds), len(levels))  # (rows, seeds, x)
    fits = stats.log_lines(levels, values)
    misfit = stats.misfit(fits)
    slope = stats.paired(fits.slope, how, fits.slope_size)
    curvature = stats.paired(fits.curvature, how, fits.curvature_size)
    bends = (
        (curvature.low > 0) | (curvature.high < 0) | (misfit.p < 1 - how.confidence) | (misfit.agreement == stats.SAME)
    )
    of_seed = {name: pd.DataFrame(getattr(fits, name), columns=seeds) for name in ("slope", "r2", "curvature")}
    key, known = found.key(found.cells.loc[place["cell"]], place), slope.n > 0
    rows = key.assign(
        slope=slope.estimate,
        low=slope.low,
        high=slope.high,
        p=slope.p,
        agreement=slope.agreement,
        n=slope.n,
        r2=of_seed["r2"].mean(axis=1),
        curvature=curvature.estimate,
        curvature_low=curvature.low,
        curvature_high=curvature.high,
        p_line=misfit.p,
        bends=bends,
    )
    rows, *of_seed_known = (part[known].reset_index(drop=True) for part in (rows, *of_seed.values()))
    each = by_seed(rows[list(key)], dict(zip(of_seed, of_seed_known, strict=True)))
    points = []
    for i, level in enumerate(levels):
        mean = stats.paired(values[..., i], Inference(confidence=how.confidence))
        points.append(key.assign(**{x: level}, mean=mean.estimate, low=mean.low, high=mean.high, n=mean.n)[mean.n > 0])

    moving = {cell: found.moving(arms.index.tolist()) for cell, arms in found.arms.groupby("cell")}
    of_line = (~np.isnan(values)).sum(-1)
    shorter = int(((of_line > 1) & (of_line < of_line.max(-1, keepdims=True))).sum())
    not_positive = int((values <= 0).any(-1).sum())
    notes = [
        f"slope of log metric against log {x} of each seed; its mean over seeds with a {how.name}",
        *_straight(rows, list(map(str, key)), how),
        *confounded([("", words(found.cells, cell), [(x, names)] if names else []) for cell, names in moving.items()]),
        *[f"{not_positive} lines of a seed have a value that is not positive, so no slope"][:not_positive],
        *[f"{shorter} lines of a seed lack a point that another seed has: their slopes are of the rest"][:shorter],
        *few_seeds(rows["n"]),
        *about(found),
    ]
    return Scaling(
        x=x,
        cells=list(map(str, found.cells)),
        slopes=rows,
        points=pd.concat(points, ignore_index=True),
        seeds=each,
        how=how,
        runs=len(found.runs),
        diverged=int(found.runs["diverged"].sum()),
        notes=notes,
    )


def _straight(rows: pd.DataFrame, key: Sequence[str], how: Inference) -> list[str]:
    """Return a note on the rows that a line does not describe, as far as that can be told."""
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
