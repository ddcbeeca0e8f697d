"""Compare runs at the levels of a config column (docs/comparing.md).

Arms meet within a cell, their runs are paired by seed, and the differences are tested by `lnjac.comparing.intervals`.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lnjac.comparing import intervals as stats
from lnjac.comparing.experiment import LAST_NORM, Measurements, arrange, by_seed, words
from lnjac.comparing.experiment import LOSS as LOSS
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.notes import Moving, about, capped, confounded, few_seeds
from lnjac.comparing.pairing import CORNERS, Contrast, Pairing, corners_of, families, pair
from lnjac.comparing.shown import Shown
from lnjac.comparing.tables import Choices, Sources, open_tables
from lnjac.comparing.tune import tuned
from lnjac.errors import ConfigError
from lnjac.text import listed, word

LAYER_METRICS = ("radial_share", "cos_center_vs_true", "flat_cos_ste", "sigma_mean")
RUN_METRICS = ("val_loss_nats", "train_loss_nats")
HOLM = "p adjusted by Holm's method"
"""How a note on adjusted p values begins."""
EXACT = "exact"
MOST_LEVELS = 30
"""Levels beyond which each is compared with the first alone, unless a reference is given."""


@dataclass(frozen=True)
class Differences(Shown):
    """Differences between two levels, with the numbers of every seed behind them.

    Attributes:
        rows: A row for each difference: the cell's columns, `metric`, `site`, the levels `a` and `b`; `mean_a` and `mean_b`
            over the seeds compared; `difference` = a − b with its interval `low` to `high`; `p`, and `p_adjusted` by
            Holm's method over the `family` p values of this metric in this cell; `effect`; `agreement` ("identical" or "the
            same in every seed", in which case there is no p); `n` seeds; `paired`; `missing`, the seeds that only one level
            has; `diverged_a` of `runs_a`, `diverged_b` of `runs_b`; `moving`, the columns that differ between the levels.
            With a margin also `equivalence`: "equivalent", "different" or "undecided".
        seeds: A row for each seed of each difference: the columns that identify the difference, `seed`, `value_a`,
            `value_b`, and their `difference` if paired. The index is the number of the row in `rows`.
        by: The compared column.
        cells: The columns that make cells. A cell's value is null where it differs between the levels.
        units: The unit of each metric; empty for a pure number.
        how: The kind of interval.
        margin: The smallest difference that would matter, if one was given.
        runs: The number of runs chosen.
        diverged: How many of them diverged, and are in no mean.
        notes: What a reader must know: what was paired, is missing, or diverged.
        choices: The values that were chosen for each level before they were compared, if any were.
    """

    rows: pd.DataFrame
    seeds: pd.DataFrame
    by: str
    cells: list[str]
    units: dict[str, str]
    how: Inference
    margin: float | None
    runs: int
    diverged: int
    notes: list[str]
    choices: Choices | None = None

    def headline(self) -> npt.NDArray[np.bool_]:
        """Mark the rows to name first: LAST_NORM, and the norm with the largest difference of each comparison.

        All rows are marked where there are no norms. Which norm is the largest is chosen after the fact: `p_adjusted` allows
        for that, the interval does not.
        """
        rows = self.rows
        if "site" not in rows:
            return np.ones(len(rows), bool)
        key = [name for name in rows if name in ("metric", "a", "b", *self.cells)]
        sizes = rows["difference"].abs()
        largest = rows[sizes == sizes.groupby([rows[name] for name in key], dropna=False).transform("max")]
        return np.asarray((rows["site"] == LAST_NORM) | rows.index.isin(largest.drop_duplicates(key).index))


def compare(
    sources: Sources,
    by: str,
    *,
    metrics: Sequence[str] = (),
    table: str = "layers",
    at: int | None = None,
    where: str | None = None,
    reference: str | None = None,
    how: Inference = STUDENT,
    margin: float | None = None,
    tune: Sequence[str] = (),
) -> Differences:
    """Compare the levels of a column with each other, within each cell of all other columns that vary.

    All pairs of levels are compared, the later in order minus the earlier; of more than MOST_LEVELS each with the first. The
    p values of one metric in one cell, of all norms and all pairs, are one family, adjusted by Holm's method; nothing is
    adjusted over metrics or cells.

    Args:
        sources: A path, or several: of merged tables, sweeps and runs; or tables opened by `open_tables`.
        by: A column of the config, or, of layers, the measured `step`.
        metrics: Columns of numbers of the table; a choice of the usual ones unless given.
        table: `layers`, for the metrics of each norm, or `runs`, for losses.
        at: The measured step of layers; each run's last unless given.
        where: Only rows for which this holds, such as `"method == 'fa'"`.
        reference: The level that each other is compared with; for ln_backward it is `exact` unless given.
        how: The kind of interval and its confidence.
        margin: The smallest difference that would matter, in the metrics' unit: each is then judged equivalent, different or
            undecided by two one-sided tests.
        tune: Columns of the config whose best value each level gets, by the mean validation loss of the lower half of the
            seeds; the levels are then compared on the other seeds (`lnjac.comparing.tune`).

    Returns:
        The differences in the metrics' own units, every seed's values, and notes.

    Raises:
        ConfigError: A source, column, step or level does not exist, or there is nothing to compare.

    Example:
        >>> found = lnjac.compare("all.parquet", "attn_mode", metrics=["radial_share"], where="method == 'fa'")
        >>> found.rows[["site", "difference", "low", "high", "p_adjusted", "n"]]
    """
    require_margin(margin)
    chosen = metrics or (LAYER_METRICS if table == "layers" else RUN_METRICS)
    tables = open_tables(sources)
    if tune:
        tables, where = tuned(tables, tune, by=[by], where=where), None
    found = arrange(tables, [by], chosen, table=table, at=at, where=where)
    levels = found.levels[by]
    pairs = pairs_of(levels, by, reference)
    contrasts = [Contrast(levels[a], levels[b], [(a,), (b,)], {}) for a, b in pairs]
    compared = differences(found, contrasts, how, margin)
    notes = [*_of_many(levels, by, reference), *compared.notes]
    return replace(compared, choices=tables.choices, notes=notes)


def require_margin(margin: float | None) -> None:
    """Raise ConfigError unless the margin is a positive number, or None."""
    if margin is not None and not 0 < margin < math.inf:
        raise ConfigError(
            f"--margin {margin:g} is no size of a difference: give a positive number in the metric's unit"
        )


def pairs_of(levels: Sequence[Any], by: str, reference: str | None) -> list[tuple[int, int]]:
    """Return the numbers of the levels to compare: all pairs, later minus earlier; or each minus the reference.

    Of more than MOST_LEVELS the first is the reference unless another is given.
    """
    names = [word(level) for level in levels]
    if reference is None and by == "ln_backward" and EXACT in names:
        reference = EXACT
    if reference is None and len(names) > MOST_LEVELS:
        return [(i, 0) for i in range(1, len(names))]
    if reference is None:
        return [(later, earlier) for earlier, later in combinations(range(len(names)), 2)]
    if reference not in names:
        raise ConfigError(f"no run chosen has {by}={reference}, only {listed(names)}")
    at = names.index(reference)
    return [(i, at) for i in range(len(names)) if i != at]


RESULTS = ["mean_a", "mean_b", "difference", "low", "high", "p", "p_adjusted", "family", "effect", "agreement", "n"]
COUNTS = ["paired", "missing", "runs_a", "diverged_a", "runs_b", "diverged_b"]


def differences(
    found: Measurements, contrasts: Sequence[Contrast], how: Inference, margin: float | None = None
) -> Differences:
    """Return the differences of contrasts, in the cells in which their levels meet."""
    pairing = pair(found, contrasts)
    both = pairing.table[(pairing.table["runs_a"] > 0) & (pairing.table["runs_b"] > 0)]
    arms = both[pairing.corners].astype(int)
    moving = {number: _moving(found, list(row)) for number, *row in arms.itertuples(name=None)}
    tests, a, b = _tested(found, pairing, both["paired"], how)
    if margin is not None:
        narrower, *_ = _tested(found, pairing, both["paired"], how.one_sided)
        tests = tests.assign(equivalence=stats.equivalence(narrower["low"], narrower["high"], margin))
    places = tests.join(both[["cell", "contrast"]], on="comparison")
    order = places.sort_values(["cell", "metric", "contrast", "site"]).index
    tests, a, b = (part.loc[order].reset_index(drop=True) for part in (tests, a, b))

    comparison = tests["comparison"]
    of_row = both.assign(family=families(arms)).loc[comparison].reset_index(drop=True)
    levels = [contrasts[at].label | {"a": contrasts[at].a, "b": contrasts[at].b} for at in of_row["contrast"]]
    sides = pd.DataFrame(levels, columns=[*contrasts[0].label, "a", "b"])
    key = found.key(pairing.cells.loc[comparison], tests).join(sides)
    # a family holds the p values of one metric in one cell, of all norms and pairs of levels
    p = tests["p"].groupby([of_row["family"], tests["metric"]], observed=True)
    tests = tests.assign(p_adjusted=p.transform(stats.holm), family=p.transform("count"))
    names = [", ".join(dict.fromkeys(name for _, names in moving[at] for name in names)) for at in comparison]
    judged = ["equivalence"] * (margin is not None)
    rows = pd.concat([key, tests[[*RESULTS, *judged]], of_row[COUNTS]], axis=1).assign(moving=names)
    seeds = by_seed(key.drop(columns=[*contrasts[0].label]), {"value_a": a, "value_b": b})
    difference = (seeds["value_a"] - seeds["value_b"]).where(rows["paired"].loc[seeds.index])
    in_cell = [(contrasts[at].name, words(pairing.cells, i), moving[i]) for i, at in both["contrast"].items()]
    notes = [
        *_tests(found, rows, how),
        *confounded(in_cell),
        *few_seeds(rows["n"]),
        *_lacking(found, pairing, contrasts),
        *about(found),
    ]
    return Differences(
        rows=rows,
        seeds=seeds.assign(difference=difference),
        by=found.by[-1],
        cells=list(map(str, found.cells)),
        units=found.units,
        how=how,
        margin=margin,
        runs=len(found.runs),
        diverged=int(found.runs["diverged"].sum()),
        notes=notes,
    )


def _tested(
    found: Measurements, pairing: Pairing, paired: "pd.Series[bool]", how: Inference
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return a test for each comparison, metric and norm, and both sides' values: tables of (rows, seeds).

    A norm that the runs of a comparison lack has no row. Where no norm has a number all have a row, for the counts of runs.
    """
    values = pairing.runs[pairing.runs["comparison"].isin(paired.index)].merge(found.values, on="run")
    wide = values.pivot(index=["comparison", "metric", "site"], columns=["corner", "seed"], values="value")
    seeds = sorted(found.runs["seed"].unique())
    rows, wide = wide.index.to_frame(index=False), wide.reset_index(drop=True)
    wide = wide.reindex(columns=pd.MultiIndex.from_product([pairing.corners, seeds]))
    sides: list[list[Any]] = [[wide[corner] for corner in corners_of(side, pairing.corners)] for side in "ab"]
    a, b = (reduce(operator.sub, parts) for parts in sides)
    size_a, size_b = (reduce(np.maximum, map(abs, parts)) for parts in sides)  # of the numbers that each is made of
    twins = paired.loc[rows["comparison"]].to_numpy()
    lacking = twins[:, None] & (a - b).isna()  # a seed that one side lacks
    a, b = a.mask(lacking), b.mask(lacking)
    alone = (a[~twins], b[~twins], how, (size_a[~twins], size_b[~twins]))
    tests = {True: stats.paired((a - b)[twins], how, np.fmax(size_a, size_b)[twins]), False: stats.unpaired(*alone)}
    parts = [pd.DataFrame(test._asdict(), rows.index[twins == which]) for which, test in tests.items()]
    rows = rows.join(pd.concat(parts)).rename(columns={"estimate": "difference"})
    known = rows["n"] > 0
    shown = known | ~known.groupby([rows["comparison"], rows["metric"]], observed=True).transform("any")
    rows = rows.assign(mean_a=a.mean(axis=1), mean_b=b.mean(axis=1))
    return rows[shown], a[shown], b[shown]


