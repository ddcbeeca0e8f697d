"""The charts of a report: each is one function that makes a frame of a view and draws it, registered in `CHARTS`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lnjac.comparing import compare
from lnjac.comparing import cost as costs
from lnjac.comparing import scaling as slopes
from lnjac.comparing.compare import LOSS
from lnjac.comparing.experiment import LAST_NORM
from lnjac.errors import ConfigError
from lnjac.reporting import marks
from lnjac.reporting.marks import choices
from lnjac.reporting.view import ENRICHMENTS, SAME, View, arranged, beside, finite, thinned
from lnjac.text import word

MOST_LINES = 4
"""Comparisons up to which every norm is drawn; beyond, only those of a comparison's headline."""
MOST_STEPS = 40
MOST_ROWS = 16_000
"""Rows of the curves behind a map, so that a page stays small whatever the number of runs."""


class Answer(NamedTuple):
    """A table that stays in sight below a chart, with its title and notes."""

    title: str
    table: pd.DataFrame
    notes: Sequence[str]


class Drawing(NamedTuple):
    """A chart with its caption, notes and folded tables of the same numbers.

    `choices` holds the values that a reader may choose among by the parameter of their name. If a drawing `follows`, its
    table has only the rows that are chosen. A `wide` one is scrolled on a narrow page.
    """

    picture: marks.Picture
    caption: str
    tables: Mapping[str, pd.DataFrame]
    notes: Sequence[str] = ()
    choices: Mapping[str, Sequence[str]] = {}
    answer: Answer | None = None
    wide: bool = False
    follows: bool = False


class Need(NamedTuple):
    """Columns of a table of which a chart needs one, with at least so many different values.

    `level` is, of runs, the level of the compared column. `otherwise` names what is lacking and the command that gives it.
    """

    table: str
    columns: Sequence[str]
    least: int
    otherwise: str

    def met(self, view: View) -> bool:
        """Return whether the view has such a column."""
        held = list(view.runs) if self.table == "runs" else view.merged.columns(self.table)
        known = [name for name in self.columns if name in held]
        frame = view.runs if self.table == "runs" else view.merged.frame(self.table, known)
        return any(frame[name].nunique() >= self.least for name in known)

    def lacking(self, view: View) -> str:
        """Return what is lacking; the command that gives it is one of lnjac's own trainer."""
        held = list(view.runs) if self.table == "runs" else view.merged.columns(self.table)
        if view.ours:
            return self.otherwise
        there = {*self.columns} & {*held}
        return self.otherwise.partition(": ")[0] if there else f"these runs have no column {' or '.join(self.columns)}"


class Chart(NamedTuple):
    """A kind of chart that merged tables may have.

    `title` heads the section of a page, which charts of one title share; `summary` tells one line of what is drawn. A page
    draws each of `metrics`, where None stands for all that belong together.
    """

    name: str
    title: str
    summary: str
    needs: Sequence[Need]
    metrics: Sequence[str | None]
    function: Callable[..., Drawing]

    def draw(self, view: View, metric: str | None = None) -> Drawing:
        """Draw a metric, or the first of the chart's own.

        Raises:
            ConfigError: If the view has not all that the chart needs.
        """
        for need in self.needs:
            if not need.met(view):
                raise ConfigError(need.lacking(view))
        return self.function(view, metric or self.metrics[0])

    def drawings(self, view: View) -> "Iterator[Drawing | str]":
        """Draw each metric; a drawing that cannot be made is a line that names the reason."""
        for metric in self.metrics:
            try:
                yield self.draw(view, metric)
            except ConfigError as error:
                yield str(error)


CHARTS: dict[str, Chart] = {}
"""Every chart by its name, in the order of a page."""

Function = Callable[..., Drawing]


def chart(
    name: str, title: str, *, needs: Sequence[Need], metrics: Sequence[str | None] = (None,), **options: Any
) -> Callable[[Function], Function]:
    """Register a function of a view and a metric as a chart; further options are passed to it."""

    def register(function: Function) -> Function:
        summary = (function.__doc__ or "").partition("\n")[0]
        CHARTS[name] = Chart(name, title, summary, needs, metrics, partial(function, **options))
        return function

    return register


