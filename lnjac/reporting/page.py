"""Fill the page's template: one HTML file that needs nothing else, whose charts run without eval or network.

Every text passes `_text` and Jinja's autoescape. The charts' data travel as base64 of gzipped JSON, in which nothing can
end a script. The content policy names scripts and style by their SHA-256.
"""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lnjac.escape import visible
from lnjac.reporting import marks
from lnjac.reporting.charts import Drawing

HERE = Path(__file__).parent
DIGITS = 6
"""Significant digits of a number in the charts' data."""
MISSING = "–"

MOST_TABLE_ROWS = 150
MOST_TABLE_CELLS = 2_400
"""Limits of a table on the page: seeds side by side make it wide, and the page's size is what is bounded."""

LABELS = {"cell": "Runs", "pair": "Levels", "site": "Norm", "metric": "Metric"}
"""The label of the list that sets a parameter of the charts."""


class Figure(NamedTuple):
    """A drawing on the page: the id of its chart, and the name of the first of the chart's datasets."""

    id: str
    drawing: Drawing
    rows: str


class Section(NamedTuple):
    """Figures that share their lists to choose from, and the reasons for which others are absent."""

    name: str
    title: str
    figures: Sequence[Figure]
    absent: Sequence[str]

    @property
    def choices(self) -> dict[str, list[str]]:
        """Return every value that one of the figures has, by the parameter that chooses it."""
        known = [figure.drawing.choices for figure in self.figures]
        return {name: list(dict.fromkeys(o for choices in known for o in choices.get(name, ()))) for name in LABELS}

    @property
    def follows(self) -> bool:
        """Return whether a figure's table has only the rows that are chosen."""
        return any(figure.drawing.follows for figure in self.figures)


class Charts:
    """The data of a page's charts; a dataset that several share is held once."""

    def __init__(self) -> None:
        self.specs: dict[str, Any] = {}
        self.datasets: dict[str, Any] = {}

    def figure(self, drawing: Drawing) -> Figure:
        """Add a drawing's chart."""
        name = f"chart-{len(self.specs)}"
        spec = marks.spec(drawing.picture, width="container")
        found = spec.pop("datasets")
        self.specs[name] = {"spec": spec, "uses": list(found)}
        self.datasets |= {key: columns(rows) for key, rows in found.items()}
        return Figure(name, drawing, next(iter(found)))

    def packed(self) -> str:
        """Return all charts and their data as base64."""
        text = json.dumps({"charts": self.specs, "datasets": self.datasets}, separators=(",", ":"), allow_nan=False)
        return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, which compress far better, with as many digits as a chart can show."""

    def short(value: Any) -> Any:
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value

    return {name: [short(row[name]) for row in rows] for name in (rows[0] if rows else ())}


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
    environment.filters |= {"rows": _rows, "sha256": _sha256, "label": LABELS.__getitem__}
    own = {
        "style": _style(),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "bundle": _bundle() if charts.specs else "",
        "data": charts.packed(),
    }
    template = environment.get_template("page.html.jinja")
    html: str = template.render({name: markup(text) for name, text in own.items()} | parts)
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


def _rows(frame: pd.DataFrame, most: int | None) -> list[tuple[Any, ...]]:
    """Return the first rows: as many as asked for, or as a table of the page may hold."""
    if most is None:
        most = min(MOST_TABLE_ROWS, MOST_TABLE_CELLS // max(1, len(frame.columns)))
    return list(frame.head(most).astype(object).itertuples(index=False, name=None))


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _style() -> str:
    """Return the style sheet after the palettes: light, dark if that is preferred, light again on paper."""
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in marks.THEME[palette].items()) for palette in ("light", "dark")
    )
    palettes = f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
    return palettes + (HERE / "page.css").read_text(encoding="utf-8")


def _bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    return str(marks.extra("vl_convert").javascript_bundle("window.vegaEmbed = vegaEmbed;"))
