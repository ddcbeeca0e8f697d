"""Tables of text: a narrow terminal leaves spare columns out, in order, and LaTeX has numbers in maths."""

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
        ("-", "-"),
        ("1-2", "1-2"),
        ("center_scale@ln_1", r"center\_scale@ln\_1"),
    ],
)
def test_numbers_stand_in_maths(text: str, expected: str) -> None:
    assert tables._latex_cell(text) == expected
