"""Say in a few sentences what a table answers: choose the question that leads, and tell the effect with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import EXACT, LAYER_METRICS, LOSS, MOST_LEVELS, compare
from lnjac.comparing.cost import cost
from lnjac.comparing.experiment import IDENTITY, cell_columns, factors, labelled, norm_rows, varying
from lnjac.comparing.filter import Where, require_column
from lnjac.comparing.floor import floor
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.scaling import scaling
from lnjac.comparing.tables import MergedTables, Sources, open_tables
from lnjac.errors import ConfigError
from lnjac.reporting.sentences import of_costs, of_differences, of_floor, of_scaling
from lnjac.reporting.wording import (
    Numbers,
    Row,
    counted,
    decimals,
    diverged,
    number,
    place,
    seeds,
)
from lnjac.runs.folder import DIVERGED, DONE

SIZES = ("model.n_embd", "model.n_layer", "steps")
"""Columns whose slope is told beside a comparison of other levels, where they have three levels or more."""


@dataclass(frozen=True)
class Verdict:
    """What a table answers, in sentences, the most important first. `str(verdict)` is the whole text."""

    sentences: list[str]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def verdict(
    sources: Sources,
    by: str | None = None,
    *,
    where: str | None = None,
    how: Inference = STUDENT,
    margin: float | None = None,
) -> Verdict:
    """Say what a table answers: the floor first, then the leading question, then what makes the answer doubtful.

    The leading question is the cost of each backward where `ln_backward` varies and `exact` is among its levels; otherwise
    the difference between the levels of `by` in validation loss, or its slope along three or more widths, depths or lengths;
    otherwise the runs' own loss. A table without a validation loss is compared in a column of its norms.

    Args:
        sources: A path, or several: of merged tables, sweeps and runs; or tables opened by `open_tables`.
        by: The column whose levels are compared; attn_mode, if that varies, or the first column that does, unless given.
        where: Only runs for which this holds, such as `"method == 'fa'"`.
        how: The kind of interval and its confidence.
        margin: The smallest difference that would matter, in the metric's unit: the sentences then also answer equivalent,
            different or undecided.

    Returns:
        The sentences.

    Raises:
        ConfigError: A source, the condition or the column is not right, or runs cannot be told apart.

    Example:
        >>> print(lnjac.verdict("all.parquet", where="method == 'fa'"))
    """
    tables = open_tables(sources)
    every, known = tables.frame("runs"), tables.described("runs")
    chosen = every[Where(where).holds(every)] if where is not None else every
    if chosen.empty:
        raise ConfigError("the tables have no rows" if where is None else f"--where {where!r} holds for no run")
    if by is not None:
        require_column(by, factors(chosen, known), "runs are not told apart by")
    done = chosen[chosen["status"] == DONE]
    if done.empty:
        runs = "The one run" if len(chosen) == 1 else f"All {counted(len(chosen), 'run')}"
        return Verdict([f"{runs} diverged: there is no number to compare."])
    vary = [name for name in varying(chosen, known) if name not in IDENTITY]
    losses = LOSS in done and bool(np.isfinite(done[LOSS].astype(float)).any())
    costs = losses and "ln_backward" in vary and bool((chosen["ln_backward"] == EXACT).any())
    ground = of_floor(floor(tables, where=where, how=how), costs=costs) if losses else []
    if costs:
        factor = by if by != "ln_backward" else None
        return Verdict(ground + of_costs(cost(tables, by=factor, where=where, how=how, margin=margin)))
    factor = by or _factor(chosen, vary)
    if factor is None:
        return Verdict(ground + _of_runs(tables, chosen, losses, how))
    if labelled(chosen, factor).nunique(dropna=False) > MOST_LEVELS:
        return Verdict(ground + _of_many_levels(chosen, factor, vary, losses))
    held = set(tables.columns("layers"))
    norms = [name for name in LAYER_METRICS if name in held][:1]
    if not losses and not norms:
        return Verdict([f"{counted(len(chosen), 'run')} have no number to compare."])
    metrics, table = ([LOSS], "runs") if losses else (norms, "layers")
    if factor in SIZES and factor == _size(chosen, [factor]):
        return Verdict(ground + of_scaling(scaling(tables, factor, metrics=metrics, table=table, where=where, how=how)))
    found = compare(tables, factor, metrics=metrics, table=table, where=where, how=how, margin=margin)
    said = ground + of_differences(found)
    size = _size(chosen, [name for name in SIZES if name in vary and name != factor])
    if size and losses:
        slopes = of_scaling(scaling(tables, size, metrics=metrics, table=table, where=where, how=how))
        said += [line for line in slopes if line not in said]
    return Verdict(said)


def _factor(runs: pd.DataFrame, vary: Sequence[str]) -> str | None:
    """Return the column to compare by: attn_mode, else the first of names, else the first of numbers; None if none varies."""
    names = [name for name in vary if runs[name].dtype.kind not in "if"]
    return next((name for name in ["attn_mode", *names, *vary] if name in vary), None)


def _size(runs: pd.DataFrame, columns: Sequence[str]) -> str | None:
    """Return the first of the columns that has three or more levels, all positive numbers: a slope needs as many."""
    for name in columns:
        if runs[name].dtype.kind in "if" and (runs[name] > 0).all() and runs[name].nunique() > 2:
            return name
    return None


def _of_runs(tables: MergedTables, runs: pd.DataFrame, losses: bool, how: Inference) -> list[str]:
    """Say the loss of runs that differ in nothing but the seed, and the range of a column over their norms."""
    done = runs[runs["status"] == DONE].drop_duplicates("run_id")
    said = []
    if losses:
        values = done[LOSS].to_numpy(float)
        found = stats.paired(values[np.isfinite(values)], how)
        row: Row = {
            "n": int(found.n),
            "difference": float(found.estimate),
            "low": float(found.low),
            "high": float(found.high),
        }
        numbers = Numbers([row], how, "nats")
        steps = done["steps_done"].dropna().unique().tolist() if "steps_done" in done else []
        after = f" after {counted(int(steps[0]), 'update')}" if len(steps) == 1 else ""
        inside = numbers.inside(row) if row["low"] == row["low"] else "one seed, so no interval"
        said.append(f"The validation loss{after} is {numbers.plain(row['difference'])}{numbers.unit} ({inside}).")
    said += _of_norms(tables, done) + diverged(int((runs["status"] == DIVERGED).sum()), len(runs))
    return said or [f"{counted(len(runs), 'run')} without a number to tell."]


def _of_norms(tables: MergedTables, runs: pd.DataFrame) -> list[str]:
    """Say where the first column of norms that the table has is least and largest: a mean over seeds at each norm."""
    metric = next((name for name in LAYER_METRICS if name in tables.columns("layers")), None)
    if metric is None:
        return []
    rows = norm_rows(tables, runs, [metric], each_step=False)
    means = rows[np.isfinite(rows[metric])].groupby("site", sort=False)[metric].mean()
    if means.empty:
        return []
    places = decimals(float(means.abs().max()), 2)
    if len(means) == 1:
        return [f"{metric} at {means.index[0]} is {number(means.iloc[0], places)}."]
    least, most = (
        f"{number(means.min(), places)} at {means.idxmin()}",
        f"{number(means.max(), places)} at {means.idxmax()}",
    )
    over = seeds([{"n": runs["seed"].nunique()}])
    return [f"{metric} at {len(means)} norms is {least} to {most} (means over {over})."]


def _of_many_levels(runs: pd.DataFrame, by: str, vary: Sequence[str], losses: bool) -> list[str]:
    """Say the range of the mean losses over more levels than are tested against each other; no difference is claimed."""
    runs = runs.assign(**{by: labelled(runs, by)})
    start = f"{by} has {counted(runs[by].nunique(dropna=False), 'level')}"
    untested = "which of them differ is not tested: choose some by --where, or a --reference."
    lost = diverged(int((runs["status"] == DIVERGED).sum()), len(runs))
    if not losses:
        return [f"{start}, and {untested}", *lost]
    done = runs[runs["status"] == DONE].drop_duplicates("run_id")
    cells = cell_columns(done, [by], [name for name in vary if name != "ln_backward.sites"])
    groups = done.groupby([by, *cells], dropna=False, sort=False)[LOSS]
    means, n = groups.mean(), groups.count()

    def at(key: Any) -> str:
        levels = dict(zip([by, *cells], key if isinstance(key, tuple) else (key,), strict=True))
        return f"{number(float(means.loc[key]), 3)} nats {place(levels, list(levels))}"

    over = seeds([{"n": one} for one in n])
    return [
        f"{start}: the validation loss is {at(means.idxmin())} to {at(means.idxmax())} (means over {over}); {untested}",
        *lost,
    ]
