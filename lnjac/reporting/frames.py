"""What a report shows: from a study's tables to charts, each with its caption and with a table of the same numbers.

Levels of one config column are shown beside each other, within a cell of all others that vary: where there are several
cells, a chart holds them all and shows the one that its parameter `cell` names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lnjac.comparing import compare, design, pooling
from lnjac.comparing import cost as comparing_cost
from lnjac.comparing import intervals as stats
from lnjac.comparing import scaling as comparing_scaling
from lnjac.comparing.design import LAST_NORM, RUN
from lnjac.comparing.filter import Where, require_column
from lnjac.comparing.tables import MergedTables
from lnjac.errors import ConfigError
from lnjac.reporting import charts as figures
from lnjac.runs import folder as runs

if TYPE_CHECKING:
    import pandas as pd

HEADLINE = ("radial_share", "cos_center_vs_true")
LOSS = "val_loss_nats"
ENRICHMENTS = ("enrichment_radial_share", "enrichment_mean")
METRICS = (*compare.LAYER_METRICS, "flat_cos_center_scale", "flat_cos_projected", *ENRICHMENTS)
"""Metrics of a layer that are shown unless others are asked for."""

SAME = {"enrichment_radial_share": "radial_share"}
"""Metrics that within a width are a multiple of another: testing both would be testing one thing twice."""

MOST_LINES = 4
"""Comparisons up to which every norm is drawn; beyond, those of a comparison's headline alone."""
MOST_STEPS = 40
MOST_ROWS = 16_000
"""Of the curves behind a map: a chart's data stay small whatever the number of runs."""

NO_PAIRS = "no two levels have a number to compare: did all runs of one diverge?"

ONE = "all runs"
"""The name of the only level, or the only cell."""


class Drawing(NamedTuple):
    """A chart, what it says, the numbers in it as a table, what its parameters can choose among, and every seed's numbers."""

    chart: figures.Chart
    caption: str
    table: "pd.DataFrame"
    notes: Sequence[str]
    choices: Mapping[str, Sequence[str]]
    seeds: "pd.DataFrame | None"


def choices(frame: "pd.DataFrame", *names: str) -> dict[str, list[str]]:
    """The values, in their order, of those columns that the frame has."""
    return {name: list(dict.fromkeys(frame[name])) for name in names if name in frame}


@dataclass(frozen=True)
class View:
    """A study's runs arranged by the levels of one column; `by` is None where nothing varies but the seed."""

    study: MergedTables
    by: str | None
    where: str | None = None
    metrics: Sequence[str] = field(default=METRICS)

    @cached_property
    def runs(self) -> "pd.DataFrame":
        """The chosen runs with their `level` and `cell`."""
        every = self.study.frame("runs")
        if self.where is not None:
            every = every[Where(self.where).holds(every)]
        if every.empty:
            raise ConfigError(f"--where {self.where!r} holds for no run")
        by = [self.by] if self.by else []
        if "seed" not in every:
            raise ConfigError(f"{self.study.path} has no column seed, the unit of every interval")
        for name in by:
            require_column(name, design.factors(every), "runs are not told apart by")
        vary = [name for name in design.varying(every) if name != "ln_backward.sites"]
        every = every.assign(**{name: design.labelled(every, name) for name in {"ln_backward", *by} & set(every)})
        cells = design.cell_columns(every, by, vary) if by else vary
        every = _by_cell(every, cells)
        return every.assign(level=every[self.by].map(word) if self.by else ONE, cell=cell_names(every, cells))

    @cached_property
    def cells(self) -> list[str]:
        """The cells' names in their order."""
        return list(dict.fromkeys(self.runs["cell"]))

    @cached_property
    def levels(self) -> list[str]:
        """The levels' names in the order of their values."""
        if not self.by:
            return [ONE]
        known = self.runs[self.by]
        return [*map(word, sorted(known.dropna().unique())), *[word(None)] * bool(known.isna().any())]

    @property
    def title(self) -> str:
        return self.by or ""

    def drawing(
        self,
        chart: figures.Chart,
        caption: str,
        table: "pd.DataFrame",
        notes: Sequence[str] = (),
        choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
        seeds: "pd.DataFrame | None" = None,
    ) -> Drawing:
        """The chart says itself what it shows, and of which runs: it may be saved as a picture of its own."""
        said = caption + (f" Where {self.where}." if self.where else "")
        return Drawing(chart.properties(description=said), caption, table, notes, choices, seeds)

    @cached_property
    def layers_compared(self) -> compare.Differences:
        """Every metric of a layer, compared once."""
        return compare.compare(self.study, _required(self), metrics=_tested(self), where=self.where)


