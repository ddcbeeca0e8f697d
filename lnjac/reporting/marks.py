"""How charts look: three kinds of drawing, made of tidy frames by Altair, and the palettes that give their colours.

A drawing names no colour. It takes them from the palette it is shown in, which in a page is made of CSS variables. Levels
differ in colour, shape and dash alike, so that no reader depends on one of them; a level has the same three in all charts.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lnjac.errors import ConfigError
from lnjac.escape import visible, visible_within

Picture = Any
"""An altair.LayerChart: altair is imported when a chart is drawn, no sooner."""
Title = str | Mapping[str, str]
"""The title of an axis of values, or that of each metric."""

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 2], [4, 4, 1, 4], [1, 3])
PICKS = ("cell", "pair", "metric", "site", "among")
"""Columns of a frame whose values a reader may choose among, by the parameters of the same names.

A row whose value is the empty text is shown whatever is chosen.
"""
_LABEL = "replace(datum.label, '−', '-')"
NUMBER = f"!datum.label || abs({_LABEL} - datum.value) <= 1e-9 ? datum.label : format(datum.value, '.6~g')"
"""The label of a number on an axis: Vega's own, unless it rounds, as to 0 where all values are one."""


THEME = json.loads(Path(__file__).with_name("theme.json").read_text(encoding="utf-8"))
"""Vega's config, whose colours are CSS variables, and their values in the palettes light and dark.

The config's `aria` is off: each mark's description would be an expression made of titles, which a backslash breaks.
`level-0` and on are Okabe and Ito's colours; `shade-0` and on run from below to above through the paper's shade. `narrow`
has the looks of a narrow chart, which keeps most of its width for the numbers.
"""
MISSING = "altair, jinja2 or vl-convert-python is not installed: pip install 'lnjac[report]' for the charts"


def extra(module: str) -> Any:
    """Return a module of the report extra."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(MISSING) from None


def require_extra() -> None:
    """Raise ConfigError, with the command that installs it, unless the report extra is installed."""
    for module in ("altair", "jinja2", "vl_convert"):
        extra(module)


# Three kinds of drawing


class Levels(NamedTuple):
    """The title of a chart's levels, and all levels that the charts of a page may have, in their order."""

    title: str
    names: Sequence[str]


ONE = Levels("", [])
"""The levels of a chart that has no column `level`."""


def dots(
    seeds: pd.DataFrame,
    intervals: pd.DataFrame,
    *,
    title: Title,
    rows_title: str | None = None,
    levels: Levels = ONE,
    zero: bool = True,
    joined: bool = False,
) -> Picture:
    """Draw numbers in rows: every seed a dot, the mean a bar with its interval.

    Args:
        seeds: place, level, seed, value, and perhaps columns to choose by. Of a place, each part between commas is a line.
        intervals: place, level, mean, low, high, and perhaps columns to choose by.
        title: The title of the axis; if the metric can be chosen, that of each.
        rows_title: The title of the places.
        levels: The levels of the column `level`.
        zero: Whether 0 is shown, as a line.
        joined: Whether the dots of one seed are joined from place to place.
    """
    alt = extra("altair")
    places = _order(intervals["place"])
    level = _level(alt, intervals, levels)
    parts = max((name.count(", ") + 1 for name in places), default=1)
    rows = [alt.Y("place:N", sort=places, title=rows_title, axis=alt.Axis(labelExpr="split(datum.label, ', ')"))]
    step = max(26 if len(places) < 16 else 17, 15 * parts + 6)
    if level.names and not intervals["level"].equals(intervals["place"]):
        rows.append(alt.YOffset("level:N", sort=level.names, scale=alt.Scale(domain=level.names)))
        step = max(step, 15 * len(level.names) + 6)

    def at(column: str) -> Any:
        axis = alt.Axis(tickCount={"expr": "min(7, ceil(width / 55))"}, labelExpr=NUMBER, labelSeparation=6)
        return alt.X(f"{column}:Q", title=_axis(intervals, title), scale=alt.Scale(zero=zero), axis=axis)

    bars = _told(alt, _bounded(_filtered(alt, intervals)), intervals).encode(*rows, *level.colour())
    base = _filtered(alt, seeds).encode(*rows, at("value"))
    drawn = [_told(alt, base, seeds).mark_point(style="seed").encode(*level.colour(shape=True))]
    drawn.append(bars.mark_tick(style="middle", orient="vertical").encode(at("mean")))
    drawn.insert(0, bars.mark_rule(style="interval").encode(at("from"), alt.X2("to:Q")))
    if joined:
        drawn.insert(0, base.mark_line(style="pair").encode(detail="seed:N"))
    if zero:
        drawn.insert(0, alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(style="none").encode(alt.X("zero:Q")))
    height = 20 + step * _most_places(intervals)
    return _finished(alt, alt.layer(*drawn), intervals, title, least=height / 2).properties(height=height)


