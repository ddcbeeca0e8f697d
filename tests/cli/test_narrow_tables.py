"""Tables of text: a narrow terminal leaves out spare columns; LaTeX has numbers in maths, and a wide table in parts."""

import os
import sys

import pytest

from lnjac.cli import tables
from lnjac.cli.tables import Grid

GRID = Grid(
    "loss",
    ["norm", "softmax", "sigmoid", "difference", "95% interval", "effect", "n"],
    1,
    [["ln_f", "2.5", "2.25", "0.25", "-0.01 to 0.51", "1.2e-05", "6"]],
    set(),
    [5, 1, 2],
)


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (100, []),
        (65, []),
        (60, ["effect"]),
        (50, ["effect", "softmax"]),
        (20, ["effect", "softmax", "sigmoid"]),
    ],
)
def test_a_narrow_terminal_leaves_out_spare_columns_and_says_so(
    width: int, left_out: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(tables.shutil, "get_terminal_size", lambda *_: os.terminal_size((width, 24)))
    tables.show([GRID])
    said = capsys.readouterr().out
    head = said.splitlines()[1].split("  ")
    assert [name for name in GRID.heads if name not in map(str.strip, head)] == [
        name for name in GRID.heads if name in left_out
    ]
    if not left_out:
        assert "left out" not in said
    else:
        assert f"left out, as the terminal is {width} characters wide: {', '.join(left_out)}; -o FILE.csv" in said


def test_what_is_no_terminal_gets_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show([GRID])
    assert "effect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-0.04", "$-0.04$"),
        ("<1e-4", r"$<1 \cdot 10^{-4}$"),
        ("2.5e+03", r"$2.5 \cdot 10^{3}$"),
        ("-0.05 to 3e-05", r"$-0.05$ to $3 \cdot 10^{-5}$"),
        ("-", "--"),
        ("1-2", "1-2"),
        ("center_scale@ln_1", r"center\_scale@ln\_1"),
    ],
)
def test_numbers_stand_in_maths(text: str, expected: str) -> None:
    assert tables._latex_cell(text) == expected


def wide(columns: int) -> Grid:
    """Two pairs of levels, each with two rows and their seeds, and so many columns of numbers."""
    heads = ["method", "a − b", *(f"number {i}" for i in range(columns))]
    rows = [
        (["fa", "x − y"], "x − y"), (["", "  seed 1"], "x − y"), (["fa", "z − y"], "z − y"),
        (["bp", "x − y"], "x − y"), (["bp", "z − y"], "z − y"),
    ]  # fmt: skip
    lines = [[*names, *["-0.5"] * columns] for names, _ in rows]
    return Grid("loss", heads, 2, lines, set(), of="difference", pairs=[pair for _, pair in rows])


def test_a_table_wider_than_a_column_of_text_is_one_for_each_pair() -> None:
    assert tables._by_pair(wide(4)) == [wide(4)]
    one, other = tables._by_pair(wide(9))
    assert (one.title, other.title) == ("loss, x − y", "loss, z − y")
    assert one.heads == ["method", *wide(9).heads[2:]]
    assert [line[0] for line in one.lines] == ["fa", "  seed 1", "bp"]
    assert [line[0] for line in other.lines] == ["fa", "bp"]
    assert all(len(line) == len(one.heads) for line in one.lines)
    text = tables._latex([wide(9), "- a note", "", "afterwards"])
    assert text.count("\\begin{tabular}{@{}lrrrrrrrrr@{}}") == 2
    labels = ["tab:difference-loss-x-y", "tab:difference-loss-z-y"]
    assert all(text.count(f"\\label{{{label}}}") == 1 for label in labels)
    assert text.rindex("\\end{tabular}") < text.index("footnotesize") < text.index("afterwards")
    assert "- a note" not in text


def test_labels_differ_whatever_the_letters() -> None:
    text = tables._latex([Grid(title, ["a", "n"], 1, [["x", "1"]], set(), of="cost") for title in ("β", "γ", "x")])
    assert [line.rpartition("label")[2] for line in text.splitlines() if "label{" in line] == [
        "{tab:cost}", "{tab:cost-2}", "{tab:cost-x}",
    ]  # fmt: skip


def test_a_long_table_is_continued_under_its_own_number() -> None:
    grid = Grid("loss", ["norm", "n"], 1, [[f"ln_{i}", "1"] for i in range(80)], set())
    text = tables._latex([grid])
    assert (text.count("\\begin{tabular}"), text.count("\\label"), text.count("(continued)")) == (
        3,
        2,
        2,
    )  # one is a comment