def view(study: MergedTables, by: str | None = None, where: str | None = None, metrics: Sequence[str] = METRICS) -> View:
    """By attn_mode where that varies, else by the first column that does, unless `by` is given."""
    if by is None:
        every = study.frame("runs")
        kept = every[Where(where).holds(every)] if where is not None else every
        vary = [name for name in design.varying(kept) if name not in design.IDENTITY]
        by = "attn_mode" if "attn_mode" in vary else next(iter(vary), None)
    return View(study, by, where, metrics)


def _by_cell(frame: "pd.DataFrame", cells: Sequence[str]) -> "pd.DataFrame":
    """In the order of the cells' values, those of exact runs first: what everything else is measured against."""
    keys = frame[list(cells)].reset_index(drop=True)
    if "ln_backward" in keys:
        keys.insert(0, "first", keys["ln_backward"] != compare.EXACT)
    order = keys.sort_values(list(map(str, keys)), kind="stable").index if cells else keys.index
    return frame.iloc[order].reset_index(drop=True)


def cell_names(frame: "pd.DataFrame", cells: Sequence[str]) -> list[str]:
    """Each row's cell in words, `ln_backward=exact, n_embd=64`: options go by their last name if that is enough."""
    if not cells:
        return [ONE] * len(frame)
    short = [name.rpartition(".")[2] for name in cells]
    names = short if len(set(short)) == len(short) else cells
    plain = frame[list(cells)].itertuples(index=False, name=None)
    return [", ".join(f"{name}={word(value)}" for name, value in zip(names, row, strict=True)) for row in plain]


def word(value: Any) -> str:
    """A level as its column's name is followed by it."""
    return design.word(value)


# One number per seed


def layer_values(view: View, metrics: Sequence[str], *, last: bool) -> "pd.DataFrame":
    """cell, level, site, metric, step, seed, value of every norm.

    At the last step of each run, or at all of them. Diverged runs have no numbers here.
    """
    view.study.require_metrics("layers", metrics)
    done = view.runs[view.runs["status"] == runs.DONE]
    context = done[[*RUN, "cell", "level", "seed"]]
    known = [*dict.fromkeys([*RUN, "step", "site", "call", *metrics])]
    rows = view.study.frame("layers", known)
    if rows["call"].any():
        rows = pooling.pooled(view.study.frame("layers", [*dict.fromkeys([*known, *pooling.NEEDED])]), list(metrics))
    rows = rows.merge(context, on=RUN)
    if last:
        rows = rows[rows["step"] == rows.groupby(RUN)["step"].transform("max")]
    if done.empty:
        raise ConfigError("all of these runs diverged")
    if rows.empty:
        raise ConfigError("no norm of these runs was measured: leave diagnostics=off out")
    return rows.melt(["cell", "level", "step", "seed", "site"], list(metrics), var_name="metric")


def _named_norm(values: "pd.DataFrame") -> str:
    """The norm that a chart of a single one shows: the last one."""
    sites = values["site"].tolist()
    return LAST_NORM if LAST_NORM in sites else str(sites[-1])