def _most_places(frame: pd.DataFrame) -> int:
    """Return the most places that are shown at once."""
    picks = list(choices(frame))
    return int(frame.groupby(picks)["place"].nunique().max()) if picks else frame["place"].nunique()


def shades(frame: pd.DataFrame, *, legend: str, sites: Sequence[str], breaks: Sequence[float]) -> Picture:
    """Draw a map: a cell for each norm and metric, shaded from below to above, faded unless it is clear of zero.

    The parameters `site` and `metric` mark one cell, once they are set.

    Args:
        frame: site, metric, shade, shown (the text in the cell), clear, more for a tooltip, and perhaps cell and pair.
        legend: The title of the shades.
        sites: The norms in their order; an empty text leaves a gap.
        breaks: The values at which a shade ends and the next begins, one fewer than there are shades.
    """
    alt = extra("altair")
    columns = _order(frame["metric"])
    base = _told(alt, _filtered(alt, frame, "site", "metric"), frame.drop(columns=["shade", "shown"])).encode(
        x=alt.X("metric:N", sort=columns, title=None, axis=alt.Axis(orient="top", labelAngle=-55)),
        y=alt.Y("site:N", sort=None, title=None, scale=alt.Scale(domain=list(sites)), axis=alt.Axis(ticks=False)),
    )
    shade = alt.Color(
        "shade:Q",
        title=legend,
        scale=alt.Scale(type="threshold", domain=list(breaks), range="diverging"),
        legend=alt.Legend(orient="bottom", titleLimit=300, gradientLength=280, labelOverlap=False),
    )
    rect = base.mark_rect(style="box", cursor="pointer").encode(
        shade,
        opacity=alt.condition("datum.clear", alt.value(1), alt.value(0.3)),
        strokeWidth=alt.condition(_picked(["site", "metric"]), alt.value(2.5), alt.value(0.3)),
    )
    fits = alt.condition(f"width > {52 * len(columns)}", alt.value({"expr": "datum.shown"}), alt.value(""))
    text = base.mark_text(style="shown", cursor="pointer").encode(text=fits)
    marked = [alt.param(name=name, value=None) for name in ("site", "metric")]
    drawn = (rect + text).add_params(*_params(alt, frame, "site", "metric"), *marked)
    height, padding = (
        24 * len(sites),
        {"left": 5, "top": 5, "bottom": 5, "right": 14},
    )  # the last column's name leans out
    return drawn.properties(height=height, padding=padding, usermeta={LEAST: height / 2})


