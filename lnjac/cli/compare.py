"""Commands that answer from merged tables: compare, cost, scaling, diff. Tables of numbers, or JSON, or a file."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lnjac.errors import ConfigError
from lnjac.escape import latex, latex_paragraph, markdown, spreadsheet, visible
from lnjac.text import aligned

if TYPE_CHECKING:
    import pandas as pd

    from lnjac.comparing.compare import Differences
    from lnjac.comparing.intervals import Inference
    from lnjac.comparing.scaling import Scaling
    from lnjac.comparing.tables import MergedTables

commands = typer.Typer(rich_markup_mode=None)

SEED = 0
"""Of a permutation's draws: the same table gives the same numbers."""


EXPORTS = (".csv", ".md", ".tex", ".parquet")


def study(sources: Sequence[Path]) -> "MergedTables":
    """What the sources hold, with a bar while runs are read."""
    from lnjac.comparing.tables import open_tables
    from lnjac.progress import bar

    with bar("reading runs") as progress:
        return open_tables(sources, progress)


class IntervalKind(str, Enum):
    t = "t"
    signflip = "signflip"


def _exportable(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in EXPORTS:
        raise ConfigError(f"the output {path} must end in one of {', '.join(EXPORTS)}")
    return path


Sources = Annotated[list[Path], typer.Argument(help="A merged table, or any mix of tables, sweeps and runs.")]
Metric = Annotated[str, typer.Option(help="Columns, separated by commas.", show_default=False)]
At = Annotated[str, typer.Option(help="Which measured step: its number, or each run's last.")]
Where = Annotated[str | None, typer.Option(help="Only rows for which this holds, such as \"method == 'fa'\".")]
OfRuns = Annotated[bool, typer.Option("--runs/--layers", help="Columns of runs (losses), or of the norms in them.")]
Reference = Annotated[
    str | None, typer.Option(help="The level that each other is compared with, instead of all pairs.")
]
Seeds = Annotated[bool, typer.Option("--seeds", help="Show every seed.")]
Kind = Annotated[IntervalKind, typer.Option("--interval", help="Student's t, or its interval with a sign-flip p.")]
Confidence = Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the intervals.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        callback=_exportable,
        help="Also write it: X.csv, X.parquet (of every seed with --seeds), X.md, X.tex.",
    ),
]


