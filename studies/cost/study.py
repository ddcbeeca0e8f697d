"""Compute every number of docs/study.md from the merged tables in this folder.

    python studies/cost/study.py           # print each block
    python studies/cost/study.py --write   # put them into docs/study.md, between their markers

A test holds the page's blocks equal to this output.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lnjac.comparing import cost as comparing_cost
from lnjac.comparing import intervals as stats
from lnjac.comparing import scaling
from lnjac.comparing.experiment import LAST_NORM
from lnjac.comparing.tables import MergedTables, open_tables
from lnjac.reporting.verdict import verdict
from lnjac.runs.merge import load
from lnjac.runs.merged import companions

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "study.md"
SHORT, LONG = "cost250", "cost1000"
LONG_BF16 = "cost1000_bf16"
METHODS = "methods250"
RATES, BEST = "rates", "best_rate"
WIDTH, STEPS = "width", "step"
INSIDE, DRAWS = "inside", "draws"
PRIMARY = "center_scale"
GROWN = ("r_mean", "radial_share", "sigma_mean")
WIDENED = {"r_mean": -1, "radial_share": -1, "sigma_mean": None, "enrichment_mean": 0, "enrichment_radial_share": 0}
"""Metrics by width, and the slope that the claim gives each."""
ALONG = (0, 1, 4, 16, 64, 256, 1024, 2000)
"""Measured steps that the page shows."""
SHOWN = ("center_scale", "projected", "ste", "scale")
CELL = ["method", "attn_mode", "ln_backward"]

BLOCKS: dict[str, Callable[[], str]] = {}


def block(function: Callable[[], str]) -> Callable[[], str]:
    BLOCKS[function.__name__] = function
    return function


def table(name: str, kind: str = "runs") -> pd.DataFrame:
    return load(companions(HERE / f"{name}.parquet")[kind])


def study(*names: str) -> MergedTables:
    return open_tables([HERE / f"{name}.parquet" for name in names])


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:+.3f}"


def interval(found: Any) -> str:
    """Of what has `low` and `high`."""
    return "–" if np.isnan(found.low) else f"{found.low:+.3f} to {found.high:+.3f}"


def estimated(found: Any) -> str:
    """Of what has `estimate`, `low` and `high`."""
    return f"{signed(float(found.estimate))} ({interval(found)})"


def p_value(value: float) -> str:
    return "–" if np.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def spread(values: "pd.Series[float]", form: str = ".2f") -> str:
    """From the smallest to the largest: of several norms or blocks, which are never taken together."""
    return f"{values.min():{form}} to {values.max():{form}}"


def inner(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the norms in the blocks."""
    return rows[rows["site"] != LAST_NORM]


ALPHA = 0.05


def as_declared(names: list[str], p: "npt.NDArray[np.float64]", adjusted: "npt.NDArray[np.float64]") -> str:
    """The rows whose `adjusted` p is below ALPHA and by the adjustment declared before the runs, over all of them, is not."""
    other = [
        f"{name} ({p_value(one)})"
        for name, one, ours in zip(names, stats.holm(p), adjusted, strict=True)
        if ours < ALPHA <= one
    ]
    said = f"Holm p below {ALPHA} within the method, but not over all {len(p)} rows, as declared before the runs"
    return f"{said}: {', '.join(other) or 'none'}."


@block
def verdict_short() -> str:
    """The answer in words after 250 updates: `lnjac cost` prints it first."""
    return in_words(SHORT)


@block
def verdict_long() -> str:
    return in_words(LONG)


def in_words(name: str) -> str:
    """The sentences on the floor, on the cost of PRIMARY and on its difference."""
    return "\n>\n".join(f"> {sentence}" for sentence in verdict(study(name), where="method == 'fa'").sentences[:2])


@block
def provenance() -> str:
    lines = []
    for path in sorted(HERE.glob("*.runs.parquet")):
        runs = load(path)
        diverged = int((runs["status"] == "diverged").sum())
        commits = ", ".join(sorted(commit[:7] for commit in runs["commit"].unique()))
        dirty = " (changed)" if runs["dirty"].any() else ""
        what = [", ".join(sorted(map(str, runs[name].unique()))) for name in ("precision", "data", "torch_version")]
        hours = f"{runs['wall_s'].sum() / 3600:.1f}"
        name = path.name.removesuffix(".runs.parquet")
        lines.append([f"`{name}`", str(len(runs)), str(diverged), *what, commits + dirty, hours])
    return markdown(["table", "runs", "diverged", "precision", "corpus", "torch", "commit", "process hours"], lines)


