"""The report as a file: its sections, that nothing breaks out of it, that its policy fits it, its size; and its commands."""

import base64
import gzip
import hashlib
import json
import math
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from support.pages import without_vega
from support.studies import write_study

from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.escape import visible
from lnjac.reporting import facts, page, report
from lnjac.reporting.charts import CHARTS
from lnjac.reporting.verdict import verdict
from lnjac.runs import folder as runs
from lnjac.runs import merge
from lnjac.runs.merged import companion
from lnjac.runs.schema import FROZEN

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")

pytestmark = pytest.mark.slow

TWO = {"attn_mode": ["sigmoid", "softmax"]}
EVIL = "</script><script>alert(1)</script>"


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
    return report.make(open_tables([path]), more.pop("title", "a study"), **more)


# What is in it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> report.Report:
    """A page with every section, its texts hostile."""
    factors = {"attn_mode": ["softmax", EVIL], "ln_backward": ["exact", "center_scale"], "model.n_embd": [32, 64]}
    path = write_study(tmp_path_factory.mktemp("whole"), factors, blocks=1, skipped=[(EVIL, EVIL)])
    with pytest.MonkeyPatch.context() as patch:
        without_vega(patch)
        return made(path, title=f"sweep {EVIL}")


def test_every_chart_has_a_caption_a_table_and_its_data(whole: report.Report):
    assert whole.sections == {
        "Comparison": ["cost", "headline", "cost-difference"],
        "Layers": ["heatmap", "seeds", "curves", "depth"],
        "Learning": ["losses", "backwards"],
        "Scaling": ["scaling-width"],
    }
    seen = Page(whole.html)
    sections = [attributes["id"] for attributes in seen.all("section")]
    assert sections == ["answer", "comparison", "layers", "learning", "scaling", "details"]
    figures = whole.html.split("<figure ")[1:]
    names = [name for names in whole.sections.values() for name in names]
    assert [re.match('class="(.*?)"', part)[1] for part in figures] == names  # type: ignore[index]
    assert all("<table" in part and "<figcaption" in part for part in figures)
    data = seen.data()
    assert len(data["charts"]) == len(figures)
    known = {attributes["data-csv"] for attributes in seen.all("button") if "data-csv" in attributes}
    assert known <= data["datasets"].keys()
    used = {name for chart in data["charts"].values() for name in chart["uses"].values()}
    assert used | known == data["datasets"].keys()
    assert all(attributes["aria-label"] for attributes in seen.all("div") if attributes.get("class") == "chart")
    assert {attributes["name"] for attributes in seen.all("select")} == {"cell", "metric", "site", "among"}
    assert "(1−ρ)·B" in seen.text  # the dictionary


def test_the_answer_comes_first_and_configuration_is_folded(whole: report.Report):
    answer = whole.html[whole.html.index('id="answer"') : whole.html.index('id="comparison"')]
    assert re.search(r"<h1[^>]*>[A-Z].*\.</h1>", answer)
    assert 'class="cost"' in answer
    for part in ("24 runs", "3 seeds", "100 steps", "0 diverged", 'href="#skipped">1 skipped'):
        assert part in answer
    unfolded = re.sub(r"<details.*?</details>", "", whole.html, flags=re.DOTALL)
    assert "torch_version" not in unfolded
    assert "torch_version" in whole.html


@pytest.mark.usefixtures("light")
def test_the_page_is_headed_by_the_answer_and_then_the_title(tmp_path: Path):
    path = write_study(tmp_path, {"attn_mode": ["softmax", EVIL]})
    said = verdict(path, "attn_mode").sentences
    html = made(path, title="a study").html
    assert f'<h1 id="answer-title">{escape(said[0], quote=False)}</h1>' in html
    seen = Page(html)
    assert "under </script>" in said[0]
    places = [seen.text.index(visible(text)) for text in (*said[:2], "a study:", *said[2:], "What varies")]
    assert places == sorted(places)


