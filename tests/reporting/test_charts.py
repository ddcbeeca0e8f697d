"""The charts of a study: their numbers, their order, and the notes and the reasons that go with them."""

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
from lnjac.reporting import charts
from lnjac.reporting.charts import CHARTS, Drawing
from lnjac.reporting.view import METRICS, View, view
from lnjac.runs import folder as runs
from lnjac.runs import read as sources
from lnjac.runs.merged import companion
from lnjac.runs.schema import FROZEN

pytest.importorskip("altair", reason="the extra [report] is not installed")

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
    """The first table below a chart."""
    return next(iter(drawn(name, shown, metric).tables.values()))


def dataset(drawing: Drawing, column: str) -> list[dict[str, Any]]:
    """The rows that a chart draws which have this column."""
    (rows,) = [rows for rows in drawing.picture.to_dict()["datasets"].values() if column in rows[0]]
    return list(rows)


# The registry


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> View:
    """A study that every chart can show."""
    return of(write_study(tmp_path_factory.mktemp("everything"), EVERYTHING, blocks=0, seeds=2))


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_draws_each_of_its_metrics_with_a_caption_and_a_table(everything: View, name: str):
    chart = CHARTS[name]
    assert chart.name == name
    assert chart.summary.endswith(".")
    for metric, drawing in zip(chart.metrics, chart.drawings(everything), strict=True):
        assert isinstance(drawing, Drawing), drawing
        spec = drawing.picture.to_dict()  # raises where a name or a value is none of Vega-Lite's grammar
        assert metric is None or metric in drawing.caption + str(spec["layer"])
        assert drawing.caption.endswith(".")
        assert all(len(frame) for frame in drawing.tables.values())


@pytest.mark.parametrize("name", [name for name in CHARTS if CHARTS[name].needs])
def test_a_chart_without_what_it_needs_names_the_command_that_gives_it(tmp_path: Path, name: str):
    poor = of(write_study(tmp_path, {}, steps=(100,), seeds=1))
    unmet = [need for need in CHARTS[name].needs if not need.met(poor)]
    drawings = list(CHARTS[name].drawings(poor))
    if unmet:
        assert drawings == [unmet[0].otherwise] * len(CHARTS[name].metrics)
        assert "python run.py" in unmet[0].otherwise or "diagnostics=" in unmet[0].otherwise
    else:
        assert name in {"enrichment", "curves", "depth", "trajectory"}


def test_a_table_without_norms_has_no_chart_of_norms(tmp_path: Path):
    path = write_study(tmp_path, TWO)
    empty = pq.read_table(path).slice(0, 0).replace_schema_metadata()
    runs.write_table(path, empty, runs.read_metadata(path))
    shown = of(path)
    for name in ("heatmap", "enrichment", "curves", "depth", "trajectory"):
        with pytest.raises(ConfigError, match="leave diagnostics=off out"):
            drawn(name, shown)


def test_a_new_chart_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(charts, "CHARTS", dict(CHARTS))
    need = charts.Need("runs", ["flavour"], 1, "no flavour")

    @charts.chart("flavours", "Flavours", needs=[need], metrics=("a", "b"))
    def flavours(shown: View, metric: str) -> Drawing:
        """The flavours."""
        return Drawing(None, f"flavour {metric}", {})

    shown = of(write_study(tmp_path, TWO, blocks=0, steps=(100,)))
    assert list(charts.CHARTS["flavours"].drawings(shown)) == ["no flavour", "no flavour"]
    shown = View(shown.merged, shown.by, None, shown.runs.assign(flavour="sweet"))
    assert [one.caption for one in charts.CHARTS["flavours"].drawings(shown)] == ["flavour a", "flavour b"]


# Numbers


def test_the_comparison_that_is_shown_is_the_one_of_compare(tmp_path: Path):
    study = open_tables([write_study(tmp_path, TWO)])
    found = compare(study, "attn_mode", metrics=["radial_share"]).rows.set_index("site")
    shown = table("headline", view(study), "radial_share").set_index("site")
    assert (shown["difference"] == found["difference"]).all()
    assert (shown["n"] == 3).all()
    assert len(dataset(drawn("headline", view(study), "radial_share"), "seed")) == len(found) * 3


def test_each_number_of_a_layer_is_of_one_norm(tmp_path: Path):
    """No row, choice or caption is of norms together."""
    path = write_study(tmp_path, TWO | {"model.n_embd": [32, 64], "method": ["bp", "fa", "dfa"]})
    shown = of(path)
    sites = set(pd.read_parquet(path)["site"])
    headline = drawn("headline", shown, "radial_share")
    curves = drawn("curves", shown)
    named = ("heatmap", "enrichment", "depth", "scaling-width")
    for drawing in (headline, curves, *(drawn(name, shown) for name in named)):
        assert set(next(iter(drawing.tables.values()))["site"]) == sites
        assert set(drawing.choices.get("site", sites)) == sites
    assert headline.caption.startswith("Difference of radial_share at ln_f and at the norm where it is largest")
    assert curves.choices["site"][0] == "ln_f"  # where the chart opens
    values = pd.read_parquet(path).query("site == 'ln_f' and step == 100")
    assert drawn("trajectory", shown).caption.startswith("radial_share at ln_f after")
    mean = values.query("attn_mode == 'softmax' and method == 'bp' and `model.n_embd` == 32")["radial_share"].mean()
    row = table("trajectory", shown).query("step == 100 and level == 'softmax' and cell == 'method=bp, n_embd=32'")
    assert row["mean"].tolist() == pytest.approx([mean])
    assert drawn("scaling-width", shown).caption.startswith("radial_share at ln_f against")


