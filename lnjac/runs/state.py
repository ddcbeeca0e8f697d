"""The state of a run's folder: missing, broken, another run's, or one of its statuses. Without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnjac.files import file_sha256
from lnjac.runs import folder as runs
from lnjac.runs.read import Source, Unfit, read

MISSING = "missing"
BROKEN = "broken"
FOREIGN = "another run's"


@dataclass(frozen=True)
class State:
    """State of a run's folder: a status of `runs`, missing, broken, or another run's; `reason` says what is wrong with it."""

    name: str
    reason: str = ""

    @property
    def finished(self) -> bool:
        return self.name in runs.FINISHED


def state(folder: Path, identity: Mapping[str, str]) -> State:
    """Return the state of the folder as that of the run `identity`. Finished only if the rows verify, to the last bit.

    Weights, a diagnostic batch or an optimizer's state that are lost leave the run finished, and are the state's reason, as
    the rows stand.
    """
    status = runs.read_status(folder)
    if not status:
        return State(BROKEN, runs.no_status(folder)) if os.path.lexists(folder / runs.STATUS) else State(MISSING)
    name = str(status.get("status"))
    if other := {key: status.get(key) for key in identity if status.get(key) != identity[key]}:
        kept = any((folder / file).exists() for file in (runs.CHECKPOINT, runs.JOURNAL))
        if name not in runs.FINISHED and not kept:
            return State(MISSING)
        return State(FOREIGN, "holds another run: " + ", ".join(f"its {key} is {id}" for key, id in other.items()))
    if name == runs.RUNNING:
        return _running(folder)
    if name not in runs.FINISHED:
        return State(name, str(status.get("error", "")))
    try:
        row = read(Source(folder, merged=False)).tables["runs"].select(list(identity)).to_pylist()[0]
    except Unfit as error:
        return State(BROKEN, str(error))
    if row != dict(identity):
        return State(BROKEN, "its rows are not of the run that its status names")
    losses = [said for file in (runs.MODEL, runs.BATCH, runs.CHECKPOINT) if (said := lost(folder / file, status))]
    return State(
        name, f"{', '.join(losses)}; the rows are whole: to make the run anew, delete its folder" if losses else ""
    )


def lost(path: Path, status: Mapping[str, Any]) -> str:
    """Return the damage of a file that the run wrote beside its rows; empty if there is none."""
    written = status.get("sha256", {}).get(path.name)
    try:
        if written is None or file_sha256(path) == written:
            return ""
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return f"{path.name} was altered: its SHA-256 differs from {runs.STATUS}'s"


def _running(folder: Path) -> State:
    """The state of a folder whose status says that its run is running."""
    try:
        runs.claimed(folder).release()
    except runs.InUse as error:
        return State(runs.RUNNING) if error.alive else State(BROKEN, str(error))
    except OSError:  # not ours to write to
        pass
    return State(runs.INTERRUPTED)


def fail(folder: Path, identity: Mapping[str, str], reason: str) -> None:
    """Say in a run's own folder that it failed, for a process that could not say so itself. Raises InUse, OSError."""
    out = runs.RunFolder(folder, identity)
    try:
        out.status(runs.FAILED, error=reason)
    finally:
        out.release()
