"""Make the frames that charts draw: the strongest of many rows, what lines are seen against, and names in words."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lnjac.comparing.compare import LOSS
from lnjac.comparing.experiment import LAST_NORM
from lnjac.comparing.filter import require_column
from lnjac.comparing.floor import FROZEN
from lnjac.errors import ConfigError
from lnjac.reporting.view import ENRICHMENTS, MOST, SAME, View, arranged
from lnjac.text import word

MOST_ROWS = 8_000
"""Rows of one chart, so that a page stays small whatever the number of runs."""
MOST_LINES = 7
"""Levels whose lines are drawn: as many as differ in colour."""
WORDS = {
    LOSS: "validation loss",
    "train_loss_nats": "training loss",
    "loss_nats": "loss of the diagnostic batches",
    "radial_share": "radial share of the centred ‖g‖²",
    "share_mean": "share of ‖g‖² in the mean",
    "share_radial": "share of ‖g‖² in the radial part",
    "share_kept": "share of ‖g‖² that is kept",
    "r_mean": "share of ‖g‖² in the mean",
    "r_radial": "radial term over ‖g‖²",
    "enrichment_mean": "share of the mean, over chance",
    "enrichment_radial": "radial term, over chance",
    "enrichment_radial_share": "radial share, over chance",
    "cos_center_vs_true": "cos(center_scale, true), token mean",
    "cos_ste_vs_true": "cos(ste, true), token mean",
    "sigma_mean": "σ at the norm's input, token mean",
    "sigma_std": "σ at the norm's input, deviation",
    "rho_mean": "ρ = v/(v+ε), token mean",
    "attn_mode": "attention mode",
    "ln_backward": "backward",
    "method": "method",
    "optimizer": "optimizer",
    "optimizer.lr": "learning rate",
    "model.n_embd": "width (n_embd)",
    "model.n_layer": "depth in blocks (n_layer)",
    "steps": "updates",
}
"""Columns in a few words, so that the title of an axis fits beside a chart."""
FORMS = {r"flat_cos_(\w+)": r"cos(\1, true), all tokens as one", r"gain_(\w+)": r"length of \1 over that of true"}
"""Forms of columns' names, and what they are in words."""
UNITS = {"nats/token": "nats a token"}


def few(view: View) -> list[str]:
    """Return the levels whose lines are drawn."""
    return view.levels if len(view.levels) <= MOST_LINES else view.levels[:MOST_LINES]


def few_said(view: View) -> str:
    """Return a sentence on the levels whose lines are left out."""
    n, of = len(few(view)), view.runs["level"].nunique()
    return f" {n} of {of:,} levels." if n < of else ""


def few_levels(view: View) -> None:
    if (n := view.runs["level"].nunique()) > MOST:
        raise ConfigError(f"{n:,} levels are too many to compare each with each: choose some by --where")


