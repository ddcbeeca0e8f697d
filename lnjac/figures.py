"""The charts: pure functions from tidy frames to Altair charts. What the frames hold is worked out elsewhere.

A chart names no colour: it takes them from the palette it is shown in, which in a page is made of CSS variables. Levels
of a factor differ in colour, shape and dash alike, so that no reader depends on one of them.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.config import ConfigError

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 2], [4, 4, 1, 4], [1, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
OFFSET = 0.75
"""How much of a place on a discrete axis its levels share."""


PICKED = "datum.site === site && datum.metric === metric"
"""Whether a row is the one that a chart's parameters `site` and `metric` choose."""


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
    diverging=("#2777a8", "#27628a", "#284e6b", "#273a4b", "#262a31", "#453325", "#6a4122", "#8f4e1d", "#b25a16"),
)


def _altair() -> Any:
    try:
        import altair
    except ImportError:
        raise ConfigError("charts need altair and vl-convert-python: pip install -e '.[report]'") from None
    return altair


# The charts


def headline(seeds: "pd.DataFrame", intervals: "pd.DataFrame", *, title: str) -> "alt.Chart":
    """Differences between levels at each site: every seed a dot, the mean a bar with its interval, and a line at none.

    seeds: site, contrast, seed, difference; intervals: site, contrast, mean, low, high. Sites from the top in their order.
    """
    alt = _altair()
    site = alt.Y("site:N", sort=_order(intervals["site"]), title=None)
    level = _level(alt, intervals["contrast"], "contrast", "difference")
    shift = alt.YOffset("contrast:N", sort=level.names, scale=alt.Scale(paddingOuter=1 - OFFSET))
    value = alt.X("difference:Q", title=title, scale=alt.Scale(zero=False))
    zero = alt.Chart(_zero()).mark_rule(style="none").encode(x="zero:Q")
    bars = alt.Chart(intervals).encode(y=site, yOffset=shift, color=level.color, tooltip=_numbers(alt, intervals))
    rule = bars.mark_rule(style="interval").encode(x=alt.X("low:Q", title=title), x2="high:Q")
    mean = bars.mark_tick(style="mean", orient="vertical").encode(x="mean:Q")
    dots = (
        alt.Chart(seeds)
        .mark_point(style="seed")
        .encode(x=value, y=site, yOffset=shift, color=level.color, shape=level.shape, tooltip=_numbers(alt, seeds))
    )
    n_rows = len(level.names) * intervals["site"].nunique()
    return (zero + rule + mean + dots).properties(height=24 + 22 * n_rows)


def heatmap(cells: "pd.DataFrame", *, legend: str) -> "alt.Chart":
    """A cell for each site and metric; its shade, from −1 to 1, and the text in it are given. `legend` names the shade.

    cells: site, metric, shade, shown. Both orders are the frame's. The parameters `site` and `metric` mark one cell.
    """
    alt = _altair()
    base = alt.Chart(cells).encode(
        x=alt.X("metric:N", sort=_order(cells["metric"]), title=None, axis=alt.Axis(orient="top", labelAngle=-30)),
        y=alt.Y("site:N", sort=_order(cells["site"]), title=None),
        tooltip=_numbers(alt, cells.drop(columns="shade")),
    )
    shade = alt.Color(
        "shade:Q",
        title=legend,
        scale=alt.Scale(type="quantize", domain=[-1, 1], range="diverging"),
        legend=alt.Legend(format=".1f", labelOverlap=True),
    )
    rect = base.mark_rect(style="cell", cursor="pointer").encode(
        color=shade, strokeWidth=alt.condition(PICKED, alt.value(3), alt.value(0.5))
    )
    text = base.mark_text(style="shown", cursor="pointer").encode(text="shown:N")
    return (rect + text).add_params(*_pick(alt, cells)).properties(height=alt.Step(26))


def curves(frame: "pd.DataFrame", *, by: str) -> "alt.Chart":
    """One metric at one site over the updates: the parameters `site` and `metric` choose which.

    frame: site, metric, step, level, mean, low, high.
    """
    alt = _altair()
    chosen = _banded(alt, frame, by, "value").transform_filter(PICKED)
    return chosen.add_params(*_pick(alt, frame)).properties(height=260)


