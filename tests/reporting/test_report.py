"""The report as a file: its sections, that nothing breaks out of it, that its policy fits it, its size; and its commands."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.studies import write_study

from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.reporting import charts as figures
from lnjac.reporting import frames as views
from lnjac.reporting import html as page
from lnjac.reporting import report
from lnjac.runs import folder as runs
from lnjac.runs import read as sources
from lnjac.runs import schema as tables

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")

TWO = {"attn_mode": ["sigmoid", "softmax"]}
BUNDLE = "window.vegaEmbed = null;"
EVIL = "</script><script>alert(1)</script>"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Vega's own 0.9 MB, which take two seconds to put together."""
    monkeypatch.setattr(page, "_bundle", lambda: BUNDLE)


class Page(HTMLParser):
    """A page as a browser would take it apart: elements with their attributes, text inside each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("script", "style"):
            self.inside.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            tag, attributes, text = self.inside.pop()
            self.inside.append((tag, attributes, text + data))
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def scripts(self) -> list[str]:
        return [text for tag, attributes, text in self.inside if tag == "script" and "type" not in attributes]

    def data(self) -> dict[str, Any]:
        (packed,) = [text for _, attributes, text in self.inside if attributes.get("id") == "data"]
        found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
        return found


def made(path: Path, **more: Any) -> report.Report:
    return report.make(open_tables([path]), title=more.pop("title", "a study"), **more)


# What is in it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> report.Report:
    """A page with every section, its texts hostile."""
    factors = {"attn_mode": ["softmax", EVIL], "ln_backward": ["exact", "center_scale"], "model.n_embd": [32, 64]}
    path = write_study(tmp_path_factory.mktemp("whole"), factors, blocks=1, skipped=[(EVIL, EVIL)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_bundle", lambda: BUNDLE)
        return made(path, title=f"sweep {EVIL}")


def test_every_section_has_its_charts_each_with_a_table(whole: report.Report):
    found = whole
    charts = {name: section["charts"] for name, section in found.sections.items()}
    assert charts == {
        "what": 0,
        "headline": 3,
        "layers": 3,
        "trajectories": 3,
        "cost": 1,
        "depth": 2,
        "scaling": 2,
        "dictionary": 0,
    }
    seen = Page(found.html)
    assert [attributes.get("id") for attributes in seen.all("section")] == list(charts)
    figures_in = found.html.split("<figure ")[1:]
    assert len(figures_in) == sum(charts.values()) == len(seen.data()["charts"])
    assert all("<table>" in part and "<figcaption" in part for part in figures_in)
    assert all(attributes["aria-label"] for attributes in seen.all("div") if attributes.get("class") == "chart")
    assert {attributes["name"] for attributes in seen.all("select")} == {"cell", "site", "metric"}
    assert "(1−ρ)·B" in seen.text or "ΣB/Σ(B+C)" in seen.text  # the dictionary


@pytest.mark.usefixtures("light")
@pytest.mark.slow
def test_the_dictionary_is_of_the_tables_that_are_there(tmp_path: Path):
    path = write_study(tmp_path, {"attn_mode": ["a", "b"]})
    assert "Columns of swaps" not in made(path).html
    note = {"table": "swaps", "merged": True, "merge_id": "m", "rows": {}}
    runs.write_table(sources.companion(path, "swaps"), runs.schema(tables.TABLES["swaps"]).empty_table(), note)
    html = made(path).html
    assert html.count('"Columns of ') == 4
    assert all(column.name in html for column in tables.TABLES["swaps"])


@pytest.mark.usefixtures("light")
def test_sections_without_data_say_what_to_run(tmp_path: Path):
    text = Page(made(write_study(tmp_path, {}, steps=(100,))).html).text
    assert "nothing varies but the seed: python run.py -m attn_mode=softmax,sigmoid seed=1,2,3" in text
    assert "python run.py eval.every=50" in text
    assert "python run.py -m ln_backward=exact,center_scale" in text
    assert "python run.py -m model.n_embd=32,64,128" in text


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("factors", "more", "charts"),
    [
        ({}, {"seeds": 1}, {"headline": 0, "layers": 2, "depth": 2}),
        (TWO, {"diverged": tuple(range(6))}, {"headline": 0, "layers": 0, "depth": 0}),
        (TWO, {"diverged": (0, 1, 2)}, {"headline": 0, "layers": 2, "depth": 2}),
    ],
    ids=["one run", "all diverged", "one level diverged"],
)
def test_poor_studies_have_poor_reports(tmp_path: Path, factors: Any, more: Any, charts: dict[str, int]):
    found = made(write_study(tmp_path, factors, blocks=0, **more)).sections
    assert {name: found[name]["charts"] for name in charts} == charts


@pytest.mark.usefixtures("light")
def test_what_was_run_tells_of_failures(tmp_path: Path):
    path = write_study(tmp_path, TWO, steps=(100,), diverged=(0, 4), skipped=[("s/7", "failed: out of memory")])
    text = Page(made(path).html).text
    assert "6, of which 2 diverged" in text
    assert "7 found, 6 merged, 1 skipped" in text
    assert "s/7: failed: out of memory" in text
    assert "2 diverged runs: in no mean below" in text
    assert "run0004" in text


@pytest.mark.usefixtures("light")
def test_what_was_run_tells_sizes_baselines_and_whether_the_tree_was_clean(tmp_path: Path):
    factors = {"eval.every": [None, 250.0], "batch_size": [32], "precision": ["fp32"], "model.block_size": [64]}
    path = write_study(tmp_path, factors | {"optimizer.lr": [0.001]}, steps=(100,))
    found = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", made(path).html))
    assert found["eval.every"] == "null, 250"
    told = ("model.n_layer", "model.block_size", "batch_size", "optimizer.lr", "precision", "bigram_nats")
    assert [found[name] for name in told] == ["2", "64", "32", "0.001", "fp32", "0.25"]
    assert found["working tree"] == "clean"


def test_the_comparison_that_is_shown_is_the_one_of_compare(tmp_path: Path):
    from lnjac.comparing import compare

    study = open_tables([write_study(tmp_path, TWO)])
    found = compare.compare(study, "attn_mode", metrics=["radial_share"]).rows.set_index("site")
    drawing = views.headline(views.view(study), "radial_share")
    shown = drawing.table.set_index("site")
    assert (shown["difference"] == found["difference"]).all()
    assert (shown["n"] == 3).all()
    datasets = drawing.chart.to_dict()["datasets"].values()
    (dots,) = [rows for rows in datasets if "seed" in rows[0]]
    assert len(dots) == len(found) * 3


def test_each_number_of_a_layer_is_of_one_norm(tmp_path: Path):
    """No row, choice or caption is of norms together."""
    path = write_study(tmp_path, TWO | {"model.n_embd": [32, 64], "method": ["bp", "fa", "dfa"]})
    view = views.view(open_tables([path]))
    sites = set(pd.read_parquet(path)["site"])
    drawn = [views.headline(view), views.heatmap(view), views.enrichment(view), views.curves(view), views.depth(view)]
    for drawing in (*drawn, views.scaling(view)):
        assert set(drawing.table["site"]) == sites
        assert set(drawing.choices.get("site", sites)) == sites
    assert drawn[0].caption.startswith("Difference of radial_share at ln_f and at the norm where it is largest")
    assert drawn[3].choices["site"][0] == "ln_f"  # where the chart opens
    values = pd.read_parquet(path).query("site == 'ln_f' and step == 100")
    shown = views.trajectory(view, "radial_share")
    assert shown.caption.startswith("radial_share at ln_f after")
    mean = values.query("attn_mode == 'softmax' and method == 'bp' and `model.n_embd` == 32")["radial_share"].mean()
    assert mean == pytest.approx(shown.table.query("step == 100 and level == 'softmax'")["mean"].iloc[0])
    assert views.scaling(view).caption.startswith("radial_share at ln_f against")


def test_a_headline_of_many_comparisons_draws_the_norms_that_it_names(tmp_path: Path):
    study = open_tables([write_study(tmp_path, TWO | {"model.n_embd": [32, 64], "method": ["bp", "fa", "dfa"]})])
    drawing = views.headline(views.view(study))
    datasets = drawing.chart.to_dict()["datasets"].values()
    (bars,) = [rows for rows in datasets if "low" in rows[0]]
    largest = drawing.table.assign(size=drawing.table["difference"].abs()).sort_values("size")
    largest = largest.drop_duplicates(["model.n_embd", "method"], keep="last")
    named = {
        f"method={row['method']}, n_embd={row['model.n_embd']}, {site}"
        for row in largest.to_dict("records")
        for site in (row["site"], "ln_f")
    }
    assert {row["place"] for row in bars} == named
    (dots,) = [rows for rows in datasets if "seed" in rows[0]]
    assert len(dots) == 3 * len(bars)
    assert any("the largest is chosen by its size" in note for note in drawing.notes)


def test_bands_are_t_intervals_of_seeds_and_diverged_runs_are_in_none(tmp_path: Path):
    from scipy import stats

    path = write_study(tmp_path, TWO, seeds=4, diverged=(1,))
    view = views.view(open_tables([path]))
    lines = views.depth(view, "radial_share").table
    layers = pd.read_parquet(path).query("step == 100 and site == 'ln_f'")
    for level, n in (("sigmoid", 3), ("softmax", 4)):
        values = layers[(layers["attn_mode"] == level) & (layers["run_id"] != "run0001")]["radial_share"]
        (line,) = lines[(lines["level"] == level) & (lines["site"] == "ln_f")].itertuples()
        low, high = stats.t.interval(0.95, n - 1, values.mean(), values.std() / np.sqrt(n))
        assert len(values) == line.n == n
        assert [line.mean, line.low, line.high] == pytest.approx([values.mean(), low, high])


def test_levels_are_those_of_attn_mode_else_of_the_first_that_varies(tmp_path: Path):
    widths = {"model.n_embd": [100, 32], "steps": [10]}
    study = open_tables([write_study(tmp_path, widths)])
    assert (views.view(study).by, views.view(study).levels) == ("model.n_embd", ["32", "100"])
    both = open_tables([write_study(tmp_path, widths | TWO)])
    assert (views.view(both).by, views.view(both).cells) == ("attn_mode", ["n_embd=32", "n_embd=100"])
    assert views.view(both, "model.n_embd", "attn_mode == 'softmax'").cells == ["all runs"]


def test_curves_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(views, "MOST_ROWS", 2000)
    factors = TWO | {"method": ["bp", "fa", "dfa"]}
    drawing = views.curves(views.view(open_tables([write_study(tmp_path, factors, steps=range(100))])))
    assert 1000 < len(drawing.table) <= 2000
    assert set(drawing.table["step"]) >= {0, 99}
    thinned, left_out = drawing.notes
    assert thinned.startswith("25 of the 100 measured steps are shown")
    assert left_out == "curves of the first 1 of 3 cells: choose others by --where"


def test_a_trajectory_says_how_many_steps_it_leaves_out(tmp_path: Path):
    view = views.view(open_tables([write_study(tmp_path, TWO, steps=range(1, 61))]))
    drawing = views.trajectory(view, "val_loss_nats")
    assert drawing.table["step"].nunique() == 40
    assert [note.startswith("40 of the 60 measured steps are shown") for note in drawing.notes] == [True]


def test_infinite_values_are_left_out_of_charts_and_said(tmp_path: Path):
    path = write_study(tmp_path, TWO, seeds=4)
    layers = pd.read_parquet(path)
    layers.loc[(layers["site"] == "ln_f") & (layers["run_id"] == "run0001"), "sigma_mean"] = np.inf
    layers.loc[(layers["site"] == "ln_f") & (layers["run_id"] == "run0002"), "sigma_mean"] = np.nan
    table = sources.conform(pa.Table.from_pandas(layers, preserve_index=False), pq.read_schema(path))
    runs.write_table(path, table.replace_schema_metadata(), runs.read_metadata(path))
    view = views.view(open_tables([path]))
    drawing = views.depth(view)
    assert np.isfinite(drawing.table[["mean", "low", "high"]]).all(axis=None)
    assert drawing.notes == ["2 of 40 values of sigma_mean are infinite, NaN or null: left out"]
    assert "6 of 120 values of sigma_mean are infinite, NaN or null: left out" in views.curves(view).notes
    found = views.heatmap(view, "sigma_mean").notes
    assert "1 infinite and 1 NaN or null values of sigma_mean are left out: attn_mode=sigmoid 2 of 20" in found


def test_a_missing_level_is_drawn_as_null(tmp_path: Path):
    view = views.view(open_tables([write_study(tmp_path, {"method.scale": [0.5, None]})]), "method.scale")
    assert view.levels == ["0.5", "null"]
    assert views.depth(view).table["level"].drop_duplicates().tolist() == ["0.5", "null"]
    assert set(views.headline(view, "sigma_mean").table["b"]) == {0.5}


def test_losses_are_seen_against_bigrams_and_shares_against_chance(tmp_path: Path):
    path = write_study(tmp_path, TWO)
    view = views.view(open_tables([path]))
    assert (views.trajectory(view, "val_loss_nats").table["reference"] == 0.25).all()
    layers = pd.read_parquet(path).query("step == 100").groupby(["attn_mode", "site"])
    layers = layers[["radial_share", "enrichment_radial_share"]].mean()
    chance = layers["radial_share"] / layers["enrichment_radial_share"]  # of made-up numbers
    shown = views.depth(view, "radial_share").table.set_index(["level", "site"])["reference"]
    assert shown.to_dict() == pytest.approx(chance.to_dict())
    assert "reference" not in views.depth(view, "sigma_mean").table


def test_numbers_that_differ_late_are_two_levels_and_two_cells(tmp_path: Path):
    lr = [0.00012345678, 0.00012345679]
    view = views.view(open_tables([write_study(tmp_path, TWO | {"optimizer.lr": lr}, blocks=0, steps=(100,))]))
    assert view.cells == ["lr=0.00012345678", "lr=0.00012345679"]
    view = views.view(view.study, "optimizer.lr")
    assert view.levels == ["0.00012345678", "0.00012345679"]


def test_a_list_offers_what_the_charts_hold_to_the_last_blank():
    (option,) = Page(page.choice("cell", "Runs", [" two  blanks\n"])).all("option")
    assert option["value"] == " two  blanks<U+000A>"


def test_cells_are_in_the_order_of_their_numbers_exact_runs_first(tmp_path: Path):
    factors = TWO | {"ln_backward": ["center_scale", "exact"], "steps": [1000, 250], "model.n_embd": [128, 64, 256]}
    view = views.view(open_tables([write_study(tmp_path, factors, blocks=0, steps=(100,))]))
    assert view.cells == [
        f"ln_backward={name}, steps={steps}, n_embd={width}"
        for name in ("exact", "center_scale")
        for steps in (250, 1000)
        for width in (64, 128, 256)
    ]
    shown = views.headline(view).seeds
    assert shown is not None
    assert list(dict.fromkeys(shown["cell"])) == view.cells
    assert views.heatmap(view).choices["cell"] == view.cells


def test_an_effect_has_one_adjusted_p_wherever_it_is_shown(tmp_path: Path):
    from lnjac.comparing import compare

    view = views.view(open_tables([write_study(tmp_path, TWO)]))
    drawn = views.heatmap(view)
    (cells,) = drawn.chart.to_dict()["datasets"].values()
    of_map = {(row["metric"], row["site"]): row["p_adjusted"] for row in cells}
    for metric in views.HEADLINE:
        table = views.headline(view, metric).table
        assert {(metric, row.site): row.p_adjusted for row in table.itertuples()}.items() <= of_map.items()
    tested = {metric for metric, _ in of_map}
    assert tested == {*views.METRICS} - {"enrichment_radial_share"}  # (d−1)·radial_share: the very same test
    for drawing in (drawn, views.headline(view, "radial_share"), views.heatmap(view, "radial_share")):
        assert any("Holm's method over the 5 p values of one metric in one cell" in note for note in drawing.notes)
    alone = compare.compare(view.study, "attn_mode", metrics=["radial_share"]).rows.set_index("site")["p_adjusted"]
    assert {site: p for (metric, site), p in of_map.items() if metric == "radial_share"} == alone.to_dict()


def test_tables_have_p_effect_and_every_seed(tmp_path: Path):
    from scipy import stats

    path = write_study(tmp_path, TWO | {"ln_backward": ["exact", "ste"]})
    runs_of = pd.read_parquet(sources.companion(path, "runs")).query("ln_backward == 'exact'")
    a, b = (runs_of[runs_of["attn_mode"] == level]["val_loss_nats"].to_numpy() for level in ("softmax", "sigmoid"))
    view = views.view(open_tables([path]))
    drawing = views.headline(view, "val_loss_nats")
    row = drawing.table.query("ln_backward == 'exact'").iloc[0]
    assert row["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert row["effect"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    for shown in (drawing.seeds, views.cost(view).seeds):
        assert shown is not None
        exact = shown[shown["cell" if "backward" not in shown else "backward"].str.endswith("exact")]
        for level, values in (("softmax", a), ("sigmoid", b)):
            assert exact[exact["attn_mode"] == level].iloc[0, -3:].tolist() == values.tolist()


@pytest.mark.usefixtures("light")
def test_notes_are_read_without_unfolding_anything(tmp_path: Path):
    html = made(write_study(tmp_path, TWO, seeds=2, diverged=(0,))).html
    open_text = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    for note in ("paired by seed", "fewer than 3 seeds", "1 runs diverged, left out of every mean", "effect: d_z"):
        assert note in open_text


# What it must not do


def test_config_text_cannot_become_markup(whole: report.Report):
    seen = Page(whole.html)
    assert len(seen.scripts()) == 2
    assert not any("alert(1)" in text for text in seen.scripts())
    assert seen.all("title") == [{}]
    assert f"sweep {EVIL}" in seen.text
    assert EVIL in json.dumps(seen.data()["datasets"])  # there as a level's name, where it is nothing but data
    assert whole.html.count("<script") == 3


def test_the_policy_allows_what_is_in_the_page_and_no_more(whole: report.Report):
    found = Page(whole.html)
    (policy,) = [a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = {words[0]: words[1:] for words in (rule.split() for rule in policy.split(";"))}
    assert rules["default-src"] == ["'none'"]
    assert "unsafe" not in policy
    assert "http" not in policy

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert set(rules["script-src"]) == {digest(text) for text in found.scripts()}
    assert set(rules["style-src"]) == {digest(text) for tag, _, text in found.inside if tag == "style"}
    for _, attributes in found.elements:
        assert not {"style", "src", "onclick", "onload"} & set(attributes)
        assert not str(attributes.get("href", "#")).startswith("http")


@pytest.mark.slow
def test_the_real_bundle_ends_no_script_early():
    bundle = page._bundle()
    assert "vegaEmbed" in bundle
    assert not re.search(r"</script|<!--|\r|\0", bundle)


def test_data_are_columns_of_six_digits():
    rows = [{"a": 0.123456789, "b": None, "c": "x"}, {"a": 1.0e-12 / 3, "b": 2, "c": "y"}]
    assert page.columns(rows) == {"a": [0.123457, 3.33333e-13], "b": [None, 2], "c": ["x", "y"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0087123, "0.008712"), (-2.931e-5, "-2.931e-05"), (2.53, "2.530"), (250.0, "250"), (6659.5, "6660")],
)
def test_numbers_have_four_significant_digits(value: float, text: str):
    assert page.number(value) == text
    assert page.number(float("nan")) == "–"


@pytest.mark.slow
def test_six_hundred_runs_take_less_than_1_6_mb(tmp_path: Path):
    factors = {
        "attn_mode": ["sigmoid", "softmax"],
        "ln_backward": ["exact", "center_scale", "projected", "ste", "scale"],
        "method": ["bp", "fa", "dfa"],
    }
    path = write_study(tmp_path, factors, seeds=20, blocks=4, steps=(0, 1, 2, 4, 8, 16, 32, 64, 128, 250))
    found = made(path)
    assert "600 runs" in found.html
    assert len(found.html.encode()) < 1.6e6
    assert all(found.sections[name]["charts"] for name in ("headline", "layers", "trajectories", "cost", "depth"))


# Commands


@pytest.mark.usefixtures("light")
def test_report_writes_a_page_and_says_what_is_in_it(lnjac: Any, tmp_path: Path):
    path, out = write_study(tmp_path, TWO, blocks=0, steps=(100,)), tmp_path / "x.html"
    code, text, err = lnjac("report", path, "-o", out, "--json", "--title", "T", "--where", "seed > 1")
    assert (code, err) == (0, "")
    told = json.loads(text)
    assert told["bytes"] == out.stat().st_size
    assert told["sections"]["headline"] == {"title": "Comparison", "charts": 3}
    assert "<title>T</title>" in out.read_text()
    assert "4 runs, by attn_mode, where seed &gt; 1" in out.read_text()


@pytest.mark.parametrize("figure", list(views.FIGURES))
def test_plot_draws_each_figure(lnjac: Any, tmp_path: Path, figure: str):
    factors = TWO | {"ln_backward": ["exact", "ste"], "model.n_embd": [32, 64]}
    out = tmp_path / "x.svg"
    code, text, err = lnjac("plot", write_study(tmp_path, factors, blocks=1), "--figure", figure, "-o", out)
    assert (code, err) == (0, "")
    assert text.startswith(f"{out}: ")
    drawn = out.read_text()
    assert drawn.startswith("<svg")
    assert any(words in drawn for words in ("Difference of", "What training", "mean over seeds"))
    assert all(cell in drawn for cell in re.findall("Shows (.*?), one of", text))
    assert 'stroke-width="2.5"' not in drawn  # the mark of a cell that a reader chose


def test_plot_takes_a_metric(lnjac: Any, tmp_path: Path):
    out = tmp_path / "x.svg"
    words = ("plot", write_study(tmp_path, TWO), "-o", out, "--figure", "depth", "--metric")
    assert lnjac(*words, "r_radial")[0] == 0
    assert "r_radial" in out.read_text()
    assert lnjac(*words, "r_radial", "--where", "seed > 1")[0] == 0
    assert "Where seed &gt; 1." in out.read_text()
    said = json.loads(lnjac(*words, "r_radial", "--json")[1])
    assert (said["output"], list(said)) == (str(out), ["output", "caption", "notes"])
    code, _, err = lnjac(*words, "r_radiall")
    assert (code, err.count("\n")) == (1, 1)
    assert "r_radiall" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("report", "-o", "x.txt"), "must end in .html"),
        (("report", "-o", "x.html", "--by", "attnmode"), "did you mean attn_mode"),
        (("report", "-o", "x.html", "--by", "seed"), "runs are not told apart by seed"),
        (("report", "-o", "x.html", "--by", "val_loss_nats"), "runs are not told apart by val_loss_nats"),
        (("report", "-o", "x.html", "--where", "seed > 9"), "holds for no run"),
        (("report", "-o", "x.html", "--where", "__import__('os')"), "--where"),
        (("plot", "-o", "x.gif", "--figure", "depth"), ".svg, .png, .pdf"),
        (("plot", "-o", "x.svg", "--figure", "cost"), "python run.py -m ln_backward=exact,center_scale"),
    ],
)
def test_bad_input_is_one_line(lnjac: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, said: str):
    monkeypatch.chdir(tmp_path)
    code, text, err = lnjac(words[0], write_study(tmp_path, TWO), *words[1:])
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert said in err
    assert not Path("x.html").exists()


@pytest.mark.parametrize("name", ["report", "plot"])
def test_help_has_an_example(lnjac: Any, name: str):
    code, text, _ = lnjac(name, "--help")
    assert code == 0
    assert f"\n      lnjac {name} " in text


def test_an_unknown_metric_of_a_view_is_named(tmp_path: Path):
    view = views.view(open_tables([write_study(tmp_path, TWO)]))
    with pytest.raises(ConfigError, match="no_such"):
        views.trajectory(view, "no_such")
    with pytest.raises(ConfigError, match="--metric val_loss_nats is a column of runs"):
        views.heatmap(view, "val_loss_nats")
    assert figures.FORMATS == (".svg", ".png", ".pdf")
