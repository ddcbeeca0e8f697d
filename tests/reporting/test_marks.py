"""How charts look: what is drawn of a frame, that a picture of it can be made, and colours that can be read."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lnjac.errors import ConfigError
from lnjac.reporting import charts, marks

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
    return pd.DataFrame({"value": np.arange(1.0, len(index) + 1)}, index=index).reset_index()


NAMED = marks.Levels("attn_mode", LEVELS)


TITLES = {"r_mean": "The mean", "r_radial": 'The "radial" part'}


def drawn_lines(frame: pd.DataFrame, x: str, title: marks.Title = "y", **more: Any) -> marks.Picture:
    return marks.lines(frame, x=x, levels=NAMED, title=title, **more)


def every_drawing() -> dict[str, marks.Picture]:
    places = lines(place=SITES)
    cells = lines(site=SITES, metric=["radial_share", "sigma_mean"])
    cells = (
        cells[cells["level"] == "softmax"].assign(shade=0.5, shown="0.1", clear=True).rename(columns={"level": "cell"})
    )
    alone = places.drop_duplicates("place").drop(columns="level")
    return {
        "rows": marks.dots(by_seed(place=SITES, level=LEVELS), places, title="x", levels=NAMED),
        "joined": marks.dots(by_seed(place=SITES), alone, title="x", zero=False, joined=True),
        "map": marks.shades(cells, legend="x", sites=SITES, breaks=range(-4, 4)),
        "curves": drawn_lines(lines(site=SITES, metric=["r_mean", "r_radial"], step=[0, 1, 100]), "step", TITLES),
        "steps": drawn_lines(lines(cell=["a", "b"], step=[0, 50, 100]), "step"),
        "depth": drawn_lines(lines(site=SITES), "site", {"sigma_mean": "σ"}, log=True),
        "sizes": drawn_lines(lines(x=[32, 64]), "x", size="model.n_embd", log=True),
    }


def layers(spec: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [layer for layer in spec["layer"] if layer["mark"]["type"] == mark]


@pytest.mark.parametrize("name", ["rows", "joined", "map", "curves", "steps", "depth", "sizes"])
def test_every_drawing_is_valid_vega_lite_and_a_picture(tmp_path: Path, name: str):
    chart = every_drawing()[name]
    chart.to_dict()  # raises where a name or a value is none of the grammar's
    picture = tmp_path / f"{name}.svg"
    marks.save(chart, picture, "light", title="t")
    text = picture.read_text()
    assert text.startswith("<svg")
    assert text.count("<path") > 5
    assert "NaN" not in text


def test_pictures_of_every_kind_by_their_suffix(tmp_path: Path):
    chart = every_drawing()["depth"]
    for suffix, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<svg")):
        marks.save(chart, tmp_path / f"x{suffix}", "dark", title="t")
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(begins)


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


def test_a_picture_has_its_title_and_what_is_chosen(tmp_path: Path):
    marks.save(every_drawing()["steps"], tmp_path / "x.svg", "light", title="A value\nafter so many updates.")
    text = (tmp_path / "x.svg").read_text()
    assert "A value&lt;U+000A&gt;after so many updates." in text
    assert ">a<" in text  # the cell


def sides(path: Path) -> tuple[float, float]:
    """The width and the height of a picture in points, by what reads it first: an SVG's or a PDF's head, a PNG's pixels."""
    data = path.read_bytes()
    if path.suffix == ".png":
        return tuple(int.from_bytes(data[at : at + 4]) * 72 / marks.DPI for at in (16, 20))  # type: ignore[return-value]
    head = rb"/MediaBox *\[0 0 ([\d.]+) ([\d.]+)" if path.suffix == ".pdf" else rb'width="([\d.]+)pt" height="([\d.]+)pt"'
    found = re.search(head, data)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("suffix", marks.FORMATS)
@pytest.mark.parametrize("name", ["rows", "map", "depth"])
def test_a_picture_has_the_size_that_was_asked_for(tmp_path: Path, name: str, suffix: str):
    path, chart = tmp_path / f"x{suffix}", every_drawing()[name]
    marks.save(chart, path, "light", marks.Size(234, font=8), title=None)
    width, height = sides(path)
    assert width == pytest.approx(234, abs=0.3)
    assert height > 60
    marks.save(chart, path, "light", marks.Size(234, 200, font=8), title=None)
    assert sides(path) == pytest.approx((234, 200), abs=0.3)


def test_text_in_a_picture_is_text_of_the_asked_height(tmp_path: Path):
    path = tmp_path / "x.svg"
    for font in (8, 12):
        marks.save(every_drawing()["depth"], path, "light", marks.Size(300, font=font), title=None)
        text = path.read_text()
        assert ">ln_f</text>" in text
        assert "font-family=\"Arial, 'Liberation Sans'" in text.replace("&apos;", "'").replace("&#39;", "'")
        (inside,) = re.findall(r'viewBox="0 0 ([\d.]+)', text)
        pixels = float(re.search(r'font-size="([\d.]+)px"[^>]*>ln_f<', text)[1])  # type: ignore[index]
        assert pixels * 300 / float(inside) == pytest.approx(font, rel=0.01)


def test_a_picture_without_a_title_names_its_axis(tmp_path: Path):
    path = tmp_path / "x.svg"
    marks.save(every_drawing()["curves"], path, "light", title=None)
    assert ">The mean<" in path.read_text()
    assert "r_mean" not in path.read_text()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (marks.Size(40), "--width 0.556in leaves the chart's numbers no room: try --width "),
        (marks.Size(300, 60), "--height 0.833in leaves the chart's numbers no room: try --height "),
    ],
)
def test_a_size_without_room_names_one_that_has_it(tmp_path: Path, size: marks.Size, said: str):
    path, chart = tmp_path / "x.svg", every_drawing()["rows"]
    with pytest.raises(ConfigError, match=said) as error:
        marks.save(chart, path, "light", size, title=None)
    assert not path.exists()
    points = 72 * float(re.findall(r"([\d.]+)in", str(error.value))[-1])
    marks.save(chart, path, "light", marks.Size(points) if size.height is None else marks.Size(300, points), title=None)


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (2.5, "2.5"), (-0.125, "−0.125"), (0.0, "0")])
def test_an_axis_of_one_value_names_it(tmp_path: Path, value: float, text: str):
    """Vega's own label of the only tick is 0, 3 or −0."""
    frame = lines(step=[0, 50]).assign(mean=value, low=np.nan, high=np.nan)
    marks.save(drawn_lines(frame, "step"), tmp_path / "x.svg", "light", title="t")
    assert f">{text}<" in (tmp_path / "x.svg").read_text()


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
    formulas = {one["as"]: one["expr"] for data in spec["data"] for one in data.get("transform", ()) if "as" in one and "expr" in one}
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


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import sys

    chart = every_drawing()["depth"]
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lnjac\[report\]' for the charts"):
        marks.save(chart, tmp_path / "x.svg", "light", title="t")
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lnjac\[report\]' for the charts"):
        every_drawing()
