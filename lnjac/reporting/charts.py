"""The charts of a report: each is one function that makes a frame of a view and draws it, registered in `CHARTS`."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from lnjac.comparing import scaling as slopes
from lnjac.comparing.compare import EXACT, LOSS, RUN_METRICS
from lnjac.comparing.intervals import STUDENT
from lnjac.errors import ConfigError
from lnjac.reporting import frames, marks
from lnjac.reporting.frames import (
    by_seed,
    capped,
    chance,
    falling,
    few,
    few_levels,
    few_said,
    floors,
    in_words,
    last_norm_first,
    named,
    paired,
    require_known,
    slopes_said,
    strongest_pairs,
    strongest_places,
    worded,
)
from lnjac.reporting.marks import Levels, choices
from lnjac.reporting.registry import CHARTS as CHARTS
from lnjac.reporting.registry import Drawing, Function, Need, chart
from lnjac.reporting.view import MOST, View, arranged, finite, thinned
from lnjac.reporting.wording import counted
from lnjac.runs.folder import DIVERGED

MOST_STEPS = 40
BREAKS = (-4, -3, -2, -1, 1, 2, 3, 4)
"""Standard deviations at which the shades of a map change."""


def lead(view: View, drawn: Sequence[str]) -> str | None:
    """Return the name of the chart that shows the answer, of those that can be drawn; None if there is none."""
    of_size = [name for name, size in SIZES.items() if size == view.by and view.runs[size].nunique() > 2]
    order = [*of_size, "cost", "ranking", "headline", "depth", "losses", "diverged"]
    return next((name for name in order if name in drawn), None)


NORMS = Need("layers", ["site"], 1, "no norm of these runs was measured: leave diagnostics=off out")
LEVELS = Need(
    "runs", ["level"], 2, "one level alone was run: python run.py -m attn_mode=softmax,sigmoid seed=1,2,3 runs two"
)
MANY = Need("runs", ["level"], MOST + 1, f"no more than {MOST} levels were run, which are compared in pairs")
BACKWARDS = Need(
    "runs",
    ["ln_backward"],
    2,
    "one backward alone was run: python run.py -m ln_backward=exact,center_scale seed=1,2,3 runs one with a cost",
)
RECORDED = Need(
    "curves", ["step"], 2, "losses were recorded at one step alone: python run.py eval.every=50 records more"
)

_RESULTS = ["difference", "low", "high", "p", "p_adjusted", "family", "effect", "agreement", "n"]
_EFFECT = "effect: d_z, the mean difference in its standard deviations over seeds; Hedges' g where unpaired"
_NO_PAIRS = "no two levels have a number to compare: did all runs of one diverge?"


# The answer


@chart("cost", "Comparison", needs=[BACKWARDS])
def cost(view: View, metric: str | None) -> Drawing:
    """The loss of each backward minus the exact one's, every seed of it."""
    found, name = view.costs(metric or LOSS), metric or LOSS
    rows, seeds = (
        view.placed(arranged(part, found.costs.cells, view.by), found.costs.cells)
        for part in (found.costs.rows, found.costs.seeds)
    )
    rows, seeds = (part.assign(place=part["a"]) for part in (rows, seeds))
    if seeds["difference"].isna().all():
        raise ConfigError("no backward has a seed in common with exact: there is no cost to pair")
    levels = _levels(view) if rows["level"].nunique() > 1 else marks.ONE
    whole = rows
    rows, seeds, left = strongest_places(rows, seeds)
    of = "cost of the backward" + " in {}" * (name != LOSS)
    picture = _dots(rows, seeds, title=named(view, [name], of), rows_title="Backward", levels=levels)
    caption = f"What training with each backward costs in {name}: every seed, the mean, its 95% interval{left}."
    table = whole.rename(
        columns={"place": "backward", "mean_a": "loss", "mean_b": "exact's loss", "difference": "cost"}
    )
    own = [column for column in ("cell", "level") if column in rows]
    columns = [*own, "backward", "loss", "exact's loss", "cost", *_RESULTS[1:]]
    notes = [*found.costs.notes, _EFFECT]
    return Drawing(picture, caption, table[columns], notes, _offered(rows), by_seed(seeds, own))


