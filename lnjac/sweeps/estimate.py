"""Estimate the time that a sweep still needs, from finished runs of the same shape."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lnjac.errors import ConfigError
from lnjac.runs.folder import DONE
from lnjac.runs.merge import load
from lnjac.runs.schema import RUNS

PER_RUN = {"seed", "steps", "eval.every", "eval.tokens", *(column.name for column in RUNS)}
"""Columns of a run, beside an optimizer's numbers, that leave the time of an update as it is."""


def seconds(todo: Sequence[tuple[Mapping[str, Any], int]], tables: Iterable[Path]) -> tuple[float, int]:
    """Estimate the run time of these runs together.

    A run's time per update is the median of the finished runs of its shape: those that differ from it in nothing but
    seed, steps and the optimizer's numbers. Evaluation and diagnostics are taken as long as theirs. A script whose config
    has no `steps` is taken as long as its own runs, and one that times no training is timed as a whole.

    Args:
        todo: each run's config columns, and the updates that need not be made, as a finished run made them.
        tables: merged tables of runs.

    Returns:
        Seconds in all, and the number of runs that they cover.
    """
    known = defaultdict(list)
    for row in [row for path in tables for row in _finished(path)]:
        rest = row["eval_s"] + row["diagnostics_s"] if row["train_s"] >= 0 else 0.0  # else there is none
        training = row["train_s"] if row["train_s"] >= 0 else row["wall_s"]
        known[shape(row)].append((training / _steps(row), rest))
    alike = [(_steps(row) - done, known[shape(row)]) for row, done in todo]
    times = [median(per_update * steps + rest for per_update, rest in runs) for steps, runs in alike if runs]
    return sum(times), len(times)


def in_words(seconds: float) -> str:
    """Return the time as a reader wants it: `2 h 5 min`, `0 min 52 s`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def shape(row: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """Return the columns that fix the time of an update, without those that are null."""
    fixed = {name: row[name] for name in row if name not in PER_RUN and not name.startswith("optimizer.")}
    return frozenset((name, value) for name, value in fixed.items() if value is not None and value == value)


def _steps(row: Mapping[str, Any]) -> float:
    """Return the updates that a run's config asks for; 1 if it does not tell."""
    steps = row.get("steps")
    return steps if isinstance(steps, (int, float)) and steps > 0 else 1


def _finished(path: Path) -> list[dict[Any, Any]]:
    try:
        frame = load(path)
    except ConfigError:
        return []
    return frame[frame["status"] == DONE].to_dict("records")
