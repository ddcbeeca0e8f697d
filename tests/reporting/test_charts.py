"""The charts of a study: their numbers, their order, and the notes and the reasons that go with them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.studies import write_study

from lnjac.comparing.compare import compare
from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.reporting import frames, marks, registry
from lnjac.reporting.charts import CHARTS
from lnjac.reporting.registry import Drawing
from lnjac.reporting.view import METRICS, View, view
from lnjac.runs import folder as runs
from lnjac.runs import read as sources
from lnjac.runs.merged import companion
from lnjac.runs.schema import FROZEN

pytest.importorskip("altair", reason="the extra [report] is not installed")

pytestmark = pytest.mark.slow

TWO = {"attn_mode": ["sigmoid", "softmax"]}
EVERYTHING = TWO | {
    "ln_backward": ["exact", "ste"],
    "model.n_embd": [32, 64],
    "model.n_layer": [1, 2],
    "steps": [10, 20],
}


def of(path: Path, by: str | None = None, where: str | None = None) -> View:
    return view(open_tables([path]), by, where)


def drawn(name: str, shown: View, metric: str | None = None) -> Drawing:
    return CHARTS[name].draw(shown, metric)


def table(name: str, shown: View, metric: str | None = None) -> pd.DataFrame:
    """The table below a chart."""
    return drawn(name, shown, metric).table


def dataset(drawing: Drawing, column: str) -> list[dict[str, Any]]:
    """The rows that a chart draws which have this column; of lines with names, the lines."""
    found = [rows for rows in drawing.picture.to_dict()["datasets"].values() if column in rows[0]]
    return list(max(found, key=len))


# The registry


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, View]:
    """A study that nearly every chart can show, and one for each other chart."""
    folder = tmp_path_factory.mktemp("studies")

    def made(name: str, factors: Mapping[str, Sequence[Any]], **more: Any) -> View:
        (folder / name).mkdir()
        return of(write_study(folder / name, factors, blocks=0, **more))

    lost = made("lost", TWO, seeds=2, diverged=(0, 3))
    many = made("many", {"optimizer.lr": [i / 1000 for i in range(1, 41)]}, seeds=2)
    return {"": made("all", EVERYTHING, seeds=2), "diverged": lost, "ranking": many}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_drawn_with_a_caption_a_table_and_what_can_be_chosen(studies: dict[str, View], name: str):
    chart, shown = CHARTS[name], studies.get(name, studies[""])
    assert chart.name == name
    assert chart.summary.endswith(".")
    drawing = chart.draw(shown)
    spec = drawing.picture.to_dict()  # raises where a name or a value is none of Vega-Lite's grammar
    assert drawing.caption.endswith(".")
    assert len(drawing.table)
    params = {one["name"]: one.get("value") for one in spec.get("params", ())}
    for pick, values in drawing.choices.items():  # the page sets the parameters of these names
        assert params[pick] == values[0]
        assert len(values) == len(set(values))
    assert {pick for pick, value in params.items() if value is not None} == set(drawing.choices)


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_without_what_it_needs_names_the_command_that_gives_it(tmp_path: Path, name: str):
    poor = of(write_study(tmp_path, {}, steps=(100,), seeds=1))
    unmet = [need for need in CHARTS[name].needs if not need.met(poor)]
    if unmet:
        with pytest.raises(ConfigError, match=re.escape(unmet[0].otherwise)):
            CHARTS[name].draw(poor)
        assert name in {"ranking", "diverged"} or re.search("python run.py|diagnostics=", unmet[0].otherwise)
    else:
        assert name in {"seeds", "curves", "depth"}


def test_a_table_without_norms_has_no_chart_of_norms(tmp_path: Path):
    path = write_study(tmp_path, TWO)
    empty = pq.read_table(path).slice(0, 0).replace_schema_metadata()
    runs.write_table(path, empty, runs.read_metadata(path))
    shown = of(path)
    for name in ("heatmap", "seeds", "curves", "depth"):
        with pytest.raises(ConfigError, match="no norm of these runs was measured"):
            drawn(name, shown)


def test_a_new_chart_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "CHARTS", dict(CHARTS))

    @registry.chart("flavours", "Flavours", needs=[registry.Need("runs", ["flavour"], 1, "no flavour")])
    def flavours(shown: View, metric: str | None) -> Drawing:
        """The flavours."""
        return Drawing(None, f"flavour {metric}.", pd.DataFrame())

    shown = of(write_study(tmp_path, TWO, blocks=0, steps=(100,)))
    with pytest.raises(ConfigError, match="no flavour"):
        registry.CHARTS["flavours"].draw(shown)
    shown = replace(shown, runs=shown.runs.assign(flavour="sweet"))
    assert registry.CHARTS["flavours"].draw(shown, "a").caption == "flavour a."


# Numbers


def test_the_comparison_that_is_shown_is_the_one_of_compare(tmp_path: Path):
    study = open_tables([write_study(tmp_path, TWO)])
    found = compare(study, "attn_mode", metrics=["radial_share"]).rows.set_index("site")
    shown = table("headline", view(study), "radial_share").set_index("place")
    assert (shown["difference"] == found["difference"]).all()
    assert (shown["n"] == 3).all()
    assert len(dataset(drawn("headline", view(study), "radial_share"), "seed")) == len(found) * 3


def test_each_number_of_a_layer_is_of_one_norm(tmp_path: Path):
    """No row, choice or caption is of norms together."""
    path = write_study(tmp_path, TWO | {"model.n_embd": [32, 64], "method": ["bp", "fa", "dfa"]})
    shown = of(path)
    sites = set(pd.read_parquet(path)["site"])
    drawings = [drawn("headline", shown, "radial_share")]
    drawings += [drawn(name, shown) for name in ("heatmap", "seeds", "curves", "depth")]
    for drawing in drawings:
        assert set(drawing.table.get("site", drawing.table.get("place"))) == sites
        assert set(drawing.choices.get("site", sites)) == sites
    assert drawings[0].caption.startswith("Difference of radial_share at each norm")
    assert drawn("curves", shown).choices["site"][0] == "ln_f"  # where the chart opens
    values = pd.read_parquet(path).query("site == 'ln_f' and step == 100")
    mean = values.query("attn_mode == 'softmax' and method == 'bp' and `model.n_embd` == 32")["radial_share"].mean()
    row = table("curves", shown, "radial_share").query(
        "step == 100 and site == 'ln_f' and level == 'softmax' and cell == 'method=bp, n_embd=32'"
    )
    assert row["mean"].tolist() == pytest.approx([mean])
    scaling = table("scaling-width", shown)
    assert set(scaling["site"]) == {"", *sites}
    assert set(scaling.loc[scaling["site"] == "", "metric"]) == {"val_loss_nats", "train_loss_nats"}


def test_a_headline_has_a_row_for_each_cell_or_else_for_each_pair(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"model.n_embd": [32, 64], "method": ["bp", "fa", "dfa"]}))
    bars = dataset(drawn("headline", shown), "low")
    assert list(dict.fromkeys(row["place"] for row in bars)) == shown.cells
    (tmp_path / "one").mkdir()
    shown = of(write_study(tmp_path / "one", {"method": ["bp", "fa", "dfa"]}))
    bars = dataset(drawn("headline", shown), "low")
    assert list(dict.fromkeys(row["place"] for row in bars)) == ["dfa − bp", "fa − bp", "fa − dfa"]


def test_a_chart_of_fewer_cells_follows_the_choice_of_a_cell(tmp_path: Path):
    """What does not vary in a chart is the same at the cells that differ in it alone."""
    shown = of(write_study(tmp_path, TWO | {"ln_backward": ["exact", "ste"], "model.n_embd": [32, 64]}))
    assert len(shown.cells) == 4
    for name in ("cost", "cost-difference", "backwards", "scaling-width"):
        drawing = drawn(name, shown)
        assert drawing.choices["cell"] == shown.cells
        numbers = [column for column in ("cost", "difference", "mean", "slope") if column in drawing.table]
        of_cell = {cell: part[numbers[0]].tolist() for cell, part in drawing.table.groupby("cell")}
        same = "n_embd=32" if name != "scaling-width" else "ln_backward=exact"
        one, other = [cell for cell in shown.cells if same in cell]
        assert of_cell[one] == of_cell[other]


def test_the_strongest_of_many_are_drawn_and_the_others_counted(tmp_path: Path):
    lr = [i / 1000 for i in range(1, 41)]
    for name, factors in (("cells", TWO | {"optimizer.lr": lr}), ("levels", {"optimizer.lr": lr})):
        (tmp_path / name).mkdir()
        shown = of(write_study(tmp_path / name, factors, blocks=0, steps=(0, 100), seeds=2))
        chart = {"cells": "headline", "levels": "ranking"}[name]
        drawing = drawn(chart, shown)
        places = {row["place"] for row in dataset(drawing, "low")}
        assert len(places) == 30
        assert "30" in drawing.caption
        assert "in the CSV" in drawing.caption
        whole = drawing.table.query("metric == 'val_loss_nats'") if name == "cells" else drawing.table
        assert len(whole) == 40
        if name == "cells":
            drawn_ = whole["place"].isin(places)
            sizes = whole["difference"].abs()
            assert len(drawing.choices) == 1  # of metrics: a row of each cell is there
            assert sizes[drawn_].max() == sizes.max()
            with pytest.raises(ConfigError, match="no more than 30 levels were run"):
                drawn("ranking", shown)
        else:
            assert places == {f"{one:g}" for one in lr[:30]}  # the losses rise with the level
            assert drawn("depth", shown).table["level"].nunique() == 7
            assert "7 of 40 levels" in drawn("depth", shown).caption
            with pytest.raises(ConfigError, match="40 levels are too many to compare each with each"):
                drawn("heatmap", shown)


def test_the_map_is_in_depth_order_and_fades_what_is_not_clear_of_zero(tmp_path: Path):
    path = write_study(tmp_path, TWO | {"model.n_layer": [1, 2]})
    drawing = drawn("heatmap", of(path))
    cells = pd.DataFrame(dataset(drawing, "shade"))
    assert cells["shade"].tolist() == pytest.approx(cells["effect"].tolist())
    apart = (cells["p_adjusted"] < 0.05) & ((cells["low"] > 0) | (cells["high"] < 0))
    assert (cells["clear"] == apart).all()
    assert 0 < apart.sum() < len(cells)
    (rect,) = [layer for layer in drawing.picture.to_dict()["layer"] if layer["mark"]["type"] == "rect"]
    sites = rect["encoding"]["y"]["scale"]["domain"]
    assert sites == [*(f"blocks.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)), " ", "ln_f"]


def test_learning_is_seen_against_a_frozen_body_and_by_backward(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"method": ["fa", "frozen"], "ln_backward": ["exact", "ste"]}))
    drawing = drawn("losses", shown)
    assert drawing.caption.endswith("Dashed: frozen body.")
    of_frozen = drawing.table[
        (drawing.table["cell"] == "method=frozen, ln_backward=exact") & (drawing.table["level"] == "softmax")
    ]
    lines = [row for row in dataset(drawing, "reference") if row["reference"] and row["level"] == "softmax"]
    seen = [
        row["value"]
        for row in lines
        if row["cell"] == "method=fa, ln_backward=exact" and row["metric"] == "val_loss_nats"
    ]
    known = of_frozen.loc[of_frozen["metric"] == "val_loss_nats", "mean"].tolist()
    assert seen == pytest.approx(known)
    assert not [row for row in lines if row["cell"].startswith("method=frozen")]
    assert set(drawn("backwards", shown).table["level"]) == {"exact", "ste"}


def test_slopes_are_written_in_the_chart(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"model.n_embd": [32, 64, 128]}))
    drawing = drawn("scaling-width", shown)
    said = dataset(drawing, "said")
    row = drawing.table.query("metric == 'val_loss_nats' and level == 'softmax'").iloc[0]
    text = next(one["said"] for one in said if one["metric"] == "val_loss_nats" and one["level"] == "softmax")
    assert text.startswith(
        f"slope {row['slope']:.2g} ({row['low']:.2g} to {row['high']:.2g}), R² {row['r2']:.2f}".replace("-", "−")
    )
    assert ("bends" in text) == row["bends"]
    lines = pd.DataFrame(dataset(drawing, "reference")).query("reference == 'slope −1'")
    assert (lines.groupby(["metric", "site"]).apply(lambda part: (part["x"] * part["value"]).nunique()) >= 1).all()
    assert set(lines["x"]) == {32, 64, 128}  # nothing beyond what was run
    assert "val_loss_nats" not in set(lines["metric"])


def test_bands_are_t_intervals_of_seeds_and_diverged_runs_are_in_none(tmp_path: Path):
    from scipy import stats

    path = write_study(tmp_path, TWO, seeds=4, diverged=(1,))
    lines = table("depth", of(path), "radial_share")
    layers = pd.read_parquet(path).query("step == 100 and site == 'ln_f'")
    for level, n in (("sigmoid", 3), ("softmax", 4)):
        values = layers[(layers["attn_mode"] == level) & (layers["run_id"] != "run0001")]["radial_share"]
        (line,) = lines[(lines["level"] == level) & (lines["site"] == "ln_f")].itertuples()
        low, high = stats.t.interval(0.95, n - 1, values.mean(), values.std() / np.sqrt(n))
        assert len(values) == line.n == n
        assert [line.mean, line.low, line.high] == pytest.approx([values.mean(), low, high])


def test_infinite_values_are_left_out_of_charts_and_said(tmp_path: Path):
    path = write_study(tmp_path, TWO, seeds=4)
    layers = pd.read_parquet(path)
    layers.loc[(layers["site"] == "ln_f") & (layers["run_id"] == "run0001"), "sigma_mean"] = np.inf
    layers.loc[(layers["site"] == "ln_f") & (layers["run_id"] == "run0002"), "sigma_mean"] = np.nan
    rows = sources.conform(pa.Table.from_pandas(layers, preserve_index=False), "layers", FROZEN["layers"])
    runs.write_table(path, rows.replace_schema_metadata(), runs.read_metadata(path))
    shown = of(path)
    assert np.isfinite(table("depth", shown, "sigma_mean")[["mean", "low", "high"]]).all(axis=None)
    assert "2 of 40 values of sigma_mean are infinite, NaN or null: left out" in drawn("depth", shown).notes
    assert "6 of 120 values of sigma_mean are infinite, NaN or null: left out" in drawn("curves", shown).notes
    found = drawn("heatmap", shown, "sigma_mean").notes
    assert "1 infinite and 1 NaN or null values of sigma_mean are left out: attn_mode=sigmoid 2 of 20" in found


def test_losses_are_seen_against_bigrams_and_shares_against_chance(tmp_path: Path):
    path = write_study(tmp_path, TWO)
    shown = of(path)
    losses = dataset(drawn("losses", shown, "val_loss_nats"), "reference")
    assert {(row["reference"], row["value"]) for row in losses} == {("bigram model", 0.25)}
    layers = pd.read_parquet(path).query("step == 100").groupby("site")
    layers = layers[["radial_share", "enrichment_radial_share"]].mean()
    rows = {row["site"]: row["value"] for row in dataset(drawn("depth", shown, "radial_share"), "reference")}
    assert rows == pytest.approx((layers["radial_share"] / layers["enrichment_radial_share"]).to_dict())
    rows = [row for row in dataset(drawn("depth", shown), "reference") if row["metric"] == "enrichment_mean"]
    assert {row["value"] for row in rows} == {1.0}
    assert not [
        row for row in dataset(drawn("depth", shown), "reference") if row["metric"] == "sigma_mean" and row["reference"]
    ]


def test_an_effect_has_one_adjusted_p_wherever_it_is_shown(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO))
    heatmap = drawn("heatmap", shown)
    of_map = {(row["metric"], row["site"]): row["p_adjusted"] for row in dataset(heatmap, "p_adjusted")}
    for metric in ("radial_share", "cos_center_vs_true"):
        rows = table("headline", shown, metric)
        assert {(metric, row.place): row.p_adjusted for row in rows.itertuples()}.items() <= of_map.items()
    tested = {metric for metric, _ in of_map}
    assert tested == {*METRICS} - {"enrichment_radial_share"}  # (d−1)·radial_share: the very same test
    for drawing in (heatmap, drawn("headline", shown, "radial_share"), drawn("heatmap", shown, "radial_share")):
        assert any("Holm's method over the 5 p values of one metric in one cell" in note for note in drawing.notes)
    alone = compare(shown.merged, "attn_mode", metrics=["radial_share"]).rows.set_index("site")["p_adjusted"]
    assert {site: p for (metric, site), p in of_map.items() if metric == "radial_share"} == alone.to_dict()


def test_tables_have_p_effect_and_every_seed(tmp_path: Path):
    from scipy import stats

    path = write_study(tmp_path, TWO | {"ln_backward": ["exact", "ste"]})
    runs_of = pd.read_parquet(companion(path, "runs")).query("ln_backward == 'exact'")
    a, b = (runs_of[runs_of["attn_mode"] == level]["val_loss_nats"].to_numpy() for level in ("softmax", "sigmoid"))
    shown = of(path)
    row = table("headline", shown, "val_loss_nats").query("place == 'ln_backward=exact'").iloc[0]
    assert row["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert row["effect"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    seeds = drawn("headline", shown, "val_loss_nats").seeds
    assert seeds is not None
    exact = seeds.query("place == 'ln_backward=exact'")
    assert exact["value_a"].tolist() == a.tolist()
    assert exact["value_b"].tolist() == b.tolist()
    seeds = drawn("cost", shown).seeds
    assert seeds is not None
    assert seeds.query("level == 'softmax'")["value_b"].tolist() == a.tolist()


def test_differences_of_cost_are_those_of_the_costs(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"ln_backward": ["exact", "ste"]}))
    costs, found = table("cost", shown).set_index("level")["cost"], table("cost-difference", shown)
    assert found["difference"].tolist() == pytest.approx([costs["softmax"] - costs["sigmoid"]])
    with pytest.raises(ConfigError, match="no backward has a cost at two levels"):
        drawn("cost-difference", of(shown.merged.path, where="attn_mode == 'softmax'"))


# Levels, cells and steps


def test_levels_are_those_of_attn_mode_else_of_the_first_that_varies(tmp_path: Path):
    widths = {"model.n_embd": [100, 32], "steps": [10]}
    shown = of(write_study(tmp_path, widths))
    assert (shown.by, list(dict.fromkeys(shown.runs["level"]))) == ("model.n_embd", ["32", "100"])
    both = of(write_study(tmp_path, widths | TWO))
    assert (both.by, both.cells) == ("attn_mode", ["n_embd=32", "n_embd=100"])
    assert view(both.merged, "model.n_embd", "attn_mode == 'softmax'").cells == ["all runs"]


def test_a_missing_level_is_drawn_as_null(tmp_path: Path):
    shown = of(write_study(tmp_path, {"method.scale": [0.5, None]}), "method.scale")
    assert table("depth", shown)["level"].drop_duplicates().tolist() == ["0.5", "null"]
    assert set(table("headline", shown, "sigma_mean")["b"]) == {"0.5"}
    assert set(table("headline", shown, "sigma_mean")["a"]) == {"null"}


def test_numbers_that_differ_late_are_two_levels_and_two_cells(tmp_path: Path):
    lr = [0.00012345678, 0.00012345679]
    shown = of(write_study(tmp_path, TWO | {"optimizer.lr": lr}, blocks=0, steps=(100,)))
    assert shown.cells == ["lr=0.00012345678", "lr=0.00012345679"]
    shown = view(shown.merged, "optimizer.lr")
    assert set(shown.runs["level"]) == {"0.00012345678", "0.00012345679"}
    assert set(table("headline", shown)["a"]) == {"0.00012345679"}


def test_cells_are_in_the_order_of_their_numbers_exact_runs_first(tmp_path: Path):
    factors = TWO | {"ln_backward": ["center_scale", "exact"], "steps": [1000, 250], "model.n_embd": [128, 64, 256]}
    shown = of(write_study(tmp_path, factors, blocks=0, steps=(100,)))
    assert shown.cells == [
        f"ln_backward={name}, steps={steps}, n_embd={width}"
        for name in ("exact", "center_scale")
        for steps in (250, 1000)
        for width in (64, 128, 256)
    ]
    assert list(dict.fromkeys(table("headline", shown)["place"])) == shown.cells
    assert drawn("heatmap", shown).choices["cell"] == shown.cells


def test_curves_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "MOST_ROWS", 2000)
    shown = of(write_study(tmp_path, TWO | {"method": ["bp", "fa", "dfa"]}, steps=range(100)))
    rows = table("curves", shown)
    assert 1000 < len(rows) <= 2000
    assert set(rows["step"]) >= {0, 99}
    (thinned,) = drawn("curves", shown).notes
    assert " of the 100 measured steps are shown" in thinned


def test_rows_are_left_out_by_whole_cells(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "MOST_ROWS", 5)
    rows = pd.DataFrame({"cell": ["a"] * 2 + ["b"] * 2 + ["c"] * 2, "value": range(6)})
    kept, notes = frames.capped(rows)
    assert kept["cell"].tolist() == ["a", "a", "b", "b"]
    assert notes == ["2 of 3 cells are shown: choose others by --where"]
    assert frames.capped(rows[:4])[1] == []


def test_a_trajectory_says_how_many_steps_it_leaves_out(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO, steps=range(1, 61)))
    steps = sorted(set(table("losses", shown)["step"]))
    assert (steps[0], steps[-1]) == (1, 60)
    gaps = [b - a for a, b in pairwise(steps)]
    assert 20 < len(steps) <= 40
    assert gaps == sorted(gaps) or max(gaps[:10]) <= min(gaps[-3:])  # denser towards the first
    (note,) = drawn("losses", shown).notes
    assert note.startswith(f"{len(steps)} of the 60 measured steps are shown")


def test_an_unknown_metric_is_named(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO))
    for name in ("losses", "depth", "curves", "seeds", "headline", "heatmap"):
        with pytest.raises(ConfigError, match="no_such"):
            drawn(name, shown, "no_such")
    for name in ("headline", "depth", "seeds", "scaling-width"):  # the hint is of the table that the chart shows
        study = of(write_study(tmp_path, TWO | {"model.n_embd": [32, 64]}))
        with pytest.raises(ConfigError, match="did you mean radial_share"):
            drawn(name, study, "radial_shar")
    with pytest.raises(ConfigError, match="--metric val_loss_nats is a column of runs"):
        drawn("heatmap", shown, "val_loss_nats")


@pytest.mark.parametrize(("column", "words"), [
    ("val_loss_nats", "Validation loss"),
    ("method", "Method"),
    ("sigma_mean", "σ at the norm's input, token mean"),
    ("flat_cos_ste", "cos(ste, true), all tokens as one"),
    ("gain_center", "Length of center over that of true"),
    ("entropy", "entropy"),
    ("my_own{}", "my_own{}"),
])  # fmt: skip
def test_a_column_is_named_in_words_where_it_has_any(column: str, words: str):
    assert frames.worded(column) == words


@pytest.mark.parametrize("name", CHARTS)
def test_every_axis_of_values_has_its_words_and_unit(studies: dict[str, View], name: str):
    spec = marks.spec(CHARTS[name].draw(studies.get(name, studies[""])).picture, width=400)
    titles = [
        channel.get("title")
        for layer in spec["layer"]
        for channel in layer["encoding"].values()
        if isinstance(channel, dict) and channel.get("type") == "quantitative" and "axis" in channel
    ]
    assert name == "heatmap" or titles
    for title in titles:
        of_each = json.loads(title["signal"].removesuffix("[metric]")).values() if isinstance(title, dict) else [title]
        assert all(words and not re.search("_nats|updates$", words) for words in of_each)
        assert all("(nats a token)" in words for words in of_each if "loss" in words or words.startswith("Cost"))