NORMS = Need("layers", ["site"], 1, "no norm of these runs was measured: leave diagnostics=off out")
LEVELS = Need(
    "runs", ["level"], 2, "one level alone was run: python run.py -m attn_mode=softmax,sigmoid seed=1,2,3 runs two"
)
BACKWARDS = Need(
    "runs",
    ["ln_backward"],
    2,
    "one backward alone was run: python run.py -m ln_backward=exact,center_scale seed=1,2,3 runs one with a cost",
)
RECORDED = Need(
    "curves", ["step"], 2, "losses were recorded at one step alone: python run.py eval.every=50 records more"
)
ENRICHED = Need("layers", ENRICHMENTS, 1, "no enrichment was measured in these runs: leave diagnostics=off out")

_RESULTS = ["difference", "low", "high", "p", "p_adjusted", "family", "effect", "agreement", "n"]
_EFFECT = "effect: d_z, the mean difference in its standard deviations over seeds; Hedges' g where unpaired"
_NO_PAIRS = "no two levels have a number to compare: did all runs of one diverge?"


@chart("headline", "Comparison", needs=[LEVELS], metrics=(LOSS, "radial_share", "cos_center_vs_true"))
def headline(view: View, metric: str) -> Drawing:
    """Differences between levels, every seed of them, at each norm or at the norms that differ most."""
    if metric == LOSS and view.runs[LOSS].isna().all():
        metric = "train_loss_nats"
    found = _compared(view, metric)
    rows = found.rows.assign(headline=found.headline())
    rows, seeds = (_in_words(part[part["metric"] == metric], found.cells) for part in (rows, found.seeds))
    if rows["difference"].isna().all():
        raise ConfigError(_NO_PAIRS)
    own, site, pairs = ["cell"] * bool(found.cells), ["site"] * ("site" in rows), rows["pair"].unique()
    few = len(rows[["cell", "pair"]].drop_duplicates()) <= MOST_LINES
    place, level = (site, ["pair"] * (len(pairs) > 1) + own) if few and site else (own + site, [])
    for frame in (rows, seeds):
        frame["place"], frame["level"] = _joined(frame, place or ["cell"]), _joined(frame, level or ["pair"])
    shown = rows if few else rows[rows["headline"]]
    at, notes = "", [*found.notes, _EFFECT]
    if len(shown) < len(rows):
        last = f"at {LAST_NORM} and " if (shown["site"] == LAST_NORM).any() else ""
        at = f" {last}at the norm where it is largest"
        notes.append(
            "the largest is chosen by its size: its adjusted p, over all norms, allows for that, its interval does not"
        )
    picture = marks.dots(
        seeds.merge(shown[["place", "level"]]).dropna(subset="difference")[["place", "level", "seed", "difference"]],
        shown.rename(columns={"difference": "mean"})[["place", "level", "mean", "low", "high"]],
        by="difference",
        title=f"{metric}: {pairs[0]}" if len(pairs) == 1 else f"difference of {metric}",
    )
    caption = f"Difference of {metric}{at} between levels of {view.by}: every seed, the mean, its 95% interval."
    tables = {
        "Table": rows[[*own, *site, "a", "b", "mean_a", "mean_b", *_RESULTS]],
        "Every seed's value": _by_seed(seeds, [*own, *site], view.by),
    }
    return Drawing(picture, caption, tables, notes)


