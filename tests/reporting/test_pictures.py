"""Pictures in files: of the asked size, with text as text, and nothing cut."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.drawings import drawn_lines, every_drawing, lines

from lnjac.errors import ConfigError
from lnjac.reporting import pictures

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["rows", "joined", "map", "curves", "steps", "depth", "sizes"])
def test_every_drawing_is_valid_vega_lite_and_a_picture(tmp_path: Path, name: str):
    chart = every_drawing()[name]
    chart.to_dict()  # raises where a name or a value is none of the grammar's
    picture = tmp_path / f"{name}.svg"
    pictures.save(chart, picture, "light", pictures.Size(), title="t")
    text = picture.read_text()
    assert text.startswith("<svg")
    assert text.count("<path") > 5
    assert "NaN" not in text


def test_pictures_of_every_kind_by_their_suffix(tmp_path: Path):
    chart = every_drawing()["depth"]
    for suffix, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<svg")):
        pictures.save(chart, tmp_path / f"x{suffix}", "dark", pictures.Size(), title="t")
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(begins)


def test_a_picture_has_its_title_and_what_is_chosen(tmp_path: Path):
    pictures.save(
        every_drawing()["steps"], tmp_path / "x.svg", "light", pictures.Size(), title="A value\nafter so many updates."
    )
    text = (tmp_path / "x.svg").read_text()
    assert "A value&lt;U+000A&gt;after so many updates." in text
    assert ">Shown: a.<" in text  # the cell


def sides(path: Path) -> tuple[float, float]:
    """The width and the height of a picture in points, by what reads it first: an SVG's or a PDF's head, a PNG's pixels."""
    data = path.read_bytes()
    if path.suffix == ".png":
        return tuple(int.from_bytes(data[at : at + 4]) * 72 / pictures.DPI for at in (16, 20))  # type: ignore[return-value]
    head = (
        rb"/MediaBox *\[0 0 ([\d.]+) ([\d.]+)" if path.suffix == ".pdf" else rb'width="([\d.]+)pt" height="([\d.]+)pt"'
    )
    found = re.search(head, data)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("suffix", pictures.FORMATS)
@pytest.mark.parametrize("name", ["rows", "map", "depth"])
def test_a_picture_has_the_size_that_was_asked_for(tmp_path: Path, name: str, suffix: str):
    path, chart = tmp_path / f"x{suffix}", every_drawing()[name]
    pictures.save(chart, path, "light", pictures.Size(234, font=8), title=None)
    width, height = sides(path)
    assert width == pytest.approx(234, abs=0.3)
    assert height > 60
    pictures.save(chart, path, "light", pictures.Size(234, 200, font=8), title=None)
    assert sides(path) == pytest.approx((234, 200), abs=0.3)


def test_text_in_a_picture_is_text_of_the_asked_height(tmp_path: Path):
    path = tmp_path / "x.svg"
    for font in (8, 12):
        pictures.save(every_drawing()["depth"], path, "light", pictures.Size(300, font=font), title=None)
        text = path.read_text()
        assert ">ln_f</text>" in text
        assert "font-family=\"Arial, 'Liberation Sans'" in text.replace("&apos;", "'").replace("&#39;", "'")
        (inside,) = re.findall(r'viewBox="0 0 ([\d.]+)', text)
        pixels = float(re.search(r'font-size="([\d.]+)px"[^>]*>ln_f<', text)[1])  # type: ignore[index]
        assert pixels * 300 / float(inside) == pytest.approx(font, rel=0.01)


def test_a_picture_without_a_title_names_its_axis(tmp_path: Path):
    path = tmp_path / "x.svg"
    pictures.save(every_drawing()["curves"], path, "light", pictures.Size(), title=None)
    assert ">The mean<" in path.read_text()
    assert "r_mean" not in path.read_text()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (pictures.Size(40), "--width 0.556in leaves the chart's numbers no room: try --width "),
        (pictures.Size(300, 60), "--height 0.833in leaves the chart's numbers no room: try --height "),
    ],
)
def test_a_size_without_room_names_one_that_has_it(tmp_path: Path, size: pictures.Size, said: str):
    path, chart = tmp_path / "x.svg", every_drawing()["rows"]
    with pytest.raises(ConfigError, match=said) as error:
        pictures.save(chart, path, "light", size, title=None)
    assert not path.exists()
    points = 72 * float(re.findall(r"([\d.]+)in", str(error.value))[-1])
    pictures.save(
        chart, path, "light", pictures.Size(points) if size.height is None else pictures.Size(300, points), title=None
    )


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (2.5, "2.5"), (-0.125, "−0.125"), (0.0, "0")])
def test_an_axis_of_one_value_names_it(tmp_path: Path, value: float, text: str):
    """Vega's own label of the only tick is 0, 3 or −0."""
    frame = lines(step=[0, 50]).assign(mean=value, low=np.nan, high=np.nan)
    pictures.save(drawn_lines(frame, "step"), tmp_path / "x.svg", "light", pictures.Size(), title="t")
    assert f">{text}<" in (tmp_path / "x.svg").read_text()