@pytest.mark.usefixtures("light")
def test_runs_that_cannot_be_compared_have_a_page_that_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("several runs have one config and seed")

    monkeypatch.setattr(report, "verdict", refuse)
    html = made(write_study(tmp_path, {"attn_mode": ["a", "b"]})).html
    assert ">These runs cannot be compared: several runs have one config and seed.</h1>" in html


@pytest.mark.usefixtures("light")
def test_the_dictionary_is_of_the_tables_that_are_there(tmp_path: Path):
    path = write_study(tmp_path, {"attn_mode": ["a", "b"]})
    assert "Columns of swaps" not in made(path).html
    note = {"table": "swaps", "merged": True, "merge_id": "m", "rows": {}}
    runs.write_table(companion(path, "swaps"), runs.schema(FROZEN["swaps"].values()).empty_table(), note)
    html = made(path).html
    assert html.count('"Columns of ') == 4
    assert all(column.name in html for column in FROZEN["swaps"].values())


@pytest.mark.usefixtures("light")
def test_charts_without_data_are_named_with_what_to_run(tmp_path: Path):
    text = Page(made(write_study(tmp_path, {}, steps=(100,))).html).text.partition("Charts that these runs")[2]
    assert "one level alone was run: python run.py -m attn_mode=softmax,sigmoid" in text
    assert "python run.py eval.every=50" in text
    assert "python run.py -m ln_backward=exact,center_scale" in text
    assert "scaling-width" in text
    assert "python run.py -m model.n_embd=32,64,128" in text


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("factors", "more", "first", "charts"),
    [
        ({}, {"seeds": 1}, "depth", {"Layers": ["seeds", "curves", "depth"], "Learning": ["losses"]}),
        (TWO, {"diverged": tuple(range(6))}, "diverged", {"Comparison": ["diverged"]}),
        (
            TWO,
            {"diverged": (0, 1, 2)},
            "depth",
            {"Comparison": ["diverged"], "Layers": ["seeds", "curves", "depth"], "Learning": ["losses"]},
        ),
        ({"steps": [10, 20, 40]}, {}, "scaling-steps", {}),
    ],
    ids=["one run", "all diverged", "one level diverged", "a size"],
)
def test_each_study_leads_with_its_own_chart(tmp_path: Path, factors: Any, more: Any, first: str, charts: Any):
    found = made(write_study(tmp_path, factors, blocks=0, **more))
    assert not charts or found.sections == charts
    assert re.findall('<figure class="(.*?)"', found.html)[0] == first


@pytest.mark.usefixtures("light")
def test_failures_are_counted_in_the_first_line_and_told_in_the_details(tmp_path: Path):
    path = write_study(tmp_path, TWO, steps=(100,), diverged=(0, 4), skipped=[("s/7", "failed: out of memory")])
    html = made(path).html
    for part in ("6 runs", 'href="#diverged">2 diverged', 'href="#skipped">1 skipped', "7 found, 6 merged, 1 skipped"):
        assert part in html
    text = Page(html).text
    assert "s/7: failed: out of memory" in text
    assert "2 diverged runs, in no mean" in text
    assert "run0004" in text


@pytest.mark.usefixtures("light")
def test_doubts_are_in_sight_each_with_what_to_do(tmp_path: Path):
    html = made(write_study(tmp_path, TWO, seeds=2, diverged=(0,), skipped=[("s/7", "failed")])).html
    (box,) = re.findall(r'<div class="warn".*?</div>', html, flags=re.DOTALL)
    assert "fewer than 3 seeds, so intervals say next to nothing: add seed=1,2,3" in box
    assert "1 of 4 runs diverged" in box
    assert "lower optimizer.lr" in box
    assert 'class="warn" role="note"' not in made(write_study(tmp_path, TWO)).html


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("warning", "shown"), [
    ("mixed commits: a (2 runs), b (4 runs)", "<li>Mixed commits: a (2 runs)"),
    ("results/a holds no run folders: its merged table x.parquet is read", "<li>results/a holds"),
    ("results holds no run folders: its merged table x.parquet is read", "<li>results holds"),
    ("data=play is not one corpus, its data_sha256 are 1, 2", "<li>data=play is"),
])  # fmt: skip
def test_a_doubt_begins_with_a_capital_unless_with_a_name(tmp_path: Path, warning: str, shown: str):
    merged = open_tables([write_study(tmp_path, TWO, blocks=0, steps=(100,))])
    assert shown in report.make(replace(merged, warnings=[warning]), "t").html


