"""Report on merged runs as one offline page: what was run, what differs, where and since when, what it costs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from os import PathLike
from pathlib import Path

import pandas as pd

from lnjac.comparing.compare import HOLM
from lnjac.comparing.experiment import RUN
from lnjac.comparing.tables import FRAMES, MergedTables, Sources, open_tables
from lnjac.errors import ConfigError
from lnjac.files import write_atomically
from lnjac.reporting.charts import CHARTS, lead
from lnjac.reporting.facts import PROVENANCE, Facts
from lnjac.reporting.marks import require_extra
from lnjac.reporting.page import BAR, Charts, Figure, Section, bundle_ahead, offered, render
from lnjac.reporting.verdict import verdict
from lnjac.reporting.view import View, view
from lnjac.runs.configs import CONFIGS
from lnjac.runs.folder import DIVERGED
from lnjac.runs.merged import companions
from lnjac.text import listed

TABLE = "TABLE"
"""The word for tables without one name."""


@dataclass(frozen=True)
class Report:
    """A page, and the names of the charts below each title."""

    html: str = field(repr=False)
    sections: dict[str, list[str]]


def report(
    sources: Sources,
    *,
    output: str | Path,
    by: str | None = None,
    where: str | None = None,
    title: str | None = None,
) -> Report:
    """Write one HTML page that needs no network: the runs, their differences and costs as charts and tables.

    Args:
        sources: A path, or several: of merged tables, sweeps and runs; or tables opened by `open_tables`.
        output: The page's path, which ends in .html. Its folder is made if it is missing.
        by: The config column whose levels are compared; attn_mode unless given, or the first that varies.
        where: A condition on runs, such as "method == 'fa'".
        title: The page's title; the sources' names unless given.

    Returns:
        The report, whose `sections` name the charts of each.

    Raises:
        ConfigError: If a source, the condition or the column is not right, or the report extra is not installed.
    """
    path = Path(output)
    if path.suffix != ".html":
        raise ConfigError(f"the output {path} must end in .html: try {path.name}.html")
    require_extra()
    made = make(open_tables(sources), title or _name(sources), by, where, _told(sources))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(made.html, encoding="utf-8"))
    return made


def make(
    merged: MergedTables, title: str, by: str | None = None, where: str | None = None, table: str = TABLE
) -> Report:
    """Return the page of merged tables. For a chart that cannot be drawn it has a line with what is lacking.

    `table` is what `lnjac command` may call the tables.
    """
    require_extra()  # without it every chart would be one that cannot be drawn
    shown, charts = view(merged, by, where), Charts()
    if lacking := [name for name in (*PROVENANCE, "dirty", "started_at", "wall_s") if name not in shown.runs]:
        raise ConfigError(
            f"the runs lack {listed(lacking)}, of which a page tells: give the whole DataFrame of runs too"
        )
    bundle_ahead()
    figures: list[Figure] = []
    absent: dict[str, str] = {}
    for name, chart in CHARTS.items():
        try:
            figures.append(charts.figure(name, chart.draw(shown)))
        except ConfigError as error:
            absent[name] = str(error)
    first = lead(shown, [figure.name for figure in figures])
    sections = []
    for heading, of_title in groupby(figures, lambda figure: CHARTS[figure.name].title):
        if own := [figure for figure in of_title if figure.name != first]:
            sections.append(Section(heading.lower(), heading, own))
    facts = Facts(shown)
    runs = facts.every()
    if CONFIGS in companions(merged.path):
        runs["command"] = [f"lnjac command {shlex.quote(table)} {run}" for run in runs["run_id"]]
    html = render(
        charts,
        title=title,
        verdict=_verdict(shown),
        lead=next((figure for figure in figures if figure.name == first), None),
        bar={name: values for name, values in offered(figures).items() if name in BAR},
        facts=facts.line(),
        doubts=facts.doubts(),
        varies=facts.varies(),
        fixed=facts.fixed(),
        provenance=facts.provenance(),
        computed=_computed(figures),
        skipped=[f"{skip['path']}: {skip['reason']}" for skip in merged.report.get("skipped", [])],
        diverged=_diverged(shown),
        runs=runs,
        runs_data=charts.table(runs),
        sections=sections,
        absent=list(absent.items()),
        columns={name: _columns(merged, name) for name in companions(merged.path)},
    )
    contents = {heading: [f.name for f in of] for heading, of in groupby(figures, lambda f: CHARTS[f.name].title)}
    return Report(html, contents)


def _verdict(shown: View) -> list[str]:
    """Return the answer in sentences; the reason if runs cannot be compared, for which no page is refused."""
    by = shown.by if shown.runs["level"].nunique() > 1 else None
    try:
        return verdict(shown.merged, by, where=shown.where).sentences
    except ConfigError as error:
        return [f"These runs cannot be compared: {error}."]


def _name(sources: Sources) -> str:
    """Return the sources' names, the title of a page that was given none."""
    if isinstance(sources, MergedTables):
        return sources.path.name
    given = [sources] if isinstance(sources, (str, PathLike, pd.DataFrame)) else sources
    paths = [Path(FRAMES if isinstance(one, pd.DataFrame) else one) for one in given]
    return ", ".join(dict.fromkeys(path.name or str(path) for path in paths))


def _told(sources: Sources) -> str:
    """Return what a command calls the sources: one path as it was given, of an absolute one the name alone."""
    if isinstance(sources, MergedTables | pd.DataFrame):
        return TABLE
    paths = [Path(sources)] if isinstance(sources, str | PathLike) else sources
    if len(paths) != 1 or isinstance(paths[0], pd.DataFrame):
        return TABLE
    path = Path(paths[0])
    return path.name if path.is_absolute() else str(path)


def _columns(merged: MergedTables, table: str) -> pd.DataFrame:
    """Return the described columns of a table, a row for each."""
    return pd.DataFrame(merged.described(table).values())[["name", "dtype", "unit", "meaning"]]


def _computed(figures: Sequence[Figure]) -> list[str]:
    """Return the notes of all figures, each once; those on adjusted p values, which differ in their numbers, as one."""
    notes = dict.fromkeys(note for figure in figures for note in figure.drawing.notes)
    if sum(note.startswith(HOLM) for note in notes) < 2:
        return list(notes)
    once = (
        f"{HOLM} over the p values of one metric in one cell (all norms or backwards, and all pairs of levels), which the "
        "column family counts; never over metrics or cells"
    )
    return list(dict.fromkeys(once if note.startswith(HOLM) else note for note in notes))


def _diverged(view: View) -> dict[str, pd.DataFrame] | None:
    """Return the diverged runs, counted by level and each by itself."""
    diverged = view.runs["status"] == DIVERGED
    if not diverged.any():
        return None
    rates = view.runs.assign(diverged=diverged).groupby(["cell", "level"], sort=False)["diverged"]
    by_level = rates.agg(diverged="sum", runs="size").query("diverged > 0").reset_index()
    return {"by_level": by_level, "runs": view.runs.loc[diverged, [*RUN, "diverged_step"]]}
