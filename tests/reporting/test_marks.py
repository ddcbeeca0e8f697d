"""How charts look: what is drawn of a frame, that a picture of it can be made, and colours that can be read."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.drawings import LEVELS, SITES, drawn_lines, every_drawing, layers, lines

from lnjac.reporting import charts, marks

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")


def test_every_seed_is_a_dot_of_the_headline():
    spec = marks.spec(every_drawing()["rows"], width=400, palette="light")
    (dots,) = layers(spec, "point")
    rows = spec["datasets"][dots["data"]["name"]]
    assert len(rows) == len(SITES) * len(LEVELS) * 2
    assert dots["encoding"]["x"]["field"] == "value"


def test_levels_differ_in_colour_shape_and_dash():
    spec = marks.spec(every_drawing()["depth"], width=400, palette="light")
    (line,), (dots,) = layers(spec, "line"), layers(spec, "point")
    assert line["encoding"]["color"]["field"] == dots["encoding"]["shape"]["field"] == "level"
    first, second = line["encoding"]["strokeDash"]["scale"]["range"]
    assert first != second
    assert len(set(spec["config"]["range"]["symbol"])) == len(set(spec["config"]["range"]["category"])) == 7


def test_a_legend_shows_shapes_whole_and_lines_dashed():
    import vl_convert

    (few,), (many,) = (
        vl_convert.vegalite_to_vega(marks.spec(chart, width=400, palette="light"))["legends"]
        for chart in (every_drawing()["depth"], drawn_lines(lines(step=[*range(30)]), "step"))
    )
    assert few["shape"] == "shape"
    assert "strokeDash" not in few
    assert (many["strokeDash"], many["symbolType"]) == ("strokeDash", "stroke")


def test_a_level_looks_the_same_in_every_chart_and_like_no_other():
    names = [f"level {i}" for i in range(20)]

    def looks(shown: list[str]) -> dict[str, tuple[str, str]]:
        frame = pd.DataFrame({"site": "ln_f", "level": shown, "mean": 1.0, "low": 0.5, "high": 1.5})
        spec = marks.spec(marks.lines(frame, x="site", levels=marks.Levels("x", names), title="y"), width=300)
        (dots,) = layers(spec, "point")
        colour, shape = (dots["encoding"][channel]["scale"] for channel in ("color", "shape"))
        assert colour["domain"] == shape["domain"] == shown
        return dict(zip(shown, zip(colour["range"], shape["range"], strict=True), strict=True))

    every = looks(names)
    assert len(set(every.values())) == len(names)
    assert looks(names[3:9]) == {name: every[name] for name in names[3:9]}


def test_lines_have_what_they_are_seen_against_beside_them():
    references = pd.DataFrame({"site": SITES, "reference": "chance", "value": 0.5})
    spec = marks.spec(drawn_lines(lines(site=SITES), "site", references=references), width=400)
    mean, beside = layers(spec, "line")
    assert (mean["encoding"]["y"]["field"], beside["encoding"]["y"]["field"]) == ("mean", "value")
    assert beside["mark"]["style"] == "none"
    halo, named = layers(spec, "text")
    assert (halo["mark"]["style"], named["mark"]["style"]) == (["named", "halo"], "named")
    assert [row["reference"] for row in spec["datasets"][named["data"]["name"]]] == ["chance"]


def test_what_has_no_reference_keeps_its_scale():
    """Vega warns of a scale of no number: a metric without a reference has a point that is not drawn."""
    frame = lines(metric=["a", "b"], step=[0, 50])
    references = pd.DataFrame({"metric": ["a"], "reference": "floor", "value": 0.5})
    spec = marks.spec(drawn_lines(frame, "step", references=references), width=400)
    (beside,) = [layer for layer in layers(spec, "line") if layer["mark"].get("style") == "none"]
    rows = spec["datasets"][beside["data"]["name"]]
    assert [(row["metric"], row["reference"], row["step"]) for row in rows] == [
        ("a", "floor", 0),
        ("a", "floor", 50),
        ("b", "", 0),
    ]


def test_a_title_names_the_chosen_metric_and_norm():
    spec = marks.spec(every_drawing()["curves"], width=400)
    assert spec["title"]["text"] == {"expr": "metric + (site ? ' at ' + site : '')"}
    axes = {layer["encoding"]["y"]["title"]["signal"] for layer in spec["layer"]}
    assert axes == {'{"r_mean": "The mean", "r_radial": "The \\"radial\\" part"}[metric]'}
    alone = marks.spec(every_drawing()["depth"], width=400)
    assert "title" not in alone
    assert {layer["encoding"]["y"]["title"] for layer in alone["layer"]} == {"σ"}


def test_means_of_one_seed_have_a_band_of_no_width():
    spec = marks.spec(drawn_lines(lines(site=SITES).assign(low=np.nan, high=np.nan), "site"), width=400)
    (band,) = layers(spec, "area")
    ends = {one["as"]: one["calculate"] for one in band["transform"] if "calculate" in one}
    assert ends["from"] == "datum.low === null ? datum.mean : datum.low"
    assert {band["encoding"][axis]["field"] for axis in ("y", "y2")} == {"from", "to"} < set(ends)


def test_a_tooltip_shows_a_missing_number_as_a_dash():
    """Vega-Lite would show it as null."""
    import vl_convert

    frame = lines(site=SITES).assign(high=np.nan, low=[0.5, np.nan] * 3)
    spec = vl_convert.vegalite_to_vega(marks.spec(drawn_lines(frame, "site"), width=400))
    said = [mark["encode"]["update"].get("tooltip", {}).get("signal", "") for mark in walked(spec["marks"])]
    assert any('"low": isValid(datum["told low"])' in one and '"mean": format(datum["mean"]' in one for one in said)
    assert not any('datum["low"]' in one or 'datum["high"]' in one for one in said)
    formulas = {
        one["as"]: one["expr"]
        for data in spec["data"]
        for one in data.get("transform", ())
        if "as" in one and "expr" in one
    }
    assert formulas["told low"] == "datum.low === null ? '–' : format(datum.low, '.4~g')"


def walked(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Marks, and those within them."""
    return [found for mark in marks for found in (mark, *walked(mark.get("marks", [])))]