def _finite(values: "pd.DataFrame") -> "tuple[pd.DataFrame, list[str]]":
    """The values that are finite numbers; and how many of each metric are not, in words."""
    known = np.isfinite(values["value"])
    total = values["metric"].value_counts()
    counts = values.loc[~known, "metric"].value_counts(sort=False)
    said = [f"{n} of {total[name]} values of {name} are infinite, NaN or null: left out" for name, n in counts.items()]
    return values[known], said


def intervals(frame: "pd.DataFrame", keys: Sequence[str], value: str = "value") -> "pd.DataFrame":
    """The mean over seeds with its t interval for each key, in order of appearance: keys, mean, low, high, n."""
    import pandas as pd

    rows = frame.groupby(list(keys), sort=False).ngroup().to_numpy()
    seeds, column = np.unique(frame["seed"], return_inverse=True)
    table = np.full((rows.max(initial=-1) + 1, len(seeds)), np.nan)
    table[rows, column] = frame[value].to_numpy(float)
    found = stats.paired(table)
    key = frame[list(keys)].drop_duplicates().reset_index(drop=True)
    numbers = {"mean": found.estimate, "low": found.low, "high": found.high, "n": found.n}
    out: pd.DataFrame = key.assign(**numbers)
    return out[out["n"] > 0].reset_index(drop=True)


def _lines(view: View, frame: "pd.DataFrame", keys: Sequence[str]) -> "pd.DataFrame":
    """`intervals`, cells and levels in their order; the cell is left out where there is only one."""
    out = _ordered(view, intervals(frame, keys))
    return out if len(view.cells) > 1 else out.drop(columns="cell")


def _beside(lines: "pd.DataFrame", reference: "pd.Series[Any]") -> "pd.DataFrame":
    """Lines with what they are seen against, which is known for each cell and level, and for each norm if it is of norms."""
    keys = [name for name in reference.index.names if name in lines]
    return lines.merge(reference.rename("reference").reset_index()[[*keys, "reference"]], on=keys, how="left")


def _ordered(view: View, frame: "pd.DataFrame", cells: Sequence[str] | None = None) -> "pd.DataFrame":
    """By cell, by pair or level where there are, each in its order; norms stay in theirs."""
    order = frame[[]].assign(cell=_places(frame["cell"], view.cells if cells is None else cells))
    if "pair" in frame:
        order["pair"] = frame["pair"]
    if "level" in frame:
        order["level"] = _places(frame["level"], view.levels)
    return frame.loc[order.sort_values(list(map(str, order)), kind="stable").index].reset_index(drop=True)


def _places(column: "pd.Series[Any]", order: Sequence[str]) -> "pd.Series[Any]":
    return column.map({name: i for i, name in enumerate(order)})


# The drawings


def headline(view: View, metric: str | None = None) -> Drawing:
    """Differences between the levels, every seed of them: at each norm, or in each cell at those of the headline."""
    metric = metric or HEADLINE[0]
    by = _required(view)
    found = _compared(view, metric)
    rows = found.rows.assign(headline=found.headline())
    rows, seeds = (_by_cell(part[part["metric"] == metric], found.cells) for part in (rows, found.seeds))
    if rows["difference"].isna().all():
        raise ConfigError(NO_PAIRS)
    by_site = "site" in rows
    pairs = rows[["a", "b"]].drop_duplicates()
    n_cells = len(rows[found.cells].drop_duplicates()) if found.cells else 1
    in_rows = by_site and len(pairs) * n_cells <= MOST_LINES
    for frame in (rows, seeds):
        pair, cell = _pairs(frame), cell_names(frame, found.cells)
        frame["cell"] = cell
        parts = [frame["cell"]] if found.cells and not in_rows else []
        parts += [frame["site"]] if by_site else []
        frame["place"] = [", ".join(of) for of in zip(*parts, strict=True)] if parts else cell
        frame["contrast"] = pair
        if in_rows and found.cells:
            frame["contrast"] = cell if len(pairs) == 1 else pair + "; " + cell
    table = rows[[*found.cells, *(["site"] if by_site else []), "a", "b", "mean_a", "mean_b", *_RESULTS]]
    shown = rows if in_rows else rows[rows["headline"]]
    drawn = seeds.merge(shown[["place", "contrast"]])
    chart = figures.headline(
        drawn.dropna(subset="difference")[["place", "contrast", "seed", "difference"]],
        shown.rename(columns={"difference": "mean"})[["place", "contrast", "mean", "low", "high"]],
        title=f"{metric}: {_pairs(pairs).iloc[0]}" if len(pairs) == 1 else f"difference of {metric}",
    )
    at, notes = "", [*found.notes, _EFFECT]
    if len(shown) < len(rows):
        last = f"at {LAST_NORM} and " if (shown["site"] == LAST_NORM).any() else ""
        at = f" {last}at the norm where it is largest"
        notes.append(
            "the largest is chosen by its size: its adjusted p, over all norms, allows for that, its interval does not"
        )
    caption = f"Difference of {metric}{at} between levels of {by}: every seed, the mean, its 95% interval."
    each = _each_seed(seeds, ["cell", "site"] if by_site else ["cell"], by)
    return view.drawing(chart, caption, table, notes, seeds=each)


