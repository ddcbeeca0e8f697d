"""The `lnjac` command. Each command imports what it needs when it runs, so that `lnjac --help` is quick."""

import sys
from typing import Annotated

import typer

from lnjac import __version__, console
from lnjac.cli import compare, report, runs
from lnjac.errors import ConfigError
from lnjac.escape import visible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich's help pages cost 0.2 s
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (runs.commands, compare.commands, report.commands):
    app.add_typer(commands)


def main() -> None:
    """Run the command; an error that a user can mend ends as readable lines and exit code 1."""
    console.steady()
    try:
        app()
    except (ConfigError, OSError) as error:
        for line in str(error).split("\n"):
            print(f"lnjac: {visible(line)}", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lnjac {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge finished runs, look at them, compare and draw them. `lnjac-run` (or run.py) makes runs."""
