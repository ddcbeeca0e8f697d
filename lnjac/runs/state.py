"""What a sweep still has to do: the state of each run's folder, and how long the missing runs will take. Without torch."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.files import file_sha256
from lnjac.runs import folder as runs
from lnjac.runs.merge import Source, Unfit, read
from lnjac.runs.schema import RUNS

if TYPE_CHECKING:
    import pandas as pd

    from lnjac.config.schema import RunConfig

MISSING = "missing"
BROKEN = "broken"
FOREIGN = "another run's"

PER_RUN = ("seed", "steps", "eval.every", "eval.tokens")
"""Config columns, beside an optimizer's numbers, that leave the time of an update as it is."""


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

    Weights or a diagnostic batch that are lost leave the run finished, and are the state's reason: the rows stand.
    """
    status = runs.read_status(folder)
    if not status:
        return State(BROKEN, runs.no_status(folder)) if os.path.lexists(folder / runs.STATUS) else State(MISSING)
    name = str(status.get("status"))
    if other := {key: status.get(key) for key in identity if status.get(key) != identity[key]}:
        if name not in runs.FINISHED and not (folder / runs.CHECKPOINT).exists():
            return State(MISSING)
        return State(FOREIGN, "holds another run: " + ", ".join(f"its {key} is {id}" for key, id in other.items()))
    if name == runs.RUNNING:
        return _running(folder)
    if name not in runs.FINISHED:
        return State(name, str(status.get("error", "")))
    try:
        row = read(Source(folder, merged=False))["runs"].select(list(identity)).to_pylist()[0]
    except Unfit as error:
        return State(BROKEN, str(error))
    if row != dict(identity):
        return State(BROKEN, "its rows are not of the run that its status names")
    lost = [said for file in (runs.MODEL, runs.BATCH) if (said := _lost(folder / file, status))]
    return State(
        name, f"{', '.join(lost)}; the rows are whole: to make the run anew, delete its folder" if lost else ""
    )


def _lost(path: Path, status: Mapping[str, Any]) -> str:
    """Return what is wrong with a file that the run wrote beside its rows, if anything."""
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


def seconds(todo: Sequence["RunConfig"], tables: Iterable[Path]) -> tuple[float, int]:
    """Estimated run time of these configs in all, and how many of them it covers.

    A config's time per update is the median of the finished runs of its shape in `tables` (merged tables of runs): those
    that differ from it in nothing but seed, steps and the optimizer's numbers. Evaluation and diagnostics are taken as
    long as theirs.
    """
    import pandas as pd

    frames = [frame for path in tables if (frame := _timed(path)) is not None]
    if not frames:
        return 0.0, 0
    known = pd.concat(frames, ignore_index=True)
    total, covered = 0.0, 0
    for config in todo:
        same = known[known["shape"] == shape(columns_of(config))]
        if len(same):
            total += float((same["per_update_s"] * config.steps + same["rest_s"]).median())
            covered += 1
    return total, covered


def columns_of(config: "RunConfig") -> dict[str, Any]:
    from lnjac.config.identity import columns

    return {column.name: value for column, value in columns(config)}


def shape(row: Mapping[str, Any]) -> str:
    """What fixes the time of an update, as text: all config columns but the numbers of PER_RUN and of the optimizer."""
    names = sorted(
        name for name in row if name not in PER_RUN and (name == "optimizer" or not name.startswith("optimizer."))
    )
    return " ".join(f"{name}={_number(row[name])}" for name in names if not _null(row[name]))


def _timed(path: Path) -> "pd.DataFrame | None":
    from lnjac.errors import ConfigError
    from lnjac.runs.merge import load

    try:
        frame = load(path)
    except ConfigError:
        return None
    done = frame[(frame["status"] == runs.DONE) & (frame["steps_done"] > 0)]
    declared = {column.name for column in RUNS}
    config = done[[name for name in done if name not in declared]]
    return done.assign(
        shape=[shape(dict(zip(config.columns, row, strict=True))) for row in config.itertuples(index=False)],
        per_update_s=done["train_s"] / done["steps_done"],
        rest_s=done["eval_s"] + done["diagnostics_s"],
    )[["shape", "per_update_s", "rest_s"]]


def _null(value: Any) -> bool:
    return value is None or value != value  # only NaN differs from itself


def _number(value: Any) -> Any:
    """A whole float as an integer: a merged column of integers with nulls is one of floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