def _compared(view: View, metric: str) -> compare.Differences:
    """The comparison that the metric is part of: that of all metrics shown of a layer, or one of its own."""
    if metric in _tested(view):
        return view.layers_compared
    return compare.compare(view.study, _required(view), metrics=[metric], table=_table(view, metric), where=view.where)


def _each_seed(seeds: "pd.DataFrame", keys: Sequence[str], level: str) -> "pd.DataFrame":
    """The values behind differences: a row for each key and level, a column for each seed."""
    import pandas as pd

    sides = [
        seeds[[*keys, side, "seed", f"value_{side}"]].set_axis([*keys, level, "seed", "value"], axis=1)
        for side in ("b", "a")
    ]
    values = pd.concat(sides).dropna(subset="value")
    values[level] = values[level].map(word)
    wide = values.pivot_table("value", [*keys, level], "seed", sort=False).sort_index(axis=1)  # one value: their mean
    return wide.rename(columns="seed {}".format).reset_index()


def _pairs(frame: "pd.DataFrame") -> "pd.Series[str]":
    """Each row's comparison in words, `softmax − sigmoid`."""
    return frame["a"].map(word) + " − " + frame["b"].map(word)


_RESULTS = ["difference", "low", "high", "p", "p_adjusted", "family", "effect", "agreement", "n"]
_EFFECT = "effect: d_z, the mean difference in its standard deviations over seeds; Hedges' g where unpaired"


def heatmap(view: View, metric: str | None = None) -> Drawing:
    """The difference of every metric at every norm, shaded against the metric's largest."""
    by = _required(view)
    if metric:
        view.study.require_metrics("layers", [metric])
    found = _compared(view, metric) if metric else view.layers_compared
    rows = _by_cell(found.rows[found.rows["metric"] == metric] if metric else found.rows, found.cells)
    rows = rows.assign(
        pair=_pairs(rows),
        cell=cell_names(rows, found.cells),
        shown=rows["difference"].map("{:.2g}".format) + np.where(rows["p_adjusted"] < 0.05, "*", ""),
        column=rows["metric"],
    ).dropna(subset="difference")
    if rows.empty:
        raise ConfigError(NO_PAIRS)
    largest = rows["difference"].abs().groupby([rows["metric"], rows["pair"], rows["cell"]]).transform("max")
    rows["shade"] = (rows["difference"] / largest).fillna(0.0)
    rows = _ordered(view, rows, list(dict.fromkeys(rows["cell"])))
    own = [name for name in ("cell", "pair") if rows[name].nunique() > 1]
    cells = rows[[*own, "site", "column", "metric", "shade", "shown", "difference", "low", "high", "p_adjusted"]]
    pair = "" if "pair" in own else f" ({rows['pair'].iloc[0]})"
    chart = figures.heatmap(cells, legend="difference / the largest of its metric")
    caption = (
        f"Difference of each metric at each norm between levels of {by}{pair}: blue below 0, orange above, full colour "
        "for the largest of its metric. A star: adjusted p < 0.05, by Holm's method over all norms and pairs of levels of "
        "one metric in one cell."
    )
    wide = cells.pivot_table("difference", [*own, "site"], "metric", sort=False).reset_index()
    return view.drawing(chart, caption, wide, found.notes, choices(cells, "cell", "pair"))


