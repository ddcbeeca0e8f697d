"""How long the runs that a sweep still has to make will take, judged by finished runs of their shape."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.runs import folder as runs
from lnjac.runs.schema import RUNS

if TYPE_CHECKING:
    import pandas as pd

    from lnjac.config.schema import RunConfig

PER_RUN = ("seed", "steps", "eval.every", "eval.tokens")
"""Config columns, beside an optimizer's numbers, that leave the time of an update as it is."""


def seconds(todo: Sequence["RunConfig"], tables: Iterable[Path]) -> tuple[float, int]:
    """Estimated run time of these configs in all, and how many of them it covers.

    A config's time per update is the median of the finished runs of its shape in `tables` (merged tables of runs): those
    that differ from it in nothing but seed, steps and the optimizer's numbers. Evaluation and diagnostics are taken as
    long as theirs.
    """
    import pandas as pd

    from lnjac.config.identity import column_values

    frames = [frame for path in tables if (frame := _timed(path)) is not None]
    if not frames:
        return 0.0, 0
    known = pd.concat(frames, ignore_index=True)
    total, covered = 0.0, 0
    for config in todo:
        same = known[known["shape"] == shape(column_values(config))]
        if len(same):
            total += float((same["per_update_s"] * config.steps + same["rest_s"]).median())
            covered += 1
    return total, covered


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
