"""Every number of docs/study/README.md, from the merged tables beside it.

    python docs/study/study.py           # print each block
    python docs/study/study.py --write   # put them into README.md, between their markers

A test holds README's blocks equal to this output.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from lnjac import compare, stats
from lnjac.sweep import companions, load

HERE = Path(__file__).resolve().parent
SHORT, LONG = "cost250", "cost1000"
INSIDE = "inside"
PRIMARY = "center_scale"
SHOWN = ("center_scale", "projected", "ste", "scale")

BLOCKS: dict[str, Callable[[], str]] = {}


def block(function: Callable[[], str]) -> Callable[[], str]:
    BLOCKS[function.__name__] = function
    return function


def table(name: str, kind: str = "runs") -> pd.DataFrame:
    return load(companions(HERE / f"{name}.parquet")[kind])


def study(name: str) -> compare.Study:
    return compare.read([HERE / f"{name}.parquet"])


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:+.3f}"


def interval(row: "pd.Series[float]") -> str:
    return "–" if np.isnan(row["low"]) else f"{row['low']:+.3f} to {row['high']:+.3f}"


def p_value(value: float) -> str:
    return "–" if np.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


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


def losses(name: str) -> pd.DataFrame:
    """Validation loss of the exact backward: a row for each method and attention mode, a column for each seed."""
    runs = table(name)
    runs = runs[(runs["ln_backward"] == "exact") & (runs["status"] == "done")]
    return runs.pivot_table("val_loss_nats", ["method", "attn_mode"], "seed")


def floor(name: str) -> str:
    runs = table(name).iloc[0]
    values = losses(name)
    lines = []
    for (method, mode), seeds in values.iterrows():
        margin = ""
        if method != "frozen" and ("frozen", mode) in values.index:
            found = stats.paired((values.loc[("frozen", mode)] - seeds).to_numpy())
            margin = f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
        lines.append([f"`{method}`", mode, f"{seeds.mean():.3f}", margin, str(seeds.count())])
    said = f"Unigram {runs['unigram_nats']:.3f}, bigram {runs['bigram_nats']:.3f} nats."
    heads = ["method", "attention", "validation loss", "below frozen by (95 % interval)", "seeds"]
    return f"{said}\n\n{markdown(heads, lines)}"


@block
def floor_short() -> str:
    return floor(SHORT)


@block
def floor_long() -> str:
    return floor(LONG)


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
    lines.append(["95 % interval", *(f"{one.low:+.3f} to {one.high:+.3f}" for one in means)])
    lines.append(["p", *(p_value(float(one.p)) for one in means)])
    found = means[-1]
    more = "more" if found.estimate > 0 else "less"
    holds = "excludes" if found.low > 0 or found.high < 0 else "includes"
    said = (
        f"Under softmax attention `center_scale` cost {abs(found.estimate):.3f} nats {more} than under sigmoid "
        f"(95 % interval {found.low:+.3f} to {found.high:+.3f}, p = {p_value(float(found.p))}, d_z = {found.effect:.1f}, "
        f"{found.n} seeds): the interval {holds} zero."
    )
    return f"{said}\n\n{markdown(['seed', 'cost under softmax', 'under sigmoid', 'difference'], lines)}"


@block
def primary() -> str:
    return headline(SHORT)


@block
def second() -> str:
    return headline(LONG)


def all_costs(name: str) -> str:
    found = compare.cost(study(name), by="attn_mode", where="method != 'frozen'", reference="sigmoid")
    rows = found.costs.rows
    wide = {}
    for _, row in rows.iterrows():
        wide[row.get("method", "fa"), row["a"], row["attn_mode"]] = row
    assert found.differences is not None
    lines = []
    for _, row in found.differences.rows.iterrows():
        method = row.get("method", "fa")
        each = [wide[method, row["ln_backward"], mode] for mode in ("softmax", "sigmoid")]
        lost = sum(int(one["diverged_a"]) for one in each)
        lines.append(
            [
                f"`{method}`",
                f"`{row['ln_backward']}`",
                *(f"{signed(one['difference'])} ({interval(one)})" for one in each),
                f"{signed(row['difference'])} ({interval(row)})",
                p_value(row["p_adjusted"]),
                str(row["n"]),
                f"{lost}/{sum(int(one['runs_a']) for one in each)}",
            ]
        )
    heads = ["method", "backward", "cost, softmax", "cost, sigmoid", "difference", "Holm p", "seeds", "diverged"]
    return markdown(heads, lines)


@block
def costs_short() -> str:
    return all_costs(SHORT)


@block
def sigma_at_ln_f() -> str:
    """σ at ln_f after the last update, exact against center_scale, by attention mode and method."""
    rows = table(SHORT, "layers")
    rows = rows[(rows["site"] == "ln_f") & rows["ln_backward"].isin(["exact", PRIMARY])]
    rows = rows.assign(
        backward=rows["ln_backward"] + ("@" + rows["ln_backward.sites"]).where(rows["ln_backward.sites"] != "all", "")
    )
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
    rows = rows[(rows["ln_backward"] == "exact") & (rows["step"] == rows["step"].max()) & (rows["level"] == "model")]
    rows = rows[rows["place"].isin(["all", "ln_f"]) & rows["surrogate"].isin(SHOWN)]
    found = rows.groupby(["place", "surrogate", "attn_mode"], sort=False)[["grad_cos", "precond_cos", "descent"]].mean()
    costs = compare.cost(study(SHORT), where="method == 'fa'").costs.rows
    paid = {(row["a"], row["attn_mode"]): row["difference"] for _, row in costs.iterrows()}
    lines = []
    for (place, surrogate, mode), row in found.iterrows():
        trained = surrogate if place == "all" else f"{surrogate}@ln_f"
        cost = paid.get((trained, mode), np.nan)
        lines.append([place, f"`{surrogate}`", mode, *(f"{value:.3f}" for value in row), signed(cost)])
    heads = ["place", "backward", "attention", "cosine of gradient", "of P·gradient", "descent", "cost of training so"]
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
    """README's text with each block put between its markers. Raises KeyError for a block that is not there."""
    for name, content in blocks():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise KeyError(f"README.md has no block {name}")
        text = marked.sub(partial(_between, content), text)
    return text


def _between(content: str, found: "re.Match[str]") -> str:
    return f"{found[1]}{content}\n{found[2]}"


if __name__ == "__main__":
    readme = HERE / "README.md"
    if "--write" in sys.argv[1:]:
        readme.write_text(filled(readme.read_text()))
    else:
        for name, content in blocks():
            print(f"<!-- {name} -->\n{content}\n<!-- /{name} -->\n")