def test_every_warning_of_a_merge_has_a_remedy():
    """The patterns are those of what lnjac.runs.merge writes."""
    frame = pd.DataFrame(
        {
            "run_id": ["a", "b"],
            "seed": [1, 2],
            "commit": ["1", "2"],
            "numerics_version": ["1", "2"],
            "dirty": [True, False],
            "data": ["x", "x"],
            "data_sha256": ["1", "2"],
            "late": [None, 1.0],
        }
    )
    schemas = [pa.schema([(name, pa.string()) for name in frame if name != "late"]), pa.schema([("late", pa.string())])]
    known = {name: column for name, column in FROZEN["runs"].items() if name != "data"}
    found = merge.warnings(pa.Table.from_pandas(frame), known, schemas)
    assert len(found) >= 5
    found = [line for line in found if not line.startswith("missing seeds")]
    matched = {pattern for pattern in facts.REMEDIES for line in found if re.search(pattern, line)}
    assert all(any(re.search(pattern, line) for pattern in facts.REMEDIES) for line in found)
    assert len(matched) == 5


@pytest.mark.usefixtures("light")
def test_details_tell_sizes_baselines_and_whether_the_tree_was_clean(tmp_path: Path):
    factors = {"eval.every": [None, 250.0], "batch_size": [32], "precision": ["fp32"], "model.block_size": [64]}
    path = write_study(tmp_path, factors | {"optimizer.lr": [0.001]}, steps=(100,))
    html = made(path).html
    found = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert found["eval.every"] == "null, 250"
    told = ("model.n_layer", "model.block_size", "batch_size", "optimizer.lr", "precision", "bigram_nats")
    assert [found[name] for name in told] == ["2", "64", "32", "0.001", "fp32", "0.25"]
    assert found["working tree"] == "clean"
    assert html.index("<dt>eval.every") < html.index("The same in all runs") < html.index("<dt>precision")


@pytest.mark.usefixtures("light")
def test_a_list_offers_what_the_charts_hold_to_the_last_blank(tmp_path: Path):
    factors = TWO | {"method": [" two  blanks\n", "bp"]}
    options = Page(made(write_study(tmp_path, factors, blocks=0)).html).all("option")
    assert "method= two  blanks<U+000A>" in {option["value"] for option in options}


@pytest.mark.usefixtures("light")
def test_how_it_was_computed_is_told_once(tmp_path: Path):
    html = made(write_study(tmp_path, TWO, seeds=2)).html
    computed = html[html.index('id="computed"') :]
    for note in ("paired by seed", "Holm&#39;s method", "effect: d_z"):
        assert html.count(note) == computed.count(note) > 0
    assert html.count("<li>paired by seed, 95% t interval</li>") == 1
    assert html.count("<li>p adjusted by Holm") == 1  # though the families of runs and of norms differ in size


@pytest.mark.usefixtures("light")
def test_a_table_has_the_rows_of_the_first_choice_and_its_main_columns_first(tmp_path: Path):
    html = made(write_study(tmp_path, TWO | {"method": ["bp", "fa"]}, blocks=0)).html
    part = html[html.index('<figure class="curves"') :].partition("</table>")[0]
    heads = re.findall(r"<th [^>]*>(.*?)</th>", part)
    assert heads[:5] == ["step", "level", "mean", "interval", "n"]
    assert 'class="first-5"' in part
    assert len(re.findall("<tr><td", part)) == 3 * 2  # steps and levels of one cell, metric and norm


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


def test_the_real_bundle_ends_no_script_early():
    bundle = page._bundle()
    assert "vegaEmbed" in bundle
    assert not re.search(r"</script|<!--|\r|\0", bundle)


