"""The charts: pure functions from tidy frames to Altair charts. What the frames hold is worked out elsewhere.

A chart names no colour: it takes them from the palette it is shown in, which in a page is made of CSS variables. Levels
of a factor differ in colour, shape and dash alike, so that no reader depends on one of them.
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.errors import ConfigError
from lnjac.escape import visible_within
from lnjac.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

Chart = Any
"""An altair.LayerChart: altair is imported when a chart is drawn, no sooner."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 2], [4, 4, 1, 4], [1, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")


class Palette(NamedTuple):
    """Colours by use. `levels` are Okabe and Ito's; `diverging` runs from below to above through the paper's own shade."""

    ink: str
    muted: str
    line: str
    paper: str
    levels: Sequence[str]
    diverging: Sequence[str]


LIGHT = Palette(
    ink="#1b1d22",
    muted="#5a5f6a",
    line="#d5d8de",
    paper="#ffffff",
    levels=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1d22"),
    diverging=("#4e9bcb", "#84b9db", "#b4d4e9", "#d9e9f3", "#f3f3f1", "#f9e0cf", "#f3c09c", "#eb9f6b", "#e2803f"),
)
DARK = Palette(
    ink="#e8e9ec",
    muted="#a6abb6",
    line="#3a3f49",
    paper="#15171b",
    levels=("#56b4e9", "#e69f00", "#2bbf93", "#d992b9", "#f0744a", "#f0e442", "#e8e9ec"),
    diverging=("#226c98", "#265d81", "#284e6b", "#273a4b", "#262a31", "#453325", "#6a4122", "#8a4b1d", "#a35213"),
)


MISSING = "charts need altair and vl-convert-python: pip install -e '.[report]'"


def _altair() -> Any:
    try:
        import altair
    except ImportError:
        raise ConfigError(MISSING) from None
    return altair


# The charts. Where a frame has a column `cell`, or `pair`, a chart shows the rows that its parameter of that name names.


def headline(seeds: "pd.DataFrame", intervals: "pd.DataFrame", *, title: str) -> Chart:
    """Differences between levels in rows: every seed a dot, the mean a bar with its interval, and a line at none.

    seeds: place, contrast, seed, difference; intervals: place, contrast, mean, low, high. Places are drawn in their order,
    one line for each part between commas.
    """
    alt = _altair()
    places = _order(intervals["place"])
    axis = alt.Axis(labelExpr="split(datum.label, ', ')")
    place = alt.Y("place:N", sort=places, title=None, axis=axis)
    level = _level(alt, intervals["contrast"], "contrast", "difference")
    shift = alt.YOffset("contrast:N", sort=level.names)
    zero = alt.Chart(_zero()).mark_rule(style="none").encode(x="zero:Q")
    bars = alt.Chart(intervals).encode(y=place, yOffset=shift, color=level.color, tooltip=_numbers(alt, intervals))
    rule = bars.mark_rule(style="interval").encode(
        x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=7)), x2="high:Q"
    )
    mean = bars.mark_tick(style="middle", orient="vertical").encode(x="mean:Q")
    dots = (
        alt.Chart(seeds)
        .mark_point(style="seed")
        .encode(
            x=alt.X("difference:Q", title=title, axis=alt.Axis(tickCount=7)),
            y=place,
            yOffset=shift,
            color=level.color,
            shape=level.shape,
            tooltip=_numbers(alt, seeds),
        )
    )
    row = max(24 * len(level.names), 15 * max(name.count(", ") + 1 for name in places) + 6)
    return (zero + rule + mean + dots).properties(height=20 + row * len(places))


