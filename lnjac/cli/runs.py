"""Commands about runs as they are: merge, show, command, diff."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lnjac.cli.options import AsJson, RTol
from lnjac.cli.tables import ascii_json
from lnjac.errors import ConfigError
from lnjac.escape import visible

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from lnjac.runs.read import Contents
    from lnjac.runs.schema import Known

commands = typer.Typer(rich_markup_mode=None)


@commands.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Run folders, sweep folders, merged files: any mix.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of layer rows, X.parquet.")],
    strict: Annotated[bool, typer.Option("--strict", help="Fail if any run has to be skipped.")] = False,
    rtol: RTol = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Merge runs and sweeps into one set of tables.

    Writes X.parquet (a row for each norm), X.runs.parquet, X.curves.parquet, and a report of the merge, X.merge.json.

    \b
    Example:
        lnjac merge multirun/A multirun/B -o all.parquet
    """
    from lnjac.progress import bar
    from lnjac.runs.merge import merge

    with bar("reading runs") as progress:
        report = merge(sources, output, strict=strict, rtol=rtol, progress=progress)
    print(report.to_json().rstrip() if as_json else "\n".join(report.lines()))


@commands.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A run's folder, a sweep's, or a merged file.")],
    step: Annotated[int | None, typer.Option(help="The measured step; the last one unless given.")] = None,
    run: Annotated[
        str | None, typer.Option(help="One of several runs: the start of its run_id (or run_id/diag_id).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the table of one finished run, a line for each norm.

    \b
    Example:
        lnjac show multirun/A/RUN --step 100
        lnjac show all.parquet --run 3f2a
    """
    from lnjac.text import layer_table, listed

    one, found = _one_run(folder, run)
    layers, known = _of(one, found.tables["layers"]), found.known["runs"]
    steps = sorted(layers["step"].unique().tolist())
    if step is not None and step not in steps:
        raise ConfigError(f"{folder} was not measured at step {step}: choose one of {listed(steps) or 'no step'}")
    layers = layers[layers["step"] == (step if step is not None else max(steps, default=0))]
    if as_json:
        print(ascii_json({"run": one, "layers": layers}))
        return
    print(visible(_headline(one, known)))
    print(layer_table(layers) if len(layers) else "no norms were measured")


@commands.command()
def command(
    table: Annotated[Path, typer.Argument(help="A merged table, a sweep's folder or a run's.")],
    run: Annotated[str, typer.Argument(help="The start of its run_id (or run_id/diag_id).", metavar="RUN_ID")],
    as_json: AsJson = False,
) -> None:
    """Print the command that makes a run again, and where it was made; the first line can be pasted into a shell.

    \b
    Example:
        lnjac command all.parquet 3f2a
    """
    from lnjac.cli.again import told
    from lnjac.runs.configs import CONFIGS

    one, found = _one_run(table, run, option="")
    said = told(one, _of(one, found.tables[CONFIGS]) if CONFIGS in found.tables else None, table)
    print(ascii_json(said._asdict()) if as_json else "\n".join(map(visible, said.lines())))


@commands.command()
def diff(
    one: Annotated[Path, typer.Argument(help="A merged table.")],
    other: Annotated[Path, typer.Argument(help="Another merged table.")],
    rtol: RTol = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Print the differences of two merged tables.

    The exit code is 1 if their science differs, 2 if a table cannot be read. Wall times, commits, versions and devices may
    differ.

    \b
    Example:
        lnjac diff before.parquet after.parquet && echo the same science
    """
    from lnjac.runs.diff import diff

    try:
        found = diff(one, other, rtol)
    except ConfigError as error:
        print(f"lnjac: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    if as_json:
        parts = ("only_one", "only_other", "changed", "columns")
        print(ascii_json({table.table: {name: getattr(table, name) for name in parts} for table in found}))
    else:
        lines = [line for table in found for line in table.lines(str(one), str(other))]
        print("\n".join(map(visible, lines)) or "the same science")
    if any(found):
        sys.exit(1)


def _one_run(folder: Path, run: str | None, option: str = "by --run ") -> "tuple[pd.Series[Any], Contents]":
    """Return the row of the run that is meant, and the tables that hold it; `option` tells how a run is named."""
    from lnjac.runs.folder import read_status
    from lnjac.runs.read import Unfit, read, search
    from lnjac.runs.schema import OWNER

    found = search([folder])
    for line in (*found.notes, *(f"{path}: {reason}" for path, reason in found.skipped)):
        print(f"lnjac: {line}", file=sys.stderr)
    if not found.sources:
        raise ConfigError(f"{folder} holds no run: name a run's folder or a merged file")
    source = found.sources[0]
    if len(found.sources) > 1:
        status = [read_status(each.path) for each in found.sources]
        source = found.sources[
            _chosen([[str(each.get(key, "?")) for key in OWNER] for each in status], run, folder, option)
        ]
    try:
        contents = read(source)
    except Unfit as error:
        raise ConfigError(f"{source.path}: {error}") from None
    every = contents.tables["runs"].to_pandas()
    return every.iloc[_chosen(every[list(OWNER)].to_numpy().tolist(), run, folder, option)], contents


def _of(one: "pd.Series[Any]", table: "pa.Table") -> "pd.DataFrame":
    """Return the rows of a run."""
    from lnjac.runs.schema import OWNER

    rows: pd.DataFrame = table.to_pandas()
    return rows[(rows[list(OWNER)] == one[list(OWNER)]).all(axis=1)]


def _chosen(ids: Sequence[Sequence[str]], run: str | None, folder: Path, option: str) -> int:
    """Return the index of the run that `run`, the start of run_id/diag_id, means; the only one need not be named."""
    from lnjac.text import listed

    names = ["/".join(each) for each in ids]
    found = [i for i, name in enumerate(names) if name.startswith(run or "")]
    if len(found) == 1:
        return found[0]
    wrong = f"{folder} holds {len(names)} runs"
    if run:
        wrong = f"the run_id of {len(found) or 'no'} runs in {folder} starts with {run}"
    choice = [ids[i] for i in found or range(len(ids))]
    alike = [one for one, _ in choice]
    short = [one if alike.count(one) == 1 else f"{one}/{other}" for one, other in choice]
    raise ConfigError(f"{wrong}: choose one {option}from {listed(short)}")


def _headline(run: "pd.Series[Any]", known: "Known") -> str:
    """Return the run in one line: the config's members and numbers that have no dot in their name, status, losses."""
    from lnjac.runs.schema import RUNS
    from lnjac.text import number

    config = " ".join(f"{name}={run[name]}" for name in run.index if name not in known and "." not in name)
    status = run["status"]
    if status == "diverged" and not math.isnan(run["diverged_step"]):
        status = f"diverged at step {run['diverged_step']:.0f}"
    losses = {name: run[f"{name}_nats"] for name in ("val_loss", "train_loss", "unigram", "bigram")}
    there = [name for name, loss in losses.items() if loss is not None and loss == loss]
    left_out = "train_loss" if "val_loss" in there else ""  # it only stands in for the other
    shown = dict.fromkeys(["val_loss", *(name for name in there if name != left_out)])
    said = ", ".join(f"{name.replace('_', ' ')} {number(losses[name])}" for name in shown)
    own = [name for name in run.index if name in known and name not in {column.name for column in RUNS}]
    parts = [
        config,
        status,
        f"{said} nats/token" if losses else "no loss",
        " ".join(f"{name}={run[name]}" for name in own),
    ]
    return " | ".join(part for part in parts if part)