def lines(
    frame: pd.DataFrame,
    *,
    x: str,
    levels: Levels,
    title: Title,
    log: bool = False,
    size: str = "",
    references: pd.DataFrame | None = None,
    said: pd.DataFrame | None = None,
) -> Picture:
    """Draw means along x, joined for each level, in a band of their intervals.

    Args:
        frame: x, level, mean, low, high, and perhaps columns to choose by.
        x: The column along which lines run: step, site, or x for a size.
        levels: The levels of the column `level`.
        title: The title of the values' axis; if the metric can be chosen, that of each.
        log: Whether that axis is logarithmic.
        size: The title of x if x is a size.
        references: Values to see the lines against, dashed: reference (their name), value, and perhaps x and level; without
            x they are the same everywhere.
        said: Words on each level's line, written in the chart: level, said, line (its number from the bottom).
    """
    alt = extra("altair")
    many = frame[x].nunique() > 20
    level = _level(alt, frame, levels, lines=many)
    scale = alt.Scale(type="log", nice=False, padding=10) if log else alt.Scale(zero=False)

    def at(column: str) -> Any:
        return alt.Y(
            f"{column}:Q", scale=scale, title=_axis(frame, title), axis=alt.Axis(labelExpr=NUMBER, tickCount=6)
        )

    along = _along(alt, frame[x], size)
    base = _told(alt, _bounded(_filtered(alt, frame, x)), frame).encode(along, *level.colour())
    band = base.mark_area(style="band").encode(at("from"), alt.Y2("to:Q"))
    drawn = [band, base.mark_line().encode(at("mean"), *level.dashes())]
    if not many:
        drawn.append(base.mark_point(style="knot").encode(at("mean"), *level.colour(shape=True)))
    if references is not None and len(references):
        drawn += _references(alt, frame, references, x, along, at("value"))
    if said is not None and len(said):
        place = {"x": alt.value(0), "y": alt.value({"expr": "height"})}
        look = {"align": "left", "dx": 6, "dy": {"expr": "-8 - 16 * datum.line"}}
        drawn += _written(_filtered(alt, said).encode(**place, text="said:N"), "said", look, color=level.hue)
    return _finished(alt, alt.layer(*drawn), frame, title, x).properties(height=270)


def _references(alt: Any, frame: pd.DataFrame, references: pd.DataFrame, x: str, along: Any, value: Any) -> list[Any]:
    """Return dashed lines with their names at the right."""
    if x not in references:
        ends = [_order(frame[x])[0], _order(frame[x])[-1]] if x == "site" else [frame[x].min(), frame[x].max()]
        references = references.merge(pd.DataFrame({x: ends}), how="cross")
    keys = [name for name in choices(references, x) if name in frame]
    if (
        keys
    ):  # Vega warns of a scale without a number: what has no reference has a line of one point, which is not drawn
        alone = frame.drop_duplicates(keys)[[*keys, x, "mean"]].rename(columns={"mean": "value"}).assign(reference="")
        known = pd.MultiIndex.from_frame(references[keys])
        references = pd.concat(
            [references, alone[~pd.MultiIndex.from_frame(alone[keys]).isin(known)]], ignore_index=True
        )
    names = [name for name in ("reference", "level") if name in references]
    detail = [f"{name}:N" for name in names]
    last = references.drop_duplicates([*choices(references, x), "reference"], keep="last")  # once, whatever the levels
    rule = _filtered(alt, references, x).mark_line(style="none", strokeWidth=1)
    named = _filtered(alt, last, x).encode(value, x=alt.value({"expr": "width"}), text="reference:N")
    return [rule.encode(along, value, detail=detail), *_written(named, "named", {"align": "right", "dy": -6})]


def _written(chart: Any, style: str, look: Mapping[str, Any], **channels: Any) -> list[Any]:
    """Return the texts of a chart, before a shade of paper that parts them from lines."""
    return [chart.mark_text(style=[style, "halo"], **look), chart.mark_text(style=style, **look).encode(**channels)]


def _axis(frame: pd.DataFrame, title: Title) -> str | None:
    """Return the title of the values' axis, or None if it follows the chosen metric, which is `spec`'s to write."""
    if isinstance(title, str):
        return title
    metrics = _order(frame["metric"]) if "metric" in frame else list(title)[:1]
    return title[metrics[0]] if len(metrics) == 1 else None


def _finished(alt: Any, drawn: Any, frame: pd.DataFrame, title: Title, *axes: str, least: float = 60) -> Any:
    """Return the chart with its parameters, and with a title that names the chosen metric and norm if they can be chosen."""
    drawn = drawn.add_params(*_params(alt, frame, *axes)).properties(usermeta={LEAST: least})
    if isinstance(title, str) or _axis(frame, title) is not None:
        return drawn
    drawn.usermeta[TITLES] = {visible(metric): words for metric, words in title.items()}
    norm = " + (site ? ' at ' + site : '')" if "site" in choices(frame, *axes) else ""
    if norm and (frame["site"] == "").any():
        of_runs = [f"metric !== {json.dumps(name)}" for name in _order(frame["metric"][frame["site"] == ""])]
        norm = f" + ({' && '.join(of_runs)} && site ? ' at ' + site : '')"
    return drawn.properties(title=alt.TitleParams(text={"expr": f"metric{norm}"}, anchor="start"))


