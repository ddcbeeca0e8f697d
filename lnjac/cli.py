"""The `lnjac` command. Each command imports what it needs when it runs, so that `lnjac --help` is quick."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lnjac import cli_report, console
from lnjac.cli_compare import AsJson, commands

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
        from lnjac.config import ConfigError

        if not isinstance(error, (ConfigError, OSError)):
            raise
        for line in str(error).splitlines():
            print(f"lnjac: {line}", file=sys.stderr)
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
    from lnjac import sweep
    from lnjac.progress import bar

    with bar("reading runs") as progress:
        report = sweep.merge(sources, output, strict=strict, rtol=rtol, progress=progress)
    print(json.dumps(json.loads(report.to_json()), indent=1) if as_json else "\n".join(report.lines()))


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or a merged file.")],
    step: Annotated[int | None, typer.Option(help="Which step was measured; the last one unless given.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Which run of a merged file: the start of its run_id (or run_id/diag_id).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a finished run's table: one line per norm.

    \b
    Example:
        lnjac show multirun/A/RUN --step 100
        lnjac show all.parquet --run 3f2a
    """
    from lnjac import sweep
    from lnjac.config import ConfigError
    from lnjac.summary import layer_table, listed

    found = sweep.discover([folder])
    if not found:
        raise ConfigError(f"{folder} holds no run: name a run's folder or a merged file")
    if len(found) > 1:
        raise ConfigError(f"{folder} holds {len(found)} runs: choose one of {listed([one.path for one in found])}")
    try:
        tables = sweep.read(found[0])
    except sweep.Unfit as error:
        raise ConfigError(f"{found[0].path}: {error}") from None
    known: pd.DataFrame = tables["runs"].to_pandas()
    names = known["run_id"] + "/" + known["diag_id"]
    chosen = known[names.str.startswith(run or "")]
    if len(chosen) != 1:
        holds = f"{len(chosen)} runs" if len(chosen) else f"no run {run}"
        short = known["run_id"].where(~known["run_id"].duplicated(keep=False), names)
        raise ConfigError(f"{folder} holds {holds}: choose one by --run from {listed(list(short))}")
    one = chosen.iloc[0]
    layers: pd.DataFrame = tables["layers"].to_pandas()
    layers = layers[(layers["run_id"] == one["run_id"]) & (layers["diag_id"] == one["diag_id"])]
    steps = sorted(layers["step"].unique().tolist())
    if step is not None and step not in steps:
        raise ConfigError(f"{folder} was not measured at step {step}: choose one of {listed(steps) or 'no step'}")
    layers = layers[layers["step"] == (step if step is not None else max(steps, default=0))]
    if as_json:
        plain = {"run": one.to_dict(), "layers": layers.to_dict("records")}
        print(json.dumps(_plain(plain), indent=1, allow_nan=False))
        return
    print(_headline(one))
    print(layer_table(layers) if len(layers) else "no norms were measured")


@app.command(hidden=True)
def columns() -> None:
    """Print the reference of all columns, docs/columns.md.

    \b
    Example:
        lnjac columns > docs/columns.md
    """
    from lnjac import tables

    sys.stdout.write(tables.markdown())


def _headline(run: "pd.Series[Any]") -> str:
    """The run in one line: the config's members and numbers that have no dot in their name, status, losses."""
    from lnjac.summary import number
    from lnjac.tables import RUNS

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