def backwards(rows: pd.DataFrame) -> "pd.Series[str]":
    """Each row's backward, with the sites if it has not all."""
    sites = rows["ln_backward.sites"]
    return rows["ln_backward"] + ("@" + sites).where(sites != "all", "")


def below_control(runs: pd.DataFrame, column: str) -> str:
    """Validation loss by method, mode and this column, and its margin below frozen blocks with the exact backward."""
    done = runs[runs["status"] == "done"]
    values = done.pivot_table("val_loss_nats", ["method", "attn_mode", column], "seed")
    frozen = values.loc["frozen"].droplevel(column)
    lines = []
    for (method, mode, level), seeds in values.iterrows():
        margin = "" if method == "frozen" else estimated(stats.paired((frozen.loc[mode] - seeds).to_numpy()))
        which = f"`{level}`" if column == "backward" else level
        lines.append([f"`{method}`", mode, which, f"{seeds.mean():.3f}", margin, str(seeds.count())])
    return markdown(
        ["method", "attention", column, "validation loss", "below frozen by (95 % interval)", "seeds"], lines
    )


def floor(*names: str) -> str:
    """The exact backward's losses, beside those of the corpus's own statistics."""
    runs = pd.concat([table(name) for name in names])
    baselines = runs.iloc[0]
    said = f"Unigram {baselines['unigram_nats']:.3f}, bigram {baselines['bigram_nats']:.3f} nats."
    return f"{said}\n\n{below_control(runs[runs['ln_backward'] == 'exact'], 'precision')}"


@block
def floor_short() -> str:
    return floor(SHORT, METHODS)


@block
def floor_long() -> str:
    return floor(LONG)


@block
def below_frozen() -> str:
    runs = table(LONG)
    return below_control(runs.assign(backward=backwards(runs)), "backward")


def between_precisions(bf16: pd.DataFrame, fp32: pd.DataFrame) -> str:
    """Validation losses of runs that differ in precision alone, seed by seed, with a surrogate at all norms or at none."""
    losses = [
        runs[runs["ln_backward.sites"] == "all"].pivot_table("val_loss_nats", CELL, "seed") for runs in (bf16, fp32)
    ]
    apart = losses[0] - losses[1]
    lines = [
        [f"`{method}`", mode, f"`{backward}`", f"{row.mean():+.4f}", f"{row.abs().max():.4f}", str(row.count())]
        for (method, mode, backward), row in apart.dropna(how="all").iterrows()
    ]
    return markdown(["method", "attention", "backward", "bf16 − fp32, mean", "largest", "seeds"], lines)


@block
def precision() -> str:
    """The long runs, in bf16, as they passed the short ones' last update, against those, in fp32."""
    short = table(SHORT)
    curves = table(LONG, "curves")
    passing = curves.loc[curves["step"] == short["steps"].iloc[0], ["run_id", "val_loss_nats"]]
    long = table(LONG).drop(columns="val_loss_nats").merge(passing, on="run_id")
    return between_precisions(long, short)


@block
def precision_long() -> str:
    """bp's long runs made in both."""
    return between_precisions(table(LONG_BF16), table(LONG))