# How they look

TITLES, LEAST = "titles", "least"
"""Notes of a picture: the title of each metric, and the pixels of height below which its rows would overlap."""


def spec(
    picture: Picture, *, width: float | str, height: float | None = None, palette: str | None = None
) -> dict[str, Any]:
    """Return the chart as Vega-Lite.

    In every text, data and titles alike, a character that cannot be seen is replaced by its code point: a line break
    would end an expression of Vega's, and SVG has no control characters.

    Args:
        picture: The chart.
        width: Pixels of all of it, or "container" for the space there is.
        height: Pixels of all of it; the chart's own unless given.
        palette: The palette of its colours, light or dark; those of the page that holds the chart unless given.
    """
    sizes = {"width": width} | ({"height": height} if height is not None else {})
    with extra("altair").data_transformers.disable_max_rows():
        found: dict[str, Any] = picture.properties(**sizes).to_dict(validate=False)
    # without it ticks, rules and areas have no size of their own in a container whose width is still to come
    found["autosize"] = {"type": "fit-x" if height is None else "fit", "contains": "padding"}
    if titles := found["usermeta"].pop(TITLES, None):
        _retitle(found, {"signal": f"{json.dumps(visible_within(titles), ensure_ascii=False)}[metric]"})
    data = found.pop("datasets")
    looks = json.dumps(dict(visible_within(found)) | {"config": THEME["config"]})
    if palette:
        looks = re.sub(r'"var\(--([\w-]+)\)"', lambda variable: f'"{THEME[palette][variable[1]]}"', looks)
    return dict(json.loads(looks)) | {"datasets": visible_within(data)}


def _retitle(found: dict[str, Any], title: dict[str, str]) -> None:
    """Give the axes of values without a title this one, a signal: Vega knows it there, and Vega-Lite's grammar does not."""
    for layer in found["layer"]:
        for axis in ("x", "y"):
            channel = layer["encoding"].get(axis, {})
            if channel.get("type") == "quantitative" and channel.get("title", "") is None:
                channel["title"] = title


class _Level(NamedTuple):
    """The encodings of levels; those of one level alone are empty."""

    names: list[str]
    hue: Any
    shape: Any
    dash: Any

    def colour(self, *, shape: bool = False) -> list[Any]:
        """Return the channel of colour, and of shape if that is asked for."""
        return [self.hue, *[self.shape] * shape] if self.names else []

    def dashes(self) -> list[Any]:
        """Return the channel of dashes."""
        return [self.dash] if self.names else []


