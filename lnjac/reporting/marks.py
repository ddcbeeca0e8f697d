"""How charts look: three kinds of drawing, made of tidy frames by Altair, and the palettes that give their colours.

A drawing names no colour. It takes them from the palette it is shown in, which in a page is made of CSS variables. Levels
differ in colour, shape and dash alike, so that no reader depends on one of them.
"""

import json
import re
import textwrap
from collections.abc import Iterable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lnjac.errors import ConfigError
from lnjac.escape import visible, visible_within
from lnjac.files import write_atomically

Picture = Any
"""An altair.LayerChart: altair is imported when a chart is drawn, no sooner."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 2], [4, 4, 1, 4], [1, 3])
PICKS = ("cell", "pair", "site", "metric")
"""Columns of a frame whose values a reader may choose among, by the parameters of the same names."""
NUMBER = ".6~g"
"""Digits of an axis: Vega's own choice shows 0 where all values are one."""


THEME = json.loads(Path(__file__).with_name("theme.json").read_text(encoding="utf-8"))
"""Vega's config, whose colours are CSS variables, and their values in the palettes light and dark.

Of these, `level-0` and on are Okabe and Ito's colours, `shade-0` and on run from below to above through the paper's shade.
"""
MISSING = "charts need altair, jinja2 and vl-convert-python: pip install -e '.[report]'"