def headline(name: str) -> str:
    """Every seed of the primary comparison, and its paired t interval."""
    runs = table(name)
    runs = runs[(runs["method"] == "fa") & (runs["status"] == "done") & (runs["ln_backward.sites"] == "all")]
    wide = runs.pivot_table("val_loss_nats", "seed", ["attn_mode", "ln_backward"])
    costs = pd.DataFrame({mode: wide[mode][PRIMARY] - wide[mode]["exact"] for mode in ("softmax", "sigmoid")})
    difference = costs["softmax"] - costs["sigmoid"]
    lines = [[str(seed), *(signed(value) for value in (*costs.loc[seed], difference[seed]))] for seed in costs.index]
    means = [stats.paired(values.to_numpy()) for values in (costs["softmax"], costs["sigmoid"], difference)]
    lines.append(["**mean**", *(f"**{signed(float(one.estimate))}**" for one in means)])
    lines.append(["95 % interval", *map(interval, means)])
    lines.append(["p", *(p_value(float(one.p)) for one in means)])
    found = means[-1]
    more = "more" if found.estimate > 0 else "less"
    holds = "excludes" if found.low > 0 or found.high < 0 else "includes"
    said = (
        f"Under softmax attention `center_scale` cost {abs(found.estimate):.3f} nats {more} than under sigmoid "
        f"(95 % interval {interval(found)}, p = {p_value(float(found.p))}, d_z = {found.effect:.1f}, "
        f"{found.n} seeds): the interval {holds} zero."
    )
    return f"{said}\n\n{markdown(['seed', 'cost under softmax', 'under sigmoid', 'difference'], lines)}"


@block
def primary() -> str:
    return headline(SHORT)


@block
def second() -> str:
    return headline(LONG)


TRAINED = "method != 'frozen'"


@cache
def costs_of(*names: str, where: str = TRAINED) -> comparing_cost.Costs:
    return comparing_cost.cost(study(*names), by="attn_mode", where=where, reference="sigmoid")


def every_seed(*names: str) -> str:
    """The cost that each seed paid for each backward."""
    costs = costs_of(*names).costs.seeds
    keys = [name for name in ("method", "a", "attn_mode") if name in costs]
    wide = costs.pivot_table("difference", keys, "seed", sort=False).sort_index(axis=1)
    lines = []
    for (*others, mode), row in wide.iterrows():
        lines.append([*(f"`{name}`" for name in others), mode, *map(signed, row)])
    heads = ["method"] * ("method" in keys) + ["backward", "attention", *(f"seed {seed}" for seed in wide)]
    return markdown(heads, lines)


def all_costs(*names: str, where: str = TRAINED) -> str:
    """Cost of every backward under each attention mode, and the difference of the two, by what else varies."""
    found = costs_of(*names, where=where)
    assert found.differences is not None
    cells = [name for name in ("method", "precision") if name in found.differences.rows]
    wide = {(*row[cells], row["a"], row["attn_mode"]): row for _, row in found.costs.rows.iterrows()}
    lines = []
    rows = found.differences.rows
    for _, row in rows.iterrows():
        each = [wide[(*row[cells], row["ln_backward"], mode)] for mode in ("softmax", "sigmoid")]
        lost = sum(int(one["diverged_a"]) for one in each)
        lines.append(
            [
                *(f"`{row[name]}`" for name in (*cells, "ln_backward")),
                *(f"{signed(one['difference'])} ({interval(one)})" for one in each),
                f"{signed(row['difference'])} ({interval(row)})",
                p_value(row["p_adjusted"]),
                str(row["n"]),
                f"{lost}/{sum(int(one['runs_a']) for one in each)}",
            ]
        )
    heads = [*cells, "backward", "cost, softmax", "cost, sigmoid", "difference", "Holm p", "seeds", "diverged"]
    if not cells:
        return markdown(heads, lines)
    names = [" ".join(f"`{row[name]}`" for name in (*cells, "ln_backward")) for _, row in rows.iterrows()]
    declared = as_declared(names, rows["p"].to_numpy(), rows["p_adjusted"].to_numpy())
    return f"{markdown(heads, lines)}\n\n{declared}"


@block
def costs_short() -> str:
    return all_costs(SHORT, METHODS)


@block
def seeds_short() -> str:
    return every_seed(SHORT, METHODS)


@block
def costs_frozen() -> str:
    return all_costs(SHORT, where="method == 'frozen'")


@block
def costs_long() -> str:
    return all_costs(LONG)


@block
def seeds_long() -> str:
    return every_seed(LONG)