def _level(alt: Any, frame: pd.DataFrame, levels: Levels, *, lines: bool = False) -> _Level:
    """Return the encodings of the levels, with one legend: of lines, or of shapes.

    A level's colour, shape and dash are those of its number among all levels; from the eighth on colours begin again, beside
    other shapes and dashes. Vega makes one legend of several as long as their titles and orders agree.
    """
    if "level" not in frame or not levels.names:
        return _Level([], alt.Undefined, None, None)
    present = set(frame["level"])
    names = [name for name in levels.names if name in present]
    look = [(at, at + at // 7) for at, name in enumerate(levels.names) if name in present]
    theme = THEME["config"]["range"]
    longest = max(map(len, names)) + 4  # characters, of some 44 that fit the narrowest page
    symbol = {"symbolType": "stroke", "symbolSize": 500} if lines else {}
    legend = alt.Legend(columns=max(1, min(4, 44 // longest)), **symbol) if len(names) > 1 else None
    colours = alt.Scale(domain=names, range=[theme["category"][colour % 7] for colour, _ in look])
    shapes = alt.Scale(domain=names, range=[theme["symbol"][other % 7] for _, other in look])
    dashes = [DASHES[other % 7] for _, other in look]
    # dashed outlines hide shapes: a scale of a domain that is not written out stays out of their legend
    dashed = alt.Scale(domain=names, range=dashes) if lines else alt.Scale(range=dashes)
    title = levels.title
    return _Level(
        names,
        alt.Color("level:N", sort=names, title=title, legend=legend, scale=colours),
        alt.Shape("level:N", sort=names, title=title, legend=legend, scale=shapes),
        alt.StrokeDash("level:N", sort=names, title=title, legend=legend if lines else None, scale=dashed),
    )


def _along(alt: Any, values: "pd.Series[Any]", size: str) -> Any:
    """Return the axis along which lines run: of norms, of updates, or of sizes.

    Updates are on a linear axis, or on a logarithmic one that has a 0 if the steps grow like that.
    """
    if values.name == "site":
        return alt.X("site:N", sort=_order(values), title="Norm, from first to last", axis=alt.Axis(labelAngle=-30))
    known = sorted(values.unique().tolist())
    if values.name == "x":
        scale = alt.Scale(type="log", nice=False, padding=20)
        return alt.X("x:Q", title=size, scale=scale, axis=alt.Axis(values=known, format="~s"))
    gaps = [b - a for a, b in pairwise(known)] or [1]
    if max(gaps) < 8 * min(gaps):
        axis = alt.Axis(tickMinStep=1, format="d", tickCount=12)
        return alt.X("step:Q", title="Updates", scale=alt.Scale(nice=False), axis=axis)
    round_ones = [0, *(m * 10**k for k in range(9) for m in (1, 2, 5))]
    ticks = known if len(known) < 9 else [one for one in round_ones if known[0] <= one <= known[-1]]
    axis = alt.Axis(values=ticks, labelOverlap="greedy", labelSeparation=8)
    return alt.X("step:Q", title="Updates", scale=alt.Scale(type="symlog", nice=False), axis=axis)


def choices(frame: pd.DataFrame, *axes: str) -> dict[str, list[str]]:
    """Return the values that a reader may choose among, by their column; those of `axes` are all shown."""
    found = {
        name: [one for one in dict.fromkeys(frame[name]) if one] for name in PICKS if name in frame and name not in axes
    }
    return {name: values for name, values in found.items() if values}


def _params(alt: Any, frame: pd.DataFrame, *axes: str) -> list[Any]:
    """Return a parameter for each choice, which begins with its first value."""
    return [alt.param(name=name, value=values[0]) for name, values in choices(frame, *axes).items()]


def _filtered(alt: Any, frame: pd.DataFrame, *axes: str) -> Any:
    """Return a chart of the rows that are chosen."""
    names = choices(frame, *axes)
    whatever = [name for name in names if (frame[name] == "").any()]
    return alt.Chart(frame).transform_filter(_picked(names, whatever)) if names else alt.Chart(frame)


def _bounded(chart: Any) -> Any:
    """Return the chart with the ends of its bars, `from` and `to`; a row without an interval has a bar of no length.

    Vega warns of a scale without a number, which a choice of nothing but single seeds would have.
    """
    ends = {"from": "low", "to": "high"}
    return chart.transform_calculate(
        **{end: f"datum.{of} === null ? datum.mean : datum.{of}" for end, of in ends.items()}
    )


def _picked(names: Iterable[str], whatever: Collection[str] = ()) -> str:
    """Return Vega's condition that a row is of the chosen values; of the columns `whatever`, also if its own is empty."""
    chosen = {name: f"datum.{name} === {name}" for name in names}
    return " && ".join(f"(!datum.{name} || {one})" if name in whatever else one for name, one in chosen.items())


def _told(alt: Any, chart: Any, frame: pd.DataFrame) -> Any:
    """Return the chart with a tooltip of all columns of a frame, in which a missing number is a dash."""
    told, numbers = [], {}
    for name in map(str, frame):
        if frame[name].dtype.kind != "f":
            told.append(alt.Tooltip(name, type="nominal"))
        elif frame[name].notna().all():
            told.append(alt.Tooltip(name, type="quantitative", format=".4~g"))
        else:
            numbers[f"told {name}"] = f"datum.{name} === null ? '–' : format(datum.{name}, '.4~g')"
            told.append(alt.Tooltip(f"told {name}", type="nominal", title=name))
    return (chart.transform_calculate(**numbers) if numbers else chart).encode(tooltip=told)


def _order(values: "pd.Series[Any]") -> list[str]:
    return list(dict.fromkeys(values.astype(str)))
