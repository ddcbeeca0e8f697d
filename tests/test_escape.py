r"""Hostile names: whatever a level, a norm, a path or an error's message holds, it stays one text in its place."""

import html
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.folders import make_run
from support.studies import write_study

from lnjac import escape
from lnjac.cli import tables

pytestmark = pytest.mark.slow

MARKS = "\x00\x1b\x85\x9b\u00a0\u200e\u202e\u2028\u2066\ufeff\ufffe\n\r\t"
TEXTS = st.text(st.one_of(st.characters(), st.sampled_from(MARKS + "\\|`*_<>&[]~$#%^{}\"'=+-@, ")))

HOSTILE = [
    "line\nbreak\u2028and\x85more",
    "esc\x1b[31mape\x9b2J\x00\ufffe",
    "right\u202eto\u2066left",
    r"back\u slash \" \n",
    "=HYPERLINK(1)|pipe\t`tick`",
    "[x]* $x_1$ #%^~&{} <b>-- ?`",
]
"""Levels of one study; each breaks something if it is taken for more than a text."""
SHOWN = [escape.visible(name) for name in HOSTILE]


def cannot_be_seen(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()} - {"\n"}


# Each medium


@given(TEXTS)
def test_what_is_shown_can_be_seen_and_is_replaced_once(text: str):
    shown = escape.visible(text)
    assert shown.isprintable()
    assert escape.visible(shown) == shown
    assert shown == text or not text.isprintable()
    assert re.sub("<U\\+([0-9A-F]{4,6})>", lambda code: chr(int(code[1], 16)), shown) == text or "<U+" in text


def test_code_points_are_named():
    assert escape.visible("a\n\x1b\u202e\U000e0001\udcff") == "a<U+000A><U+001B><U+202E><U+E0001><U+DCFF>"
    assert escape.visible("σ − é 中") == "σ − é 中"
    assert escape.visible_lines("a\n\tb\x1b\r\n") == "a\n\tb<U+001B><U+000D>\n"


@given(TEXTS)
def test_a_log_line_has_no_mark_that_a_terminal_obeys(text: str):
    record = logging.LogRecord("", logging.INFO, "", 0, "%s", (text,), None)
    shown = escape.LogFormatter("%(message)s").format(record)
    assert cannot_be_seen(shown) <= {"\t"}
    assert shown.count("\n") == text.count("\n")


@given(TEXTS)
def test_markdown_shows_a_text_in_one_cell(text: str):
    table = f"| a | b |\n| --- | --- |\n| x{escape.markdown(text)}x | y |\n"
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(table)
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert {token.type for token in cells[2]} <= {"text", "text_special"}
    assert "".join(token.content for token in cells[2]) == f"x{escape.visible(text)}x"


