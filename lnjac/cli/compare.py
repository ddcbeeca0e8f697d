"""Commands that answer from merged tables: compare, cost, scaling."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lnjac.cli import options, tables
from lnjac.cli.tables import Grid, Part
from lnjac.text import listed, word

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from lnjac.comparing.compare import Differences
    from lnjac.comparing.scaling import Scaling
    from lnjac.comparing.tables import Choices

commands = typer.Typer(rich_markup_mode=None)

COMMAND = "`lnjac command TABLE RUN_ID` prints the command that makes a run again; the table runs holds their run_ids"
"""Told under answers that show every run."""


@commands.command()
def compare(
    sources: options.Sources,
    by: Annotated[str, typer.Option(help="The config column whose levels are compared; or step.")],
    metric: options.Metrics = "",
    at: options.At = None,
    where: options.Where = None,
    runs: options.OfRuns = False,
    reference: options.Reference = None,
    seeds: options.Seeds = False,
    interval: options.Kind = "t",
    confidence: options.Confidence = 0.95,
    margin: options.Margin = None,
    tune: options.Tune = "",
    as_json: options.AsJson = False,
    output: options.Output = None,
) -> None:
    """Compare the levels of a config column, norm by norm, paired by seed. The answer in words comes first.

    \b
    Example:
        lnjac compare all.parquet --by attn_mode --metric radial_share --where "method == 'fa'"
        lnjac compare multirun/A multirun/B --by method --runs --reference bp --seeds
        lnjac compare all.parquet --by attn_mode --runs --margin 0.05
        lnjac compare all.parquet --by attn_mode --runs --tune optimizer.lr
    """
    from lnjac.comparing import compare as comparing
    from lnjac.comparing.floor import floor
    from lnjac.comparing.tables import open_tables
    from lnjac.comparing.tune import tuned
    from lnjac.reporting.sentences import of_differences, of_floor

    metrics, table, how = options.names(metric), "runs" if runs else "layers", options.inference(interval, confidence)
    opened = open_tables(sources)
    if tune:
        opened, where = tuned(opened, options.names(tune), by=[by], where=where), None
    found = comparing.compare(
        opened, by, metrics=metrics, table=table, at=at, where=where, reference=reference, how=how, margin=margin
    )
    ground = of_floor(floor(opened, where=where, how=how)) if comparing.LOSS in found.units else []
    said = [*ground, *of_differences(found)]
    parts = [*_choices(found.choices), *_differences(found, confidence, seeds), *_notes(found.notes)]
    parts += _notes([COMMAND] * seeds)
    _answer(found.seeds if seeds else found.rows, said, parts, _plain(found, seeds), output, as_json)


@commands.command()
def cost(
    sources: options.Sources,
    by: Annotated[
        str | None, typer.Option(help="The factor between whose levels costs are compared; attn_mode if it varies.")
    ] = None,
    metric: Annotated[str, typer.Option(help="The loss: a column of runs.")] = "val_loss_nats",
    where: options.Where = None,
    reference: options.Reference = None,
    seeds: options.Seeds = False,
    interval: options.Kind = "t",
    confidence: options.Confidence = 0.95,
    margin: options.Margin = None,
    tune: options.Tune = "",
    as_json: options.AsJson = False,
    output: options.Output = None,
) -> None:
    """Compute the cost of each ln_backward, paired by seed. The answer in words comes first.

    The cost is a run's loss minus that of its exact twin. A second table compares costs between the levels of --by.

    \b
    Example:
        lnjac cost all.parquet --where "method == 'fa'"
        lnjac cost multirun/A --by method --reference bp --seeds
    """
    import pandas as pd

    from lnjac.comparing import cost as comparing
    from lnjac.comparing.compare import LOSS
    from lnjac.comparing.floor import floor
    from lnjac.comparing.tables import open_tables
    from lnjac.comparing.tune import tuned
    from lnjac.reporting.sentences import of_costs, of_floor

    how, opened = options.inference(interval, confidence), open_tables(sources)
    if tune:
        opened, where = tuned(opened, options.names(tune), by=["ln_backward", *filter(None, [by])], where=where), None
    found = comparing.cost(opened, by=by, metric=metric, where=where, reference=reference, how=how, margin=margin)
    ground = of_floor(floor(opened, where=where, how=how), costs=True) if metric == LOSS else []
    compared = {"cost": found.costs}
    if found.differences is not None:
        compared["difference of costs"] = found.differences
    parts: list[Part] = [*_choices(found.costs.choices)]
    for what, one in compared.items():
        none = f"no {what}: no ln_backward ran at two levels of {found.by} with its exact twin"
        parts += _differences(one, confidence, seeds, what) or [none]
        parts += [*_notes(one.notes), ""]
    frames = [(one.seeds if seeds else one.rows).assign(what=what) for what, one in compared.items()]
    plain = {what.replace(" ", "_"): _plain(one, seeds) for what, one in compared.items()}
    _answer(pd.concat(frames, ignore_index=True), ground + of_costs(found), parts, plain, output, as_json)


@commands.command()
def scaling(
    sources: options.Sources,
    x: Annotated[str, typer.Option("--x", help="A config column of numbers (model.n_embd, steps, …), or step.")],
    metric: options.Metrics = "",
    at: options.At = None,
    where: options.Where = None,
    runs: options.OfRuns = False,
    seeds: options.Seeds = False,
    interval: options.Kind = "t",
    confidence: options.Confidence = 0.95,
    as_json: options.AsJson = False,
    output: options.Output = None,
) -> None:
    """Fit how a metric scales with width, steps or another number. The answer in words comes first.

    The slope of log metric against log x is fitted for each seed; its mean over seeds comes with an interval.

    \b
    Example:
        lnjac scaling all.parquet --x model.n_embd --metric radial_share,r_mean
        lnjac scaling all.parquet --x steps --runs --where "method == 'bp'"
    """
    from lnjac.comparing import scaling as comparing
    from lnjac.reporting.sentences import of_scaling

    metrics, table, how = options.names(metric), "runs" if runs else "layers", options.inference(interval, confidence)
    found = comparing.scaling(sources, x, metrics=metrics, table=table, at=at, where=where, how=how)
    parts = [*_slopes(found, confidence, seeds), *_notes(found.notes)]
    plain = {"slopes": found.slopes, "points": found.points, "notes": found.notes}
    more = {"seeds": found.seeds} if seeds else {}
    _answer(found.seeds if seeds else found.slopes, of_scaling(found), parts, plain | more, output, as_json)


def _answer(
    frame: "pd.DataFrame",
    said: Sequence[str],
    parts: Sequence[Part],
    plain: Mapping[str, Any],
    output: "Path | None",
    as_json: bool,
) -> None:
    """Write the answer if a file is wanted, and print it, as text or as JSON: first the sentences, then the tables."""
    if output is not None:
        tables.write(frame, [*said, "", *parts], output)
    if as_json:
        print(tables.ascii_json({"verdict": list(said), **plain}))
        return
    for sentence in said:
        tables.show_wrapped(sentence)
    tables.show(["", *parts])


def _plain(found: "Differences", seeds: bool) -> dict[str, Any]:
    plain = {"rows": found.rows, "notes": found.notes} | ({"seeds": found.seeds} if seeds else {})
    return plain | ({"choices": vars(found.choices)} if found.choices else {})


def _notes(notes: Sequence[str]) -> list[Part]:
    return [f"- {note}" for note in notes]


def _choices(found: "Choices | None") -> list[Grid]:
    """Return the table of chosen values, if any were."""
    if found is None:
        return []
    title = f"{', '.join(found.keys)} chosen on seeds {listed(found.tuning)}"
    heads = [*found.levels, *found.keys, "val loss", "tried", "edge"]
    lines = [
        [
            *(word(row[name]) for name in (*found.levels, *found.keys)),
            f"{row['val_loss_nats']:.5g}",
            str(row["tried"]),
            row["edge"],
        ]
        for row in _records(found.rows)
    ]
    return [Grid(title, heads, len(found.levels), lines, set())]


# An answer as tables

PAIR = "pair of levels"
"""The name of the pair in words among a row's values."""