def trajectory(frame: "pd.DataFrame", *, by: str, title: str) -> "alt.Chart":
    """A value over the updates for each level: mean and interval. frame: step, level, mean, low, high."""
    return _banded(_altair(), frame, by, title).properties(height=260)


def cost(seeds: "pd.DataFrame", intervals: "pd.DataFrame", *, by: str, title: str) -> "alt.Chart":
    """What each backward costs at each level: every seed a dot, one seed's dots joined, mean and interval beside them.

    seeds: backward, level, seed, cost; intervals: backward, level, mean, low, high.
    """
    alt = _altair()
    level = _level(alt, intervals["level"], "level", by)
    backward = alt.X("backward:N", sort=_order(intervals["backward"]), title=None, axis=alt.Axis(labelAngle=-30))
    shift = alt.XOffset("level:N", sort=level.names, scale=alt.Scale(paddingOuter=1 - OFFSET))
    zero = alt.Chart(_zero()).mark_rule(style="none").encode(y="zero:Q")
    base = alt.Chart(seeds).encode(x=backward, xOffset=shift, y=alt.Y("cost:Q", title=title))
    pairs = base.mark_line(style="pair").encode(detail="seed:N")
    dots = base.mark_point(style="seed").encode(color=level.color, shape=level.shape, tooltip=_numbers(alt, seeds))
    bars = alt.Chart(intervals).encode(
        x=backward, xOffset=shift, color=level.color, tooltip=_numbers(alt, intervals)
    )
    rule = bars.mark_rule(style="interval").encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    mean = bars.mark_tick(style="mean", orient="horizontal").encode(y="mean:Q")
    return (zero + pairs + rule + mean + dots).properties(height=300)