def test_a_headline_of_many_comparisons_draws_the_norms_that_it_names(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"model.n_embd": [32, 64], "method": ["bp", "fa", "dfa"]}))
    drawing = drawn("headline", shown, "radial_share")
    bars, rows = dataset(drawing, "low"), table("headline", shown, "radial_share")
    largest = rows.assign(size=rows["difference"].abs()).sort_values("size").drop_duplicates("cell", keep="last")
    named = {f"{row.cell}, {site}" for row in largest.itertuples() for site in (row.site, "ln_f")}
    assert len(largest) == 6
    assert {row["place"] for row in bars} == named
    assert len(dataset(drawing, "seed")) == 3 * len(bars)
    assert any("the largest is chosen by its size" in note for note in drawing.notes)


def test_few_comparisons_are_drawn_at_every_norm_a_colour_each(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"method": ["bp", "fa"]}))
    bars = dataset(drawn("headline", shown, "radial_share"), "low")
    sites = dict.fromkeys(table("headline", shown, "radial_share")["site"])
    assert list(dict.fromkeys(row["place"] for row in bars)) == list(sites)
    assert {row["level"] for row in bars} == {"method=bp", "method=fa"}


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
    assert np.isfinite(table("depth", shown)[["mean", "low", "high"]]).all(axis=None)
    assert drawn("depth", shown).notes == ["2 of 40 values of sigma_mean are infinite, NaN or null: left out"]
    assert "6 of 120 values of sigma_mean are infinite, NaN or null: left out" in drawn("curves", shown).notes
    found = drawn("heatmap", shown, "sigma_mean").notes
    assert "1 infinite and 1 NaN or null values of sigma_mean are left out: attn_mode=sigmoid 2 of 20" in found


def test_losses_are_seen_against_bigrams_and_shares_against_chance(tmp_path: Path):
    path = write_study(tmp_path, TWO)
    shown = of(path)
    assert (table("losses", shown)["reference"] == 0.25).all()
    layers = pd.read_parquet(path).query("step == 100").groupby(["attn_mode", "site"])
    layers = layers[["radial_share", "enrichment_radial_share"]].mean()
    chance = layers["radial_share"] / layers["enrichment_radial_share"]  # of made-up numbers
    reference = table("depth", shown, "radial_share").set_index(["level", "site"])["reference"]
    assert reference.to_dict() == pytest.approx(chance.to_dict())
    assert "reference" not in table("depth", shown, "sigma_mean")


def test_an_effect_has_one_adjusted_p_wherever_it_is_shown(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO))
    heatmap = drawn("heatmap", shown)
    of_map = {(row["metric"], row["site"]): row["p_adjusted"] for row in dataset(heatmap, "p_adjusted")}
    for metric in ("radial_share", "cos_center_vs_true"):
        rows = table("headline", shown, metric)
        assert {(metric, row.site): row.p_adjusted for row in rows.itertuples()}.items() <= of_map.items()
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
    row = table("headline", shown, "val_loss_nats").query("cell == 'ln_backward=exact'").iloc[0]
    assert row["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert row["effect"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    for name, place, level in (("headline", "cell", "attn_mode"), ("cost", "backward", "level")):
        seeds = drawn(name, shown).tables["Every seed's value"]
        exact = seeds[seeds[place].str.endswith("exact")]
        for one, values in (("softmax", a), ("sigmoid", b)):
            assert exact[exact[level] == one].iloc[0, -3:].tolist() == values.tolist()


def test_differences_of_cost_stay_in_sight(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO | {"ln_backward": ["exact", "ste"]}))
    answer = drawn("cost", shown).answer
    assert answer is not None
    costs = table("cost", shown).set_index("level")["cost"]
    assert answer.table["difference"].tolist() == pytest.approx([costs["softmax"] - costs["sigmoid"]])
    assert drawn("cost", of(shown.merged.path, where="attn_mode == 'softmax'")).answer is None


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
    assert list(dict.fromkeys(drawn("headline", shown).tables["Every seed's value"]["cell"])) == shown.cells
    assert drawn("heatmap", shown).choices["cell"] == shown.cells


def test_curves_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(charts, "MOST_ROWS", 2000)
    shown = of(write_study(tmp_path, TWO | {"method": ["bp", "fa", "dfa"]}, steps=range(100)))
    rows = table("curves", shown)
    assert 1000 < len(rows) <= 2000
    assert set(rows["step"]) >= {0, 99}
    thinned, left_out = drawn("curves", shown).notes
    assert thinned.startswith("25 of the 100 measured steps are shown")
    assert left_out == "curves of the first 1 of 3 cells: choose others by --where"


def test_a_trajectory_says_how_many_steps_it_leaves_out(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO, steps=range(1, 61)))
    assert table("losses", shown)["step"].nunique() == 40
    assert [note.startswith("40 of the 60 measured steps are shown") for note in drawn("losses", shown).notes] == [True]


def test_an_unknown_metric_is_named(tmp_path: Path):
    shown = of(write_study(tmp_path, TWO))
    for name in ("trajectory", "losses", "depth", "curves", "enrichment", "headline"):
        with pytest.raises(ConfigError, match="no_such"):
            drawn(name, shown, "no_such")
    with pytest.raises(ConfigError, match="--metric val_loss_nats is a column of runs"):
        drawn("heatmap", shown, "val_loss_nats")
