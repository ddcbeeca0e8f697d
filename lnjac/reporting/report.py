"""Report on merged runs as one offline page: what was run, what differs, where and since when, what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from lnjac.comparing.experiment import IDENTITY, RUN, varying
from lnjac.comparing.tables import FRAMES, MergedTables, Sources, open_tables
from lnjac.errors import ConfigError
from lnjac.files import write_atomically
from lnjac.reporting.charts import CHARTS, Drawing
from lnjac.reporting.marks import extra
from lnjac.reporting.page import Charts, Section, render
from lnjac.reporting.verdict import verdict
from lnjac.reporting.view import View, view
from lnjac.runs.folder import DIVERGED
from lnjac.runs.merged import companions
from lnjac.runs.schema import Known
from lnjac.text import listed, word

CONFIG = (
    *("model", "model.n_layer", "model.n_head", "model.n_embd", "model.block_size"),
    *("attn_mode", "method", "ln_backward", "optimizer", "optimizer.lr"),
    *("data", "batch_size", "steps", "precision", "unigram_nats", "bigram_nats"),
)
"""Columns of runs that the page lists even if they are the same in all of them."""
PROVENANCE = ("commit", "lnjac_version", "torch_version", "python_version", "device", "data_sha256")


@dataclass(frozen=True)
class Report:
    """A page, and the title and the number of charts of each section that has any."""

    html: str = field(repr=False)
    sections: dict[str, dict[str, Any]]


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
        The report, whose `sections` count the charts of each.

    Raises:
        ConfigError: If a source, the condition or the column is not right, or the report extra is not installed.
    """
    path = Path(output)
    if path.suffix != ".html":
        raise ConfigError(f"the output {path} must end in .html: try {path.name}.html")
    made = make(open_tables(sources), title or _name(sources), by, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(made.html, encoding="utf-8"))
    return made


def make(merged: MergedTables, title: str, by: str | None = None, where: str | None = None) -> Report:
    """Return the page of merged tables. For a chart that cannot be drawn it has a line with what is lacking."""
    extra("altair")  # without it every chart would be one that cannot be drawn
    shown, charts, sections = view(merged, by, where), Charts(), []
    if lacking := [name for name in (*PROVENANCE, "dirty", "started_at", "wall_s") if name not in shown.runs]:
        raise ConfigError(
            f"the runs lack {listed(lacking)}, of which a page tells: give the whole DataFrame of runs too"
        )
    absent: dict[str, Sequence[str]] = {}
    for name, of_title in groupby(CHARTS.values(), lambda chart: chart.title):
        group = list(of_title)
        drawn = [drawing for chart in group for drawing in chart.drawings(shown)]
        figures = [charts.figure(drawing) for drawing in drawn if isinstance(drawing, Drawing)]
        reasons = list(dict.fromkeys(reason for reason in drawn if isinstance(reason, str)))
        if figures:
            sections.append(Section(group[0].name, name, figures, reasons))
        else:
            absent[name] = reasons
    html = render(
        charts,
        title=title,
        verdict=_verdict(shown),
        lead=f"{len(shown.runs)} runs" + f", by {shown.by}" * bool(shown.by) + (f", where {where}" if where else ""),
        facts=_facts(shown.runs, merged.report, merged.described("runs")),
        warnings=merged.warnings,
        skipped=[f"{skip['path']}: {skip['reason']}" for skip in merged.report.get("skipped", [])],
        diverged=_diverged(shown),
        sections=sections,
        absent=absent,
        columns={name: _columns(merged, name) for name in companions(merged.path)},
    )
    contents = {part.name: {"title": part.title, "charts": len(part.figures)} for part in sections}
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


def _columns(merged: MergedTables, table: str) -> pd.DataFrame:
    """Return the described columns of a table, a row for each."""
    return pd.DataFrame(merged.described(table).values())[["name", "dtype", "unit", "meaning"]]


def _facts(runs: pd.DataFrame, merge: Mapping[str, Any], known: Known) -> list[tuple[str, str]]:
    """Return terms and texts of the runs and their provenance: what varies first, then what they have in common."""
    facts = [("runs", f"{len(runs)}, of which {(runs['status'] == DIVERGED).sum()} diverged")]
    if merge:
        counts = f"{merge['found']} found, {merge['merged']} merged, {len(merge['skipped'])} skipped"
        facts += [("merge", counts), ("sources", listed(merge["sources"]))]
    vary = varying(runs.drop(columns=["cell", "level"]), known)
    groups = [name for name in vary if "." not in name and name not in IDENTITY]
    own = [name for name in vary if "." in name and name.partition(".")[0] not in groups]  # else told by the member
    told = dict.fromkeys(
        [*groups, *own, "seed", *(name for name in CONFIG if name in runs and runs[name].notna().any())]
    )
    facts += [(name, _values(runs[name])) for name in told]
    known_of = [name for name in PROVENANCE if runs[name].notna().any()]
    facts += [(name, _values(runs[name].str[:12])) for name in known_of]  # hashes by their beginning
    if runs["dirty"].notna().any():
        facts.append(("working tree", _values(runs["dirty"].map({False: "clean", True: "dirty"}))))
    facts.append(("started", f"{runs['started_at'].min()} to {runs['started_at'].max()}"))
    return [*facts, ("computing", f"{runs['wall_s'].sum() / 3600:.2f} hours")]


def _values(column: "pd.Series[Any]") -> str:
    """Return its different values, null first, numbers in their order."""
    known = column.dropna().unique().tolist()
    values = [None] * column.hasnans + (sorted(known) if column.dtype.kind in "if" else known)
    return listed([word(value) for value in values], 12)


def _diverged(view: View) -> dict[str, pd.DataFrame] | None:
    """Return the diverged runs, counted by level and each by itself."""
    diverged = view.runs["status"] == DIVERGED
    if not diverged.any():
        return None
    rates = view.runs.assign(diverged=diverged).groupby(["cell", "level"], sort=False)["diverged"]
    by_level = rates.agg(diverged="sum", runs="size").query("diverged > 0").reset_index()
    return {"by_level": by_level, "runs": view.runs.loc[diverged, [*RUN, "diverged_step"]]}