def depth(frame: "pd.DataFrame", *, by: str, title: str, log: bool = False) -> "alt.Chart":
    """A metric at each site from the first to the last: mean and interval. frame: site, level, mean, low, high."""
    alt = _altair()
    level = _level(alt, frame["level"], "level", by)
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    base = alt.Chart(frame).encode(
        x=alt.X("site:N", sort=_order(frame["site"]), title=None, axis=alt.Axis(labelAngle=-30)),
        color=level.color,
        tooltip=_numbers(alt, frame),
    )
    band = base.mark_area(style="band").encode(y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q")
    line = base.mark_line().encode(y=alt.Y("mean:Q", scale=scale, title=title), strokeDash=level.dash)
    dots = base.mark_point(style="mean").encode(y="mean:Q", shape=level.shape)
    return (band + line + dots).properties(height=280)


def scaling(seeds: "pd.DataFrame", frame: "pd.DataFrame", *, by: str, x: str, title: str) -> "alt.Chart":
    """A value against a size, both logarithmic where they are positive: means joined, every seed a dot.

    seeds: x, level, seed, value; frame: x, level, mean, low, high.
    """
    alt = _altair()
    level = _level(alt, frame["level"], "level", by)
    scale = alt.Scale(type="log", nice=False, padding=12) if (seeds["value"] > 0).all() else alt.Scale(zero=False)
    sizes = sorted(frame["x"].unique().tolist())
    wide = alt.Scale(type="log" if sizes[0] > 0 else "symlog", nice=False, padding=20)
    size = alt.X("x:Q", title=x, scale=wide, axis=alt.Axis(values=sizes))
    line = (
        alt.Chart(frame)
        .mark_line()
        .encode(x=size, y=alt.Y("mean:Q", scale=scale, title=title), color=level.color, strokeDash=level.dash)
    )
    dots = (
        alt.Chart(seeds)
        .mark_point(style="seed")
        .encode(
            x=size,
            y=alt.Y("value:Q", scale=scale, title=title),
            color=level.color,
            shape=level.shape,
            tooltip=_numbers(alt, seeds),
        )
    )
    return (line + dots).properties(height=300)


# How they look


def spec(chart: "alt.Chart", palette: Palette, *, width: int | str) -> dict[str, Any]:
    """The chart as Vega-Lite, in these colours. `width` is in pixels, or "container" for the space there is."""
    alt = _altair()
    with alt.data_transformers.disable_max_rows():
        found: dict[str, Any] = chart.properties(width=width).to_dict(validate=False)
    # ticks, rules and areas have no size of their own in a container whose width is still to come
    found["autosize"] = {"type": "fit-x" if width == "container" else "pad", "contains": "padding"}
    return found | {"config": _config(palette)}


def _config(palette: Palette) -> dict[str, Any]:
    text = {"labelColor": palette.muted, "titleColor": palette.ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": palette.paper,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": text
        | {
            "titleFontWeight": "normal",
            "gridColor": palette.line,
            "domainColor": palette.muted,
            "tickColor": palette.muted,
            "labelLimit": 160,
            "titleLimit": 320,
        },
        "legend": text | {"titleFontWeight": "normal", "orient": "top", "columns": 3, "labelLimit": 220},
        "range": {
            "category": list(palette.levels),
            "symbol": list(SHAPES),
            "diverging": list(palette.diverging),
        },
        "line": {"strokeWidth": 2},
        "style": {
            "none": {"stroke": palette.muted, "strokeDash": [3, 3]},
            "interval": {"strokeWidth": 3, "opacity": 0.55},
            "mean": {"thickness": 3, "size": 60, "filled": True},
            "seed": {"size": 42, "filled": False, "strokeWidth": 1.6, "opacity": 0.9},
            "pair": {"stroke": palette.muted, "strokeWidth": 1, "opacity": 0.45},
            "band": {"opacity": 0.18},
            "cell": {"stroke": palette.ink},
            "shown": {"fill": palette.ink, "fontSize": 11},
        },
    }


class _Level(NamedTuple):
    names: list[str]
    color: Any
    shape: Any
    dash: Any


def _level(alt: Any, levels: "pd.Series[Any]", field: str, title: str) -> _Level:
    """The encodings of a factor. Their legends are one as long as titles and orders agree."""
    names = _order(levels)
    legend = alt.Legend() if len(names) > 1 else None
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    return _Level(
        names,
        alt.Color(f"{field}:N", sort=names, title=title, legend=legend, scale=alt.Scale(domain=names)),
        alt.Shape(f"{field}:N", sort=names, title=title, legend=legend, scale=alt.Scale(domain=names)),
        alt.StrokeDash(
            f"{field}:N", sort=names, title=title, legend=legend, scale=alt.Scale(domain=names, range=dashes)
        ),
    )


def _banded(alt: Any, frame: "pd.DataFrame", by: str, title: str) -> Any:
    level = _level(alt, frame["level"], "level", by)
    base = alt.Chart(frame).encode(x=_updates(alt, frame["step"]), color=level.color, tooltip=_numbers(alt, frame))
    scale = alt.Scale(zero=False)
    band = base.mark_area(style="band").encode(y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q")
    line = base.mark_line().encode(y=alt.Y("mean:Q", scale=scale, title=title), strokeDash=level.dash)
    few = frame["step"].nunique() <= 20
    dots = base.mark_point(style="mean", opacity=1 if few else 0).encode(y="mean:Q", shape=level.shape)
    return band + line + dots


def _updates(alt: Any, steps: "pd.Series[Any]") -> Any:
    """The axis of updates: logarithmic, but with a 0, where the steps grow like that."""
    known = sorted(steps.unique().tolist())
    gaps = [b - a for a, b in pairwise(known)] or [1]
    if max(gaps) < 8 * min(gaps):
        return alt.X("step:Q", title="updates")
    return alt.X("step:Q", title="updates", scale=alt.Scale(type="symlog"), axis=alt.Axis(values=known))


def _pick(alt: Any, frame: "pd.DataFrame") -> list[Any]:
    """The parameters that choose a site and a metric: the first of each to begin with."""
    return [alt.param(name=name, value=frame[name].iloc[0]) for name in ("site", "metric")]


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