def test_a_maps_shades_are_centred():
    spec = marks.spec(every_drawing()["map"], width=400, palette="light")
    (rect,) = layers(spec, "rect")
    assert rect["encoding"]["color"]["scale"]["domain"] == list(range(-4, 4))
    assert len(spec["config"]["range"]["diverging"]) % 2 == 1  # one shade is the middle
    assert len(charts.BREAKS) == len(spec["config"]["range"]["diverging"]) - 1
    assert [-one for one in charts.BREAKS[::-1]] == list(charts.BREAKS)
    assert rect["encoding"]["y"]["scale"]["domain"] == SITES


def test_parameters_choose_rows_only_where_there_is_a_choice():
    several = marks.spec(every_drawing()["steps"], width=400, palette="light")
    assert several["params"] == [{"name": "cell", "value": "a"}]
    assert all({"filter": "datum.cell === cell"} in layer["transform"] for layer in several["layer"])
    assert "params" not in marks.spec(every_drawing()["depth"], width=400, palette="light")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", ["light", "dark"])
def test_text_can_be_read_on_paper_and_on_every_shade(palette: str):
    colours = marks.THEME[palette]
    levels = [colours[f"level-{i}"] for i in range(3)]
    shades = [colour for name, colour in colours.items() if name.startswith("shade-")]
    assert contrast(colours["ink"], colours["paper"]) >= 7
    assert contrast(colours["muted"], colours["paper"]) >= 4.5
    assert min(contrast(colours["ink"], shade) for shade in shades) >= 4.5
    assert min(contrast(level, colours["paper"]) for level in levels) >= 3


def test_a_page_has_a_variable_for_every_colour_and_a_picture_its_value():
    used = set(re.findall(r"var\(--([\w-]+)\)", str(marks.THEME["config"])))
    assert set(marks.THEME["light"]) == set(marks.THEME["dark"]) == used | {"link"}
    in_page, dark = (marks.spec(every_drawing()["map"], width=400, palette=palette) for palette in (None, "dark"))
    assert in_page["config"]["background"] == "var(--paper)"
    assert "var(" not in str(dark)
    assert dark["config"]["background"] == marks.THEME["dark"]["paper"]