@chart("ranking", "Comparison", needs=[MANY])
def ranking(view: View, metric: str | None) -> Drawing:
    """The levels of lowest loss where there are too many to compare each with each."""
    name = metric or LOSS
    values = view.runs.loc[view.runs["status"] != DIVERGED].drop_duplicates("run_id")
    if name not in values or values[name].isna().all():
        raise ConfigError(f"no run has a number for {name}")
    values = values[values["cell"].isin(view.cells)].assign(value=values[name]).dropna(subset="value")
    rows = view.means(values, ["cell", "level"]).sort_values("mean", kind="stable").rename(columns={"level": "place"})
    drawn = rows[rows["place"].isin(view.levels)]
    seeds = values[["cell", "level", "seed", "value"]].rename(columns={"level": "place"})
    if "cell" not in rows:
        seeds = seeds.drop(columns="cell")
    total = view.runs["level"].nunique()
    left = f"; the other {total - len(view.levels):,} are in the CSV" * (total > len(view.levels))
    of = f"The {len(view.levels)} of {total:,} levels of {view.by} with the lowest {name}"
    caption = f"{of}: every seed, the mean, its 95% interval{left}."
    notes = [
        "the lowest are chosen by their mean: chance is part of why they are the lowest, and no interval allows for that"
    ]
    shown = seeds[seeds["place"].isin(view.levels)]
    title, by = named(view, [name]), worded(view.by)
    picture = marks.dots(shown, drawn.drop(columns="n"), title=title, rows_title=by, zero=False)
    return Drawing(picture, caption, rows.rename(columns={"place": view.by}), notes, choices(drawn), seeds)


@chart("headline", "Comparison", needs=[LEVELS])
def headline(view: View, metric: str | None) -> Drawing:
    """Differences between levels in the loss, every seed of them; of a metric of norms, at each norm."""
    few_levels(view)
    require_known(view, metric)
    losses = [name for name in RUN_METRICS if name in view.runs and view.runs[name].notna().any()]
    names = [metric] if metric else losses or view.tested[:1]
    of_norms = names[0] in view.merged.columns("layers")
    if of_norms and names[0] in view.tested:  # one family of p values with those of the map
        found = view.norms_compared
    else:
        found = view.compared(names, "layers" if of_norms else "runs")
    parts = [part[part["metric"].isin(names)] for part in (found.rows, found.seeds)]
    if parts[0]["difference"].isna().all():
        raise ConfigError(_NO_PAIRS)
    if of_norms:
        whole, seeds = (in_words(view, part, found.cells).assign(place=lambda frame: frame["site"]) for part in parts)
        rows, left = strongest_pairs(view, whole), ""
        seeds = seeds[seeds["pair"].isin(rows["pair"])]
    else:  # a row for each cell, or for each pair of levels if there is one cell: no cell is to choose
        whole, seeds = (paired(arranged(part, found.cells)) for part in parts)
        place = "cell" if whole["cell"].nunique() > 1 else "pair"
        whole, seeds = (part.assign(place=part[place]) for part in (whole, seeds))
        if place == "cell":
            pairs = strongest_pairs(view, whole)
            rows, seeds, left = strongest_places(pairs, seeds[seeds["pair"].isin(pairs["pair"])])
        else:
            rows, seeds, left = strongest_places(whole, seeds)
        rows, seeds, whole = (
            part.drop(columns=["cell", *["pair"] * (place == "pair")]) for part in (rows, seeds, whole)
        )
    title = named(view, rows["metric"], "difference in {}")
    picture = _dots(rows, seeds, title=title, rows_title="Norm" if of_norms else None)
    of, where = (names[0] if len(names) == 1 else "the chosen loss"), " at each norm" * of_norms
    which = f" ({whole['pair'].iloc[0]})" if "pair" in whole and whole["pair"].nunique() == 1 else ""
    caption = (
        f"Difference of {of}{where} between levels of {view.by}{which}: every seed, the mean, its 95% interval{left}."
    )
    own = [name for name in ("cell", "pair", "metric") if name in rows]
    table = whole[[*own, "place", "a", "b", "mean_a", "mean_b", *_RESULTS]]
    return Drawing(picture, caption, table, [*found.notes, _EFFECT], _offered(rows), by_seed(seeds, own))