@block
def projected_long() -> str:
    """Validation losses on the way of bp's long runs with `projected` under sigmoid attention, and σ at ln_f at their end."""
    chosen = "method == 'bp' and attn_mode == 'sigmoid' and ln_backward == 'projected'"
    curves = table(LONG, "curves").query("step > 0").merge(table(LONG).query(chosen)[["run_id", "seed"]])
    wide = curves.pivot_table("val_loss_nats", "seed", "step")
    sigma = table(LONG, "layers").query(f"{chosen} and site == 'ln_f'").set_index("seed")["sigma_mean"]
    lines = [[str(seed), *(f"{loss:.3f}" for loss in row), f"{sigma[seed]:.3g}"] for seed, row in wide.iterrows()]
    return markdown(["seed", *(f"{step} updates" for step in wide), "σ at ln_f"], lines)


def losses_by_rate() -> pd.DataFrame:
    """Mean validation loss of each cell at each rate of the grid, on its own seeds; infinite where a run diverged."""
    runs = table(RATES)
    loss = runs["val_loss_nats"].where(runs["status"] == "done", np.inf)
    found = runs.assign(loss=loss).pivot_table("loss", CELL, "optimizer.lr", sort=False).sort_index(axis=1)
    return found.loc[["fa", "bp", "dfa"]]


@block
def rates() -> str:
    """Validation loss after 250 updates at each learning rate, on seeds that are not the study's; the best is bold."""
    runs, wide = table(RATES), losses_by_rate()
    lines = []
    for (method, mode, backward), row in wide.iterrows():
        values = ["–" if np.isnan(x) else "diverged" if np.isinf(x) else f"{x:.3f}" for x in row]
        values = [f"**{value}**" if x == row.min() else value for value, x in zip(values, row, strict=True)]
        lines.append([f"`{method}`", mode, f"`{backward}`", *values])
    seeds = " and ".join(map(str, sorted(runs["seed"].unique())))
    said = f"{(runs['status'] == 'diverged').sum()} of {len(runs)} runs diverged. Means over seeds {seeds}."
    heads = ["method", "attention", "backward", *(f"lr {lr:g}" for lr in wide)]
    return f"{said}\n\n{markdown(heads, lines)}"


@block
def costs_best_rate() -> str:
    """Cost of each backward at its own rate, against the exact one's at its own, paired by seed.

    Where the default rate is the best, the runs are those of METHODS.
    """
    best = losses_by_rate().idxmin(axis=1)
    runs = pd.concat([table(BEST), table(METHODS)])
    runs = runs[runs["ln_backward.sites"] == "all"].merge(best.rename("optimizer.lr").reset_index())
    wide = runs.pivot_table("val_loss_nats", "seed", CELL)
    modes = ("softmax", "sigmoid")
    costs = {}
    for method in best.index.unique("method"):
        for name in SHOWN:
            each = [wide[method, mode, name] - wide[method, mode, "exact"] for mode in modes]
            costs[method, name] = [stats.paired(values.to_numpy()) for values in (*each, each[0] - each[1])]
    p_values = pd.Series({key: float(difference.p) for key, (*_, difference) in costs.items()})
    adjusted = p_values.groupby(level=0, sort=False).transform(stats.holm)  # a method's backwards are one family
    lines = []
    for ((method, name), found), p in zip(costs.items(), adjusted, strict=True):
        rates = [f"{best[method, mode, of]:g}" for of in (name, "exact") for mode in modes]
        sides = map(estimated, found)
        lines.append([f"`{method}`", f"`{name}`", *rates, *sides, p_value(float(p)), str(int(found[-1].n))])
    heads = ["method", "backward", *(f"lr, {mode}" for mode in modes), *(f"exact's, {mode}" for mode in modes)]
    said = f"{(runs['status'] == 'diverged').sum()} of {len(runs)} runs diverged."
    heads += [*(f"cost, {mode}" for mode in modes), "difference", "Holm p", "seeds"]
    names = [f"`{method}` `{name}`" for method, name in costs]
    declared = as_declared(names, p_values.to_numpy(), adjusted.to_numpy())
    return f"{said}\n\n{markdown(heads, lines)}\n\n{declared}"