@chart("heatmap", "Norms and metrics", needs=[NORMS, LEVELS])
def heatmap(view: View, metric: str | None) -> Drawing:
    """The difference of every metric at every norm, shaded against the metric's largest."""
    found = view.compared([metric]) if metric else view.norms_compared
    rows = _in_words(found.rows, found.cells)
    rows = rows.dropna(subset="difference")
    if rows.empty:
        raise ConfigError(_NO_PAIRS)
    largest = rows["difference"].abs().groupby([rows["metric"], rows["pair"], rows["cell"]]).transform("max")
    rows = rows.assign(
        column=rows["metric"],
        shade=(rows["difference"] / largest).fillna(0.0),
        shown=rows["difference"].map("{:.2g}".format) + np.where(rows["p_adjusted"] < 0.05, "*", ""),
    )
    own = [name for name in ("cell", "pair") if rows[name].nunique() > 1]
    cells = rows[[*own, "site", "column", "metric", "shade", "shown", "difference", "low", "high", "p_adjusted"]]
    pair = "" if "pair" in own else f" ({rows['pair'].iloc[0]})"
    caption = (
        f"Difference of each metric at each norm between levels of {view.by}{pair}: blue below 0, orange above, full colour "
        "for the largest of its metric. A star: adjusted p < 0.05, by Holm's method over all norms and pairs of levels of "
        "one metric in one cell."
    )
    table = cells.pivot_table("difference", [*own, "site"], "metric", sort=False).reset_index()
    picture = marks.shades(cells, legend="difference / the largest of its metric")
    return Drawing(picture, caption, {"Table": table}, found.notes, choices(cells, "site", "metric"), wide=True)


@chart("enrichment", "Norms and metrics", needs=[NORMS, ENRICHED])
def enrichment(view: View, metric: str | None) -> Drawing:
    """Shares of the gradient's energy against chance, 1, at every norm and level."""
    metrics = [metric] if metric else [name for name in ENRICHMENTS if name in view.metrics]
    values, notes = finite(view.layers(metrics, last=True))
    if values.empty:
        raise ConfigError(ENRICHED.otherwise)
    lines = view.means(values, ["cell", "level", "site", "metric"])
    one = lines["level"].nunique() == 1
    cells = lines.assign(
        column=lines["metric"] if one else lines["level"] + " " + lines["metric"].str.removeprefix("enrichment_"),
        shade=(np.log2(lines["mean"]) / 4).clip(-1, 1),
        shown=lines["mean"].map("{:.2g}".format),
    )
    caption = (
        "Enrichment at each norm: a share of the gradient's energy against that of a random direction. Neutral at "
        "chance (1), blue below, orange above, full colour from 16 times."
    )
    own = ["cell"] * ("cell" in cells)
    table = cells.pivot_table("mean", [*own, "site"], "column", sort=False).reset_index()
    cells = cells[[*own, "site", "column", "metric", "shade", "shown", "mean", "low", "high"]]
    picture = marks.shades(cells, legend="enrichment", label="format(pow(2, 4 * datum.value), '.2~r') + '×'")
    return Drawing(picture, caption, {"Table": table}, notes, choices(cells, "site", "metric"), wide=True)


