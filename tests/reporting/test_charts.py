"""The charts: what they draw of a frame, and that a picture of each can be made."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lnjac.errors import ConfigError
from lnjac.reporting import charts as figures

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")

LEVELS = ["softmax", "sigmoid"]
SITES = ["blocks.0.ln_1", "blocks.0.ln_2", "ln_f"]


def lines(**more: list[Any]) -> pd.DataFrame:
    """A mean with its interval for every combination of the given columns and levels."""
    index = pd.MultiIndex.from_product([*more.values(), LEVELS], names=[*more, "level"])
    mean = np.arange(1.0, len(index) + 1)
    return pd.DataFrame({"mean": mean, "low": mean - 0.5, "high": mean + 0.5}, index=index).reset_index()


def by_seed(value: str, **more: list[Any]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([*more.values(), [1, 2]], names=[*more, "seed"])
    return pd.DataFrame({value: np.arange(1.0, len(index) + 1)}, index=index).reset_index()


def every_chart() -> dict[str, figures.Chart]:
    contrasts = lines(place=SITES).rename(columns={"level": "contrast"})
    cells = lines(site=SITES, metric=["radial_share", "sigma_mean"])
    cells = cells[cells["level"] == "softmax"].assign(shade=0.5, shown="0.1").rename(columns={"level": "cell"})
    costs = lines(backward=["ste", "scale"])
    return {
        "headline": figures.headline(by_seed("difference", place=SITES, contrast=LEVELS), contrasts, title="x"),
        "heatmap": figures.heatmap(cells.assign(column=cells["metric"]), legend="x"),
        "curves": figures.curves(lines(site=SITES, metric=["r_mean"], step=[0, 1, 100]), by="attn_mode"),
        "trajectory": figures.trajectory(lines(cell=["a", "b"], step=[0, 50, 100]), by="attn_mode", title="x"),
        "cost": figures.cost(
            by_seed("cost", backward=["ste", "scale"], level=LEVELS), costs, by="attn_mode", title="x"
        ),
        "depth": figures.depth(lines(site=SITES), by="attn_mode", title="sigma", log=True),
        "scaling": figures.scaling(lines(x=[32, 64]), by="attn_mode", x="model.n_embd", title="x"),
    }


def layers(spec: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [layer for layer in spec["layer"] if layer["mark"]["type"] == mark]


@pytest.mark.parametrize("name", ["headline", "heatmap", "curves", "trajectory", "cost", "depth", "scaling"])
def test_every_chart_is_valid_vega_lite_and_a_picture(tmp_path: Path, name: str):
    chart = every_chart()[name]
    chart.to_dict()  # raises where a name or a value is none of the grammar's
    picture = tmp_path / f"{name}.svg"
    figures.save(chart, picture, figures.LIGHT, width=400)
    text = picture.read_text()
    assert text.startswith("<svg")
    assert text.count("<path") > 5
    assert "NaN" not in text


def test_pictures_of_every_kind_by_their_suffix(tmp_path: Path):
    chart = every_chart()["depth"]
    for suffix, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<svg")):
        figures.save(chart, tmp_path / f"x{suffix}", figures.DARK, width=300)
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(begins)
    with pytest.raises(ConfigError, match=r"\.svg, \.png, \.pdf"):
        figures.save(chart, tmp_path / "x.gif", figures.DARK, width=300)
    assert not (tmp_path / "x.gif").exists()


def test_every_seed_is_a_dot_of_the_headline():
    spec = figures.spec(every_chart()["headline"], figures.LIGHT, width=400)
    (dots,) = layers(spec, "point")
    rows = spec["datasets"][dots["data"]["name"]]
    assert len(rows) == len(SITES) * len(LEVELS) * 2
    assert dots["encoding"]["x"]["field"] == "difference"


def test_levels_differ_in_colour_shape_and_dash():
    spec = figures.spec(every_chart()["depth"], figures.LIGHT, width=400)
    (line,), (dots,) = layers(spec, "line"), layers(spec, "point")
    assert line["encoding"]["color"]["field"] == dots["encoding"]["shape"]["field"] == "level"
    first, second = line["encoding"]["strokeDash"]["scale"]["range"]
    assert first != second
    assert len(set(spec["config"]["range"]["symbol"])) == len(set(spec["config"]["range"]["category"])) == 7


def test_a_legend_shows_shapes_whole_and_lines_dashed():
    import vl_convert

    (few,), (many,) = (
        vl_convert.vegalite_to_vega(figures.spec(chart, figures.LIGHT, width=400))["legends"]
        for chart in (every_chart()["depth"], figures.trajectory(lines(step=[*range(30)]), by="x", title="y"))
    )
    assert few["shape"] == "shape"
    assert "strokeDash" not in few
    assert (many["strokeDash"], many["symbolType"]) == ("strokeDash", "stroke")


def test_lines_have_what_they_are_seen_against_beside_them():
    chart = figures.depth(lines(site=SITES).assign(reference=0.5), by="attn_mode", title="share")
    spec = figures.spec(chart, figures.LIGHT, width=400)
    mean, beside = layers(spec, "line")
    assert (mean["encoding"]["y"]["field"], beside["encoding"]["y"]["field"]) == ("mean", "reference")
    assert beside["mark"]["style"] == "none"


def test_a_picture_says_what_it_shows(tmp_path: Path):
    chart = every_chart()["trajectory"].properties(description="A value after so many updates.")
    figures.save(chart, tmp_path / "x.svg", figures.LIGHT, width=400)
    text = (tmp_path / "x.svg").read_text()
    assert "A value after so many updates." in text
    assert ">a<" in text  # the cell


def test_a_maps_shades_are_centred():
    spec = figures.spec(every_chart()["heatmap"], figures.LIGHT, width=400)
    (rect,) = layers(spec, "rect")
    assert rect["encoding"]["color"]["scale"] == {"domain": [-1, 1], "range": "diverging", "type": "quantize"}
    assert len(figures.LIGHT.diverging) % 2 == len(figures.DARK.diverging) % 2 == 1  # one shade is the middle


def test_parameters_choose_rows_only_where_there_is_a_choice():
    several = figures.spec(every_chart()["trajectory"], figures.LIGHT, width=400)
    assert several["params"] == [{"name": "cell", "value": "a"}]
    assert all(layer["transform"] == [{"filter": "datum.cell === cell"}] for layer in several["layer"])
    assert "params" not in figures.spec(every_chart()["depth"], figures.LIGHT, width=400)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [figures.LIGHT, figures.DARK], ids=["light", "dark"])
def test_text_can_be_read_on_paper_and_on_every_shade(palette: figures.Palette):
    assert contrast(palette.ink, palette.paper) >= 7
    assert contrast(palette.muted, palette.paper) >= 4.5
    assert min(contrast(palette.ink, shade) for shade in palette.diverging) >= 4.5
    assert min(contrast(level, palette.paper) for level in palette.levels[:3]) >= 3


def test_a_page_has_a_variable_for_every_colour():
    names = set(figures.variables(figures.LIGHT))
    assert names == set(figures.variables(figures.DARK))
    used = [*figures.IN_PAGE.levels, *figures.IN_PAGE.diverging, figures.IN_PAGE.ink]
    assert {colour.removeprefix("var(--").removesuffix(")") for colour in used} <= names


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import sys

    chart = every_chart()["depth"]
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]'"):
        figures.save(chart, tmp_path / "x.svg", figures.LIGHT, width=300)
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]'"):
        every_chart()