@block
def width() -> str:
    """At ln_f, and as a slope of log metric against log width at each norm, after 250 updates."""
    found = scaling.scaling(study(WIDTH), "model.n_embd", metrics=[*WIDENED])
    points = found.points[found.points["site"] == LAST_NORM]
    points = points.pivot_table("mean", ["metric", "attn_mode"], "model.n_embd", sort=False)
    lines = []
    for (metric, mode), row in points.iterrows():
        slopes = found.slopes[(found.slopes["metric"] == metric) & (found.slopes["attn_mode"] == mode)]
        (last,) = slopes[slopes["site"] == LAST_NORM].itertuples()
        off, claimed = "", WIDENED[str(metric)]
        if claimed is not None:
            beyond = slopes[(slopes["low"] > claimed) | (slopes["high"] < claimed)]["site"]
            off = f"{claimed}: {', '.join(beyond) or 'none'}"
        at = f"{last.slope:+.2f} ({last.low:+.2f} to {last.high:+.2f})"
        values = (f"{value:.3g}" for value in row)
        bent = f"{int(slopes['bends'].sum())}" + ", with ln_f" * bool(last.bends)
        lines.append([f"`{metric}`", mode, *values, at, spread(inner(slopes)["slope"], "+.2f"), off, bent])
    widths = (f"ln_f, width {int(x)}" for x in points)
    heads = ["metric", "attention", *widths, "slope at ln_f (95 % interval)", "slopes in the blocks"]
    heads += ["claimed slope: norms whose interval excludes it", "norms of nine that no line describes"]
    return markdown(heads, lines)


def on_the_way() -> pd.DataFrame:
    layers = table(STEPS, "layers")
    return layers[layers["step"].isin(ALONG)]


@block
def steps() -> str:
    """The shares at ln_f on the way to the last update, means over seeds."""
    rows = on_the_way().query(f"site == '{LAST_NORM}'")
    found = rows.groupby(["attn_mode", "step"])[[*GROWN, "loss_nats"]].mean()
    lines = [
        [mode, str(step), *(f"{value:.3g}" for value in row[[*GROWN]]), f"{row['loss_nats']:.3f}"]
        for (mode, step), row in found.iterrows()
    ]
    return markdown(["attention", "updates", *(f"`{name}` at ln_f" for name in GROWN), "loss of the batch"], lines)


def enrichment(layers: pd.DataFrame, along: str, head: str) -> str:
    """Enrichment of the radial share at ln_f and at the norms of the blocks, each a mean over seeds."""
    lines = []
    for (mode, x), part in layers.groupby(["attn_mode", along]):
        wide = part.pivot_table("enrichment_radial_share", "site", "seed")
        found = stats.paired(wide.to_numpy())
        norms = pd.DataFrame({"site": wide.index, "mean": found.estimate, "low": found.low, "high": found.high})
        inside = inner(norms)
        off = inside[(inside["low"] > 1) | (inside["high"] < 1)]
        (last,) = norms[norms["site"] == LAST_NORM].itertuples()
        lines.append([mode, str(x), f"{last.mean:.2f}", spread(inside["mean"]), f"{len(off)} of {len(inside)}"])
    return markdown(
        ["attention", head, "at ln_f", "at the norms of the blocks", "of these, interval excludes 1"], lines
    )


@block
def enrichment_by_width() -> str:
    return enrichment(table(WIDTH, "layers"), "model.n_embd", "width")


@block
def enrichment_by_step() -> str:
    return enrichment(on_the_way(), "step", "updates")


@block
def growth() -> str:
    """Whether a share grows more under softmax at some norm: log of the last over the first, paired by seed.

    Of each metric ln_f and the norm with the largest difference; its nine norms are one family.
    """
    layers = table(STEPS, "layers")
    lines = []
    for metric in GROWN:
        wide = np.log(layers.pivot_table(metric, ["attn_mode", "site", "seed"], "step", sort=False))
        grown = (wide[max(ALONG)] - wide[min(ALONG)]).unstack("seed")
        sides = [grown.loc[mode] for mode in ("softmax", "sigmoid")]
        each = [stats.paired(values.to_numpy()) for values in (*sides, sides[0] - sides[1])]
        adjusted = stats.holm(each[-1].p)
        shown = sorted({sides[0].index.get_loc(LAST_NORM), int(np.abs(each[-1].estimate).argmax())}, reverse=True)
        signs = np.sign(each[-1].estimate[adjusted < ALPHA])
        below = f"{(signs > 0).sum()} softmax, {(signs < 0).sum()} sigmoid"
        for i in shown:
            row = [f"{one.estimate[i]:+.3f} ({one.low[i]:+.3f} to {one.high[i]:+.3f})" for one in each]
            lines.append([f"`{metric}`", sides[0].index[i], *row, p_value(float(adjusted[i])), below])
    return markdown(
        ["log growth of", "at", "softmax", "sigmoid", "difference", "Holm p", "norms below 0.05, more under"], lines
    )