Row = dict[str, Any]
Column = tuple[str, str, int]
"""The head of a column, the name of its values in rows, and the digits of those that are numbers."""


def _differences(found: "Differences", confidence: float, seeds: bool, what: str = "difference") -> list[Grid]:
    rows, key = found.rows, _key(found.rows, "a")
    a, b = (rows[side].map(word).unique() for side in "ab")
    head_a, head_b, pair = "a", "b", "a − b"
    if len(a) == len(b) == 1:
        head_a, head_b = a[0], b[0]
    elif len(b) == 1:
        head_a, head_b, pair = "mean", b[0], found.by
    named, apart = _named(key, found.cells)
    labels = named if named and len(a) == len(b) == 1 else [*named, pair]
    lines = []
    for row in _records(rows):
        diverged = " ".join(f"{row[f'diverged_{side}']}/{row[f'runs_{side}']}" for side in "ab")
        p = "<1e-4" if row["p_adjusted"] < 1e-4 else row["p_adjusted"]
        both = f"{word(row['a'])} − {word(row['b'])}"
        names = {PAIR: both, pair: both if pair == "a − b" else word(row["a"])}
        more = names | {"interval": _interval(row), "p": p, "diverged": diverged}
        lines.append(row | {name: _level(row, name) for name in key} | more)
    columns = [(head_a, "mean_a", 5), (head_b, "mean_b", 5), (what, "difference", 4)]
    columns += [(_percent(confidence), "interval", 0), ("effect", "effect", 2), ("p adj.", "p", 2), ("n", "n", 0)]
    if found.margin is not None:
        columns.append((f"margin {found.margin:g}", "equivalence", 0))
    if rows[["diverged_a", "diverged_b"]].to_numpy().any():
        columns.append(("diverged", "diverged", 0))
    each = found.seeds.rename(columns={"value_a": "mean_a", "value_b": "mean_b"}) if seeds else None
    strong = set(rows.index[found.headline()]) if "site" in key else set()
    spare, of = ("effect", "mean_a", "mean_b", "diverged"), f"{what} by {found.by}"
    return _grids(lines, apart, labels, columns, each, strong, spare=spare, of=of)