def _moving(found: Measurements, arms: Sequence[int]) -> Moving:
    """Return the columns that move with the level of each compared column, given the arms at the corners."""
    sides = {found.by[-1]: [arms]}
    if len(arms) == len(CORNERS):
        a, b, exact_a, exact_b = arms
        sides = {found.by[0]: [[a, exact_a], [b, exact_b]], found.by[1]: [[a, b], [exact_a, exact_b]]}
    names = {by: dict.fromkeys(name for two in pairs for name in found.moving(two)) for by, pairs in sides.items()}
    return [(by, list(columns)) for by, columns in names.items() if columns]


# Notes


def _of_many(levels: Sequence[Any], by: str, reference: str | None) -> list[str]:
    """Return a note that there are too many levels to compare each with each, if there are."""
    if reference is not None or len(levels) <= MOST_LEVELS or (by == "ln_backward" and EXACT in levels):
        return []
    return [
        f"{len(levels)} levels of {by} make too many pairs: each is compared with the first, {word(levels[0])}; choose "
        "another by --reference, or fewer levels by --where"
    ]


def _tests(found: Measurements, rows: pd.DataFrame, how: Inference) -> list[str]:
    """Return notes on how differences were tested."""
    notes = []
    if not rows["paired"].all():
        notes.append(f"unpaired (Welch) in {(~rows['paired']).sum()} of {len(rows)} rows: no seed is at both levels")
    if rows["paired"].any():
        notes.append(f"paired by seed, {how.name}")
    sizes = sorted({*rows["family"]} - {0})
    if sizes:
        size = f"{sizes[-1]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        of = "all norms, " * ("site" in rows) + "all backwards, " * (len(found.by) > 1) + "all pairs of levels"
        notes.append(
            f"{HOLM} over the {size} p value{'s' * (sizes[-1] > 1)} of one metric in one cell ({of}); "
            "never over metrics or cells"
        )
    return notes


def _lacking(found: Measurements, pairing: Pairing, contrasts: Sequence[Contrast]) -> list[str]:
    """Return notes on the cells that lack a level, and on the seeds that one level lacks."""
    alone, missing = set(), set()
    there, numbers = pairing.there, pairing.table["contrast"].to_dict()
    for side, other in (("a", "b"), ("b", "a")):
        lacking = there[there[other] & ~there[side]].reset_index("seed")["seed"]
        for number, seeds in lacking.groupby(level="comparison"):
            contrast, cell = contrasts[numbers[number]], words(pairing.cells, number)
            level = f"{found.by[-1]}={word(getattr(contrast, side))}"
            if pairing.table.at[number, f"runs_{side}"]:
                missing.add(f"{cell} {level} lacks seed {listed(seeds.tolist())}".strip())
            else:
                alone.add(" ".join(filter(None, (cell, *map(str, contrast.label.values()), f"has no {level}"))))
    return capped("not compared", sorted(alone)) + capped("missing pairs", sorted(missing))