def heatmap(cells: "pd.DataFrame", *, legend: str, label: str = "format(datum.value, '.2f')") -> Chart:
    """A cell for each site and column; its shade, from −1 to 1, and the text in it are given. `legend` names the shade,
    `label` is Vega's expression for the value of one.

    cells: site, column, metric, shade, shown and what else a tooltip tells. The parameters `site` and `metric` mark one,
    once they are set.
    """
    alt = _altair()
    base = _filtered(alt, cells, "cell", "pair").encode(
        x=alt.X("column:N", sort=_order(cells["column"]), title=None, axis=alt.Axis(orient="top", labelAngle=-40)),
        y=alt.Y("site:N", sort=_order(cells["site"]), title=None),
        tooltip=_numbers(alt, cells.drop(columns=["shade", "shown", "column"])),
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
        color=shade, strokeWidth=alt.condition(_picked("site", "metric"), alt.value(2.5), alt.value(0.3))
    )
    text = base.mark_text(style="shown", cursor="pointer").encode(text="shown:N")
    picks = [*_params(alt, cells, "cell", "pair"), *(alt.param(name=name, value=None) for name in ("site", "metric"))]
    return (rect + text).add_params(*picks).properties(height=26 * cells["site"].nunique())


def curves(frame: "pd.DataFrame", *, by: str) -> Chart:
    """One metric at one site over the updates: the parameters `site` and `metric` choose which.

    frame: site, metric, step, level, mean, low, high.
    """
    return _banded(_altair(), frame, by, "value", "cell", "site", "metric")


def trajectory(frame: "pd.DataFrame", *, by: str, title: str) -> Chart:
    """A value over the updates for each level: mean and interval. frame: step, level, mean, low, high."""
    return _banded(_altair(), frame, by, title, "cell")


def cost(seeds: "pd.DataFrame", intervals: "pd.DataFrame", *, by: str, title: str) -> Chart:
    """What each backward costs at each level: every seed a dot, one seed's dots joined, mean and interval behind them.

    seeds: backward, level, seed, cost; intervals: backward, level, mean, low, high.
    """
    alt = _altair()
    level = _level(alt, intervals["level"], "level", by)
    backward = alt.X("backward:N", sort=_order(intervals["backward"]), title=None, axis=alt.Axis(labelAngle=-30))
    shift = alt.XOffset("level:N", sort=level.names)
    zero = alt.Chart(_zero()).mark_rule(style="none").encode(y="zero:Q")
    base = _filtered(alt, seeds, "cell").encode(x=backward, xOffset=shift, y=alt.Y("cost:Q", title=title))
    pairs = base.mark_line(style="pair").encode(detail=["seed:N", "backward:N"])
    dots = base.mark_point(style="seed").encode(color=level.color, shape=level.shape, tooltip=_numbers(alt, seeds))
    bars = _filtered(alt, intervals, "cell").encode(
        x=backward, xOffset=shift, color=level.color, tooltip=_numbers(alt, intervals)
    )
    rule = bars.mark_rule(style="interval").encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    mean = bars.mark_tick(style="middle", orient="horizontal", size=40).encode(y="mean:Q")
    return (zero + pairs + rule + mean + dots).add_params(*_params(alt, seeds, "cell")).properties(height=300)


def depth(frame: "pd.DataFrame", *, by: str, title: str, log: bool = False) -> Chart:
    """A metric at each site from the first to the last: mean and interval. frame: site, level, mean, low, high."""
    alt = _altair()
    site = alt.X("site:N", sort=_order(frame["site"]), title=None, axis=alt.Axis(labelAngle=-30))
    scale = alt.Scale(type="log", nice=False, padding=10) if log else alt.Scale(zero=False)
    return _series(alt, frame, by, site, alt.Y("mean:Q", scale=scale, title=title), "cell")


def scaling(frame: "pd.DataFrame", *, by: str, x: str, title: str) -> Chart:
    """A value against a size, both logarithmic where they are positive: mean and interval.

    frame: x, level, mean, low, high.
    """
    alt = _altair()
    positive = bool((frame[["mean", "low"]].min() > 0).all())
    scale = alt.Scale(type="log", nice=False, padding=10) if positive else alt.Scale(zero=False)
    sizes = sorted(frame["x"].unique().tolist())
    size = alt.X(
        "x:Q", title=x, scale=alt.Scale(type="log", nice=False, padding=20), axis=alt.Axis(values=sizes, format="~s")
    )
    return _series(alt, frame, by, size, alt.Y("mean:Q", scale=scale, title=title), "cell")


# How they look