def enrichment(view: View) -> Drawing:
    """Energy shares against chance, 1, at every norm and level."""
    metrics = [name for name in ENRICHMENTS if name in _known(view)]
    values, notes = _finite(layer_values(view, metrics, last=True))
    if values.empty:
        raise ConfigError("no enrichment was measured in these runs")
    lines = _lines(view, values, ["cell", "level", "site", "metric"])
    one = lines["level"].nunique() == 1
    cells = lines.assign(
        column=lines["metric"] if one else lines["level"] + " " + lines["metric"].str.removeprefix("enrichment_"),
        shade=(np.log2(lines["mean"]) / 4).clip(-1, 1),
        shown=lines["mean"].map("{:.2g}".format),
    ).sort_values("metric", key=lambda names: names.map(metrics.index), kind="stable")
    own = [name for name in ("cell",) if name in cells]
    cells = cells[[*own, "site", "column", "metric", "shade", "shown", "mean", "low", "high"]]
    chart = figures.heatmap(cells, legend="enrichment", label="format(pow(2, 4 * datum.value), '.2~r') + '×'")
    caption = (
        "Enrichment at each norm: a share of the gradient's energy against that of a random direction. Neutral at "
        "chance (1), blue below, orange above, full colour from 16 times."
    )
    wide = cells.pivot_table("mean", [*own, "site"], "column", sort=False).reset_index()
    return view.drawing(chart, caption, wide, notes, choices(cells, "cell"))