@chart("cost-difference", "Comparison", needs=[BACKWARDS, LEVELS])
def cost_difference(view: View, metric: str | None) -> Drawing:
    """How the cost of each backward differs between levels, every seed of it."""
    found, name = view.costs(metric or LOSS), metric or LOSS
    if found.differences is None or found.differences.rows["difference"].isna().all():
        raise ConfigError("no backward has a cost at two levels to compare")
    cells = found.differences.cells
    of_seed = found.differences.seeds.join(found.differences.rows["ln_backward"])
    rows, seeds = (in_words(view, part, cells) for part in (found.differences.rows, of_seed))
    rows, seeds = (strongest_pairs(view, part.assign(place=part["ln_backward"])) for part in (rows, seeds))
    whole = rows
    rows, seeds, left = strongest_places(rows, seeds)
    title = named(view, [name], "difference of costs" + " in {}" * (name != LOSS))
    picture = _dots(rows, seeds, title=title, rows_title="Backward")
    which = f" ({rows['pair'].iloc[0]})" if rows["pair"].nunique() == 1 else ""
    of = f"How the cost of each backward in {name} differs between levels of {found.by}{which}"
    caption = f"{of}: every seed, the mean, its 95% interval{left}."
    own = [name for name in ("cell", "pair") if name in rows]
    table = whole[[*own, "place", "mean_a", "mean_b", *_RESULTS]].rename(columns={"place": "backward"})
    notes = [*found.differences.notes, _EFFECT]
    return Drawing(picture, caption, table, notes, _offered(rows), by_seed(seeds, own))


@chart("diverged", "Comparison", needs=[Need("runs", ["diverged_step"], 1, "no run diverged, which is good")])
def diverged(view: View, metric: str | None) -> Drawing:
    """The update at which each run diverged."""
    lost = view.runs[view.runs["status"] == DIVERGED]
    seeds = lost.dropna(subset="diverged_step")[["cell", "level", "seed", "diverged_step"]]
    seeds = seeds.rename(columns={"diverged_step": "value"})
    if seeds.empty:
        raise ConfigError("no run diverged, which is good")
    by = view.runs["level"].nunique() > 1
    seeds = seeds.assign(place=seeds["level"] if by else seeds["cell"])
    rows = seeds.groupby("place", sort=False)["value"].agg(["mean", "size"]).reset_index()
    rows = rows.rename(columns={"size": "n"}).assign(low=np.nan, high=np.nan)
    drawn = rows.head(MOST)
    left = f"; the first {MOST} of {len(rows):,}, the others are in the CSV" * (len(rows) > MOST)
    of = f"{counted(len(lost), 'diverged run')}, of {len(view.runs):,}"
    caption = f"The update at which each of {of}, was stopped: every run, the mean{left}."
    of_drawn = seeds.loc[seeds["place"].isin(drawn["place"]), ["place", "level", "seed", "value"]]
    title, rows_title = "Updates until the run diverged", worded(view.by) if by else None
    picture = marks.dots(of_drawn, drawn.drop(columns="n"), title=title, rows_title=rows_title)
    return Drawing(picture, caption, rows[["place", "mean", "n"]], seeds=seeds.drop(columns="place"))


# Norms


