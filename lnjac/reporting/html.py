"""One HTML file that needs nothing else: text, tables and charts, which run under a policy without eval or network.

Every text goes through `_escaped` once, here; the charts' data travel as base64 of gzipped JSON, in which nothing can end a
script. Scripts and styles are named to the policy by their SHA-256.
"""

import base64
import gzip
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.errors import ConfigError
from lnjac.escape import visible
from lnjac.reporting import charts as figures

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 6
"""Significant digits of a number in the charts' data."""

HERE = Path(__file__).parent


class Section(NamedTuple):
    """A part of the page: its body is HTML already."""

    name: str
    title: str
    body: str


class Charts:
    """The charts of a page: each is drawn once, and data that several share are held once."""

    def __init__(self) -> None:
        self.specs: dict[str, Any] = {}
        self.datasets: dict[str, Any] = {}

    def figure(
        self, chart: figures.Chart, caption: str, below: str, *, wide: bool = False, choosing: bool = False
    ) -> str:
        """A chart under its caption, notes and tables of what it shows below it.

        A `wide` one is scrolled where the page is narrow; if readers are `choosing` the table's rows, the page fills it.
        """
        name = f"chart-{len(self.specs)}"
        spec = figures.spec(chart, figures.IN_PAGE, width="container")
        found = spec.pop("datasets")
        self.specs[name] = {"spec": spec, "uses": list(found)}
        self.datasets |= {key: columns(rows) for key, rows in found.items()}
        label = _escaped(caption)
        filled = f' data-rows="{next(iter(found))}"' if choosing else ""
        place = f'<div class="chart" id="{name}" role="img" aria-label="{label}"></div>\n'
        if wide:
            place = _scrolled(place, f"Chart {len(self.specs)}: {caption}", "wide")
        return (
            f'<figure aria-labelledby="{name}-said"{filled}><figcaption id="{name}-said">{label}</figcaption>\n'
            f"{place}{below}</figure>\n"
        )

    def packed(self) -> str:
        text = json.dumps({"charts": self.specs, "datasets": self.datasets}, separators=(",", ":"), allow_nan=False)
        return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns, which compress far better, with as many digits as a chart can show."""
    names = list(rows[0]) if rows else []
    return {name: [_short(row[name]) for row in rows] for name in names}


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


# Text


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_escaped(text)}</p>\n' if kind else f"<p>{_escaped(text)}</p>\n"


def heading(text: str) -> str:
    return f"<h3>{_escaped(text)}</h3>\n"


def said() -> str:
    """Where the page says, aloud too, what was chosen."""
    return '<p class="said" data-said aria-live="polite"></p>\n'


def items(lines: Iterable[str], kind: str = "") -> str:
    inside = "".join(f"<li>{_escaped(line)}</li>\n" for line in lines)
    return f'<ul class="{kind}">\n{inside}</ul>\n' if kind else f"<ul>\n{inside}</ul>\n"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{_escaped(term)}</dt><dd>{_escaped(text)}</dd>\n" for term, text in pairs)
    return f"<dl>\n{inside}</dl>\n"


def choice(name: str, label: str, options: Sequence[str]) -> str:
    """A list to choose from; its id is its name."""
    # a value of its own: that of the text alone is without blanks at its ends
    inside = "".join(f'<option value="{shown}">{shown}</option>' for shown in map(_escaped, options))
    return f'<label>{_escaped(label)} <select name="{name}">{inside}</select></label>\n'


def linked(choices: Mapping[str, tuple[str, Sequence[str]]], inside: str) -> str:
    """Charts with lists to choose from: each list has a label, and sets the charts' parameter of its name.

    What has but one choice is not asked.
    """
    lists = "".join(choice(name, label, options) for name, (label, options) in choices.items() if len(options) > 1)
    shown = f'<div class="choose">{lists}</div>\n' if lists else ""
    return f"<div data-linked>\n{shown}{inside}</div>\n"


MOST_TABLE_ROWS = 150
MOST_TABLE_CELLS = 2_400
"""What a table of the page holds at most: seeds side by side make it wide, and it is the page's size that is bounded."""


def table(frame: "pd.DataFrame", label: str) -> str:
    """A frame as a table that can be scrolled by keyboard; rows beyond what a table may hold are only counted."""
    most = min(MOST_TABLE_ROWS, MOST_TABLE_CELLS // max(1, len(frame.columns)))
    more = paragraph(f"{len(frame) - most} more rows are left out here.", "muted") if len(frame) > most else ""
    frame = frame.head(most)

    def cell(value: Any) -> str:  # its end tag may be left out: a page has thousands of cells
        if isinstance(value, float):
            return f"<td class=n>{number(value)}"
        kind = " class=n" if isinstance(value, int) and not isinstance(value, bool) else ""
        return f"<td{kind}>{_escaped(str(value))}"

    numeric = {name for name in frame if frame[name].dtype.kind in "if"}
    head = "".join(
        f'<th scope="col"{" class=n" if name in numeric else ""}>{_escaped(str(name))}</th>' for name in frame
    )
    plain = frame.astype(object).itertuples(index=False, name=None)
    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in plain)
    inside = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return _scrolled(inside, label) + more


def number(value: float) -> str:
    """Four significant digits, as in page.js; whole numbers and those from 1000 without decimals; – for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:#.4g}"


def _scrolled(inside: str, label: str, kind: str = "") -> str:
    """What is wider than its page, to be scrolled by keyboard too."""
    return (
        f'<div class="{f"scroll {kind}".strip()}" tabindex="0" role="region" aria-label="{_escaped(label)}">'
        f"{inside}</div>\n"
    )


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{_escaped(summary)}</summary>\n{inside}</details>\n"


# The page


def page(title: str, lead: str, sections: Sequence[Section], charts: Charts) -> str:
    """The whole file. Its policy allows the very scripts and style that are in it, and nothing from anywhere else."""
    style, script, bundle = _style(), (HERE / "page.js").read_text(encoding="utf-8"), _bundle() if charts.specs else ""
    policy = (
        f"default-src 'none'; script-src {_hash(bundle)} {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{s.name}">{_escaped(s.title)}</a></li>\n' for s in sections)
    body = "".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title">\n<h2 id="{s.name}-title">{_escaped(s.title)}</h2>\n'
        f"{s.body}</section>\n"
        for s in sections
    )
    scripts = (
        f'<script type="text/plain" id="data">{charts.packed()}</script>\n'
        f"<script>{bundle}</script>\n<script>{script}</script>\n"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{_escaped(title)}</h1>
<p class="muted">{_escaped(lead)}</p>
<nav aria-label="Sections"><ul>
{links}</ul></nav>
</header>
<noscript><p class="warn">The charts need JavaScript. The text is complete without it, and so are the tables but that of
the curves that are chosen, which is empty, and those that say how many rows they leave out.</p></noscript>
<p class="warn" id="broken" role="alert" hidden>The charts, and the table of the curves that are
chosen, could not be drawn in this browser. The rest is as it would be.</p>
<main id="content" tabindex="-1">
{body}</main>
{scripts if charts.specs else ""}</body>
</html>
"""


def _style() -> str:
    """The style sheet, after the palettes: light, dark where that is preferred, light again on paper."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in figures.variables(palette).items()) + f"--link:{link};"
        for palette, link in ((figures.LIGHT, "#005ea2"), (figures.DARK, "#7cc4f5"))
    )
    palettes = f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
    return palettes + (HERE / "page.css").read_text(encoding="utf-8")


def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise ConfigError(figures.MISSING) from None
    return str(javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