def curves(view: View) -> Drawing:
    """Every metric at every norm over the updates, of which the chart shows one. The table holds them all."""
    values, lost = _finite(layer_values(view, _known(view), last=False))
    per_step = len(values[["site", "metric", "level"]].drop_duplicates())
    values, notes = _thinned(values, max(2, min(MOST_STEPS, MOST_ROWS // per_step)))
    notes += lost
    lines = _lines(view, values, ["cell", "site", "metric", "step", "level"]).drop(columns="n")
    lines = lines.assign(later=lines["site"] != LAST_NORM).sort_values(["later", "step"], kind="stable")
    lines = lines.drop(columns="later")  # the chart opens at the first row's norm
    if len(lines) > MOST_ROWS:
        per_cell = len(lines) / len(view.cells)
        kept = view.cells[: max(1, int(MOST_ROWS / per_cell))]
        lines = lines[lines["cell"].isin(kept)]
        notes.append(f"curves of the first {len(kept)} of {len(view.cells)} cells: choose others by --where")
    caption = "The chosen metric at the chosen norm after so many updates: mean over seeds and its 95% interval."
    chosen = choices(lines, "cell", "site", "metric")
    return view.drawing(figures.curves(lines, by=view.title), caption, lines, notes, chosen)


def trajectory(view: View, metric: str | None = None) -> Drawing:
    """A loss, or a metric at the last norm, after so many updates."""
    metric = metric or LOSS
    known = view.study.columns("curves")
    if metric in known:
        done = view.runs[(view.runs["status"] == runs.DONE) & ~view.runs["run_id"].duplicated()]
        values = view.study.frame("curves", ["run_id", "step", metric]).dropna(subset=metric)
        values = values.merge(done[["run_id", "cell", "level", "seed"]], on="run_id").rename(columns={metric: "value"})
        values, lost = _finite(values.assign(metric=metric, site=""))
        what = metric
    else:
        values = layer_values(view, [metric], last=False)
        norm = _named_norm(values)
        values, lost = _finite(values[values["site"] == norm])
        what = f"{metric} at {norm}"
    if values.empty or values.groupby(["cell", "level", "seed"])["step"].nunique().max() < 2:
        raise ConfigError(f"{metric} was measured at most once in a run: {_MORE_OFTEN.get(metric, _MORE_OFTEN[''])}")
    values, notes = _thinned(values, MOST_STEPS)
    notes += lost
    lines = _lines(view, values, ["cell", "step", "level"])
    caption = f"{what} after so many updates: mean over seeds and its 95% interval."
    if metric in compare.RUN_METRICS:
        lines = _beside(lines, view.runs.groupby(["cell", "level"])["bigram_nats"].mean())
        caption += " Dashed: a bigram model's."
    chart = figures.trajectory(lines.drop(columns="n"), by=view.title, title=what)
    return view.drawing(chart, caption, lines, notes, choices(lines, "cell"))


_MORE_OFTEN = {
    LOSS: "python run.py eval.every=50 measures it along the way",
    "": "python run.py diagnostics=trajectory measures it along the way",
}


def cost(view: View, metric: str | None = None) -> Drawing:
    """The loss of each backward minus the exact one's, seed by seed."""
    if "ln_backward" not in view.runs or view.runs["ln_backward"].nunique() < 2:
        raise ConfigError(
            "one backward alone: python run.py -m ln_backward=exact,center_scale seed=1,2,3 makes runs whose cost can be told"
        )
    by = None if view.by == "ln_backward" else view.by
    found = comparing_cost.cost(view.study, by=by, metric=metric or LOSS, where=view.where)
    others = [name for name in found.costs.cells if name != found.by]
    rows, seeds = (_by_cell(part, others) for part in (found.costs.rows, found.costs.seeds))
    for frame in (rows, seeds):
        frame["cell"] = cell_names(frame, others)
        frame["level"] = frame[found.by].map(word) if found.by else ONE
        frame["backward"] = frame["a"]
    rows, seeds = (_ordered(view, frame, list(dict.fromkeys(rows["cell"]))) for frame in (rows, seeds))
    own = ["cell"] if rows["cell"].nunique() > 1 else []
    if seeds["difference"].isna().all():
        raise ConfigError("no backward has a seed in common with exact: there is no cost to pair")
    chart = figures.cost(
        seeds.dropna(subset="difference").rename(columns={"difference": "cost"})[
            [*own, "backward", "level", "seed", "cost"]
        ],
        rows.rename(columns={"difference": "mean"})[[*own, "backward", "level", "mean", "low", "high"]],
        by=found.by or "",
        title=f"{metric or LOSS} − exact's",
    )
    table = rows[[*found.costs.cells, "a", "mean_a", "mean_b", *_RESULTS]].rename(
        columns={"a": "backward", "mean_a": "loss", "mean_b": "exact's loss", "difference": "cost"}
    )
    caption = (
        "What training with each backward costs: every seed, those of one seed joined, the mean, its 95% interval."
    )
    each = _each_seed(seeds.assign(**{found.by or "level": seeds["level"]}), ["cell", found.by or "level"], "backward")
    return view.drawing(chart, caption, table, [*found.costs.notes, _EFFECT], choices(rows, *own), each)


def cost_differences(view: View) -> "tuple[pd.DataFrame, Sequence[str]] | None":
    """How the cost differs between the levels, if there are any: a table and its notes."""
    by = None if view.by == "ln_backward" else view.by
    found = comparing_cost.cost(view.study, by=by, where=view.where).differences
    if found is None:
        return None
    rows = found.rows
    return rows[[*found.cells, "ln_backward", "a", "b", "mean_a", "mean_b", *_RESULTS]], [*found.notes, _EFFECT]


def depth(view: View, metric: str | None = None) -> Drawing:
    """A metric at every norm, from the first to the last."""
    metric = metric or "sigma_mean"
    values, notes = _finite(layer_values(view, [metric], last=True))
    lines = _lines(view, values, ["cell", "level", "site"])
    caption = f"{metric} from the first norm to the last: mean over seeds and its 95% interval, after the last update."
    if metric in (by_chance := {share: enriched for enriched, share in SAME.items()}):
        both = layer_values(view, [metric, by_chance[metric]], last=True)
        mean = both.pivot_table("value", ["cell", "level", "site"], "metric")
        lines = _beside(lines, mean[metric] / mean[by_chance[metric]])
        caption += " Dashed: that of a random direction."
    log = metric.startswith("sigma") and bool((lines[["mean", "low"]].min() > 0).all())
    chart = figures.depth(lines.drop(columns="n"), by=view.title, title=metric, log=log)
    return view.drawing(chart, caption, lines, notes, choices(lines, "cell"))


def scaling(view: View, metric: str | None = None, x: str = "") -> Drawing:
    """A metric against width or steps, with the slope of their logarithms."""
    metric = metric or HEADLINE[0]
    x = x or next(iter(sizes(view)), "")
    if not x:
        raise ConfigError(_SCALING)
    found = comparing_scaling.scaling(view.study, x, metrics=[metric], table=_table(view, metric), where=view.where)
    others = [name for name in found.cells if name != view.by]
    points, what = _by_cell(found.points, others), metric
    if "site" in points and len(points):
        norm = _named_norm(points)
        points, what = points[points["site"] == norm], f"{metric} at {norm}"
    if points.empty:
        raise ConfigError(f"no run has a number for {metric}")
    points = points.assign(
        cell=cell_names(points, others),
        level=points[view.by].map(word) if view.by in found.cells else ONE,
        x=points[x],
    )
    points = _ordered(view, points, list(dict.fromkeys(points["cell"])))
    own = ["cell"] if points["cell"].nunique() > 1 else []
    chart = figures.scaling(
        points[[*own, "x", "level", "mean", "low", "high"]],
        by=view.title if view.by in found.cells else "",
        x=x,
        title=what,
    )
    caption = f"{what} against {x}: mean over seeds and its 95% interval."
    return view.drawing(chart, caption, _by_cell(found.slopes, others), found.notes, choices(points, *own))


def sizes(view: View) -> list[str]:
    """Sizes that vary: what a metric may scale with."""
    return [
        name
        for name in ("model.n_embd", "model.n_layer", "steps")
        if name in view.runs and view.runs[name].nunique() > 1
    ]


_SCALING = "one width and one number of steps: python run.py -m model.n_embd=32,64,128 seed=1,2,3 varies one"

FIGURES: Mapping[str, Callable[..., Drawing]] = {
    "headline": headline,
    "heatmap": heatmap,
    "trajectory": trajectory,
    "cost": cost,
    "depth": depth,
    "scaling": scaling,
}
"""What `lnjac plot` draws, by name: a view and a metric or None, to a drawing."""


def _required(view: View) -> str:
    if view.by is None:
        raise ConfigError(
            "nothing varies but the seed: python run.py -m attn_mode=softmax,sigmoid seed=1,2,3 compares two"
        )
    return view.by


def _table(view: View, metric: str) -> str:
    return "layers" if metric in view.study.columns("layers") else "runs"


def _known(view: View) -> list[str]:
    """The view's metrics, as far as the table has a number for them."""
    there = set(view.study.columns("layers"))
    return [name for name in view.metrics if name in there]


def _tested(view: View) -> list[str]:
    """Those of them whose differences are tested, each thing once."""
    return [name for name in _known(view) if SAME.get(name) not in view.metrics]


def _thinned(values: "pd.DataFrame", most: int) -> tuple["pd.DataFrame", list[str]]:
    """The rows of at most so many steps, the first and the last among them; and what that leaves out, in words."""
    known = sorted(values["step"].unique().tolist())
    if len(known) <= most:
        return values, []
    kept = [known[round(i)] for i in np.linspace(0, len(known) - 1, most)]
    said = (
        f"{most} of the {len(known)} measured steps are shown, each as it was measured: nothing is averaged over steps"
    )
    return values[values["step"].isin(kept)], [said]