def test_data_are_columns_of_six_digits():
    rows = [
        {"a": 0.123456789, "b": None, "c": "x"},
        {"a": 1.0e-12 / 3, "b": 2, "c": "y"},
        {"a": math.nan, "b": 1, "c": ""},
    ]
    assert page.columns(rows) == {"a": [0.123457, 3.33333e-13, None], "b": [None, 2, 1], "c": ["x", "y", ""]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0087123, "0.008712"), (-2.931e-5, "-2.931e-05"), (2.53, "2.530"), (250.0, "250"), (6659.5, "6660")],
)
def test_numbers_have_four_significant_digits(value: float, text: str):
    assert page.number(value) == text


@pytest.mark.usefixtures("light")
def test_a_missing_value_is_printed_in_one_way(tmp_path: Path):
    factors = {"method.scale": [0.5, None], "ln_backward": ["exact", "ste"]}
    html = made(write_study(tmp_path, factors, seeds=1, blocks=0, diverged=(3,)), by="ln_backward").html
    assert "<td class=n>–" in html  # an interval of one seed
    assert not re.search(r"<t[dh][^>]*>(nan|NaN|None|NaT|-)\b", html)
    assert "scale=null" in html  # a level that is null is no missing value


@pytest.mark.rare
def test_six_hundred_runs_take_less_than_1_5_mb(tmp_path: Path):
    factors = {
        "attn_mode": ["sigmoid", "softmax"],
        "ln_backward": ["exact", "center_scale", "projected", "ste", "scale"],
        "method": ["bp", "fa", "dfa"],
    }
    path = write_study(tmp_path, factors, seeds=20, blocks=4, steps=(0, 1, 2, 4, 8, 16, 32, 64, 128, 250))
    found = made(path)
    assert "600 runs" in found.html
    assert len(found.html.encode()) < 1.5e6
    names = {name for names in found.sections.values() for name in names}
    assert {
        "cost",
        "headline",
        "cost-difference",
        "heatmap",
        "seeds",
        "curves",
        "depth",
        "losses",
        "backwards",
    } == names


# Commands


@pytest.mark.usefixtures("light")
def test_report_writes_a_page_and_says_what_is_in_it(lnjac: Any, tmp_path: Path):
    path, out = write_study(tmp_path, TWO, blocks=0, steps=(100,)), tmp_path / "x.html"
    code, text, err = lnjac("report", path, "-o", out, "--json", "--title", "T", "--where", "seed > 1")
    assert (code, err) == (0, "")
    told = json.loads(text)
    assert told["bytes"] == out.stat().st_size
    assert told["sections"]["Comparison"] == ["headline"]
    assert "<title>T</title>" in out.read_text()
    assert ">4 runs</a>" in out.read_text()
    assert "where seed &gt; 1" in out.read_text()


@pytest.mark.parametrize("figure", CHARTS)
def test_plot_draws_each_figure(lnjac: Any, tmp_path: Path, figure: str):
    sizes = {"model.n_embd": [32, 64], "model.n_layer": [1, 2], "steps": [1, 2]}
    factors = TWO | {"ln_backward": ["exact", "ste"]} | sizes
    if figure == "ranking":
        factors = {"optimizer.lr": [i / 1000 for i in range(1, 32)]}
    out = tmp_path / "x.svg"
    path = write_study(tmp_path, factors, blocks=0, seeds=2, diverged=(0,) * (figure == "diverged"))
    code, text, err = lnjac("plot", path, "--figure", figure, "-o", out)
    assert (code, err) == (0, "")
    assert text.startswith(f"{out}: ")
    drawn = out.read_text()
    assert drawn.startswith("<svg")
    assert "var(--" not in drawn
    assert all(cell in drawn for cell in re.findall("Shows (.*?), one of", text))
    assert 'stroke-width="2.5"' not in drawn  # the mark of a cell that a reader chose