def _slopes(found: "Scaling", confidence: float, seeds: bool) -> list[Grid]:
    key = _key(found.slopes, "slope")
    named, apart = _named(key, found.cells)
    at_x = {(*(word(row[name]) for name in key), row[found.x]): row["mean"] for row in _records(found.points)}
    levels = {word(level): level for level in found.points[found.x].unique()}
    lines = []
    for row in _records(found.slopes):
        names = {name: word(row[name]) for name in key}
        means = {f"x={head}": at_x.get((*names.values(), level), math.nan) for head, level in levels.items()}
        intervals = {"interval": _interval(row), "curving": _interval(row, "curvature_")}
        lines.append(row | names | means | intervals)
    columns = [
        *((head, f"x={head}", 4) for head in levels),
        ("slope", "slope", 4),
        (_percent(confidence), "interval", 0),
    ]
    if found.slopes["curvature"].notna().any():  # else two points a line, through which any line goes
        columns += [("R²", "r2", 3), ("curvature", "curvature", 3), (_percent(confidence), "curving", 0)]
    columns.append(("n", "n", 0))
    spare = [
        "curving",
        "curvature",
        *(f"x={head}" for head in list(levels)[1:-1]),
        "r2",
        *(f"x={head}" for head in levels),
    ]
    each = found.seeds if seeds else None
    return _grids(lines, apart, named or ["metric"], columns, each, by=f", by {found.x}", spare=spare, of="slope")


def _grids(
    lines: Sequence[Row],
    apart: Sequence[str],
    labels: Sequence[str],
    columns: Sequence[Column],
    seeds: "pd.DataFrame | None",
    strong: Collection[Any] = (),
    by: str = "",
    spare: Sequence[str] = (),
    of: str = "",
) -> list[Grid]:
    """Return a table for each metric and each value of `apart`: a line for each row, and under it one for each seed.

    The index of `seeds` is the number of the row. `spare` names values that a narrow terminal may leave out, in that order,
    `of` what the numbers are of.
    """
    below: dict[Any, list[Row]] = {} if seeds is None else {at: _records(part) for at, part in seeds.groupby(level=0)}
    heads, names = [*labels, *(head for head, *_ in columns)], [*labels, *(name for _, name, _ in columns)]
    ends = [names.index(name) for name in dict.fromkeys(spare) if name in names]
    found, pairs = dict[str, Grid](), dict[str, list[str]]()
    for at, row in enumerate(lines):
        title = " ".join([row["metric"], *(f"{name}={row[name]}" for name in apart)]) + by
        grid = found.setdefault(
            title, Grid(title, heads, len(labels), [], set(), ends, of, pairs.setdefault(title, []))
        )
        if at in strong:
            grid.strong.add(len(grid.lines))
        for one in (row, *below.get(at, ())):
            seed = [*[""] * (len(labels) - 1), f"  seed {one.get('seed')}"]
            names = [row[name] for name in labels] if one is row else seed
            pairs[title].append(row.get(PAIR, ""))
            grid.lines.append([*names, *(_cell(one.get(name, ""), digits) for _, name, digits in columns)])
    return list(found.values())


def _records(frame: "pd.DataFrame") -> list[Row]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _key(rows: "pd.DataFrame", first: str) -> list[str]:
    """Return the columns that tell rows apart: those before `first`."""
    return [str(name) for name in rows.columns[: rows.columns.get_loc(first)]]


def _named(key: Sequence[str], cells: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the columns that name a line, and those that each table has one value of: of norms the cell's."""
    apart = [name for name in cells if "site" in key]
    return [name for name in key if name not in ("metric", *apart)], apart


def _level(row: Row, name: str) -> str:
    """Return a part of a row's key; `-` where it is not the same at both levels."""
    return "-" if name in row["moving"].split(", ") else word(row[name])


def _cell(value: Any, digits: int) -> str:
    return (
        f"{value:.{digits}g}" if isinstance(value, float) and value == value else "-" if value != value else str(value)
    )


def _percent(confidence: float) -> str:
    return f"{100 * confidence:g}% interval"


def _interval(row: Row, of: str = "") -> str:
    low, high = row[f"{of}low"], row[f"{of}high"]
    return (row["agreement"] if not of else "") or ("-" if low != low else f"{low:.3g} to {high:.3g}")