@block
def sigma_at_ln_f() -> str:
    """σ at ln_f after the last update, exact against center_scale, by attention mode and method."""
    rows = pd.concat([table(name, "layers") for name in (SHORT, METHODS)])
    rows = rows[(rows["site"] == "ln_f") & rows["ln_backward"].isin(["exact", PRIMARY])]
    rows = rows.assign(backward=backwards(rows))
    wide = rows.pivot_table(["sigma_mean", "radial_share"], ["method", "attn_mode", "backward"])
    lines = [
        [f"`{method}`", mode, f"`{backward}`", f"{row['sigma_mean']:.2f}", f"{row['radial_share']:.3f}"]
        for (method, mode, backward), row in wide.iterrows()
    ]
    return markdown(["method", "attention", "backward", "σ at ln_f", "radial share at ln_f"], lines)


def inside(kind: str) -> pd.DataFrame:
    """A table of the runs analysed in full, with their config."""
    config = table(INSIDE)[["run_id", "diag_id", "attn_mode", "ln_backward", "seed"]]
    return table(INSIDE, kind).merge(config, on=["run_id", "diag_id"])


@block
def swaps() -> str:
    """Runs trained with the exact backward, after the last update: what one swapped update would do, beside the cost."""
    rows = inside("swaps")
    rows = rows[(rows["ln_backward"] == "exact") & (rows["step"] == rows["step"].max())]
    rows = rows[rows["place"].isin(["all", "ln_f"]) & rows["surrogate"].isin(["exact", *SHOWN])]
    keys = ["place", "surrogate", "attn_mode"]
    found = rows[rows["level"] == "model"].groupby(keys, sort=False)[["grad_cos", "precond_cos", "descent"]].mean()
    found = found.map("{:.3f}".format)
    blocks = rows[rows["part"].str.startswith("blocks.") & (rows["level"] == "block")]
    of_block = blocks.groupby([*keys, "part"])["grad_cos"].mean()
    found.insert(1, "blocks", of_block.groupby(keys).agg(partial(spread, form=".3f")))
    costs = costs_of(SHORT).costs.rows
    paid = {(row["a"], row["attn_mode"]): row["difference"] for _, row in costs.iterrows()}
    lines = []
    for (place, surrogate, mode), row in found.iterrows():
        trained = surrogate if place == "all" else f"{surrogate}@ln_f"
        cost = paid.get((trained, mode), np.nan)
        lines.append([place, f"`{surrogate}`", mode, *row, signed(cost)])
    heads = [
        "place",
        "backward",
        "attention",
        "cosine of gradient",
        "in each block",
        "of P·gradient",
        "descent",
        "cost of training so",
    ]
    return markdown(heads, lines)


@block
def trajectory() -> str:
    """σ and radial share at ln_f and the batch's loss, on the way."""
    rows = table(INSIDE, "layers")
    rows = rows[rows["site"] == "ln_f"]
    found = rows.groupby(["attn_mode", "ln_backward", "step"])[["sigma_mean", "radial_share", "loss_nats"]].mean()
    lines = [
        [
            mode,
            f"`{backward}`",
            str(step),
            f"{row['sigma_mean']:.3g}",
            f"{row['radial_share']:.3f}",
            f"{row['loss_nats']:.3f}",
        ]
        for (mode, backward, step), row in found.iterrows()
    ]
    return markdown(
        ["attention", "backward", "updates", "σ at ln_f", "radial share at ln_f", "loss of the batch"], lines
    )


@block
def attention_weights() -> str:
    """What the attention layers do with their context, on the way: means over layers and seeds."""
    rows = inside("mechanism")
    rows = rows[rows["place"].str.endswith(".attn")]
    wide = rows.pivot_table("value", ["attn_mode", "ln_backward", "step"], "quantity")
    lines = [
        [mode, f"`{backward}`", str(step), *(f"{row[name]:.3g}" for name in ("row_mass", "entropy", "saturation"))]
        for (mode, backward, step), row in wide.iterrows()
    ]
    heads = ["attention", "backward", "updates", "row mass", "entropy, nats", "saturated weights"]
    return markdown(heads, lines)


