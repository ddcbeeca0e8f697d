"""The report of a study: what was run, what differs, where and since when, what it costs; one offline page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac import page, tables, views
from lnjac.config import ConfigError
from lnjac.design import IDENTITY, RUN, Study, varying
from lnjac.page import Charts, Section
from lnjac.runs import DIVERGED, write_atomically
from lnjac.views import Drawing, View

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """A page with what is in it: for each section, how many charts it has or why it has none."""

    html: str
    title: str
    sections: dict[str, dict[str, Any]]

    def write(self, path: Path) -> None:
        write_atomically(path, lambda temporary: temporary.write_text(self.html, encoding="utf-8"))


def make(study: Study, *, title: str, by: str | None = None, where: str | None = None) -> Report:
    """All sections of one study; what cannot be shown is a line that says what to run for it."""
    view = views.view(study, by, where)
    view.runs  # noqa: B018  what is wrong with --by or --where is said before anything else
    charts, sections, contents = Charts(), [], {}
    for name, (heading, build) in SECTIONS.items():
        before = len(charts.specs)
        body = build(view, charts)
        sections.append(Section(name, heading, body))
        contents[name] = {"title": heading, "charts": len(charts.specs) - before}
    lead = f"{len(view.runs)} runs" + (f", by {view.by}" if view.by else "") + (f", where {where}" if where else "")
    return Report(page.page(title, lead, sections, charts), title, contents)


# Sections


def _what(view: View, charts: Charts) -> str:
    """Runs and their provenance, what was skipped, what diverged, what makes a comparison doubtful."""
    every, merge = view.runs, _merge(view.study)
    diverged = every[every["status"] == DIVERGED]
    pairs = [("runs", f"{len(every)}, of which {len(diverged)} diverged")]
    if merge:
        found = f"{merge['found']} found, {merge['merged']} merged, {len(merge['skipped'])} skipped"
        pairs += [("merge", found), ("sources", ", ".join(merge["sources"]))]
    vary = varying(every.drop(columns=["cell", "level"]))
    groups = [name for name in vary if "." not in name and name not in IDENTITY]
    own = [name for name in vary if "." in name and name.partition(".")[0] not in groups]  # else told by the member
    pairs += [(name, _values(every[name])) for name in [*groups, *own]]
    pairs.append(("seed", _values(every["seed"])))
    fixed = [
        name for name in ("model", "attn_mode", "method", "ln_backward", "optimizer", "data", "steps") if name in every
    ]
    pairs += [(name, _values(every[name])) for name in fixed if every[name].nunique() == 1]
    for name in ("commit", "lnjac_version", "torch_version", "python_version", "device", "data_sha256"):
        pairs.append((name, _values(every[name].map(lambda text: text[:12] if isinstance(text, str) else text))))
    pairs.append(("started", f"{every['started_at'].min()} to {every['started_at'].max()}"))
    pairs.append(("computing", f"{every['wall_s'].sum() / 3600:.2f} hours"))
    body = page.definitions(pairs)
    if view.study.doubts:
        body += page.heading("What makes a comparison doubtful") + page.items(view.study.doubts, "warn")
    if merge and merge["skipped"]:
        skipped = [f"{skip['path']}: {skip['reason']}" for skip in merge["skipped"]]
        body += page.folded(f"{len(skipped)} skipped runs", page.items(skipped[:300]))
    if len(diverged):
        counts = every.assign(diverged=every["status"] == DIVERGED).groupby(["cell", "level"], sort=False)["diverged"]
        table = counts.agg(diverged="sum", runs="size").query("diverged > 0").reset_index()
        said = f"{len(diverged)} diverged runs: in no mean below"
        body += page.folded(
            said, page.table(table, "Diverged runs") + page.table(diverged[[*RUN, "diverged_step"]], said)
        )
    return body


def _headline(view: View, charts: Charts) -> str:
    return _shown(charts, [partial(views.headline, view, metric) for metric in (views.LOSS, *views.HEADLINE)])


def _merge(study: Study) -> dict[str, Any]:
    """What the merge said of itself; {} where that is lost."""
    said = study.path.with_suffix(".merge.json")
    return dict(json.loads(said.read_text(encoding="utf-8"))) if said.exists() else {}


def _layers(view: View, charts: Charts) -> str:
    """Maps of norms and metrics; a cell of one chooses what the curves below them show."""
    maps = _drawings([lambda: views.heatmap(view), lambda: views.enrichment(view)])
    body, curves = (
        "".join(_figure(charts, drawn, wide=True) for drawn in maps),
        _drawings([lambda: views.curves(view)])[0],
    )
    if isinstance(curves, str):
        return body + page.paragraph(curves, "muted")
    label = "The chosen curves as a table"
    table = page.table(curves.table[["step", "level", "mean", "low", "high"]].head(0), label)
    body += page.said()
    body += charts.figure(curves.chart, curves.caption, page.folded(label, table), choosing=True)
    body += page.items(curves.notes, "muted") if curves.notes else ""
    hint = page.paragraph("Click a cell, or choose here, to see its metric over the updates.")
    return hint + page.linked(_choices([*maps, curves]), body)


def _trajectories(view: View, charts: Charts) -> str:
    metrics = (views.LOSS, "train_loss_nats", views.HEADLINE[0])
    return _shown(charts, [partial(views.trajectory, view, metric) for metric in metrics])


def _cost(view: View, charts: Charts) -> str:
    charts_before = len(charts.specs)
    body = _shown(charts, [partial(views.cost, view)])
    if charts_before < len(charts.specs) and (found := views.cost_differences(view)):
        rows, notes = found
        label = "Differences of cost between levels"
        body += page.heading(label) + page.table(rows, label) + page.items(notes, "muted")
    return body


def _depth(view: View, charts: Charts) -> str:
    return _shown(charts, [partial(views.depth, view, metric) for metric in ("sigma_mean", "radial_share")])


def _scaling(view: View, charts: Charts) -> str:
    metrics = (views.HEADLINE[0], views.LOSS)
    return "".join(
        _shown(charts, [partial(views.scaling, view, metric, x) for metric in metrics])
        for x in views.sizes(view) or [""]
    )


def _dictionary(view: View, charts: Charts) -> str:
    import pandas as pd

    body = page.paragraph(
        "Symbols are those of docs/maths.md. Tables of layers and runs also hold the config's values."
    )
    for name, declared in tables.CORE.items():
        frame = pd.DataFrame(declared)
        body += page.folded(f"{name}: {len(frame)} columns", page.table(frame, f"Columns of {name}"))
    return body


SECTIONS: dict[str, tuple[str, Callable[[View, Charts], str]]] = {
    "what": ("What was run", _what),
    "headline": ("Comparison", _headline),
    "layers": ("Norms and metrics", _layers),
    "trajectories": ("Trajectories", _trajectories),
    "cost": ("Cost of each backward", _cost),
    "depth": ("By depth", _depth),
    "scaling": ("Scaling", _scaling),
    "dictionary": ("Columns", _dictionary),
}


CHOICES = {"cell": "Runs", "pair": "Levels", "site": "Norm", "metric": "Metric"}
"""What a list that sets a parameter of the charts is called."""


def _shown(charts: Charts, draw: Sequence[Callable[[], Drawing]]) -> str:
    """Figures that share their lists to choose from."""
    drawn = _drawings(draw)
    return page.linked(_choices(drawn), "".join(_figure(charts, drawing) for drawing in drawn))


def _drawings(draw: Sequence[Callable[[], Drawing]]) -> list[Drawing | str]:
    """Each drawing, or the line that says why there is none and what would give it; a line is said once."""
    found: list[Drawing | str] = []
    for one in draw:
        try:
            found.append(one())
        except ConfigError as error:
            found.append(str(error))
    return list({drawing if isinstance(drawing, str) else i: drawing for i, drawing in enumerate(found)}.values())


def _choices(drawn: Sequence[Drawing | str]) -> dict[str, tuple[str, list[str]]]:
    """Every choice that one of the drawings has, with its label."""
    known = [drawing.choices for drawing in drawn if isinstance(drawing, Drawing)]
    return {
        name: (label, list(dict.fromkeys(option for choices in known for option in choices.get(name, ()))))
        for name, label in CHOICES.items()
    }


def _figure(charts: Charts, drawing: Drawing | str, *, wide: bool = False) -> str:
    if isinstance(drawing, str):
        return page.paragraph(drawing, "muted")
    notes = page.items(drawing.notes, "muted") if drawing.notes else ""
    table = page.folded("Table and notes" if notes else "Table", page.table(drawing.table, drawing.caption) + notes)
    return charts.figure(drawing.chart, drawing.caption, table, wide=wide)


def _values(column: "pd.Series[Any]", most: int = 12) -> str:
    values = column.unique().tolist()
    values = sorted(values) if column.dtype.kind in "if" else values
    return ", ".join(map(str, values[:most])) + (f", … ({len(values)})" if len(values) > most else "")
