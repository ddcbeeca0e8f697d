"""Fill the page's template: one HTML file that needs nothing else, whose charts run without eval or network.

Every text passes `_text` and Jinja's autoescape. The charts' data travel as base64 of gzipped JSON, in which nothing can
end a script. The content policy names scripts and style by their SHA-256.
"""

import base64
import gzip
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lnjac.escape import visible, visible_within
from lnjac.reporting import marks
from lnjac.reporting.registry import Drawing

HERE = Path(__file__).parent
DIGITS = 6
"""Significant digits of a number in the charts' data."""
MISSING = "–"

MOST_TABLE_ROWS = 60
"""Rows of a table on the page, of those that are chosen."""
MOST = {"most": MOST_TABLE_ROWS, "most_runs": 300}
"""Rows of the page's tables, for the template."""
NARROW = (
    *("loss", "exact's loss", "cost", "mean", "mean_a", "mean_b", "difference", "slope"),
    *("interval", "p_adjusted", "r2", "n"),
)
"""Columns of results that a table shows first, after those that name its rows."""
INTERVAL = "interval"
"""The column that shows `low` and `high`."""

LABELS = {"cell": "Runs", "pair": "Levels", "metric": "Metric", "site": "Norm", "among": "Level"}
"""The label of the list that sets a parameter of the charts."""
BAR = ("cell", "pair", "metric")
"""What is chosen for all charts at once; a section has lists of its own for the rest."""


class Figure(NamedTuple):
    """A drawing on the page: its chart's name, the id of its place, and the names of the datasets of its tables."""

    name: str
    id: str
    drawing: Drawing
    table: str
    seeds: str


class Section(NamedTuple):
    """Figures below one title."""

    name: str
    title: str
    figures: Sequence[Figure]

    @property
    def choices(self) -> dict[str, list[str]]:
        """Return what this section alone lets a reader choose."""
        return {name: values for name, values in offered(self.figures).items() if name not in BAR}


def offered(figures: Sequence[Figure]) -> dict[str, list[str]]:
    """Return every value that one of the figures has, by the parameter that chooses it; a single value is no choice."""
    known = [figure.drawing.choices for figure in figures]
    every = {name: list(dict.fromkeys(o for choices in known for o in choices.get(name, ()))) for name in LABELS}
    return {name: values for name, values in every.items() if len(values) > 1}


class Charts:
    """The data of a page's charts and tables; a dataset that several share is held once."""

    def __init__(self) -> None:
        self.specs: dict[str, Any] = {}
        self.datasets: dict[str, Any] = {}

    def figure(self, name: str, drawing: Drawing) -> Figure:
        """Add a drawing's chart and tables."""
        place = f"chart-{len(self.specs)}"
        spec = marks.spec(drawing.picture, width="container")
        data = {name: self._added(rows) for name, rows in spec.pop("datasets").items()}
        self.specs[place] = {"spec": spec, "uses": data, "choices": visible_within(dict(drawing.choices))}
        table, seeds = (self.table(frame) if frame is not None else "" for frame in (drawing.table, drawing.seeds))
        return Figure(name, place, drawing, table, seeds)

    def table(self, frame: pd.DataFrame) -> str:
        """Add a table without a chart, and return the name of its dataset."""
        return self._added(visible_within(frame.to_dict("records")))

    def _added(self, rows: Sequence[Mapping[Any, Any]]) -> str:
        """Add rows as columns, and return the name of their dataset, the same for the same rows."""
        found = columns(rows)
        name = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
        self.datasets[name] = found
        return name

    def packed(self) -> str:
        """Return all charts and their data as base64."""
        text = json.dumps(
            {"charts": self.specs, "datasets": self.datasets, "narrow": marks.THEME["narrow"]},
            separators=(",", ":"),
            allow_nan=False,
        )
        return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


class Narrow(NamedTuple):
    """The rows of a table as a page shows them: the first columns at once, the others when a reader asks for them."""

    columns: list[str]
    first: int
    numbers: set[str]
    rows: list[tuple[Any, ...]]
    left: int


def narrow(frame: pd.DataFrame, chosen: Mapping[str, Sequence[str]]) -> Narrow:
    """Return the rows of the first choice, as many as a page shows, with their most important columns first."""
    for name in [name for name in chosen if name in frame]:
        frame = frame[frame[name].isin(["", chosen[name][0]])]
    if {"low", "high"} <= {*frame}:
        ends = zip(frame["low"], frame["high"], strict=True)
        frame = frame.assign(
            interval=pd.Series([_interval(low, high) for low, high in ends], frame.index, dtype=object)
        )
    names = list(map(str, frame))
    results = [name for name in NARROW if name in names]
    keys = names[: min((names.index(name) for name in results), default=0)]
    first = [*(name for name in keys if name not in chosen), *results] or names
    shown = frame[[*first, *(name for name in names if name not in first)]]
    numbers = {name for name in names if frame[name].dtype.kind in "if"} | {INTERVAL}
    most = MOST_TABLE_ROWS if results else len(shown)
    rows = list(shown.head(most).astype(object).itertuples(index=False, name=None))
    return Narrow(list(map(str, shown)), min(len(first), 8), numbers, rows, max(0, len(shown) - most))


def _interval(low: float, high: float) -> str | None:
    return None if math.isnan(low) else f"{number(low)} to {number(high)}"


def columns(rows: Sequence[Mapping[Any, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, which compress far better, with as many digits as a chart can show and null for no number."""

    def short(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, float):
            return value
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None

    return {str(name): [short(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def render(charts: Charts, **parts: Any) -> str:
    """Fill the template with the parts that it names; its scripts are left out if there are no charts."""
    jinja2, markup = marks.extra("jinja2"), marks.extra("markupsafe").Markup
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"narrow": narrow, "sha256": _sha256, "label": LABELS.__getitem__}
    own = {
        "style": _style(),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "bundle": _bundle() if charts.specs else "",
        "data": charts.packed(),
    }
    template = environment.get_template("page.html.jinja")
    html: str = template.render({name: markup(text) for name, text in own.items()} | MOST | parts)
    return html


def _text(value: Any) -> Any:
    """Return a value as the page shows it; markup passes as it is."""
    if hasattr(value, "__html__"):
        return value
    if value is None or value != value:
        return MISSING
    return number(value) if isinstance(value, float) else visible(str(value))


def number(value: float) -> str:
    """Return four significant digits, as page.js does; whole numbers and those from 1000 have no decimals."""
    return f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:#.4g}"


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _style() -> str:
    """Return the style sheet after the palettes: light, dark if that is preferred, light again on paper."""
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in marks.THEME[palette].items()) for palette in ("light", "dark")
    )
    palettes = f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
    return palettes + (HERE / "page.css").read_text(encoding="utf-8")


BUNDLING = (
    "import sys, vl_convert\n"
    "sys.stdout.buffer.write(vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;').encode())"
)


@cache
def bundle_ahead() -> "subprocess.Popen[bytes]":
    """Begin to put the page's libraries together, in a process of its own: vl_convert holds the GIL for over a second."""
    marks.extra("vl_convert")
    return subprocess.Popen([sys.executable, "-c", BUNDLING], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@cache
def _bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    script, errors = bundle_ahead().communicate()
    if not script:
        raise RuntimeError(f"vl_convert made no script of Vega: {errors.decode()}")
    return script.decode()