def extra(module: str) -> Any:
    """Return a module of the report extra."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(MISSING) from None


# Three kinds of drawing


def dots(seeds: pd.DataFrame, intervals: pd.DataFrame, *, by: str, title: str, joined: bool = False) -> Picture:
    """Draw differences in rows: every seed a dot, the mean a bar with its interval, and a line at zero.

    Args:
        seeds: place, level, seed, difference, and perhaps cell. Of a place, each part between commas is a line of text.
        intervals: place, level, mean, low, high, and perhaps cell.
        by: The title of the levels.
        title: The title of the axis.
        joined: Whether the dots of one seed in one place are joined.
    """
    alt = extra("altair")
    places, level = _order(intervals["place"]), _level(alt, intervals["level"], by)
    axis = alt.Axis(labelExpr="split(datum.label, ', ')")
    rows = {
        "y": alt.Y("place:N", sort=places, title=None, axis=axis),
        "yOffset": alt.YOffset("level:N", sort=level.names),
    }

    def at(column: str) -> Any:
        return alt.X(f"{column}:Q", title=title, axis=alt.Axis(tickCount=7, format=NUMBER))

    zero = alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(style="none").encode(x="zero:Q")
    bars = _filtered(alt, intervals).encode(**rows, color=level.color, tooltip=_numbers(alt, intervals))
    rule = bars.mark_rule(style="interval").encode(x=at("low"), x2="high:Q")
    mean = bars.mark_tick(style="middle", orient="vertical").encode(x=at("mean"))
    base = _filtered(alt, seeds).encode(**rows, x=at("difference"))
    points = base.mark_point(style="seed").encode(color=level.color, shape=level.shape, tooltip=_numbers(alt, seeds))
    pairs = [base.mark_line(style="pair").encode(detail=["seed:N", "place:N"])] if joined else []
    row = max(24 * len(level.names), 15 * max(name.count(", ") + 1 for name in places) + 6)
    drawn = alt.layer(zero, *pairs, rule, mean, points).add_params(*_params(alt, seeds))
    return drawn.properties(height=20 + row * len(places))


def shades(frame: pd.DataFrame, *, legend: str, label: str = "format(datum.value, '.2f')") -> Picture:
    """Draw a map: a cell for each norm and column, shaded from −1 to 1.

    The parameters `site` and `metric` mark one cell, once they are set.

    Args:
        frame: site, column, metric, shade, shown (the text in the cell), more for a tooltip, and perhaps cell and pair.
        legend: The title of the shades.
        label: Vega's expression for the label of one shade.
    """
    alt = extra("altair")
    base = _filtered(alt, frame, "site", "metric").encode(
        x=alt.X("column:N", sort=_order(frame["column"]), title=None, axis=alt.Axis(orient="top", labelAngle=-40)),
        y=alt.Y("site:N", sort=_order(frame["site"]), title=None),
        tooltip=_numbers(alt, frame.drop(columns=["shade", "shown", "column"])),
    )
    shade = alt.Color(
        "shade:Q",
        title=legend,
        scale=alt.Scale(type="quantize", domain=[-1, 1], range="diverging"),
        legend=alt.Legend(
            labelExpr=f"isFinite(datum.value) ? {label} : ''",  # the lowest shade begins nowhere
            orient="bottom",
            titleLimit=300,
            labelOverlap=False,
        ),
    )
    rect = base.mark_rect(style="box", cursor="pointer").encode(
        color=shade, strokeWidth=alt.condition(_picked(["site", "metric"]), alt.value(2.5), alt.value(0.3))
    )
    text = base.mark_text(style="shown", cursor="pointer").encode(text="shown:N")
    marked = [alt.param(name=name, value=None) for name in ("site", "metric")]
    drawn = (rect + text).add_params(*_params(alt, frame, "site", "metric"), *marked)
    return drawn.properties(height=26 * frame["site"].nunique())


def lines(frame: pd.DataFrame, *, x: str, by: str, title: str, log: bool = False, size: str | None = None) -> Picture:
    """Draw means along x, joined for each level, in a band of their intervals, and dashed their `reference`, if any.

    Args:
        frame: x, level, mean, low, high, and perhaps reference, cell, site and metric.
        x: The column along which lines run: step, site, or x for a size.
        by: The title of the levels.
        title: The title of the values' axis.
        log: Whether that axis is logarithmic.
        size: The title of x if x is a size.
    """
    alt = extra("altair")
    many = frame[x].nunique() > 20
    level = _level(alt, frame["level"], by, lines=many)
    scale = alt.Scale(type="log", nice=False, padding=10) if log else alt.Scale(zero=False)

    def at(column: str) -> Any:
        return alt.Y(f"{column}:Q", scale=scale, title=title, axis=alt.Axis(format=NUMBER))

    plain = _filtered(alt, frame, x).encode(x=_along(alt, frame[x], size))
    base = plain.encode(color=level.color, tooltip=_numbers(alt, frame))
    drawn = [base.mark_line().encode(y=at("mean"), strokeDash=level.dash)]
    if frame["low"].notna().any():  # Vega complains of a band that is nowhere
        drawn.insert(0, base.mark_area(style="band").encode(y=at("low"), y2="high:Q"))
    if "reference" in frame:
        drawn.append(plain.mark_line(style="none", strokeWidth=1).encode(y=at("reference"), detail="level:N"))
    if not many:
        drawn.append(base.mark_point(style="knot").encode(y=at("mean"), shape=level.shape))
    return alt.layer(*drawn).add_params(*_params(alt, frame, x)).properties(height=270)


# How they look


def spec(picture: Picture, *, width: int | str, palette: str | None = None) -> dict[str, Any]:
    """Return the chart as Vega-Lite.

    In every text, data and titles alike, a character that cannot be seen is replaced by its code point: a line break
    would end an expression of Vega's, and SVG has no control characters.

    Args:
        picture: The chart.
        width: Pixels, or "container" for the space there is.
        palette: The palette of its colours, light or dark; those of the page that holds the chart unless given.
    """
    with extra("altair").data_transformers.disable_max_rows():
        found: dict[str, Any] = picture.properties(width=width).to_dict(validate=False)
    # ticks, rules and areas have no size of their own in a container whose width is still to come
    found["autosize"] = {"type": "fit-x" if width == "container" else "pad", "contains": "padding"}
    config = json.dumps(THEME["config"])
    if palette:
        config = re.sub(r"var\(--([\w-]+)\)", lambda variable: THEME[palette][variable[1]], config)
    return dict(visible_within(found)) | {"config": json.loads(config)}


FORMATS = (".svg", ".png", ".pdf")


def save(picture: Picture, path: Path, palette: str, *, width: int, title: str) -> None:
    """Write the chart as the kind of picture that the path's suffix, one of FORMATS, names.

    The title is followed by the choices that are shown.
    """
    found = spec(picture, width=width, palette=palette)
    chosen = [f"{one['value']}" for one in found.get("params", ()) if one.get("value") is not None]
    lines = [
        line for text in (visible(title), *chosen) for line in textwrap.wrap(text, width // 6)
    ]  # pixels a character
    found["title"] = {"text": lines, "anchor": "start", "frame": "bounds", "offset": 12}
    converter = extra("vl_convert")
    if path.suffix == ".svg":
        made = converter.vegalite_to_svg(found).encode()
    elif path.suffix == ".png":
        made = converter.vegalite_to_png(found, scale=2)
    else:
        made = converter.vegalite_to_pdf(found)
    write_atomically(path, lambda temporary: temporary.write_bytes(made))


class _Level(NamedTuple):
    names: list[str]
    color: Any
    shape: Any
    dash: Any


def _level(alt: Any, levels: "pd.Series[Any]", title: str, *, lines: bool = False) -> _Level:
    """Return the encodings of levels, with one legend: of lines, or of shapes.

    Vega makes one legend of several as long as their titles and orders agree.
    """
    names = _order(levels)
    longest = max(map(len, names)) + 4  # characters, of some 44 that fit the narrowest page
    symbol = {"symbolType": "stroke", "symbolSize": 500} if lines else {}
    legend = alt.Legend(columns=max(1, min(4, 44 // longest)), **symbol) if len(names) > 1 else None
    scale = alt.Scale(domain=names)
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    # dashed outlines hide shapes: a scale of a domain that is not written out stays out of their legend
    dashed = alt.Scale(domain=names, range=dashes) if lines else alt.Scale(range=dashes)
    return _Level(
        names,
        alt.Color("level:N", sort=names, title=title, legend=legend, scale=scale),
        alt.Shape("level:N", sort=names, title=title, legend=legend, scale=scale),
        alt.StrokeDash("level:N", sort=names, title=title, legend=legend if lines else None, scale=dashed),
    )


def _along(alt: Any, values: "pd.Series[Any]", size: str | None) -> Any:
    """Return the axis along which lines run: of norms, of updates, or of sizes.

    Updates are on a linear axis, or on a logarithmic one that has a 0 if the steps grow like that.
    """
    if values.name == "site":
        return alt.X("site:N", sort=_order(values), title=None, axis=alt.Axis(labelAngle=-30))
    known = sorted(values.unique().tolist())
    if values.name == "x":
        scale = alt.Scale(type="log", nice=False, padding=20)
        return alt.X("x:Q", title=size, scale=scale, axis=alt.Axis(values=known, format="~s"))
    gaps = [b - a for a, b in pairwise(known)] or [1]
    if max(gaps) < 8 * min(gaps):
        axis = alt.Axis(tickMinStep=1, format="d", tickCount=12)
        return alt.X("step:Q", title="updates", scale=alt.Scale(nice=False), axis=axis)
    axis = alt.Axis(values=known, labelOverlap="greedy", labelSeparation=8)
    return alt.X("step:Q", title="updates", scale=alt.Scale(type="symlog"), axis=axis)


def choices(frame: pd.DataFrame, *axes: str) -> dict[str, list[str]]:
    """Return the values that a reader may choose among, by their column; those of `axes` are all shown."""
    return {name: list(dict.fromkeys(frame[name])) for name in PICKS if name in frame and name not in axes}


def _params(alt: Any, frame: pd.DataFrame, *axes: str) -> list[Any]:
    """Return a parameter for each choice, which begins with its first value."""
    return [alt.param(name=name, value=values[0]) for name, values in choices(frame, *axes).items()]


def _filtered(alt: Any, frame: pd.DataFrame, *axes: str) -> Any:
    """Return a chart of the rows that are chosen."""
    names = choices(frame, *axes)
    return alt.Chart(frame).transform_filter(_picked(names)) if names else alt.Chart(frame)


def _picked(names: Iterable[str]) -> str:
    return " && ".join(f"datum.{name} === {name}" for name in names)


def _numbers(alt: Any, frame: pd.DataFrame) -> list[Any]:
    """Return a tooltip of all columns."""
    kinds = {True: {"type": "quantitative", "format": ".4~g"}, False: {"type": "nominal"}}
    return [alt.Tooltip(str(name), **kinds[frame[name].dtype.kind == "f"]) for name in frame]


def _order(values: "pd.Series[Any]") -> list[str]:
    return list(dict.fromkeys(values.astype(str)))
