"""The per-layer table as text."""

import math

import pandas as pd
import pytest

from lnjac.text import AVERAGE, HEADINGS, exact, layer_table, number

HEADER = ["name", "r_mean", "r_rad", "σ_μ", "cos_c/t", "cos_s/t"]


def row(site: str, call: int = 0, **values: float) -> dict[str, object]:
    return {"site": site, "call": call, **dict.fromkeys(HEADINGS, 0.25), **values}


def cells(text: str) -> list[list[str]]:
    """The table's cells, without the line that says how its last was made."""
    *lines, said = text.splitlines()
    assert said == AVERAGE
    assert AVERAGE.startswith("AVG: the plain mean of the norms")
    return [line.replace(" [", "[").split() for line in lines]


def test_one_line_per_site_and_the_plain_mean():
    text = layer_table([row("blocks.0.ln_1", r_mean=0.1), row("ln_f", r_mean=0.4)])
    assert cells(text) == [
        HEADER,
        ["blocks.0.ln_1", "0.1000", "0.2500", "0.2500", "0.2500", "0.2500"],
        ["ln_f", "0.4000", "0.2500", "0.2500", "0.2500", "0.2500"],
        ["AVG", "0.2500", "0.2500", "0.2500", "0.2500", "0.2500"],
    ]


def test_each_number_comes_from_its_own_column():
    values = dict(zip(HEADINGS, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    assert cells(layer_table([row("ln_f", **values)]))[1] == [
        "ln_f",
        "0.1000",
        "0.2000",
        "0.3000",
        "0.4000",
        "0.5000",
    ]


def test_columns_are_aligned():
    lines = layer_table([row("a"), row("a.long.name", r_mean=123.0), row("b", r_radial=math.nan)]).splitlines()[:-1]
    assert len({len(line) for line in lines}) == 1
    assert all(line.endswith(("cos_s/t", "0.2500")) for line in lines)


def test_calls_are_told_apart_only_where_a_site_has_several():
    names = [line[0] for line in cells(layer_table([row("qk"), row("qk", call=1), row("ln_f")]))]
    assert names == ["name", "qk[0]", "qk[1]", "ln_f", "AVG"]


def test_missing_is_a_dash_in_its_row_and_in_the_mean():
    body = cells(layer_table([row("a", r_mean=math.nan), row("b")]))
    assert [line[1] for line in body] == ["r_mean", "-", "0.2500", "-"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5000"),
        (-0.12345, "-0.1235"),
        (0.0, "0.0000"),
        (1.234e-5, "1.23e-05"),
        (-1.234e-5, "-1.23e-05"),
        (0.00099, "9.90e-04"),
        (12345.678, "12345.6780"),
        (1.5e9, "1.50e+09"),
        (math.inf, "inf"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_numbers_stay_readable(value: float | None, text: str):
    assert number(value) == text


def test_takes_a_data_frame():
    rows = [row("a", r_mean=1e-7), row("b")]
    assert layer_table(pd.DataFrame(rows)) == layer_table(rows)


def test_no_rows_leave_the_header():
    assert layer_table([]).split() == HEADER


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.1, "0.1"), (250.0, "250"), (1e-5, "1e-05"), (1234567.0, "1234567.0"), (1 / 3, "0.3333333333333333")],
)
def test_a_level_is_shown_with_the_digits_that_tell_it_apart(value: float, shown: str):
    assert exact(value) == shown
    assert float(shown) == value


def test_a_norms_name_stays_on_its_line():
    first, line = layer_table([row("ln\n\x1b[31m")]).splitlines()[:2]
    assert line.split()[0] == "ln<U+000A><U+001B>[31m"
    assert len(first) == len(line)
