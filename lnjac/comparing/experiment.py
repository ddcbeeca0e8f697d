"""Arrange runs as an experiment: what varies among them, the cells and arms that this makes, one number per run and norm.

A run is at one level of the compared column. Runs that differ in nothing but the seed are an arm. Arms that agree in all
other varying columns are in one cell: levels are compared within a cell, where runs of one seed are twins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lnjac.columns import VOLATILE
from lnjac.comparing import pooling
from lnjac.comparing.filter import Where, require_column
from lnjac.comparing.tables import MergedTables
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs.schema import FROZEN, Known, with_role
from lnjac.text import exact, listed, word

LOSS = "val_loss_nats"
LAST_NORM = "ln_f"
"""The norm before the head, which a headline names wherever it was measured."""

RUN = ["run_id", "diag_id"]
IDENTITY = ("data_sha256", "numerics_version")
"""Columns outside the config. Runs of one config that differ in them must not be compared with each other."""


# What varies


def varying(every: pd.DataFrame, known: Known = FROZEN["runs"]) -> list[str]:
    """Return the columns of the config (and IDENTITY) in which runs differ, without `seed`: groups first, then settings.

    `known` are the described columns of runs; the others are the config's.
    """
    names = [str(name) for name in every if (name not in known or name in IDENTITY) and name != "seed"]
    found = [name for name in names if every[name].nunique(dropna=False) > 1]
    return sorted(found, key=lambda name: (name in IDENTITY, "." in name))


def factors(every: pd.DataFrame, known: Known = FROZEN["runs"]) -> list[str]:
    """Return the columns that runs can be compared by, those that vary first: of the config, and volatile ones."""
    config = [str(name) for name in every if name not in known and name != "seed"]
    found = config + [name for name in (*IDENTITY, *with_role(VOLATILE, known)) if name in every]
    return sorted(found, key=varying(every, known).__contains__, reverse=True)


def labelled(every: pd.DataFrame, column: str) -> "pd.Series[Any]":
    """Return a column with the varying settings of a group's member: `center_scale@ln_f`, `sgd[lr=0.1]`."""
    values, groups = every[column], every.groupby(column, dropna=False)
    for option in [name for name in map(str, every) if name.startswith(f"{column}.")]:
        text = every[option].map(exact if every[option].dtype.kind == "f" else str, na_action="ignore")
        if option == "ln_backward.sites":
            values = values + ("@" + text).where(text != "all", "")
        elif groups[option].nunique(dropna=False).max() > 1:
            values = values + (f"[{option.removeprefix(column)[1:]}=" + text + "]").fillna("")
    return values


def cell_columns(every: pd.DataFrame, by: Sequence[str], vary: Sequence[str]) -> list[str]:
    """Return the fewest varying columns that, with `by`, tell apart all runs that differ in more than the seed."""
    return telling_apart(numbered(every[list(by)]), _settings(every, by, vary))


def _settings(every: pd.DataFrame, by: Sequence[str], vary: Sequence[str]) -> pd.DataFrame:
    """Return the varying columns beside `by` and the settings of its members, which are part of their level; as numbers."""
    own = tuple(f"{name}." for name in by)
    names = [name for name in vary if name not in by and not name.startswith(own)]
    return pd.DataFrame({name: every[name].factorize(use_na_sentinel=False)[0] for name in names}, every.index)


def telling_apart(groups: "pd.Series[int]", settings: pd.DataFrame) -> list[str]:
    """Return the fewest columns, taken in their order, that divide the groups as far as all of them do."""
    found, codes = [], pd.factorize(groups)[0]
    for name, setting in settings.items():
        finer = pd.factorize(codes * (setting.max() + 1) + setting)[0]
        if finer.max() > codes.max():
            found.append(str(name))
            codes = finer
    return found


def numbered(rows: pd.DataFrame) -> "pd.Series[int]":
    """Return a number for each row, in order of appearance: equal rows have the same, and null equals null."""
    if rows.columns.empty:
        return pd.Series(0, rows.index)
    return rows.groupby(list(rows), dropna=False, sort=False).ngroup()