@chart("heatmap", "Layers", needs=[NORMS, LEVELS])
def heatmap(view: View, metric: str | None) -> Drawing:
    """The standardized difference of every metric at every norm, in depth order."""
    few_levels(view)
    found = view.compared([metric]) if metric else view.norms_compared
    rows = strongest_pairs(view, in_words(view, found.rows, found.cells)).dropna(subset="difference")
    if rows.empty:
        raise ConfigError(_NO_PAIRS)
    of_block = view.merged.frame("layers", ["site", "block"]).drop_duplicates("site").set_index("site")["block"]
    sites: list[str] = []
    for site in [one for one in view.sites if one in set(rows["site"])]:  # norms outside of blocks stand apart
        gap = bool(sites) and bool(pd.isna(of_block[site]) != pd.isna(of_block[sites[-1]]))
        sites += [" "] * gap + [site]
    clear = (rows["p_adjusted"] < 1 - STUDENT.confidence) & ~((rows["low"] <= 0) & (rows["high"] >= 0))
    rows = rows.assign(
        shade=rows["effect"].fillna(0.0),
        shown=rows["difference"].map("{:.2g}".format),
        clear=clear,
    )
    own = [name for name in ("cell", "pair") if name in rows and rows[name].nunique() > 1]
    rows, lost = capped(rows)
    cells = rows[
        [*own, "metric", "site", "shade", "shown", "clear", "difference", "low", "high", "p_adjusted", "effect"]
    ]
    picture = marks.shades(cells, legend="Difference in standard deviations over seeds", sites=sites, breaks=BREAKS)
    pair = "" if "pair" in own else f" ({rows['pair'].iloc[0]})"
    caption = (
        f"Difference of each metric at each norm between levels of {view.by}{pair}, coloured by its size in standard "
        "deviations over seeds: blue below 0, orange above. Faded: not clear of zero."
    )
    table = rows[[*own, "metric", "site", "mean_a", "mean_b", *_RESULTS]]
    return Drawing(picture, caption, table, [*lost, *found.notes, _EFFECT], choices(cells, "site", "metric"))


@chart("seeds", "Layers", needs=[NORMS])
def seeds(view: View, metric: str | None) -> Drawing:
    """A metric at a norm after the last update, every seed of it."""
    values, notes = finite(view.layers([metric] if metric else view.metrics, last=True))
    values = values[values["level"].isin(few(view))].rename(columns={"level": "place"})
    values = last_norm_first(values).drop(columns=["step", *["cell"] * (len(view.cells) < 2)])
    values, lost = capped(values.assign(level=values["place"]))
    rows = view.means(values.assign(cell=values.get("cell", "")), ["cell", "metric", "site", "level", "place"])
    several = rows["place"].nunique() > 1
    levels = _levels(view) if several else marks.ONE
    title = named(view, rows["metric"])
    picture = marks.dots(values, rows, title=title, levels=levels, zero=False, joined=several)
    joined = ", those of one seed joined" * several
    caption = (
        f"The chosen metric at the chosen norm after the last update: every seed{joined}, the mean, its 95% interval."
    )
    return Drawing(picture, caption, rows, [*lost, *notes], choices(values), values)


