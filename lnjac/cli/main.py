"""The `lnjac` command. Each command imports what it needs when it runs, so that `lnjac --help` is quick."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lnjac import console
from lnjac.cli import report as cli_report
from lnjac.cli.compare import AsJson, ascii_json, commands
from lnjac.escape import visible

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich's help pages cost 0.2 s
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(commands)
app.add_typer(cli_report.commands)


def main() -> None:
    """Run the command; what a user can mend ends as one readable line and exit code 1."""
    console.steady()
    try:
        app()
    except (OSError, ValueError) as error:
        from lnjac.errors import ConfigError

        if not isinstance(error, (ConfigError, OSError)):
            raise
        for line in str(error).split("\n"):
            print(f"lnjac: {visible(line)}", file=sys.stderr)
        sys.exit(1)


@app.callback()
def about() -> None:
    """Merge finished runs, look at them and compare them. Runs are made by run.py."""


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Run folders, sweep folders, merged files: any mix.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of layer rows, X.parquet.")],
    strict: Annotated[bool, typer.Option("--strict", help="Fail if any run has to be skipped.")] = False,
    rtol: Annotated[float, typer.Option(min=0, help="Relative difference allowed between equal runs.")] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Merge runs and sweeps into X.parquet, X.runs.parquet, X.curves.parquet; X.merge.json says what happened.

    \b
    Example:
        lnjac merge multirun/A multirun/B -o all.parquet
    """
    from lnjac.progress import bar
    from lnjac.runs import merge as sweep

    with bar("reading runs") as progress:
        report = sweep.merge(sources, output, strict=strict, rtol=rtol, progress=progress)
    print(report.to_json().rstrip() if as_json else "\n".join(report.lines()))


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A run's folder, a sweep's, or a merged file.")],
    step: Annotated[int | None, typer.Option(help="Which step was measured; the last one unless given.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Which of several runs: the start of its run_id (or run_id/diag_id).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a finished run's table: one line per norm.

    \b
    Example:
        lnjac show multirun/A/RUN --step 100
        lnjac show all.parquet --run 3f2a
    """
    from lnjac.errors import ConfigError
    from lnjac.runs import folder as runs
    from lnjac.runs.placing import finish
    from lnjac.runs.read import OWNER, Unfit, read, search
    from lnjac.text import layer_table, listed

    found = search([folder])
    for line in (*found.notes, *(f"{path}: {reason}" for path, reason in found.skipped)):
        print(f"lnjac: {line}", file=sys.stderr)
    if not found.sources:
        raise ConfigError(f"{folder} holds no run: name a run's folder or a merged file")
    source = found.sources[0]
    if len(found.sources) > 1:
        said = [runs.read_status(each.path) for each in found.sources]
        names = ["/".join(str(status.get(key, "?")) for key in OWNER) for status in said]
        source = found.sources[_chosen(names, run, folder)]
    if source.merged:
        finish(source.path)
    try:
        tables = read(source)
    except Unfit as error:
        raise ConfigError(f"{source.path}: {error}") from None
    known: pd.DataFrame = tables["runs"].to_pandas()
    one = known.iloc[_chosen(list(known["run_id"] + "/" + known["diag_id"]), run, folder)]
    layers: pd.DataFrame = tables["layers"].to_pandas()
    layers = layers[(layers["run_id"] == one["run_id"]) & (layers["diag_id"] == one["diag_id"])]
    steps = sorted(layers["step"].unique().tolist())
    if step is not None and step not in steps:
        raise ConfigError(f"{folder} was not measured at step {step}: choose one of {listed(steps) or 'no step'}")
    layers = layers[layers["step"] == (step if step is not None else max(steps, default=0))]
    if as_json:
        plain = {"run": one.to_dict(), "layers": layers.to_dict("records")}
        print(ascii_json(_plain(plain)))
        return
    print(visible(_headline(one)))
    print(layer_table(layers) if len(layers) else "no norms were measured")


@app.command(hidden=True)
def columns() -> None:
    """Print the reference of all columns, docs/columns.md.

    \b
    Example:
        lnjac columns > docs/columns.md
    """
    from lnjac.diagnostics.catalogue import TABLES, notes
    from lnjac.runs.schema import markdown

    sys.stdout.write(markdown(TABLES, notes))


def _chosen(names: list[str], run: str | None, folder: Path) -> int:
    """Which of the runs, named run_id/diag_id, is meant by the start of its name; the only one need not be named."""
    from lnjac.errors import ConfigError
    from lnjac.text import listed

    found = [i for i, name in enumerate(names) if name.startswith(run or "")]
    if len(found) == 1:
        return found[0]
    wrong = f"{folder} holds {len(names)} runs"
    if run and found:
        names = [names[i] for i in found]
        wrong = f"the run_id of {len(names)} runs in {folder} starts with {run}"
    elif run:
        wrong = f"{folder} holds no run whose run_id starts with {run}"
    ids = [name.split("/")[0] for name in names]
    short = [id if ids.count(id) == 1 else name for id, name in zip(ids, names, strict=True)]
    raise ConfigError(f"{wrong}: choose one by --run from {listed(short)}")


def _headline(run: "pd.Series[Any]") -> str:
    """The run in one line: the config's members and numbers that have no dot in their name, status, losses."""
    from lnjac.runs.schema import RUNS
    from lnjac.text import number

    declared = {column.name for column in RUNS}
    config = " ".join(f"{name}={run[name]}" for name in run.index if name not in declared and "." not in name)
    status = run["status"]
    if status == "diverged" and not math.isnan(run["diverged_step"]):
        status = f"diverged at step {run['diverged_step']:.0f}"
    losses = ", ".join(
        f"{name} {number(run[f'{column}_nats'])}"
        for name, column in (("val loss", "val_loss"), ("unigram", "unigram"), ("bigram", "bigram"))
    )
    return f"{config} | {status} | {losses} nats/token"


def _plain(value: Any) -> Any:
    """The value as JSON knows it: numpy's numbers as Python's; NaN and missing as null, infinite as text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