def strongest_places(rows: pd.DataFrame, seeds: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return the rows and seeds of the MOST places with the largest differences, the largest first, if there are more.

    The text tells of those that are left out.
    """
    sizes = rows["difference"].abs().groupby(rows["place"], sort=False).max().sort_values(ascending=False)
    if len(sizes) <= MOST:
        return rows, seeds, ""
    order = {place: at for at, place in enumerate(sizes.index[:MOST])}
    rows, seeds = (
        part[part["place"].isin(order)].sort_values("place", key=lambda names: names.map(order), kind="stable")
        for part in (rows, seeds)
    )
    return rows, seeds, f"; the {MOST} largest of {len(sizes):,}, the others are in the CSV"


def strongest_pairs(view: View, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the MOST pairs of levels whose losses differ most."""
    pairs = rows[["pair", "a", "b"]].drop_duplicates("pair")
    if len(pairs) <= MOST or LOSS not in view.runs:
        return rows[rows["pair"].isin(pairs["pair"][:MOST])]
    mean = view.runs.groupby("level")[LOSS].mean()
    sizes = (pairs["a"].map(mean) - pairs["b"].map(mean)).abs().sort_values(ascending=False, kind="stable")
    return rows[rows["pair"].isin(pairs.loc[sizes.index[:MOST], "pair"])]


def capped(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return at most MOST_ROWS rows, those of the first cells, and a note if that leaves out any."""
    if len(rows) <= MOST_ROWS or "cell" not in rows:
        return rows, []
    sizes = rows["cell"].value_counts(sort=False).cumsum()
    kept = sizes.index[: max(1, int((sizes <= MOST_ROWS).sum()))]
    note = f"{len(kept)} of {len(sizes)} cells are shown: choose others by --where"
    return rows[rows["cell"].isin(kept)], [note]


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    a, b = rows["a"].map(word), rows["b"].map(word)
    return rows.assign(a=a, b=b, pair=a + " − " + b)


def in_words(view: View, rows: pd.DataFrame, cells: Sequence[str]) -> pd.DataFrame:
    """Return the rows of a comparison once for each cell of the view, with `a`, `b` and `pair` in words."""
    return view.placed(paired(arranged(rows, cells)), cells)


def by_seed(seeds: pd.DataFrame, own: Sequence[str]) -> pd.DataFrame:
    """Return the values behind differences, a row for each seed."""
    return seeds[[*own, "place", "seed", "value_a", "value_b", "difference"]]


def last_norm_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, those of the last norm first: a chart opens at the norm of its first row."""
    return rows.assign(later=rows["site"] != LAST_NORM).sort_values("later", kind="stable").drop(columns="later")


def chance(view: View, keys: Sequence[str], *, last: bool) -> pd.DataFrame:
    """Return the values that metrics would have in a random direction: those known from an enrichment, which is then 1."""
    held, parts = view.merged.columns("layers"), []
    keys = [name for name in keys if name != "cell" or len(view.cells) > 1]
    for enriched in [name for name in ENRICHMENTS if name in held]:
        share = SAME.get(enriched, "")
        both = view.layers([*[share] * (share in held), enriched], last=last)
        wide = both.pivot_table("value", [name for name in keys if name != "metric"], "metric", observed=True)
        for name in map(str, wide):
            value = wide[name] / wide[enriched]
            parts.append(value.rename("value").dropna().reset_index().assign(metric=name))
    if not parts:
        return pd.DataFrame(columns=["metric"])
    return pd.concat(parts, ignore_index=True)[[*keys, "value"]].assign(reference="chance")


def floors(view: View, values: pd.DataFrame) -> pd.DataFrame:
    """Return the loss of a frozen body in the same cell and level, or else the validation loss of a bigram model."""
    own = ["cell"] * (len(view.cells) > 1)
    steps = values[["cell", "metric", "step"]].drop_duplicates()
    parts = []
    if "method" in view.settings and (view.runs["method"] == FROZEN).any():
        others = ["level", *(name for name in view.settings if name != "method")]
        cells = view.runs.loc[view.runs["method"] != FROZEN, ["cell", *others]].drop_duplicates()
        frozen = values[values["run_id"].isin(view.runs.loc[view.runs["method"] == FROZEN, "run_id"])]
        frozen = frozen[["run_id", "metric", "step", "value"]].merge(
            view.runs[["run_id", *others]].drop_duplicates("run_id")
        )
        means = cells.merge(frozen, on=others).groupby([*own, "metric", "level", "step"], sort=False)["value"].mean()
        parts.append(means.reset_index().assign(reference="frozen body"))
    elif "bigram_nats" in view.runs and view.runs["bigram_nats"].notna().any() and (steps["metric"] == LOSS).any():
        bigram = view.runs.groupby("cell", sort=False)["bigram_nats"].mean().rename("value").reset_index()
        rows = steps[steps["metric"] == LOSS].merge(bigram, on="cell")
        parts.append(rows[[*own, "metric", "step", "value"]].assign(reference="bigram model"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def falling(points: pd.DataFrame, own: Sequence[str]) -> pd.DataFrame:
    """Return a line of slope −1 through the mean of the first points' logarithms in each panel."""
    panels = points.groupby(list(own), sort=False)
    first = panels["x"].transform("min")
    at_first = points[points["x"] == first].assign(start=lambda frame: np.log(frame["mean"]))
    start = np.exp(at_first.groupby(list(own), sort=False)["start"].mean()).reset_index()
    found = (
        points.assign(first=first)[[*own, "x", "first"]].drop_duplicates().merge(start, on=list(own)).sort_values("x")
    )
    return found.assign(value=found["start"] * found["first"] / found["x"], reference="slope −1")[
        [*own, "x", "value", "reference"]
    ]


def slopes_said(fits: pd.DataFrame, own: Sequence[str]) -> pd.DataFrame:
    """Return for each line `slope −0.92 (−1.01 to −0.83), R² 0.99`, and whether the points bend away from it."""

    def said(row: "pd.Series[Any]") -> str:
        inside = "" if np.isnan(row["low"]) else f" ({row['low']:.2g} to {row['high']:.2g})"
        fit = "" if np.isnan(row["r2"]) else f", R² {row['r2']:.2f}"
        text = f"slope {row['slope']:.2g}{inside}{fit}{', bends' * bool(row['bends'])}"
        return text.replace("-", "−")

    keys = [*own, "level"]
    found = fits.drop_duplicates(keys)[[*keys, "slope", "low", "high", "r2", "bends"]]
    said_of = found.apply(said, axis=1)
    return found[keys].assign(said=said_of, line=found.groupby(list(own), sort=False).cumcount())


def require_known(view: View, metric: str | None) -> None:
    """Raise ConfigError if a metric is a column neither of layers nor of runs, with the nearest of both that is measured."""
    known = {table: view.merged.described(table) for table in ("layers", "runs") if table == "runs" or view.metrics}
    names = [name for table in known for name in view.merged.columns(table)]
    if metric is not None and metric not in names:
        measured = [name for of in known.values() for name, column in of.items() if column.dtype == "float64"]
        require_column(metric, [*measured, *names], "no column for --metric is called")


def named(view: View, metrics: Iterable[str], of: str = "{}") -> dict[str, str]:
    """Return the title of the axis of each metric: its words and its unit; `of` is the thing shown, as `difference in {}`."""
    held = view.merged.columns("layers") if view.metrics else []
    found = {}
    for metric in dict.fromkeys(metrics):
        unit = view.merged.units("layers" if metric in held else "runs", [metric])[metric]
        found[metric] = worded(metric, of) + f" ({UNITS.get(unit, unit)})" * (unit not in ("", "1"))
    return found


def worded(column: str, of: str = "{}") -> str:
    """Return a column in words that begin with a capital; its name if it has no words."""
    forms = (re.sub(form, words, column) for form, words in FORMS.items() if re.fullmatch(form, column))
    text = of.format(next(forms, WORDS.get(column, column)))
    plain = (column in WORDS or text != column) and re.match(r"[a-z]+(?: |$)", text)  # no symbol, and no bare name
    return text[0].upper() + text[1:] if plain else text