@given(TEXTS | st.from_regex(r"[+-]?[0-9]+", fullmatch=True))
def test_a_spreadsheet_computes_no_text(text: str):
    safe = escape.spreadsheet(text)
    if re.fullmatch(r"[+-]?[0-9]+", text):
        assert safe == text
    else:
        assert safe.lstrip()[:1] not in list("=@")
        assert safe.removeprefix("'") == escape.visible(text) or text.startswith("'")


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-x", "@SUM(1)", " =1", "-inf", "＝1", "-1e", "+1-1"])
def test_a_formula_gets_an_apostrophe(text: str):
    assert escape.spreadsheet(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-0.5", "+1e-3", "-.5", "2", "softmax", "a=b", "softmax − sigmoid", ""])
def test_numbers_and_plain_texts_have_none(text: str):
    assert escape.spreadsheet(text) == text


def test_a_csv_keeps_numbers_and_neutralises_texts_and_headings():
    frame = pd.DataFrame({"=a": ["=1", "b"], "n": [-1.5, 2.0], "mixed": [-3, "-x"], "none": [None, "-2"]})
    safe = tables.for_spreadsheets(frame)
    assert list(safe) == ["'=a", "n", "mixed", "none"]
    assert safe["'=a"].tolist() == ["'=1", "b"]
    assert safe["n"].tolist() == [-1.5, 2.0]
    assert safe["mixed"].tolist() == [-3, "'-x"]
    assert safe["none"].isna().tolist() == [True, False]
    assert safe["none"].tolist()[1] == "-2"


@given(TEXTS)
def test_latex_is_ascii_without_a_bare_special(text: str):
    for found in (escape.latex(text), escape.latex_paragraph(text)):
        assert found.isascii()
        assert found.isprintable()
        bare = re.sub(r"\\[a-z]+|\\.|\$\\?[A-Za-z<>-]+\$|\$\\\$\$", "", found, flags=re.IGNORECASE)
        assert not set(bare) & set("$&#%^_~\\")


def test_latex_has_its_own_signs():
    assert escape.latex("a − b <1e-4 50% x_1") == r"a $-$ b $<$1e-4 50\% x\_1"
    assert escape.latex("--?`") == "-{}-{}?{}`"
    assert escape.latex("éσΛ中") == r"\'{e}$\sigma$$\Lambda$$<$U+4E2D$>$"
    assert escape.latex_paragraph("a_b" + "x" * 30).count(r"\allowbreak") == 3


# Through the commands


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    factors = {"attn_mode": HOSTILE, "ln_backward": ["exact", "center_scale"], "model.n_embd": [32, 64]}
    return write_study(tmp_path_factory.mktemp("hostile"), factors, blocks=1, seeds=2, steps=(0, 100))


COMMANDS = {
    "compare": ("--by", "attn_mode", "--metric", "radial_share"),
    "cost": (),
    "scaling": ("--x", "model.n_embd", "--metric", "radial_share"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_gets_no_command(lnjac: Any, study: Path, command: str, monkeypatch: pytest.MonkeyPatch):
    code, plain, _ = lnjac(command, study, *COMMANDS[command])
    assert code == 0
    assert cannot_be_seen(plain) == set()
    assert all(name in plain for name in SHOWN)
    code, as_json, _ = lnjac(command, study, *COMMANDS[command], "--json")
    assert code == 0
    assert as_json.isascii()
    assert cannot_be_seen(as_json) == set()
    assert all(json.dumps(name) in as_json for name in HOSTILE)  # a program gets them as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")
    code, wide, _ = lnjac(command, study, *COMMANDS[command])
    wide = re.sub("\x1b\\[[01]m", "", wide)  # bold, and its end
    assert code == 0
    assert cannot_be_seen(wide) == set()
    assert all(name in wide for name in SHOWN)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_export_holds_each_level_once(lnjac: Any, study: Path, tmp_path: Path, command: str):
    words = (command, study, *COMMANDS[command])
    _, printed, _ = lnjac(*words)
    notes = [line.removeprefix("- ") for line in printed.splitlines() if line.startswith("- ")]
    for suffix in ("csv", "md", "parquet", "tex"):
        assert lnjac(*words, "-o", tmp_path / f"x.{suffix}")[0] == 0
    kept, safe = pd.read_parquet(tmp_path / "x.parquet"), pd.read_csv(tmp_path / "x.csv")
    assert len(kept) == len(safe)
    for name in kept.columns:
        if kept[name].dtype.kind in "if":
            assert safe[name].tolist() == pytest.approx(kept[name].tolist(), nan_ok=True)
        else:
            texts = ["" if value is None or value != value else escape.spreadsheet(str(value)) for value in kept[name]]
            assert ["" if value != value else str(value) for value in safe[name]] == texts  # empty reads as NaN
    text = (tmp_path / "x.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    shown = ["".join(part.content for part in token.children or []) for token in tokens if token.type == "inline"]
    assert all(any(name in one for one in shown) for name in SHOWN)
    assert [one for one in shown if one in notes] == notes
    assert sum(token.type == "table_open" for token in tokens) > 0
    tex = (tmp_path / "x.tex").read_text(encoding="ascii")
    assert all(escape.latex_paragraph(note) in tex for note in notes)
    tex = tex.replace("\\allowbreak{}", "").replace("{}", "")
    assert all(escape.latex(name).replace("{}", "") in tex for name in HOSTILE)
    labels = re.findall(r"\\label\{(.*?)\}", tex)
    assert len(labels) == len(set(labels)) == tex.count(r"\lnjaccaption{") > 0
    assert all(re.fullmatch("tab:[a-z0-9.-]+", label) for label in labels)


def compiled(tex: Path) -> str:
    """The log of a plain pdflatex, which must succeed."""
    if not (pdflatex := shutil.which("pdflatex")):
        pytest.skip("needs pdflatex on the PATH: apt-get install texlive-latex-base")
    words = [pdflatex, "-interaction=nonstopmode", "-halt-on-error", tex.name]
    done = subprocess.run(words, cwd=tex.parent, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert tex.with_suffix(".pdf").exists()
    return tex.with_suffix(".log").read_text(errors="replace")


@pytest.mark.parametrize("command", COMMANDS)
def test_latex_compiles_alone_and_within_a_paper_and_overflows_nowhere(
    lnjac: Any, study: Path, tmp_path: Path, command: str
):
    lnjac(command, study, *COMMANDS[command], "--seeds", "-o", tmp_path / "x.tex")
    paper = "\\documentclass[twocolumn]{article}%s\\begin{document}A\\input{x}Z\\end{document}"
    for name, more in (("with", "\\usepackage{graphicx}"), ("without", "")):
        (tmp_path / f"{name}.tex").write_text(paper % more)
    for name in ("x", "with"):
        log = compiled(tmp_path / f"{name}.tex")
        assert "Overfull" not in log
        assert "Missing character" not in log
    compiled(tmp_path / "without.tex")


def test_latex_says_what_the_terminal_says(lnjac: Any, tmp_path: Path):
    path = write_study(tmp_path, {"attn_mode": ["sigmoid", "relu_x", "softmax"]}, blocks=1)
    words = ("compare", path, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats")
    _, printed, _ = lnjac(*words, "-o", tmp_path / "x.tex")
    body = (tmp_path / "x.tex").read_text().split(r"\providecommand{\bottomrule}{\hline}")[1]
    marks = {
        r"\\allowbreak\{\}": "",
        r"\$-\$": "−",
        r" \\cdot 10\^\{(-?)(\d)\}": r"e\g<1>\2",
        r"\$([^$]*)\$": r"\1",
        r"\\([_%])": r"\1",
    }
    for mark, said in marks.items():
        body = re.sub(mark, said, body)
    rows = [" ".join(line.removesuffix(r"\\").replace("&", " ").split()) for line in body.splitlines() if "&" in line]
    lines = printed.splitlines()
    first = lines.index("val_loss_nats") + 1
    assert rows == [" ".join(line.split()) for line in lines[first : first + 4]]
    assert "softmax − sigmoid" in rows[-2] + rows[-1] + rows[1]
    label = r"\label{tab:difference-by-attn-mode-val-loss-nats}"
    assert rf"\lnjaccaption{{val_loss_nats: difference by attn_mode}}{label}" in body
    under = body.split(r"\end{tabular}")[1]
    assert all(f"noindent {line.removeprefix('- ')}" in under for line in lines if line.startswith("- "))


COLUMN = 'method.\\u "x"|\n= $_'
"""A config column: it becomes the titles of axes and legends, and the headings of tables."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two levels only: their names are in a chart's titles."""
    factors = {COLUMN: [HOSTILE[0], HOSTILE[3]], "ln_backward": ["exact", "ste"], "model.n_embd": [32, 64]}
    return write_study(tmp_path_factory.mktemp("two"), factors, blocks=1, seeds=2, steps=(0, 100))


@pytest.mark.parametrize("name", [pytest.param("study", marks=pytest.mark.rare), "two"])
def test_charts_are_drawn_whatever_their_texts(name: str, tmp_path: Path, lnjac: Any, request: pytest.FixtureRequest):
    pytest.importorskip("vl_convert", reason="the extra [report] is not installed")
    from lnjac.reporting.charts import CHARTS

    path, by = request.getfixturevalue(name), {"study": "attn_mode", "two": COLUMN}[name]
    absent = ("ranking", "diverged", "scaling-depth", "scaling-steps")
    for figure in [name for name in CHARTS if name not in absent]:
        code, text, err = lnjac("plot", path, "--figure", figure, "--by", by, "-o", tmp_path / "x.svg")
        assert (code, err) == (0, "")
        assert cannot_be_seen(text) == set()
        shown = "".join(ElementTree.parse(tmp_path / "x.svg").getroot().itertext())
        assert cannot_be_seen(shown) == set()
        assert any(part[:12] in shown for part in SHOWN)


def test_no_section_of_a_report_is_lost(two: Path, tmp_path: Path, lnjac: Any):
    pytest.importorskip("vl_convert", reason="the extra [report] is not installed")
    code, text, err = lnjac(
        "report", two, "--by", COLUMN, "--title", HOSTILE[2], "-o", tmp_path / "\u202ex.html", "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["sections"] == {
        "Comparison": ["cost", "headline", "cost-difference"],
        "Layers": ["heatmap", "seeds", "curves", "depth"],
        "Learning": ["losses", "backwards"],
        "Scaling": ["scaling-width"],
    }
    page = (
        Path(found["output"]).read_text(encoding="utf-8").partition("<body")[2].partition('<script type="text/plain"')
    )
    assert cannot_be_seen(page[0]) == set()
    shown = html.unescape(page[0])
    assert all(escape.visible(name) in shown for name in (COLUMN, HOSTILE[0], HOSTILE[2], HOSTILE[3]))


def test_a_hostile_column_is_compared_and_exported(two: Path, tmp_path: Path, lnjac: Any):
    for suffix in ("md", "csv", "tex"):
        code, text, err = lnjac(
            "compare", two, "--by", COLUMN, "--reference", HOSTILE[0], "-o", tmp_path / f"x.{suffix}"
        )
        assert (code, err) == (0, "")
        assert cannot_be_seen(text) == set()
    by_level = lnjac("compare", two, "--by", "model.n_embd", "-o", tmp_path / "cells.csv")
    assert by_level[0] == 0
    assert escape.visible(COLUMN) in pd.read_csv(tmp_path / "cells.csv")
    assert "Overfull" not in compiled(tmp_path / "x.tex")


def test_merge_show_and_errors_are_plain_lines(lnjac: Any, tmp_path: Path):
    evil = "x\x1b[31m\n\u202e"
    for seed in (1, 2):
        make_run(tmp_path / "s" / f"{seed}{evil}", seed=seed, attn_mode=evil, run_id=f"r{seed}", sites=(evil,))
    make_run(tmp_path / "s" / f"3{evil}", seed=3, run_id="r3")
    (tmp_path / "s" / f"3{evil}" / "status.json").write_text(json.dumps({"status": "failed", "error": f"E: {evil}"}))
    code, text, err = lnjac("merge", tmp_path / "s", "-o", tmp_path / f"all{evil}.parquet")
    assert (code, err) == (0, "")
    assert cannot_be_seen(text) == set()
    assert [line for line in text.splitlines() if line.startswith("skipped")] == [
        f"skipped {escape.visible(str(tmp_path / 's' / f'3{evil}'))}: failed: E: x<U+001B>[31m <U+202E>"
    ]
    code, text, _ = lnjac("show", tmp_path / f"all{evil}.parquet", "--run", "r1")
    assert code == 0
    assert cannot_be_seen(text) == set()
    assert text.count(escape.visible(evil)) == 2  # a level, a norm
    code, _, err = lnjac("show", tmp_path / f"all{evil}.parquet", "--run", evil)
    assert code == 1
    assert cannot_be_seen(err) == set()
    assert all(line.startswith("lnjac: ") for line in err.splitlines())