@commands.command()
def compare(
    sources: Sources,
    by: Annotated[str, typer.Option(help="The config column whose levels are compared, or step.")],
    metric: Metric = "",
    at: At = "last",
    where: Where = None,
    runs: OfRuns = False,
    reference: Reference = None,
    seeds: Seeds = False,
    interval: Kind = IntervalKind.t,
    confidence: Confidence = 0.95,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Compare the levels of a config column, norm by norm, paired by seed.

    \b
    Example:
        lnjac compare all.parquet --by attn_mode --metric radial_share --where "method == 'fa'"
        lnjac compare multirun/A multirun/B --by method --runs --reference bp --seeds
    """
    from lnjac.comparing import compare as comparing

    found = comparing.compare(
        study(sources),
        by,
        metrics=_names(metric),
        table="runs" if runs else "layers",
        at=_step(at),
        where=where,
        reference=reference,
        how=_inference(interval, confidence),
    )
    parts: list[str | Grid] = [*_grids(found, confidence, seeds), *_notes(found.notes)]
    _write(found.seeds if seeds else found.rows, parts, output)
    if as_json:
        print(ascii_json(_plain_comparison(found, seeds)))
    else:
        _print(parts)


@commands.command()
def cost(
    sources: Sources,
    by: Annotated[
        str | None, typer.Option(help="The factor between whose levels costs are compared; attn_mode if it varies.")
    ] = None,
    metric: Annotated[str, typer.Option(help="The loss: a column of runs.")] = "val_loss_nats",
    where: Where = None,
    reference: Reference = None,
    seeds: Seeds = False,
    interval: Kind = IntervalKind.t,
    confidence: Confidence = 0.95,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """What each ln_backward costs: its loss minus exact's, paired by seed; and whether softmax pays more than sigmoid.

    \b
    Example:
        lnjac cost all.parquet --where "method == 'fa'"
        lnjac cost multirun/A --by method --reference bp --seeds
    """
    import pandas as pd

    from lnjac.comparing import cost

    how = _inference(interval, confidence)
    found = cost.cost(study(sources), by=by, metric=metric, where=where, reference=reference, how=how)
    compared = {"cost": found.costs}
    if found.differences is not None:
        compared["difference of costs"] = found.differences
    frames = [(one.seeds if seeds else one.rows).assign(what=what) for what, one in compared.items()]
    parts: list[str | Grid] = []
    for what, one in compared.items():
        none = f"no {what}: no ln_backward ran at two levels of {found.by} with its exact twin"
        grids = list(_grids(one, confidence, seeds, what))
        parts += [*grids, *([] if grids else [none]), *_notes(one.notes), ""]
    _write(pd.concat(frames, ignore_index=True), parts, output)
    if as_json:
        print(ascii_json({what.replace(" ", "_"): _plain_comparison(one, seeds) for what, one in compared.items()}))
    else:
        _print(parts)


@commands.command()
def scaling(
    sources: Sources,
    x: Annotated[str, typer.Option("--x", help="A config column of numbers (model.n_embd, steps, …), or step.")],
    metric: Metric = "",
    at: At = "last",
    where: Where = None,
    runs: OfRuns = False,
    seeds: Seeds = False,
    interval: Kind = IntervalKind.t,
    confidence: Confidence = 0.95,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """How a metric scales with width, steps or another number: the log-log slope of each seed, and its interval.

    \b
    Example:
        lnjac scaling all.parquet --x model.n_embd --metric radial_share,r_mean
        lnjac scaling all.parquet --x steps --runs --where "method == 'bp'"
    """
    from lnjac.comparing import scaling

    found = scaling.scaling(
        study(sources),
        x,
        metrics=_names(metric),
        table="runs" if runs else "layers",
        at=_step(at),
        where=where,
        how=_inference(interval, confidence),
    )
    parts: list[str | Grid] = [*_slopes(found, confidence, seeds), *_notes(found.notes)]
    _write(found.seeds if seeds else found.slopes, parts, output)
    if as_json:
        frames = {"slopes": found.slopes, "points": found.points} | ({"seeds": found.seeds} if seeds else {})
        print(ascii_json({name: _records(frame) for name, frame in frames.items()} | {"notes": found.notes}))
    else:
        _print(parts)


@commands.command()
def diff(
    one: Annotated[Path, typer.Argument(help="A merged table.")],
    other: Annotated[Path, typer.Argument(help="Another.")],
    rtol: Annotated[float, typer.Option(min=0, help="Relative difference up to which numbers are equal.")] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Say how two merged tables differ in layers, runs and curves; exit code 1 if they do, 2 if one cannot be read.

    Wall times, commits, versions and devices may differ.

    \b
    Example:
        lnjac diff before.parquet after.parquet && echo the same science
    """
    from lnjac.runs.diff import diff as compute

    try:
        found = compute(one, other, rtol)
    except ConfigError as error:
        print(f"lnjac: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    if as_json:
        frames = ("only_one", "only_other", "changed")
        plain = {
            part.table: {name: _records(getattr(part, name)) for name in frames} | {"columns": part.columns}
            for part in found
        }
        print(ascii_json(plain))
    else:
        _print([line for part in found for line in part.lines(str(one), str(other))] or ["the same science"])
    if any(found):
        sys.exit(1)


# Options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _step(text: str) -> int | None:
    if text == "last":
        return None
    if not text.isdecimal():
        raise ConfigError(f"--at {text} is no step: give the number of a measured step, or last")
    return int(text)


def _inference(kind: IntervalKind, confidence: float) -> "Inference":
    import numpy as np

    from lnjac.comparing.intervals import Inference

    return Inference(kind.value, confidence, np.random.default_rng(SEED))


# Output


class Grid(NamedTuple):
    """A table of text under its title: `labels` columns of names, then numbers; `strong` lines are the headline."""

    title: str
    heads: list[str]
    labels: int
    lines: list[list[str]]
    strong: set[int]

    def escaped(self, escape: Callable[[str], str]) -> "Grid":
        """Return the grid with each of its texts escaped."""
        lines = [list(map(escape, line)) for line in self.lines]
        return self._replace(title=escape(self.title), heads=list(map(escape, self.heads)), lines=lines)


def _grids(found: "Differences", confidence: float, seeds: bool, what: str = "difference") -> Iterator[Grid]:
    """One for each metric, of norms also for each cell: a line for each comparison, and under it one for each seed."""
    rows, headline = found.rows, found.headline()
    apart, labels = _layout(rows, found.cells, "a")
    single_a, single_b = (rows[side].nunique(dropna=False) == 1 for side in "ab")
    pair, means = "a − b", ["a", "b"]  # the column that says what a line compares, and the heads of its two means
    if single_a and single_b:
        pair, means = "" if labels else pair, [_text(rows["a"].iloc[0]), _text(rows["b"].iloc[0])]
    elif single_b:
        pair, means = found.by, ["mean", _text(rows["b"].iloc[0])]
    heads = [
        *labels,
        *([pair] if pair else []),
        *means,
        what,
        f"{100 * confidence:g}% interval",
        "effect",
        "p adj.",
        "n",
    ]
    diverged = bool(rows[["diverged_a", "diverged_b"]].to_numpy().any())
    heads += ["diverged"] if diverged else []
    for title, part in _parts(rows, apart):
        lines: list[list[str]] = []
        strong = set()
        for at, row in part:
            names = [_label(row, name) for name in labels]
            if pair:
                names.append(_text(row["a"]) if pair == found.by else f"{_text(row['a'])} − {_text(row['b'])}")
            if "site" in row and headline[at]:
                strong.add(len(lines))
            numbers = [_number(row["mean_a"], 5), _number(row["mean_b"], 5), _number(row["difference"])]
            lines.append([*names, *numbers, row["agreement"] or _interval(row), _number(row["effect"], 2)])
            lines[-1] += [_p(row["p_adjusted"]), str(row["n"])]
            if diverged:
                lines[-1].append(" ".join(f"{row[f'diverged_{side}']}/{row[f'runs_{side}']}" for side in "ab"))
            of_row = found.seeds[found.seeds.index == at] if seeds else found.seeds[:0]
            for seed, a, b in of_row[["seed", "value_a", "value_b"]].itertuples(index=False, name=None):
                lines.append(_of_seed(seed, len(names), [a, b, a - b], heads))
        yield Grid(title, heads, len(labels) + bool(pair), lines, strong)


def _slopes(found: "Scaling", confidence: float, seeds: bool) -> Iterator[Grid]:
    """One for each metric, of norms also for each cell: the means at each x and the slope, and under it each seed's."""
    apart, labels = _layout(found.slopes, found.cells, "slope")
    key, labels = [*apart, *labels], labels or ["metric"]
    levels = list(dict.fromkeys(found.points[found.x]))
    means = dict(zip(_plain(found.points, [*key, found.x]), found.points["mean"], strict=True))
    heads = [*labels, *map(_text, levels), "slope", f"{100 * confidence:g}% interval"]
    judged = bool(found.slopes["curvature"].notna().any())  # else two points a line
    heads += ["R²", "curvature", f"{100 * confidence:g}% interval"] if judged else []
    heads.append("n")
    rows, of_seed = _plain(found.slopes, key), _plain(found.seeds, key)
    for title, part in _parts(found.slopes, apart):
        lines = []
        for at, row in part:
            at_x = [_number(means.get((*rows[at], level), math.nan)) for level in levels]
            line = [*(_label(row, name) for name in labels), *at_x, _number(row["slope"])]
            line.append(row["agreement"] or _interval(row))
            if judged:
                line += [_number(row["r2"], 3), _number(row["curvature"], 3), _interval(row, "curvature_")]
            lines.append([*line, str(row["n"])])
            for name, seed in zip(of_seed, found.seeds.to_dict("records"), strict=True) if seeds else ():
                if name == rows[at]:
                    more = [None, seed["r2"], seed["curvature"]] if judged else []
                    numbers = [*[None] * len(levels), seed["slope"], *more]
                    lines.append(_of_seed(seed["seed"], len(labels), numbers, heads))
        yield Grid(f"{title}, by {found.x}", heads, len(labels), lines, set())


def _plain(frame: "pd.DataFrame", key: Sequence[str]) -> list[tuple[Any, ...]]:
    """Each row's key, None for what is missing: NaN would equal nothing."""
    columns = frame[list(key)].astype(object)
    return list(columns.where(columns.notna(), None).itertuples(index=False, name=None))


def _layout(rows: "pd.DataFrame", cells: Sequence[str], first: str) -> tuple[list[str], list[str]]:
    """Of the key (the columns before `first`): what each grid has one value of, and what labels its lines."""
    apart = ["metric", *(cells if "site" in rows else [])]
    key = [str(name) for name in rows.columns[: rows.columns.get_loc(first)]]
    return apart, [name for name in key if name not in apart]


def _parts(rows: "pd.DataFrame", apart: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """The rows with their numbers, by the values of `apart`, which make a title."""
    parts: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for at, row in enumerate(rows.to_dict("records")):
        cell = [f"{name}={_label(row, name)}" for name in apart if name != "metric"]
        parts.setdefault(" ".join([row["metric"], *cell]), []).append((at, {str(k): v for k, v in row.items()}))
    yield from parts.items()


def _of_seed(seed: int, labels: int, numbers: Sequence[float | None], heads: Sequence[str]) -> list[str]:
    """A line under a comparison's own: the seed in its last label, its numbers, and nothing in the rest."""
    line = [*[""] * (labels - 1), f"  seed {seed}", *("" if number is None else _number(number) for number in numbers)]
    return line + [""] * (len(heads) - len(line))


def _notes(notes: Sequence[str]) -> list[str]:
    return [f"- {note}" for note in notes]


def _print(parts: Iterable[str | Grid]) -> None:
    """On a terminal within its width; elsewhere as plain lines, as long as they have to be."""
    parts = [visible(part) if isinstance(part, str) else part.escaped(visible) for part in parts]
    if not sys.stdout.isatty():
        for part in parts:
            print(
                part if isinstance(part, str) else f"{part.title}\n{aligned([part.heads, *part.lines], part.labels)}\n"
            )
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part)
            continue
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        for i, head in enumerate(part.heads):
            table.add_column(head, justify="left" if i < part.labels else "right", overflow="fold")
        for number, line in enumerate(part.lines):
            table.add_row(*line, style="bold" if number in part.strong else None)
        console.print(part.title, table, "", sep="\n")


def ascii_json(found: Any) -> str:
    """Return the value as JSON in ASCII: any terminal can show it, and no text in it can command one."""
    return json.dumps(found, indent=1, allow_nan=False)


def _plain_comparison(found: "Differences", seeds: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"rows": _records(found.rows), "notes": found.notes}
    return plain | ({"seeds": _records(found.seeds)} if seeds else {})


def _records(frame: "pd.DataFrame") -> Any:
    """Rows as JSON knows them: null for what is missing or not finite."""
    return json.loads(frame.to_json(orient="records", double_precision=15))


def _write(frame: "pd.DataFrame", parts: Sequence[str | Grid], path: Path | None) -> None:
    """Write all columns for a program to read, or for a reader the tables and notes that are printed."""
    if path is None:
        return
    from lnjac.files import write_atomically

    writers = {
        ".csv": lambda to: _for_spreadsheets(frame).to_csv(to, index=False),
        ".md": lambda to: to.write_text("\n".join(map(_markdown, parts)) + "\n", encoding="utf-8"),
        ".tex": lambda to: to.write_text(_latex(parts), encoding="ascii"),
        ".parquet": lambda to: frame.to_parquet(to, index=False),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, writers[path.suffix])


def _for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the frame with no text, name or value, that a spreadsheet would compute; numbers stay as they are."""
    import pandas as pd

    def safe(column: "pd.Series[Any]") -> "pd.Series[Any]":
        if pd.api.types.is_numeric_dtype(column):
            return column
        values = [spreadsheet(value) if isinstance(value, str) else value for value in column]
        return pd.Series(values, index=column.index, dtype=object)

    return frame.assign(**{str(name): safe(frame[name]) for name in frame}).rename(columns=spreadsheet)


def _markdown(part: str | Grid) -> str:
    if isinstance(part, str):
        return markdown(part)
    grid = part.escaped(markdown)
    sides = [":--"] * grid.labels + ["--:"] * (len(grid.heads) - grid.labels)
    lines = [grid.heads, sides, *grid.lines]
    return f"**{grid.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


ROWS_OF_A_PAGE = 36
"""Lines of a table in LaTeX, after which it is continued in another: a table cannot be broken between pages."""

LATEX_BEGIN = r"""% A document of its own, or part of another by \input; there the package graphicx shrinks wide tables.
\makeatletter
\def\lnjacend{}
\ifx\@nodocument\relax\else
  \documentclass{article}
  \usepackage{graphicx}
  \begin{document}
  \def\lnjacend{\end{document}}
\fi
\makeatother
\providecommand{\resizebox}[3]{#3}
"""


def _latex(parts: Sequence[str | Grid]) -> str:
    """Return tables and notes in ASCII and without a package, so that any LaTeX compiles them."""
    body = [_latex_table(part) if isinstance(part, Grid) else _latex_line(part) for part in parts]
    return "\n".join([LATEX_BEGIN, *body, "\\lnjacend\n"])


def _latex_line(text: str) -> str:
    return f"{{\\raggedright\\noindent {latex_paragraph(text)}\\par}}" if text else "\\medskip"


def _latex_table(grid: Grid) -> str:
    title, grid = latex_paragraph(grid.title), grid.escaped(latex)
    sides = "l" * grid.labels + "r" * (len(grid.heads) - grid.labels)
    found = []
    for first in range(0, len(grid.lines), ROWS_OF_A_PAGE):
        rows = [grid.heads, *grid.lines[first : first + ROWS_OF_A_PAGE]]
        head, *lines = [" & ".join(re.sub("^  ", r"\\quad ", cell) for cell in row) + r" \\" for row in rows]
        inside = "\n".join([rf"\begin{{tabular}}{{@{{}}{sides}@{{}}}}", head, r"\hline", *lines, r"\end{tabular}"])
        said = title + (" (continued)" if first else "")
        found.append(
            f"{{\\raggedright\\noindent\\textbf{{{said}}}\\par\\nobreak\\smallskip\\noindent\n"
            f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{inside}}}\\par\\medskip}}\n"
        )
    return "\n".join(found)


def _label(row: Mapping[Any, Any], name: str) -> str:
    """A part of a row's key; `-` where it is not the same at both levels."""
    return "-" if name in row.get("moving", "").split(", ") else _text(row[name])


def _text(value: Any) -> str:
    from lnjac.comparing.design import word

    return word(value)


def _number(value: float, digits: int = 4) -> str:
    return "-" if value != value else f"{value:.{digits}g}"


def _p(value: float) -> str:
    return "<1e-4" if value < 1e-4 else "-" if value != value else f"{value:.2g}"


def _interval(row: Mapping[Any, Any], of: str = "") -> str:
    low, high = row[f"{of}low"], row[f"{of}high"]
    return "-" if low != low else f"{low:.3g} to {high:.3g}"