@chart("curves", "Layers", needs=[NORMS])
def curves(view: View, metric: str | None) -> Drawing:
    """A metric at a norm over the updates."""
    values, lost = finite(view.layers([metric] if metric else view.metrics, last=False))
    if values["step"].nunique() < 2:
        remedy = "python run.py diagnostics=trajectory measures them along the way"
        raise ConfigError("norms were measured at one step alone" + f": {remedy}" * view.ours)
    values = values[values["level"].isin(few(view))]
    per_step = max(1, len(values[["cell", "site", "metric", "level"]].drop_duplicates()))
    values, notes = thinned(values, max(3, min(MOST_STEPS, frames.MOST_ROWS // per_step)))
    rows, more = capped(view.means(last_norm_first(values), ["cell", "metric", "site", "step", "level"]))
    by_chance = chance(view, ["cell", "metric", "site"], last=False)
    picture = marks.lines(rows, x="step", levels=_levels(view), title=named(view, rows["metric"]), references=by_chance)
    caption = "The chosen metric at the chosen norm after so many updates: mean over seeds and its 95% interval."
    caption += " Dashed: that of a random direction." * (len(by_chance) > 0) + few_said(view)
    return Drawing(picture, caption, rows, [*notes, *more, *lost], choices(rows))


@chart("depth", "Layers", needs=[NORMS])
def depth(view: View, metric: str | None) -> Drawing:
    """A metric at every norm, from the first to the last."""
    values, notes = finite(view.layers([metric] if metric else view.metrics, last=True))
    if values.empty:
        raise ConfigError("no norm of these runs has a finite number")
    values = values[values["level"].isin(few(view))]
    order = {site: at for at, site in enumerate(view.sites)}
    values = values.sort_values("site", key=lambda sites: sites.map(order), kind="stable")
    rows = view.means(values, ["cell", "metric", "level", "site"])
    rows = (
        rows.sort_values("metric", key=lambda names: names.map(view.metrics.index), kind="stable")
        if not metric
        else rows
    )
    rows, lost = capped(rows)
    by_chance = chance(view, ["cell", "metric", "site"], last=True)
    by_chance = by_chance[by_chance["metric"].isin(rows["metric"])]
    log = (metric or "").startswith("sigma") and bool((rows[["mean", "low"]].min() > 0).all())
    picture = marks.lines(
        rows,
        x="site",
        levels=_levels(view),
        title=named(view, rows["metric"]),
        log=log,
        references=by_chance,
    )
    of = metric or "The chosen metric"
    caption = f"{of} from the first norm to the last: mean over seeds and its 95% interval, after the last update."
    caption += " Dashed: that of a random direction." * (len(by_chance) > 0) + few_said(view)
    return Drawing(picture, caption, rows, [*lost, *notes], choices(rows, "site"))


# Updates


@chart("losses", "Learning", needs=[RECORDED])
def losses(view: View, metric: str | None) -> Drawing:
    """A loss over the updates, beside those of a frozen body and of a bigram model."""
    values, notes = _learning(view, metric)
    rows = view.means(values[values["level"].isin(few(view))], ["cell", "metric", "step", "level"])
    references = floors(view, values)
    return _of_learning(view, rows, references, _levels(view), notes, "", few_said(view))


@chart("backwards", "Learning", needs=[BACKWARDS, RECORDED])
def backwards(view: View, metric: str | None) -> Drawing:
    """A loss over the updates with each backward, at one level."""
    if view.by == "ln_backward":
        raise ConfigError("the backwards are the levels of the other chart")
    values, notes = _learning(view, metric)
    runs = view.runs[["run_id", "ln_backward"]].drop_duplicates()
    values = values.merge(runs, on="run_id")
    others = [name for name in view.settings if name != "ln_backward"]
    names = list(dict.fromkeys(sorted(view.runs["ln_backward"], key=lambda name: name != EXACT)))
    rows = view.means(values, ["cell", "metric", "step", "level", "ln_backward"])
    keys = view.runs[["cell", *others]].drop_duplicates()
    rows = rows.merge(keys, on="cell") if "cell" in rows else rows
    rows = view.placed(rows, others).rename(columns={"level": "among", "ln_backward": "level"})
    rows = rows[
        [name for name in ("cell", "metric", "among", "step", "level", "mean", "low", "high", "n") if name in rows]
    ]
    if rows["among"].nunique() < 2:
        rows = rows.drop(columns="among")
    return _of_learning(view, rows, None, Levels(worded("ln_backward"), names), notes, " with each backward")


def _learning(view: View, metric: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Return the losses over the updates, with their run_id, of those that were recorded more than once in a run."""
    held = view.merged.columns("curves")
    parts = []
    for name in [metric] if metric else [name for name in RUN_METRICS if name in held]:
        values = view.curves(name)
        if values.groupby("run_id")["step"].nunique().max() > 1:
            parts.append(values)
    if not parts:
        remedy = ": python run.py eval.every=50 measures it along the way" * view.ours
        raise ConfigError(f"{metric or 'a loss'} was measured at most once in a run{remedy}")
    values, lost = finite(pd.concat(parts, ignore_index=True))
    values, notes = thinned(values, MOST_STEPS)
    return values, notes + lost


def _of_learning(
    view: View,
    rows: pd.DataFrame,
    references: pd.DataFrame | None,
    levels: Levels,
    notes: Sequence[str],
    which: str,
    few: str = "",
) -> Drawing:
    rows, lost = capped(rows)
    of = rows["metric"].iloc[0] if rows["metric"].nunique() == 1 else "The chosen loss"
    title = named(view, rows["metric"])
    picture = marks.lines(rows, x="step", levels=levels, title=title, references=references)
    caption = f"{of}{which} after so many updates: mean over seeds and its 95% interval."
    if references is not None and len(references):
        caption += f" Dashed: {' and '.join(dict.fromkeys(references['reference']))}."
    return Drawing(picture, caption + few, rows, [*notes, *lost], choices(rows))


# Sizes


SIZES = {"scaling-width": "model.n_embd", "scaling-depth": "model.n_layer", "scaling-steps": "steps"}


def _of_size(name: str, example: str) -> Callable[[Function], Function]:
    size = SIZES[name]
    otherwise = f"{size} is the same in all runs: python run.py -m {size}={example} seed=1,2,3 varies it"
    return chart(name, "Scaling", needs=[Need("runs", [size], 2, otherwise)], size=size)


@_of_size("scaling-steps", "250,500,1000")
@_of_size("scaling-depth", "2,4,8")
@_of_size("scaling-width", "32,64,128")
def scaling(view: View, metric: str | None, size: str) -> Drawing:
    """A metric against a size, with the slope of their logarithms and a line of slope −1."""
    require_known(view, metric)
    of_layers = [name for name in ([metric] if metric else view.tested) if name in view.merged.columns("layers")]
    of_runs = [name for name in ([metric] if metric else RUN_METRICS) if name not in of_layers and name in view.runs]
    of_runs = [name for name in of_runs if view.runs[name].notna().any()]
    points, fits, notes = pd.DataFrame(), pd.DataFrame(), []
    for names, table in ((of_runs, "runs"), (of_layers, "layers")):
        if names:
            found = slopes.scaling(view.merged, size, metrics=names, table=table, where=view.where)
            both = (
                view.placed(arranged(part, found.cells, view.by), found.cells) for part in (found.points, found.slopes)
            )
            more_points, more_fits = (part.assign(site=part.get("site", "")) for part in both)
            points, fits = pd.concat([points, more_points]), pd.concat([fits, more_fits])
            notes += [note for note in found.notes if note not in notes]
    if metric is None and len(points):  # all share one axis, on which only a positive number has a place
        positive = points.groupby("metric", sort=False)["mean"].transform("min") > 0
        points = points[positive]
        fits = fits[fits["metric"].isin(points["metric"])]
    if points.empty:
        raise ConfigError("no run has a number that could scale")
    points, fits = (last_norm_first(part.reset_index(drop=True)) for part in (points, fits))
    points, lost = capped(points.assign(x=points[size]))
    own = [name for name in ("cell", "metric", "site") if name in points and (points[name] != "").any()]
    points = points[[*own, "level", "x", "mean", "low", "high"]]
    log = bool((points["mean"] > 0).all())
    points["low"] = points["low"].where((points["low"] > 0) | (not log))
    levels = _levels(view) if points["level"].nunique() > 1 else Levels("", points["level"].unique().tolist())
    picture = marks.lines(
        points,
        x="x",
        levels=levels,
        title=named(view, points["metric"]),
        log=log,
        size=worded(size),
        references=falling(points[points["metric"].isin(of_layers)], own) if log and of_layers else None,
        said=slopes_said(fits, own),
    )
    of = f"{metric or 'The chosen metric'}{' at the chosen norm' * ('site' in own)}"
    caption = (
        f"{of} against {size}: mean over seeds and its 95% interval, with the slope of their logarithms and its interval. "
        f"{'Dashed: slope −1. ' * (log and bool(of_layers))}Nothing is drawn beyond the sizes that were run."
    )
    columns = [*own, *(name for name in fits if name not in {*own, "site", "metric", "cell"})]
    return Drawing(picture, caption, fits[columns], [*lost, *notes], choices(points))


# What charts share


def _levels(view: View) -> Levels:
    return Levels(worded(view.by), view.levels)


def _dots(
    rows: pd.DataFrame, seeds: pd.DataFrame, *, title: marks.Title, rows_title: str | None, levels: Levels = marks.ONE
) -> marks.Picture:
    """Draw differences, of which the columns to choose by are kept."""
    own = [name for name in ("cell", "pair", "metric") if name in rows and rows[name].nunique() > 1]
    keys = [*own, "place", *["level"] * bool(levels.names)]
    dots = seeds.dropna(subset="difference").rename(columns={"difference": "value"})
    return marks.dots(
        dots[[*keys, "seed", "value"]],
        rows.rename(columns={"difference": "mean"})[[*keys, "mean", "low", "high"]].dropna(subset="mean"),
        title=title,
        rows_title=rows_title,
        levels=levels,
    )


def _offered(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return what `_dots` lets a reader choose of these rows."""
    return choices(rows[[name for name in ("cell", "pair", "metric") if name in rows and rows[name].nunique() > 1]])
