"""The report of a study: what was run, what differs, where and since when, what it costs; one offline page."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.comparing.study import IDENTITY, RUN, Study, read, varying
from lnjac.errors import ConfigError
from lnjac.files import write_atomically
from lnjac.reporting import frames as views
from lnjac.reporting import html as page
from lnjac.reporting.frames import Drawing, View
from lnjac.reporting.html import Charts, Section
from lnjac.runs import schema as tables
from lnjac.runs.folder import DIVERGED
from lnjac.runs.read import companions
from lnjac.text import listed

if TYPE_CHECKING:
    import pandas as pd


CONFIG = (
    *("model", "model.n_layer", "model.n_head", "model.n_embd", "model.block_size"),
    *("attn_mode", "method", "ln_backward", "optimizer", "optimizer.lr"),
    *("data", "batch_size", "steps", "precision"),
)
"""What is told of the runs even if it is the same in all of them."""

BASELINES = ("unigram_nats", "bigram_nats")
PROVENANCE = ("commit", "lnjac_version", "torch_version", "python_version", "device", "data_sha256")
MOST_SKIPPED = 300


@dataclass(frozen=True)
class Report:
    """A page, and for each of its sections the title and how many charts it has."""

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


def report(
    table: str | Path, output: str | Path, *, title: str | None = None, by: str | None = None, where: str | None = None
) -> Report:
    """Write one offline page about the runs of a merged table, or of a sweep's folder.

    Args:
        table: all.parquet as `lnjac.merge` made it, or a folder of runs.
        output: The page, X.html.
        title: The page's title; the table's name unless given.
        by: The config column whose levels are compared; attn_mode, or the first that varies, unless given.
        where: Only runs for which this holds, such as "method == 'fa'".

    Returns:
        The page, and for each of its sections the number of charts.

    Raises:
        ConfigError: The table cannot be read, or holds nothing that `by` and `where` ask for.
    """
    made = make(read([Path(table)]), title=title or Path(table).name, by=by, where=where)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    made.write(Path(output))
    return made


# Sections


def _what(view: View, charts: Charts) -> str:
    """Runs and their provenance, what was skipped, what diverged, what makes a comparison doubtful."""
    merge = _merge(view.study)
    body = page.definitions(_provenance(view.runs, merge))
    if view.study.doubts:
        body += page.heading("What makes a comparison doubtful") + page.items(view.study.doubts, "warn")
    if skipped := [f"{skip['path']}: {skip['reason']}" for skip in merge.get("skipped", [])]:
        body += page.folded(f"{len(skipped)} skipped runs", page.items(skipped[:MOST_SKIPPED]))
    diverged = view.runs["status"] == DIVERGED
    if diverged.any():
        rates = view.runs.assign(diverged=diverged).groupby(["cell", "level"], sort=False)["diverged"]
        table = rates.agg(diverged="sum", runs="size").query("diverged > 0").reset_index()
        said = f"{diverged.sum()} diverged runs: in no mean below"
        each = view.runs.loc[diverged, [*RUN, "diverged_step"]]
        body += page.folded(said, page.table(table, "Diverged runs by level") + page.table(each, "Each diverged run"))
    return body


def _provenance(every: "pd.DataFrame", merge: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the runs are and where they are from: what varies first, then what they have in common."""
    found = [("runs", f"{len(every)}, of which {(every['status'] == DIVERGED).sum()} diverged")]
    if merge:
        counts = f"{merge['found']} found, {merge['merged']} merged, {len(merge['skipped'])} skipped"
        found += [("merge", counts), ("sources", listed(merge["sources"]))]
    vary = varying(every.drop(columns=["cell", "level"]))
    groups = [name for name in vary if "." not in name and name not in IDENTITY]
    own = [name for name in vary if "." in name and name.partition(".")[0] not in groups]  # else told by the member
    told = dict.fromkeys([*groups, *own, "seed", *(name for name in CONFIG if name in every), *BASELINES])
    found += [(name, _values(every[name])) for name in told]
    found += [(name, _values(every[name].map(_short))) for name in PROVENANCE]
    found.append(("working tree", _values(every["dirty"].map({False: "clean", True: "dirty"}))))
    found.append(("started", f"{every['started_at'].min()} to {every['started_at'].max()}"))
    return [*found, ("computing", f"{every['wall_s'].sum() / 3600:.2f} hours")]


def _headline(view: View, charts: Charts) -> str:
    return _shown(charts, [partial(views.headline, view, metric) for metric in (views.LOSS, *views.HEADLINE)])


def _merge(study: Study) -> dict[str, Any]:
    """What the merge said of itself; {} where that is lost."""
    said = study.path.with_suffix(".merge.json")
    return dict(json.loads(said.read_text(encoding="utf-8"))) if said.exists() else {}


def _layers(view: View, charts: Charts) -> str:
    """Maps of norms and metrics; a cell of one chooses what the curves below them show."""
    *maps, curves = _drawings([partial(draw, view) for draw in (views.heatmap, views.enrichment, views.curves)])
    body = "".join(_figure(charts, drawn, wide=True) for drawn in maps)
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
    before = len(charts.specs)
    body = _shown(charts, [partial(views.cost, view)])
    if len(charts.specs) > before and (found := views.cost_differences(view)):
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
    for name in companions(view.study.path):
        frame = pd.DataFrame(tables.TABLES[name])
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
    shown = dict.fromkeys(_figure(charts, drawing) for drawing in drawn)  # what is missing is said once
    return page.linked(_choices(drawn), "".join(shown))


def _drawings(draw: Sequence[Callable[[], Drawing]]) -> list[Drawing | str]:
    """Each drawing, or the line that says why there is none and what would give it."""
    found: list[Drawing | str] = []
    for one in draw:
        try:
            found.append(one())
        except ConfigError as error:
            found.append(str(error))
    return found


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
    below = page.items(drawing.notes, "muted") if drawing.notes else ""
    below += page.folded("Table", page.table(drawing.table, drawing.caption))
    if drawing.seeds is not None:
        label = "Every seed's value"
        below += page.folded(label, page.table(drawing.seeds, f"{label}: {drawing.caption}"))
    return charts.figure(drawing.chart, drawing.caption, below, wide=wide)


def _values(column: "pd.Series[Any]", most: int = 12) -> str:
    """Its different values, null first, numbers in their order."""
    known = column.dropna().unique().tolist()
    values = [None] * column.hasnans + (sorted(known) if column.dtype.kind in "if" else known)
    return listed([views.word(value) for value in values], most)


def _short(text: Any) -> Any:
    """A hash by its beginning."""
    return text[:12] if isinstance(text, str) else text