@chart("curves", "Norms and metrics", needs=[NORMS])
def curves(view: View, metric: str | None) -> Drawing:
    """Every metric at every norm over the updates, of which one is chosen."""
    values, lost = finite(view.layers([metric] if metric else view.metrics, last=False))
    per_step = max(1, len(values[["site", "metric", "level"]].drop_duplicates()))
    values, notes = thinned(values, max(2, min(MOST_STEPS, MOST_ROWS // per_step)))
    notes += lost
    lines = view.means(values, ["cell", "site", "metric", "step", "level"]).drop(columns="n")
    later = lines["site"] != LAST_NORM  # the chart opens at the norm of the first row
    lines = lines.assign(later=later).sort_values(["later", "step"], kind="stable").drop(columns="later")
    if len(lines) > MOST_ROWS:
        kept = view.cells[: max(1, int(MOST_ROWS / (len(lines) / len(view.cells))))]
        lines = lines[lines["cell"].isin(kept)]
        notes.append(f"curves of the first {len(kept)} of {len(view.cells)} cells: choose others by --where")
    picture = marks.lines(lines, x="step", by=view.by, title="value")
    caption = "The chosen metric at the chosen norm after so many updates: mean over seeds and its 95% interval."
    tables = {"The chosen curves as a table": lines}
    return Drawing(picture, caption, tables, notes, choices(lines), follows=True)


@chart("losses", "Trajectories", needs=[RECORDED], metrics=(LOSS, "train_loss_nats"))
def losses(view: View, metric: str) -> Drawing:
    """A loss over the updates, beside that of a bigram model."""
    values = view.curves(metric)
    reference = view.runs.groupby(["cell", "level"])["bigram_nats"].mean()
    remedy = "python run.py eval.every=50 measures it along the way"
    if reference.isna().all():
        return _over_updates(view, values, metric, remedy)
    return _over_updates(view, values, metric, remedy, reference, " Dashed: a bigram model's.")


@chart("trajectory", "Trajectories", needs=[NORMS], metrics=("radial_share",))
def trajectory(view: View, metric: str) -> Drawing:
    """A metric at the last norm over the updates."""
    values, name = _at_one_norm(view.layers([metric], last=False), metric)
    return _over_updates(view, values, name, "python run.py diagnostics=trajectory measures it along the way")


def _over_updates(
    view: View,
    values: pd.DataFrame,
    name: str,
    remedy: str,
    reference: "pd.Series[Any] | None" = None,
    more: str = "",
) -> Drawing:
    values, lost = finite(values)
    if values.empty or values.groupby(["cell", "level", "seed"])["step"].nunique().max() < 2:
        raise ConfigError(f"{name} was measured at most once in a run" + f": {remedy}" * view.ours)
    values, notes = thinned(values, MOST_STEPS)
    lines = view.means(values, ["cell", "step", "level"])
    if reference is not None:
        lines = beside(lines, reference)
    caption = f"{name} after so many updates: mean over seeds and its 95% interval.{more}"
    picture = marks.lines(lines.drop(columns="n"), x="step", by=view.by, title=name)
    return Drawing(picture, caption, {"Table": lines}, [*notes, *lost], choices(lines))


@chart("cost", "Cost of each backward", needs=[BACKWARDS], metrics=(LOSS,))
def cost(view: View, metric: str) -> Drawing:
    """The loss of each backward minus the exact one's, every seed of it."""
    by = None if view.by == "ln_backward" else view.by
    found = costs.cost(view.merged, by=by, metric=metric, where=view.where)
    rows, seeds = (
        arranged(part, found.costs.cells, found.by).assign(place=itemgetter("a"), backward=itemgetter("a"))
        for part in (found.costs.rows, found.costs.seeds)
    )
    if seeds["difference"].isna().all():
        raise ConfigError("no backward has a seed in common with exact: there is no cost to pair")
    own = ["cell"] * (rows["cell"].nunique() > 1)
    picture = marks.dots(
        seeds.dropna(subset="difference")[[*own, "place", "level", "seed", "difference"]],
        rows.rename(columns={"difference": "mean"})[[*own, "place", "level", "mean", "low", "high"]],
        by=found.by or "",
        title=f"{metric} − exact's",
        upright=True,
    )
    caption = (
        "What training with each backward costs: every seed, those of one seed joined, the mean, its 95% interval."
    )
    columns = {"mean_a": "loss", "mean_b": "exact's loss", "difference": "cost"}
    tables = {
        "Table": rows[[*own, "level", "backward", "mean_a", "mean_b", *_RESULTS]].rename(columns=columns),
        "Every seed's value": _by_seed(seeds, [*own, "level"], "backward"),
    }
    answer = None
    if found.differences is not None:
        between = _in_words(found.differences.rows, found.differences.cells)
        own = ["cell"] * bool(found.differences.cells)
        table = between[[*own, "ln_backward", "a", "b", "mean_a", "mean_b", *_RESULTS]]
        table = table.rename(columns={"ln_backward": "backward"})
        answer = Answer("Differences of cost between levels", table, [*found.differences.notes, _EFFECT])
    return Drawing(picture, caption, tables, [*found.costs.notes, _EFFECT], choices(seeds[own]), answer)


@chart("depth", "By depth", needs=[NORMS], metrics=("sigma_mean", "radial_share"))
def depth(view: View, metric: str) -> Drawing:
    """A metric at every norm, from the first to the last."""
    values, notes = finite(view.layers([metric], last=True))
    lines = view.means(values, ["cell", "level", "site"])
    caption = f"{metric} from the first norm to the last: mean over seeds and its 95% interval, after the last update."
    if metric in (by_chance := {share: enriched for enriched, share in SAME.items()}):
        both = view.layers([metric, by_chance[metric]], last=True)
        mean = both.pivot_table("value", ["cell", "level", "site"], "metric")
        lines = beside(lines, mean[metric] / mean[by_chance[metric]])
        caption += " Dashed: that of a random direction."
    log = metric.startswith("sigma") and bool((lines[["mean", "low"]].min() > 0).all())
    picture = marks.lines(lines.drop(columns="n"), x="site", by=view.by, title=metric, log=log)
    return Drawing(picture, caption, {"Table": lines}, notes, choices(lines, "site"))


def _of_size(size: str, name: str, example: str) -> Callable[[Function], Function]:
    otherwise = f"{size} is the same in all runs: python run.py -m {size}={example} seed=1,2,3 varies it"
    need = Need("runs", [size], 2, otherwise)
    return chart(f"scaling-{name}", f"Scaling with {name}", needs=[need], metrics=("radial_share", LOSS), size=size)


@_of_size("steps", "steps", "250,500,1000")
@_of_size("model.n_layer", "depth", "2,4,8")
@_of_size("model.n_embd", "width", "32,64,128")
def scaling(view: View, metric: str, size: str) -> Drawing:
    """A metric against a size, with the slope of their logarithms."""
    found = slopes.scaling(view.merged, size, metrics=[metric], table=_table(view, metric), where=view.where)
    points, name = arranged(found.points, found.cells, view.by), metric
    if "site" in points and len(points):
        points, name = _at_one_norm(points, metric)
    if points.empty:
        raise ConfigError(f"no run has a number for {metric}")
    points = points.assign(x=points[size])[["cell", "level", "x", "mean", "low", "high"]]
    points = points if points["cell"].nunique() > 1 else points.drop(columns="cell")
    log = bool((points[["mean", "low"]].min() > 0).all())
    by = view.by if view.by in found.cells else ""
    picture = marks.lines(points, x="x", by=by, title=name, log=log, size=size)
    caption = f"{name} against {size}: mean over seeds and its 95% interval."
    table = arranged(found.slopes, found.cells, view.by).drop(columns=["cell", "level"])
    return Drawing(picture, caption, {"Table": table}, found.notes, choices(points))


# What charts share


def _compared(view: View, metric: str) -> compare.Differences:
    """Compare the metric with all metrics of a layer that are shown, or alone."""
    return view.norms_compared if metric in view.tested else view.compared([metric], _table(view, metric))


def _table(view: View, metric: str) -> str:
    return "layers" if metric in view.merged.columns("layers") else "runs"


def _in_words(rows: pd.DataFrame, cells: Sequence[str]) -> pd.DataFrame:
    """Return the rows of a comparison in the order of their cells, with `cell`, `a`, `b` and `pair` in words."""
    rows = arranged(rows, cells)
    a, b = rows["a"].map(word), rows["b"].map(word)
    return rows.assign(a=a, b=b, pair=a + " − " + b)


def _joined(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [", ".join(parts) for parts in zip(*(frame[name] for name in names), strict=True)]


def _by_seed(seeds: pd.DataFrame, keys: Sequence[str], level: str) -> pd.DataFrame:
    """Return the values behind differences: a row for each key and level, a column for each seed."""
    sides = [
        seeds[[*keys, side, "seed", f"value_{side}"]].set_axis([*keys, level, "seed", "value"], axis=1) for side in "ba"
    ]
    wide = pd.concat(sides).pivot_table("value", [*keys, level], "seed", sort=False)  # one value: their mean
    return wide.sort_index(axis=1).rename(columns="seed {}".format).reset_index()


def _at_one_norm(rows: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, str]:
    """Return the rows of the norm that a chart of one norm shows, the last, and the metric's name with its own."""
    sites = rows["site"].tolist()
    norm = LAST_NORM if LAST_NORM in sites else str(sites[-1])
    return rows[rows["site"] == norm], f"{metric} at {norm}"