@block
def radial_paths() -> str:
    """The radial part with the exact backward: Σ⟨g,z⟩ of ln_f, and the largest |Σ⟨g,z⟩| of the others, by path.

    Means over seeds; the largest is that of one norm.
    """
    rows = inside("mechanism")
    rows = rows[(rows["ln_backward"] == "exact") & rows["quantity"].str.startswith("gz")]
    sizes = rows["value"].where(rows["place"] == "ln_f", rows["value"].abs())
    rows = rows.assign(at=rows["place"].str.rpartition(".")[2] + rows["quantity"].str[2:], value=sizes)
    of_norm = rows.groupby(["attn_mode", "step", "at", "place"])["value"].mean()
    largest = of_norm[of_norm.abs().groupby(level=[0, 1, 2]).idxmax()].droplevel("place")
    wide = largest.unstack("at")
    shown = {"ln_f": "ln_f", "ln_f_from_logits": "ln_f, by W", "ln_2": "largest at an ln_2", "ln_1": "at an ln_1"}
    shown |= {"ln_1_q": "by queries", "ln_1_k": "by keys", "ln_1_v": "by values"}
    lines = [[mode, str(step), *(f"{value:.3g}" for value in row[[*shown]])] for (mode, step), row in wide.iterrows()]
    return markdown(["attention", "updates", *shown.values()], lines)


@block
def enrichment_of_draws() -> str:
    """A check: over other draws of the feedback, before the first update, mean and radial enrichment should average 1."""
    rows = table(DRAWS, "mechanism").merge(table(DRAWS)[["run_id", "attn_mode", "seed"]], on="run_id")
    wide = rows.pivot_table("value", ["attn_mode", "seed", "place"], "quantity")
    draws = int(rows["n"].iloc[0])
    lines = []
    for metric in ("enrichment_mean", "enrichment_radial_share"):
        value, stderr = (wide[f"{metric}_over_draws{end}"] for end in ("", "_stderr"))
        off = ((value - 1) / stderr).abs()
        for mode, norms in value.groupby("attn_mode"):
            beyond = f"{(off[mode] > 2).sum()} of {len(norms)}"
            by_norm = norms.loc[mode].unstack("seed")
            found = stats.paired(by_norm.to_numpy() - 1)
            smallest = p_value(float(np.nanmin(stats.holm(found.p))))
            lines.append([f"`{metric}`", mode, spread(by_norm.mean(axis=1)), smallest, beyond])
    heads = [
        "metric",
        "attention",
        "at each norm, mean over seeds",
        "smallest Holm p against 1, over the norms",
        "norms of runs off by more than two standard errors",
    ]
    return f"{draws} draws for each norm of each run.\n\n{markdown(heads, lines)}"


@block
def alignment() -> str:
    """The whole gradient by the method against bp's, and with the blocks' weights put back."""
    rows = inside("tensors")
    rows = rows[(rows["kind"] == "model") & (rows["step"] > 0)]
    found = rows.groupby(["attn_mode", "ln_backward", "step"])[["cos", "control_cos", "norm_ratio"]].mean()
    lines = [
        [mode, f"`{backward}`", str(step), *(f"{value:.3f}" for value in row)]
        for (mode, backward, step), row in found.iterrows()
    ]
    return markdown(["attention", "backward", "updates", "cosine with bp", "control", "norm over bp's"], lines)


def blocks() -> Iterator[tuple[str, str]]:
    for name, function in BLOCKS.items():
        yield name, function()


def filled(text: str) -> str:
    """Return the page's text with each block put between its markers.

    Raises:
        KeyError: the text has no markers for a block.
    """
    for name, content in blocks():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise KeyError(f"docs/study.md has no block {name}: add its two markers")
        text = marked.sub(partial(_between, content), text)
    return text


def _between(content: str, found: "re.Match[str]") -> str:
    return f"{found[1]}{content}\n{found[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        for name, content in blocks():
            print(f"<!-- {name} -->\n{content}\n<!-- /{name} -->\n")
