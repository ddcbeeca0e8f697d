"""Tell how a finished run is made again: its command, where it was made, and what differs here."""

import json
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.errors import ConfigError
from lnjac.runs.configs import PATH

if TYPE_CHECKING:
    import pandas as pd

VERSIONS = {
    "lnjac_version": "lnjac",
    "torch_version": "torch",
    "python_version": "Python",
    "numerics_version": "numerics",
}
"""Columns of runs that hold a version, and its name for a reader."""


class Told(NamedTuple):
    """How a run is made again.

    Attributes:
        command: For a shell; None if lnjac knows none.
        config: The run's config where there is no command, else None.
        made: Where and by what it was made, by name.
        notes: What differs here, and what is to be filled in.
    """

    command: str | None
    config: Any
    made: dict[str, str]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the command, and below it comments, so that all can be pasted into a shell."""
        made = [f"{name} {value}" for name, value in self.made.items()]
        first = [self.command] if self.command else json.dumps(self.config, indent=1).split("\n")
        return [*first, f"# {', '.join(made)}", *(f"# {note}" for note in self.notes)]


def told(run: "pd.Series[Any]", configs: "pd.DataFrame | None", table: Path) -> Told:
    """Return how a run is made again.

    Args:
        run: Its row of `runs`.
        configs: Its row of `configs`; None, or without rows, if the table lacks it.
        table: Where they were found.

    Raises:
        ConfigError: There is no config.
    """
    if configs is None or configs.empty:
        raise ConfigError(
            f"{table} does not hold the configs of its runs: merge them again by `lnjac merge FOLDER -o {table}`"
        )
    texts = configs[["config", "command"]].iloc[0]
    config, words = (json.loads(text) if isinstance(text, str) else [] for text in texts)
    ours, made = _there(run, "numerics_version") is not None, _made(run)
    if not ours and not words:
        why = "lnjac knows no command of it: a loop of its own recorded it, with the config above"
        return Told(None, config, made, [why, *_differing(run, ours=False)])
    if not ours:
        return Told(shlex.join(["python", *words]), None, made, [*_filled_in(words, run), *_differing(run, ours=False)])
    from lnjac.config import identity
    from lnjac.config.command import again
    from lnjac.config.schema import CHECKOUT, CONF

    found = again(config)
    program = ["python", "run.py"] if CONF == CHECKOUT else ["lnjac-run"]
    notes = [*_filled_in(found.words, run), *found.problems, *_differing(run, ours=True)]
    if found.config is not None:
        ids = {"run_id": identity.run_id(found.config, run["data_sha256"]), "diag_id": identity.diag_id(found.config)}
        notes += [
            f"it makes another run here: {name} {ids[name]}, not {run[name]}" for name in ids if ids[name] != run[name]
        ]
    return Told(shlex.join([*program, *found.words]), None, made, notes)


def _filled_in(words: list[str], run: "pd.Series[Any]") -> list[str]:
    if not any(PATH in word.partition("=")[2] for word in words):
        return []
    sha256 = _there(run, "data_sha256")
    corpus = f", of the corpus with the SHA-256 {sha256}" if sha256 else ""
    return [f"put your own paths in place of {PATH}{corpus}"]


def _made(run: "pd.Series[Any]") -> dict[str, str]:
    """Return where and by what a run was made, for a reader."""
    found = {name: str(_there(run, name)) for name in ("run_id", "diag_id")}
    if commit := _there(run, "commit"):
        found["commit"] = f"{commit}{' with uncommitted changes' * bool(_there(run, 'dirty'))}"
    found |= {name: _version(value) for column, name in VERSIONS.items() if (value := _there(run, column)) is not None}
    found |= {name: str(value) for name in ("device", "threads") if (value := _there(run, name)) is not None}
    if sha256 := _there(run, "data_sha256"):
        found["data"] = f"{_there(run, 'data')} {sha256}"
    return found


def _differing(run: "pd.Series[Any]", *, ours: bool) -> list[str]:
    """Return a line for what differs here: versions, and, of lnjac's own runs, the commit."""
    import torch

    from lnjac import __version__
    from lnjac.runs.folder import provenance

    here: dict[str, Any] = {"torch_version": str(torch.__version__), "python_version": platform.python_version()}
    if ours:
        from lnjac.config.identity import NUMERICS_VERSION

        here |= {"commit": provenance()["commit"], "lnjac_version": __version__, "numerics_version": NUMERICS_VERSION}
    names = VERSIONS | {"commit": "commit"}
    found = []
    for column, now in here.items():
        then = _there(run, column)
        if then is not None and _version(then) != _version(now):
            found.append(f"{names[column]} {'unknown' if now is None else _version(now)}")
    return [f"here: {', '.join(found)}"] if found else []


def _version(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _there(run: "pd.Series[Any]", column: str) -> Any:
    """Return a value of the run's row; None if it has none."""
    value = run.get(column)
    return None if value is None or value != value else value