def spec(chart: Chart, palette: Palette, *, width: int | str) -> dict[str, Any]:
    """The chart as Vega-Lite, in these colours. `width` is in pixels, or "container" for the space there is.

    Of every text in it, data and titles alike, what cannot be seen is replaced by its code point: a line break would
    end an expression of Vega's, a control character is none of SVG's.
    """
    alt = _altair()
    with alt.data_transformers.disable_max_rows():
        found: dict[str, Any] = chart.properties(width=width).to_dict(validate=False)
    # ticks, rules and areas have no size of their own in a container whose width is still to come
    found["autosize"] = {"type": "fit-x" if width == "container" else "pad", "contains": "padding"}
    return dict(visible_within(found)) | {"config": _config(palette)}


FORMATS = (".svg", ".png", ".pdf")


def save(chart: Chart, path: Path, palette: Palette, *, width: int) -> None:
    """Write the chart as the kind of picture that the path's suffix names, without browser or network.

    Its title is what it says of itself, and which of its rows it shows.
    """
    found = spec(chart, palette, width=width)
    chosen = [f"{one['value']}" for one in found.get("params", ()) if one.get("value") is not None]
    said = [found.get("description", ""), *chosen]
    lines = [line for text in said for line in textwrap.wrap(text, width // 6)]  # pixels a character
    found["title"] = {"text": lines, "anchor": "start", "frame": "bounds", "offset": 12}
    try:
        import vl_convert
    except ImportError:
        raise ConfigError(MISSING) from None
    match path.suffix:
        case ".svg":
            made = vl_convert.vegalite_to_svg(found).encode()
        case ".png":
            made = vl_convert.vegalite_to_png(found, scale=2)
        case ".pdf":
            made = vl_convert.vegalite_to_pdf(found)
        case other:
            raise ConfigError(f"no picture is called {other}: choose one of {', '.join(FORMATS)}")
    write_atomically(path, lambda temporary: temporary.write_bytes(made))


def _config(palette: Palette) -> dict[str, Any]:
    text = {"labelColor": palette.muted, "titleColor": palette.ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": palette.paper,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "aria": False,  # each mark's description would be an expression made of titles, which a backslash breaks
        "axis": text
        | {
            "titleFontWeight": "normal",
            "gridColor": palette.line,
            "domainColor": palette.muted,
            "tickColor": palette.muted,
            "labelLimit": 260,
            "titleLimit": 320,
        },
        "legend": text | {"titleFontWeight": "normal", "orient": "top", "gradientLength": 400, "labelLimit": 260},
        "range": {
            "category": list(palette.levels),
            "symbol": list(SHAPES),
            "diverging": list(palette.diverging),
        },
        "title": {"color": palette.ink, "fontWeight": "normal", "fontSize": 12},
        "line": {"strokeWidth": 2},
        "style": {
            "none": {"color": palette.muted, "strokeDash": [3, 3]},
            "interval": {"strokeWidth": 3, "opacity": 0.55},
            "middle": {"thickness": 3, "size": 18},
            "knot": {"size": 50, "filled": True},
            "seed": {"size": 42, "filled": False, "strokeWidth": 1.6, "opacity": 0.9},
            "pair": {"color": palette.muted, "strokeWidth": 1, "opacity": 0.45},
            "band": {"opacity": 0.18},
            "box": {"stroke": palette.ink},
            "shown": {"color": palette.ink, "fontSize": 11},
        },
    }


class _Level(NamedTuple):
    names: list[str]
    color: Any
    shape: Any
    dash: Any


def _level(alt: Any, levels: "pd.Series[Any]", field: str, title: str, *, lines: bool = False) -> _Level:
    """The encodings of a factor. Their legends are one as long as titles and orders agree: of `lines`, or of shapes."""
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
        alt.Color(f"{field}:N", sort=names, title=title, legend=legend, scale=scale),
        alt.Shape(f"{field}:N", sort=names, title=title, legend=legend, scale=scale),
        alt.StrokeDash(f"{field}:N", sort=names, title=title, legend=legend if lines else None, scale=dashed),
    )


def _series(alt: Any, frame: "pd.DataFrame", by: str, x: Any, y: Any, *picks: str) -> Any:
    """Means along x joined for each level, in a band of their intervals; dashed beside them their `reference`, if any."""
    many = frame[x.shorthand.split(":")[0]].nunique() > 20
    level = _level(alt, frame["level"], "level", by, lines=many)
    base = _filtered(alt, frame, *picks).encode(x=x, color=level.color, tooltip=_numbers(alt, frame))
    bounds = y.copy()
    bounds.shorthand = "low:Q"
    band = base.mark_area(style="band").encode(y=bounds, y2="high:Q")
    marks = band + base.mark_line().encode(y=y, strokeDash=level.dash)
    if "reference" in frame:
        beside = y.copy()
        beside.shorthand = "reference:Q"
        plain = _filtered(alt, frame, *picks).encode(x=x, y=beside, detail="level:N")
        marks += plain.mark_line(style="none", strokeWidth=1)
    if not many:
        marks += base.mark_point(style="knot").encode(y=y, shape=level.shape)
    return marks.add_params(*_params(alt, frame, *picks)).properties(height=270)


def _banded(alt: Any, frame: "pd.DataFrame", by: str, title: str, *picks: str) -> Any:
    y = alt.Y("mean:Q", scale=alt.Scale(zero=False), title=title)
    return _series(alt, frame, by, _updates(alt, frame["step"]), y, *picks)


def _updates(alt: Any, steps: "pd.Series[Any]") -> Any:
    """The axis of updates: logarithmic, but with a 0, where the steps grow like that."""
    known = sorted(steps.unique().tolist())
    gaps = [b - a for a, b in pairwise(known)] or [1]
    if max(gaps) < 8 * min(gaps):
        axis = alt.Axis(tickMinStep=1, format="d", tickCount=12)
        return alt.X("step:Q", title="updates", scale=alt.Scale(nice=False), axis=axis)
    axis = alt.Axis(values=known, labelOverlap="greedy", labelSeparation=8)
    return alt.X("step:Q", title="updates", scale=alt.Scale(type="symlog"), axis=axis)


def _params(alt: Any, frame: "pd.DataFrame", *names: str) -> list[Any]:
    """Parameters that choose among a column's values, the first to begin with, of those columns that the frame has."""
    return [alt.param(name=name, value=frame[name].iloc[0]) for name in names if name in frame]


def _filtered(alt: Any, frame: "pd.DataFrame", *names: str) -> Any:
    """A chart of the rows that the parameters of these names choose."""
    there = [name for name in names if name in frame]
    return alt.Chart(frame).transform_filter(_picked(*there)) if there else alt.Chart(frame)


def _picked(*names: str) -> str:
    return " && ".join(f"datum.{name} === {name}" for name in names)


def _numbers(alt: Any, frame: "pd.DataFrame") -> list[Any]:
    """A tooltip of all columns."""
    kinds = {True: {"type": "quantitative", "format": ".4~g"}, False: {"type": "nominal"}}
    return [alt.Tooltip(str(name), **kinds[frame[name].dtype.kind == "f"]) for name in frame]


def _order(values: "pd.Series[Any]") -> list[str]:
    return list(dict.fromkeys(values.astype(str)))


def _zero() -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"zero": [0]})


def variables(palette: Palette) -> Mapping[str, str]:
    """The palette's colours by the name of their CSS variable."""
    single = {name: getattr(palette, name) for name in ("ink", "muted", "line", "paper")}
    many = {"level": palette.levels, "shade": palette.diverging}
    return single | {f"{name}-{i}": colour for name, colours in many.items() for i, colour in enumerate(colours)}


def _from_variables() -> Palette:
    levels = [f"var(--level-{i})" for i in range(len(LIGHT.levels))]
    shades = [f"var(--shade-{i})" for i in range(len(LIGHT.diverging))]
    return Palette("var(--ink)", "var(--muted)", "var(--line)", "transparent", levels, shades)


IN_PAGE = _from_variables()
"""The palette of a page, which changes with the reader's preference and in print without drawing anything again."""