def words(levels: pd.DataFrame, row: Any) -> str:
    """Return a row of levels with the names of their columns: `method=fa model.n_embd=64`."""
    return " ".join(f"{name}={word(levels.at[row, name])}" for name in levels)


# Runs and their values


@dataclass(frozen=True)
class Measurements:
    """Runs by arm, and a number for each run, metric and norm.

    Attributes:
        by: The compared columns.
        levels: The levels of each of them in order; a missing one is None, and the last.
        runs: A row for each run: `run` (its number), `seed`, `arm` (a number), `diverged`.
        arms: A row for each arm: `cell` (a number), the number of its level of each compared column.
        settings: A row for each arm, a column for each other varying column: a number, equal where values are.
        cells: A row for each cell: its values of the fewest columns that tell cells apart.
        values: A row for each run, metric and norm: `run`, `metric`, `site`, `value`. NaN where the run diverged, or has no
            finite number.
        units: The unit of each metric; empty for a pure number.
        notes: What was left out, and the warnings of the merge.
    """

    by: list[str]
    levels: dict[str, list[Any]]
    runs: pd.DataFrame
    arms: pd.DataFrame
    settings: pd.DataFrame
    cells: pd.DataFrame
    values: pd.DataFrame
    units: dict[str, str]
    notes: list[str]

    def key(self, cells: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
        """Return the columns that tell rows apart: those of their cells, `metric`, and, of norms, `site`."""
        place = ["metric"] if list(self.values["site"].cat.categories) == [""] else ["metric", "site"]
        return cells.reset_index(drop=True).join(values[place].astype(str))

    def moving(self, arms: Sequence[int]) -> list[str]:
        """Return the columns in which arms differ beside their levels; a setting of a group that differs is not named."""
        settings = self.settings.to_numpy()[list(arms)]
        found = self.settings.columns[(settings != settings[0]).any(axis=0)]
        implied = tuple(f"{name}." for name in found) + ("data_sha256",) * ("data" in self.by)
        return [name for name in found if not name.startswith(implied)]


def by_seed(key: pd.DataFrame, values: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a row for each row of `key` and seed: key, `seed`, and the values of tables (rows, seeds) that are not all NaN.

    The index is the number of the row in `key`.
    """
    lines = pd.DataFrame({name: part.stack() for name, part in values.items()}).dropna(how="all")
    return key.join(lines.rename_axis([None, "seed"]).reset_index("seed"), how="right")


def arrange(
    tables: MergedTables,
    by: Sequence[str],
    metrics: Sequence[str],
    *,
    table: str = "layers",
    at: int | None = None,
    where: str | None = None,
) -> Measurements:
    """Return the metrics of the chosen runs, arranged by the levels of `by`.

    Args:
        tables: The merged tables.
        by: Columns of the config, volatile ones (commit, device, …), or, of layers, the measured `step`.
        metrics: Columns of numbers of the table.
        table: `layers` or `runs`.
        at: The measured step; the last of each run unless given.
        where: An expression that chooses rows.

    Raises:
        ConfigError: A column is unknown, no row is chosen, or runs cannot be told apart.
    """
    every = tables.frame("runs")
    if "seed" not in every:
        raise ConfigError(f"{tables.path} has no column seed, the unit of every comparison")
    known = tables.described("runs")
    for name in by:
        require_column(name, factors(every, known) + ["step"] * (table == "layers"), "runs are not told apart by")
    if table == "runs" and at is not None:
        raise ConfigError(f"--at {at}: a run's row is of its last update; leave --at out, or compare --layers")
    metrics = list(dict.fromkeys(metrics))
    tables.require_metrics(table, metrics)
    chosen = Where(where) if where is not None else None
    if table == "runs":
        rows = _run_rows(every, metrics, chosen)
    else:
        rows = norm_rows(tables, every, metrics, each_step="step" in by, at=at, chosen=chosen)
    if rows.empty:
        raise ConfigError(_no_row(every, chosen, table))
    if table == "runs":
        every = every.loc[rows["run"], [name for name in every if not str(name).startswith("diagnostics.")]]
    elif "step" in by:  # each measured step of a run is then a run
        steps = rows[["run", "step"]].drop_duplicates()
        every = every.loc[steps["run"]].assign(step=steps["step"].to_numpy()).reset_index(drop=True)
        rows = rows.assign(run=numbered(rows[["run", "step"]]))
    else:
        every = every.loc[[*rows["run"].unique(), *_unmeasured(every, rows, chosen)]]
    vary = [name for name in varying(every, known) if name != "ln_backward.sites"]
    every = every.assign(**{name: labelled(every, name) for name in {"ln_backward", *by} if name in every})
    for name in by:
        if every[name].nunique(dropna=False) < 2:
            raise ConfigError(f"all {len(every)} runs chosen have {name}={every[name].iloc[0]}: nothing to compare")

    present = {name: sorted(every[name].dropna().unique().tolist()) for name in by}
    levels = {name: present[name] + [None] * bool(every[name].hasnans) for name in by}
    settings = _settings(every, by, vary)
    columns = telling_apart(numbered(every[list(by)]), settings)
    number = {name: pd.Categorical(every[name], present[name]).codes % len(levels[name]) for name in by}  # of null, −1
    arms = pd.DataFrame({"cell": numbered(every[columns]), **number}, every.index, dtype=int)
    arm = arms.groupby(list(arms)).ngroup()
    found = pd.DataFrame(
        {"run": every.index, "seed": every["seed"], "arm": arm, "diverged": every["status"] == runs.DIVERGED}
    )
    again = every["run_id"][found.duplicated(["arm", "seed"], keep=False)]
    if len(again):
        raise ConfigError(f"several runs have one config and seed ({', '.join(again[:2])}): choose by --where")
    cells = every.loc[~arms["cell"].duplicated(), columns].reset_index(drop=True)
    arms, settings = (part.groupby(arm).first() for part in (arms, settings))
    values, notes = _values(rows, found["diverged"], every[list(by)], metrics)
    units = tables.units(table, metrics)
    notes += _unequal_steps(rows, every, found, arms["cell"], table, by)
    return Measurements(list(by), levels, found, arms, settings, cells, values, units, [*notes, *tables.warnings])


def _unequal_steps(
    rows: pd.DataFrame, every: pd.DataFrame, found: pd.DataFrame, cell: "pd.Series[int]", table: str, by: Sequence[str]
) -> list[str]:
    """Return a note if runs that are compared were measured after different numbers of updates, which no level tells."""
    if "step" in by or "steps" in every:  # the config of lnjac's own runs tells it
        return []
    step = rows.groupby("run")["step"].max() if table == "layers" else every["steps_done"]
    of = every[list(by)].assign(cell=found["arm"].map(cell), step=step)[~found["diverged"]].dropna(subset="step")
    told = any(of[name].equals(of["step"].astype(of[name].dtype)) for name in by if of[name].dtype.kind in "if")
    if told or of.groupby("cell")["step"].nunique().max() < 2:
        return []
    counts = of.groupby([*by, "step"], dropna=False).size().reset_index(name="n")
    each = [
        f"{words(counts[list(by)], row)} {n} at {step}"
        for row, (n, step) in enumerate(zip(counts["n"], counts["step"].astype(int), strict=True))
    ]
    return [f"runs of one comparison ended at different steps: {listed(each, 5)}"]


def _run_rows(every: pd.DataFrame, metrics: Sequence[str], chosen: Where | None) -> pd.DataFrame:
    """Return the chosen runs, each once: with other diagnostics it is no other run."""
    kept = (every[chosen.holds(every)] if chosen else every).drop_duplicates("run_id")
    return kept[metrics].assign(run=kept.index, site="")


def norm_rows(
    tables: MergedTables,
    every: pd.DataFrame,
    metrics: Sequence[str],
    *,
    each_step: bool,
    at: int | None = None,
    chosen: Where | None = None,
) -> pd.DataFrame:
    """Return the rows of the norms of these runs, calls pooled: `run` (the label in `every`), `step`, `site`, the metrics.

    They are of each measured step, of the step `at`, or of each run's last.
    """
    known, named = tables.columns("layers"), chosen.columns if chosen else []
    if chosen:
        chosen.require([*map(str, every), *known])
    own = [name for name in named if name in known and name not in every]
    wanted = list(dict.fromkeys([*RUN, "step", "site", "call", *metrics, *own]))
    run = every[RUN].assign(run=every.index)
    rows = tables.frame("layers", wanted).reset_index().merge(run, on=RUN).set_index("index")
    if chosen:
        of_run = every.loc[rows["run"], [name for name in named if name in every]].set_axis(rows.index)
        rows = rows[chosen.holds(rows.assign(**of_run))]
    if not each_step:
        steps = sorted(rows["step"].unique().tolist())
        rows = rows[rows["step"] == (rows.groupby("run")["step"].transform("max") if at is None else at)]
        if steps and rows.empty:
            raise ConfigError(f"no norm was measured at step {at}: choose one of {', '.join(map(str, steps[:20]))}")
    if rows["call"].any():
        described = tables.described("layers")
        calls = tables.frame("layers", pooling.needed(metrics, described)).loc[rows.index]
        rows = pooling.pooled(calls, metrics, described).merge(run, on=RUN)
    return rows[["run", "step", "site", *metrics]]


def _unmeasured(every: pd.DataFrame, rows: pd.DataFrame, chosen: Where | None) -> list[Any]:
    """Return the chosen runs that diverged before any norm was measured: they have no numbers, but they count."""
    if chosen and not set(chosen.columns) <= set(every):
        return []
    absent = every[(every["status"] == runs.DIVERGED) & ~every.index.isin(rows["run"])]
    return list(absent[chosen.holds(absent)].index if chosen else absent.index)


def _no_row(every: pd.DataFrame, chosen: Where | None, table: str) -> str:
    if not chosen:
        measured = "no norm of these runs was measured: compare their losses by --runs"
        return measured if table == "layers" and len(every) else "the tables have no rows"
    known = [
        f"; {name} is {listed(sorted(map(str, every[name].unique())))}" for name in chosen.columns if name in every
    ]
    return f"--where {chosen.text!r} holds for no row{''.join(known)}"


def _values(
    rows: pd.DataFrame, diverged: "pd.Series[bool]", levels: pd.DataFrame, metrics: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Return a row for each run, metric and norm; and notes on values that are not finite, of runs that did not diverge."""
    sites = rows["site"].unique()
    whole = pd.MultiIndex.from_product([diverged.index, sites], names=["run", "site"])
    rows = rows.assign(measured=True).set_index(whole.names).reindex(whole).reset_index()
    rows["site"] = pd.Categorical(rows["site"], sites)
    values = rows.melt(["run", "site", "measured"], list(metrics), "metric")
    values["metric"] = pd.Categorical(values["metric"], list(metrics))
    finite, done = np.isfinite(values["value"]), ~values["run"].map(diverged)
    counted = values[values.pop("measured").notna() & done].assign(lost=~finite)
    notes = []
    for metric, lost in counted[counted["lost"]].groupby("metric", observed=True):
        infinite = int(np.isinf(lost["value"]).sum())
        kinds = {"infinite": infinite, "NaN or null": len(lost) - infinite}
        number = " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        all_of = counted[counted["metric"] == metric].join(levels, on="run")
        counts = all_of.groupby(list(levels), dropna=False, sort=False)["lost"].agg(["sum", "size"])
        counts = counts[counts["sum"] > 0]
        known = counts.index.to_frame(index=False)
        parts = enumerate(zip(counts["sum"], counts["size"], strict=True))
        where = [f"{words(known, row)} {n} of {of}" for row, (n, of) in parts]
        notes.append(f"{number} values of {metric} are left out: {listed(where, 5)}")
    return values.assign(value=values["value"].where(finite & done)), notes
