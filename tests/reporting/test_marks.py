"""How charts look: what is drawn of a frame, that a picture of it can be made, and colours that can be read."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lnjac.errors import ConfigError
from lnjac.reporting import marks

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")

LEVELS = ["softmax", "sigmoid"]
SITES = ["blocks.0.ln_1", "blocks.0.ln_2", "ln_f"]


def lines(**more: list[Any]) -> pd.DataFrame:
    """A mean with its interval for every combination of the given columns and levels."""
    index = pd.MultiIndex.from_product([*more.values(), LEVELS], names=[*more, "level"])
    mean = np.arange(1.0, len(index) + 1)
    return pd.DataFrame({"mean": mean, "low": mean - 0.5, "high": mean + 0.5}, index=index).reset_index()


def by_seed(**more: list[Any]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([*more.values(), [1, 2]], names=[*more, "seed"])
    return pd.DataFrame({"difference": np.arange(1.0, len(index) + 1)}, index=index).reset_index()


def every_drawing() -> dict[str, marks.Picture]:
    places = lines(place=SITES)
    cells = lines(site=SITES, metric=["radial_share", "sigma_mean"])
    cells = cells[cells["level"] == "softmax"].assign(shade=0.5, shown="0.1").rename(columns={"level": "cell"})
    costs = lines(place=["ste", "scale"])
    of_seed = by_seed(place=["ste", "scale"], level=LEVELS)
    return {
        "rows": marks.dots(by_seed(place=SITES, level=LEVELS), places, by="attn_mode", title="x"),
        "upright": marks.dots(of_seed, costs, by="attn_mode", title="x", upright=True),
        "map": marks.shades(cells.assign(column=cells["metric"]), legend="x"),
        "curves": marks.lines(lines(site=SITES, metric=["r_mean"], step=[0, 1, 100]), x="step", by="a", title="x"),
        "steps": marks.lines(lines(cell=["a", "b"], step=[0, 50, 100]), x="step", by="attn_mode", title="x"),
        "depth": marks.lines(lines(site=SITES), x="site", by="attn_mode", title="sigma", log=True),
        "sizes": marks.lines(lines(x=[32, 64]), x="x", by="attn_mode", title="x", size="model.n_embd", log=True),
    }


def layers(spec: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [layer for layer in spec["layer"] if layer["mark"]["type"] == mark]


@pytest.mark.parametrize("name", ["rows", "upright", "map", "curves", "steps", "depth", "sizes"])
def test_every_drawing_is_valid_vega_lite_and_a_picture(tmp_path: Path, name: str):
    chart = every_drawing()[name]
    chart.to_dict()  # raises where a name or a value is none of the grammar's
    picture = tmp_path / f"{name}.svg"
    marks.save(chart, picture, "light", width=400, title="t")
    text = picture.read_text()
    assert text.startswith("<svg")
    assert text.count("<path") > 5
    assert "NaN" not in text


def test_pictures_of_every_kind_by_their_suffix(tmp_path: Path):
    chart = every_drawing()["depth"]
    for suffix, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<svg")):
        marks.save(chart, tmp_path / f"x{suffix}", "dark", width=300, title="t")
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(begins)


def test_every_seed_is_a_dot_of_the_headline():
    spec = marks.spec(every_drawing()["rows"], width=400, palette="light")
    (dots,) = layers(spec, "point")
    rows = spec["datasets"][dots["data"]["name"]]
    assert len(rows) == len(SITES) * len(LEVELS) * 2
    assert dots["encoding"]["x"]["field"] == "difference"


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
        for chart in (every_drawing()["depth"], marks.lines(lines(step=[*range(30)]), x="step", by="x", title="y"))
    )
    assert few["shape"] == "shape"
    assert "strokeDash" not in few
    assert (many["strokeDash"], many["symbolType"]) == ("strokeDash", "stroke")


def test_lines_have_what_they_are_seen_against_beside_them():
    chart = marks.lines(lines(site=SITES).assign(reference=0.5), x="site", by="attn_mode", title="share")
    spec = marks.spec(chart, width=400, palette="light")
    mean, beside = layers(spec, "line")
    assert (mean["encoding"]["y"]["field"], beside["encoding"]["y"]["field"]) == ("mean", "reference")
    assert beside["mark"]["style"] == "none"


def test_a_picture_has_its_title_and_what_is_chosen(tmp_path: Path):
    marks.save(
        every_drawing()["steps"], tmp_path / "x.svg", "light", width=400, title="A value\nafter so many updates."
    )
    text = (tmp_path / "x.svg").read_text()
    assert "A value&lt;U+000A&gt;after so many updates." in text
    assert ">a<" in text  # the cell


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (2.5, "2.5"), (-0.125, "−0.125"), (0.0, "0")])
def test_an_axis_of_one_value_names_it(tmp_path: Path, value: float, text: str):
    """Vega's own label of the only tick is 0, 3 or −0."""
    frame = lines(step=[0, 50]).assign(mean=value, low=np.nan, high=np.nan)
    marks.save(marks.lines(frame, x="step", by="a", title="y"), tmp_path / "x.svg", "light", width=400, title="t")
    assert f">{text}<" in (tmp_path / "x.svg").read_text()


def test_means_of_one_seed_have_no_band():
    alone = lines(site=SITES).assign(low=np.nan, high=np.nan)
    spec = marks.spec(marks.lines(alone, x="site", by="a", title="y"), width=400)
    assert not layers(spec, "area")
    assert layers(marks.spec(every_drawing()["depth"], width=400), "area")


def test_a_maps_shades_are_centred():
    spec = marks.spec(every_drawing()["map"], width=400, palette="light")
    (rect,) = layers(spec, "rect")
    assert rect["encoding"]["color"]["scale"] == {"domain": [-1, 1], "range": "diverging", "type": "quantize"}
    assert len(spec["config"]["range"]["diverging"]) % 2 == 1  # one shade is the middle


def test_parameters_choose_rows_only_where_there_is_a_choice():
    several = marks.spec(every_drawing()["steps"], width=400, palette="light")
    assert several["params"] == [{"name": "cell", "value": "a"}]
    assert all(layer["transform"] == [{"filter": "datum.cell === cell"}] for layer in several["layer"])
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


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import sys

    chart = every_drawing()["depth"]
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]'"):
        marks.save(chart, tmp_path / "x.svg", "light", width=300, title="t")
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]'"):
        every_drawing()
