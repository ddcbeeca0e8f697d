"""Arrange runs for charts: the levels of one column beside each other, within cells of all else that varies.

Of more than MOST levels or cells the strongest are shown, and the others counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from lnjac.comparing import compare, cost, experiment, intervals
from lnjac.comparing.experiment import RUN
from lnjac.comparing.filter import Where, require_column
from lnjac.comparing.tables import MergedTables
from lnjac.errors import ConfigError
from lnjac.runs.folder import DONE
from lnjac.text import word

ENRICHMENTS = ("enrichment_radial_share", "enrichment_mean")
METRICS = (*compare.LAYER_METRICS, "flat_cos_center_scale", "flat_cos_projected", *ENRICHMENTS)
"""The metrics of a layer that are shown unless another is asked for."""
SAME = {"enrichment_radial_share": "radial_share"}
"""Metrics that are a multiple of another within a width: testing both would be testing one thing twice."""

ALL = "all runs"
"""The name of the only level, or of the only cell."""
MOST = 30
"""Levels, cells or pairs of levels beyond which the strongest are shown."""


@dataclass(frozen=True, eq=False)
class View:
    """The runs of merged tables arranged by the levels of the column `by`, which is empty if nothing varies but the seed.

    Attributes:
        merged: The tables.
        by: The compared column.
        where: The condition that chose the runs.
        runs: The chosen runs in the order of their cells and levels, named in the columns `cell` and `level`.
        settings: The columns that make cells.
        cells: The names of the cells that are shown, in their order.
        levels: The names of the levels that are shown, in their order.
    """

    merged: MergedTables
    by: str
    where: str | None
    runs: pd.DataFrame
    settings: list[str]
    cells: list[str]
    levels: list[str]
    _costs: dict[str, cost.Costs] = field(default_factory=dict, repr=False)

    @property
    def ours(self) -> bool:
        """Return whether lnjac's own trainer made the runs."""
        return "numerics_version" in self.runs and bool(self.runs["numerics_version"].notna().any())

    @cached_property
    def done(self) -> pd.DataFrame:
        """Return the runs that are shown and did not diverge: their keys, cell, level and seed."""
        shown = self.runs["cell"].isin(self.cells) & self.runs["level"].isin(self.levels)
        done = self.runs.loc[shown & (self.runs["status"] == DONE), [*RUN, "cell", "level", "seed"]]
        if done.empty:
            raise ConfigError("all of these runs diverged")
        return done

    @cached_property
    def sites(self) -> list[str]:
        """Return the norms in depth order: that of the run with the most norms first, then those that only others have."""
        rows = self.merged.frame("layers", [*RUN, "site"]).drop_duplicates()
        of_run = rows.groupby(RUN, sort=False)["site"].agg(list)
        longest = sorted(of_run, key=len, reverse=True)
        return list(dict.fromkeys(site for sites in longest for site in sites))

    def placed(self, frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
        """Return the rows once for each shown cell that they are part of, which `cell` names.

        A chart whose rows are of fewer cells than the view has, as one along a size, then follows the choice of a cell.

        Args:
            frame: Rows, with the columns of their own cells.
            columns: These columns. Rows without one value of them are part of all cells: their `cell` is empty.
        """
        frame = frame.drop(columns="cell", errors="ignore")
        keys = [name for name in columns if name in self.settings]
        if not keys or len(self.cells) < 2:
            return frame
        cells = self.runs[[*keys, "cell"]].drop_duplicates()
        found = frame.merge(cells, on=keys, how="left").fillna({"cell": ""})
        order = {name: at for at, name in enumerate(["", *self.cells])}
        found = found[found["cell"].isin(order)]
        return found.sort_values("cell", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)

    @property
    def metrics(self) -> list[str]:
        """Return those of METRICS that the table holds."""
        held = set(self.merged.columns("layers"))
        return [name for name in METRICS if name in held]

    @property
    def tested(self) -> list[str]:
        """Return those of the metrics whose differences are tested, each quantity once."""
        return [name for name in self.metrics if SAME.get(name) not in METRICS]

    @cached_property
    def norms_compared(self) -> compare.Differences:
        """Compare all tested metrics of a layer at once."""
        return self.compared(self.tested)

    def compared(self, metrics: Sequence[str], table: str = "layers") -> compare.Differences:
        """Compare the levels in some metrics of a table."""
        return compare.compare(self.merged, self.by, metrics=metrics, table=table, where=self.where)

    def costs(self, metric: str) -> cost.Costs:
        """Compute the cost of each backward in a loss, once for the charts that show it."""
        if metric not in self._costs:
            by = None if self.by == "ln_backward" else self.by
            self._costs[metric] = cost.cost(self.merged, by=by, metric=metric, where=self.where)
        return self._costs[metric]

    def layers(self, metrics: Sequence[str], *, last: bool) -> pd.DataFrame:
        """Return cell, level, step, seed, site, metric and value of every norm of the runs that did not diverge.

        Values are of each run's last step, or of all steps.
        """
        self.merged.require_metrics("layers", metrics)
        rows = experiment.norm_rows(self.merged, self.done, metrics, each_step=not last)
        rows = self.done.merge(rows, left_index=True, right_on="run")
        return rows.melt(["cell", "level", "step", "seed", "site"], list(metrics), var_name="metric")

    def curves(self, metric: str) -> pd.DataFrame:
        """Return cell, level, seed, step, metric and value of a loss along the runs that did not diverge."""
        known = [name for name in self.merged.columns("curves") if name not in ("run_id", "step")]
        require_column(metric, known, "no column of curves for --metric is called")
        rows = self.merged.frame("curves", ["run_id", "step", metric]).dropna(subset=metric)
        # other diagnostics of one run are no other run
        done = self.done.drop(columns="diag_id").drop_duplicates("run_id")
        return done.merge(rows, on="run_id").rename(columns={metric: "value"}).assign(metric=metric)

    def means(self, values: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
        """Return the mean over seeds and its 95% t interval for each key, in order of appearance: keys, mean, low, high, n.

        The key `cell` is left out if the view has only one.
        """
        rows = values.groupby(list(keys), sort=False).ngroup().to_numpy()
        seeds, column = np.unique(values["seed"], return_inverse=True)
        table = np.full((rows.max(initial=-1) + 1, len(seeds)), np.nan)
        table[rows, column] = values["value"].to_numpy(float)
        found = intervals.paired(table)
        key = values[list(keys)].drop_duplicates().reset_index(drop=True)
        out: pd.DataFrame = key.assign(mean=found.estimate, low=found.low, high=found.high, n=found.n)
        return out if len(self.cells) > 1 else out.drop(columns="cell")


def view(merged: MergedTables, by: str | None = None, where: str | None = None) -> View:
    """Arrange the runs of merged tables by the levels of a column.

    Args:
        merged: The tables.
        by: A column that tells runs apart; attn_mode unless given, or the first column that varies if attn_mode does not.
        where: A condition that the chosen runs meet.

    Raises:
        ConfigError: If no run meets the condition, or no column is called `by`.
    """
    every = merged.frame("runs")
    chosen = every[Where(where).holds(every)] if where is not None else every
    if chosen.empty:
        raise ConfigError("the tables have no rows" if where is None else f"--where {where!r} holds for no run")
    if "seed" not in chosen:
        raise ConfigError(f"{merged.path} has no column seed, the unit of every interval")
    known = merged.described("runs")
    vary = experiment.varying(chosen, known)
    if by is None:
        settings = [name for name in vary if name not in experiment.IDENTITY]
        by = "attn_mode" if "attn_mode" in settings else next(iter(settings), "")
    else:
        require_column(by, experiment.factors(chosen, known), "runs are not told apart by")
    compared = [by] if by else []
    labels = {"ln_backward", *compared} & set(chosen)
    chosen = chosen.assign(**{name: experiment.labelled(chosen, name) for name in labels})
    vary = [name for name in vary if name != "ln_backward.sites"]  # part of the label of ln_backward
    cells = experiment.cell_columns(chosen, compared, vary) if by else vary
    runs = arranged(chosen, [*cells, *compared], by)
    return View(merged, by, where, runs, list(map(str, cells)), *_strongest(runs))


def _strongest(runs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the cells and the levels to show: all, or those in which levels differ most, and those of lowest loss."""
    cells, levels = (list(dict.fromkeys(runs[name])) for name in ("cell", "level"))
    if max(len(cells), len(levels)) <= MOST or compare.LOSS not in runs:
        return cells[:MOST], levels[:MOST]
    means = runs.pivot_table(compare.LOSS, "cell", "level", sort=False)
    spread = (means.max(axis=1) - means.min(axis=1)).reindex(cells).sort_values(ascending=False, kind="stable")
    lowest = means.mean().reindex(levels).sort_values(kind="stable")
    return (
        cells if len(cells) <= MOST else list(spread.index[:MOST]),
        levels if len(levels) <= MOST else list(lowest.index[:MOST]),
    )


def arranged(frame: pd.DataFrame, cells: Sequence[str], by: str | None = None) -> pd.DataFrame:
    """Return the rows in the order of their cells and levels, which `cell` and `level` name in words.

    Cells of exact runs are first, because everything else is measured against them.

    Args:
        frame: Rows that hold the columns `cells`.
        cells: Columns that vary. The one that is `by` makes the levels, the others the cells.
        by: The column whose levels are shown beside each other.
    """
    others = [name for name in cells if name != by]
    keys = frame[[*others, *(name for name in cells if name == by)]].reset_index(drop=True)
    if "ln_backward" in keys:
        keys.insert(0, "exact first", keys["ln_backward"] != compare.EXACT)
    order = keys.sort_values(list(map(str, keys)), kind="stable").index if len(keys.columns) else keys.index
    frame = frame.iloc[order].reset_index(drop=True)
    level = frame[by].map(word) if by in cells else ALL
    return frame.assign(cell=_cell_names(frame, others), level=level)


def _cell_names(frame: pd.DataFrame, cells: Sequence[str]) -> list[str]:
    """Return each row's cell, as `ln_backward=exact, n_embd=64`; an option goes by its last name if that is enough."""
    if not cells:
        return [ALL] * len(frame)
    short = [name.rpartition(".")[2] for name in cells]
    names = short if len(set(short)) == len(short) else cells
    plain = frame[list(cells)].itertuples(index=False, name=None)
    return [", ".join(f"{name}={word(value)}" for name, value in zip(names, row, strict=True)) for row in plain]


# One number per seed


def finite(values: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the values that are finite numbers, and a note for each metric of which some are not."""
    known = np.isfinite(values["value"])
    total = values["metric"].value_counts()
    counts = values.loc[~known, "metric"].value_counts(sort=False)
    notes = [f"{n} of {total[name]} values of {name} are infinite, NaN or null: left out" for name, n in counts.items()]
    return values[known], notes


def thinned(values: pd.DataFrame, most: int) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of at most so many steps, denser towards the first, and a note if that leaves out any."""
    known = sorted(values["step"].unique().tolist())
    if len(known) <= most:
        return values, []
    kept = [known[at] for at in sorted({0, *np.geomspace(1, len(known) - 1, most - 1).round().astype(int).tolist()})]
    note = (
        f"{len(kept)} of the {len(known)} measured steps are shown, as far apart as they are late, each as it was measured: "
        "nothing is averaged over steps"
    )
    return values[values["step"].isin(kept)], [note]
