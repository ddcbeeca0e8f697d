"""Write a chart as a picture of a given size, for a paper: SVG or PDF, whose text is text, or PNG."""

import math
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from lnjac.errors import ConfigError
from lnjac.escape import visible
from lnjac.files import write_atomically
from lnjac.reporting import marks

FORMATS = (".svg", ".png", ".pdf")
INCH = 72
"""Points of an inch, the unit of sizes in files."""
DPI = 300
ROOM = 60
"""Pixels of width below which the numbers of a chart have no room."""
FILE_FONT = "Arial, 'Liberation Sans', Helvetica, 'DejaVu Sans Condensed', sans-serif"
"""Fonts whose letters are as wide as those that the chart was laid out with, so that an SVG is whole wherever it is shown."""
FONT = marks.THEME["config"]["axis"]["labelFontSize"]
"""Pixels of a page's text, in whose proportion a picture is drawn."""
NARROW = 600
"""Pixels of width from which on a chart has room for long labels."""


class Size(NamedTuple):
    """The size of a picture in points: its width, its height (the chart's own unless given), and the height of its text.

    A picture is drawn as on a page and scaled until its text has that height; lines, dots and rows keep their proportion.
    """

    width: float = 6.5 * INCH
    height: float | None = None
    font: float = 9.0


def save(picture: marks.Picture, path: Path, palette: str, size: Size, *, title: str | None) -> None:
    """Write the chart as the kind of picture that the path's suffix, one of FORMATS, names.

    Args:
        picture: The chart.
        path: Its file.
        palette: The palette of its colours, light or dark.
        size: Its size.
        title: The title, which is followed by the choices that are shown; without one there is neither.

    Raises:
        ConfigError: If the size leaves no room for the chart's numbers, or the report extra is not installed.
    """
    converter = marks.extra("vl_convert")
    drawn = _drawn(converter, picture, palette, size, title)
    _require_room(converter, picture, drawn, size, title)
    height = size.height or size.width * drawn.height / drawn.width
    unit = "pt" if path.suffix == ".svg" else ""
    sides = f'width="{size.width:g}{unit}" height="{height:.6g}{unit}"'
    svg = re.sub(r'width="[\d.]+" height="[\d.]+"', sides, drawn.svg, count=1)
    if path.suffix == ".svg":
        made = svg.encode()
    elif path.suffix == ".png":
        made = converter.svg_to_png(svg, ppi=DPI)
    else:
        made = converter.svg_to_pdf(svg)
    write_atomically(path, lambda temporary: temporary.write_bytes(made))


class _Drawn(NamedTuple):
    """An SVG in pixels of a page, of which its text has FONT: its sides, and those of the part that shows the numbers."""

    svg: str
    width: float
    height: float
    inner_width: float
    inner_height: float
    least: float
    """The smallest height of that part."""


def _drawn(converter: Any, picture: marks.Picture, palette: str, size: Size, title: str | None) -> _Drawn:
    scale = FONT / size.font
    width, height = size.width * scale, None if size.height is None else size.height * scale
    found = marks.spec(picture, width=width, height=height, palette=palette)
    found["config"] = {**found["config"], "font": FILE_FONT}
    if width < NARROW:
        for name, looks in marks.THEME["narrow"].items():
            found["config"][name] = found["config"].get(name, {}) | looks
    found.pop("title", None)
    if title is not None:
        chosen = [f"{one['value']}" for one in found.get("params", ()) if one.get("value") is not None]
        per_line = max(1, int(width // 6))  # pixels a character
        shown = [f"Shown: {', '.join(chosen)}."] if chosen else []
        lines = [line for text in (visible(title), *shown) for line in textwrap.wrap(text, per_line)]
        found["title"] = {"text": lines, "anchor": "start", "frame": "bounds", "offset": 12}
    svg = converter.vegalite_to_svg(found)
    sides = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    inner = re.search(r'class="background"[^>]* d="M[\d.]+,[\d.]+h(-?[\d.]+)v(-?[\d.]+)', svg)
    assert sides is not None
    assert inner is not None
    (width, height), (inner_width, inner_height) = (map(float, one.groups()) for one in (sides, inner))
    return _Drawn(svg, width, height, inner_width, inner_height, found["usermeta"][marks.LEAST])


def _require_room(converter: Any, picture: marks.Picture, drawn: _Drawn, size: Size, title: str | None) -> None:
    """Raise ConfigError unless the numbers have room, with the size that gives it: what is beside them in a large picture."""
    if drawn.inner_width < ROOM:
        large = _drawn(converter, picture, "light", size._replace(width=20 * INCH), title)
        side, given, pixels = "width", size.width, large.width - large.inner_width + ROOM
    elif size.height is not None and drawn.inner_height < drawn.least:
        large = _drawn(converter, picture, "light", size._replace(height=None), title)
        side, given, pixels = "height", size.height, large.height - large.inner_height + drawn.least
    else:
        return
    enough = math.ceil(100 * pixels * size.font / FONT / INCH + 1) / 100
    raise ConfigError(
        f"--{side} {given / INCH:.3g}in leaves the chart's numbers no room: "
        f"try --{side} {enough}in, or a smaller --font-size"
    )
