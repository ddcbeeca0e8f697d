"""Estimate the time that a sweep still needs, from finished runs of the same shape."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.runs import folder as runs
from lnjac.runs.schema import RUNS

if TYPE_CHECKING:
    import pandas as pd

PER_RUN = ("seed", "steps", "eval.every", "eval.tokens")
"""Config columns, beside an optimizer's numbers, that leave the time of an update as it is."""


def seconds(todo: Sequence[Mapping[str, Any]], tables: Iterable[Path]) -> tuple[float, int]:
    """Estimate the run time of these runs together.

    A run's time per update is the median of the finished runs of its shape: those that differ from it in nothing but
    seed, steps and the optimizer's numbers. Evaluation and diagnostics are taken as long as theirs.

    Args:
        todo: each run's config columns.
        tables: merged tables of runs.

    Returns:
        Seconds in all, and the number of runs that they cover.
    """
    import pandas as pd

    frames = [frame for path in tables if (frame := _timed(path)) is not None]
    if not frames:
        return 0.0, 0
    known = pd.concat(frames, ignore_index=True)
    total, covered = 0.0, 0
    for row in todo:
        same = known[known["shape"] == shape(row)]
        if len(same):
            total += float((same["per_update_s"] * row["steps"] + same["rest_s"]).median())
            covered += 1
    return total, covered


def in_words(seconds: float) -> str:
    """Return the time as a reader wants it: `2 h 5 min`, `0 min 52 s`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def shape(row: Mapping[str, Any]) -> str:
    """Return as text the config columns that fix the time of an update: not PER_RUN, nor the optimizer's numbers."""
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