def test_plot_takes_a_metric(lnjac: Any, tmp_path: Path):
    out = tmp_path / "x.svg"
    words = ("plot", write_study(tmp_path, TWO), "-o", out, "--figure", "depth", "--metric")
    assert lnjac(*words, "r_radial")[0] == 0
    assert ">r_radial from the first norm to the last" in out.read_text()
    assert ">Radial term over ‖g‖²<" in out.read_text()
    assert lnjac(*words, "r_radial", "--where", "seed > 1")[0] == 0
    assert "Where seed &gt; 1." in out.read_text()
    said = json.loads(lnjac(*words, "r_radial", "--json")[1])
    assert (said["output"], list(said)) == (str(out), ["output", "caption", "notes"])
    code, _, err = lnjac(*words, "r_radiall")
    assert (code, err.count("\n")) == (1, 1)
    assert "r_radiall" in err


def test_plot_lists_what_a_table_can_show_and_why_not_the_rest(lnjac: Any, tmp_path: Path):
    path = write_study(tmp_path, TWO, blocks=0)
    code, text, err = lnjac("plot", path)
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert list(lines) == list(CHARTS)
    assert lines["depth"] == CHARTS["depth"].summary
    assert lines["cost"].startswith("not shown: one backward alone was run: python run.py -m ln_backward=")
    told = json.loads(lnjac("plot", path, "--json")[1])
    assert told["cost"]["lacking"] == lines["cost"].removeprefix("not shown: ")
    assert told["depth"] == {"summary": CHARTS["depth"].summary, "lacking": None}


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
        (("plot", "-o", "x.svg", "--figure", "costs"), "did you mean cost?"),
        (("plot", "-o", "x.svg"), "--figure is missing"),
        (("plot", "--figure", "cost"), "try -o cost.svg"),
        (("plot", "-o", "x.svg", "--figure", "cost"), "; these runs can show headline, heatmap, seeds, curves, depth"),
        (
            ("plot", "-o", "x.svg", "--figure", "depth", "--width", "3.25"),
            "write a number and its unit, as 3.25in, 8.2cm",
        ),
        (("plot", "-o", "x.svg", "--figure", "depth", "--height", "0cm"), "--height 0cm is no length of a picture"),
        (("plot", "-o", "x.svg", "--figure", "depth", "--width", "2mm"), "no room: try --width"),
    ],
)
def test_bad_input_is_one_line(lnjac: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, said: str):
    monkeypatch.chdir(tmp_path)
    code, text, err = lnjac(words[0], write_study(tmp_path, TWO), *words[1:])
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert said in err
    assert not Path("x.html").exists()


def test_plot_draws_in_the_size_of_a_papers_column(lnjac: Any, tmp_path: Path):
    path, out = write_study(tmp_path, TWO, blocks=0, steps=(100,)), tmp_path / "x.pdf"
    for width, points in (("3.25in", b"234"), ("82.55mm", b"234"), ("8.255 cm", b"234"), ("234pt", b"234")):
        code, *_ = lnjac(
            "plot", path, "--figure", "headline", "-o", out, "--width", width, "--font-size", "8", "--no-title"
        )
        assert code == 0
        assert b"/MediaBox [0 0 " + points + b" " in out.read_bytes()


@pytest.mark.parametrize("name", ["report", "plot"])
def test_help_has_an_example(lnjac: Any, name: str):
    code, text, _ = lnjac(name, "--help")
    assert code == 0
    assert f"\n      lnjac {name} " in text


# In Python


@pytest.mark.usefixtures("light")
def test_a_report_in_python_takes_paths_as_strings_or_a_study(tmp_path: Path):
    path = write_study(tmp_path, TWO, blocks=0, steps=(100,))
    found = report.report(str(path), output=str(tmp_path / "new" / "a.html"), where="seed > 1")
    assert (tmp_path / "new" / "a.html").read_text(encoding="utf-8") == found.html
    assert "<title>all.parquet</title>" in found.html
    assert "where seed &gt; 1" in found.html
    again = report.report(open_tables([path]), output=tmp_path / "b.html", where="seed > 1", title="all.parquet")
    assert again.html == found.html
    listed = report.report([path], output=tmp_path / "c.html", by="attn_mode", where="seed > 1")
    assert listed.sections == found.sections
    with pytest.raises(ConfigError, match=r"must end in \.html: try x\.txt\.html"):
        report.report(path, output="x.txt")
