"""Take data frames as the tables of a merge: those that `lnjac.load` gives, filtered and extended by their user.

pandas drops what a file says of its columns, so `lnjac.load` puts it into `frame.attrs`, as one text: pandas copies the
attrs at each operation. Frames without it are known by their columns, as files that do not describe theirs.
"""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from lnjac.columns import KEY, Column
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs.read import Contents, Unfit, conform
from lnjac.runs.schema import FROZEN, OWNER, Known, describe, described, with_role

ATTRS = "lnjac"

MARKS = {"layers": {"site", "step"}, "runs": {"status"}, "curves": {"step", "train_loss_nats"}}
"""Columns that tell which table a frame without attrs is, the first that has all."""


def attach(frame: pd.DataFrame, table: str, known: Known) -> pd.DataFrame:
    """Return the frame with its table's name, the descriptions of its columns, and its config columns in its attrs."""
    own = describe(column for column in known.values() if column.name not in FROZEN.get(table, {}))
    note = {"table": table, "columns": own, "config": [name for name in frame if name not in known]}
    frame.attrs[ATTRS] = json.dumps(note)
    return frame


def contents(frames: Sequence[pd.DataFrame]) -> Contents:
    """Return data frames as the tables of a merge.

    Raises:
        ConfigError: A frame is no table of lnjac, lacks a column, holds a row twice, or is there twice.
    """
    found = Contents({}, {}, {})
    for frame in frames:
        note = _note(frame)
        name, known = note["table"], dict(described(note["table"], note))
        if name in found.tables:
            raise ConfigError(f"two DataFrames of {name} were given: put them together by pandas.concat")
        data = _arrow(frame, name)
        if name == "runs" and "config" in note:  # else a number of one's own would pass for a setting
            added = [field for field in data.schema if field.name not in (*known, *note["config"])]
            numbers = [field.name for field in added if pa.types.is_floating(field.type)]
            known |= {column: Column(column, "float64", "", "a column of the DataFrame") for column in numbers}
        try:
            found.tables[name] = conform(data, name, known)
        except Unfit as error:
            raise ConfigError(f"the DataFrame of {name} {error}") from None
        found.known[name] = known
        key = with_role(KEY, known)
        if again := int(found.tables[name].select(key).to_pandas().duplicated().sum()):
            raise ConfigError(
                f"the DataFrame of {name} has {again} rows whose {', '.join(key)} another row has: leave one by "
                "drop_duplicates()"
            )
    return found


def runs_of(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of a DataFrame of layers, as far as their rows tell: identity and config. All count as done.

    The config is each column without a description that is the same in all rows of a run, but for numbers that were
    added after loading.
    """
    note, rows = _note(layers), _flat(layers)
    known, config = described("layers", note), note.get("config")
    names = [name for name in map(str, rows) if name not in known]
    if config is not None:
        names = [name for name in names if name in config or not pd.api.types.is_float_dtype(rows[name])]
    of_run = rows.groupby(list(OWNER), sort=False)
    same = [name for name in names if of_run[name].nunique(dropna=False).max() == 1]
    found = rows.drop_duplicates(list(OWNER))[[*OWNER, *same]].assign(status=runs.DONE, started_at="")
    return found.reset_index(drop=True)


def _note(frame: pd.DataFrame) -> dict[str, Any]:
    if ATTRS in frame.attrs:
        found: dict[str, Any] = json.loads(frame.attrs[ATTRS])
        return found
    there = {str(name) for name in _flat(frame.head(0))}
    for table, marks in MARKS.items():
        if marks <= there:
            return {"table": table}
    raise ConfigError(
        f"the DataFrame with the columns {', '.join(sorted(there)[:5])}, … is no table of lnjac: give one that lnjac.load "
        "returns (layers have site and step, runs have status)"
    )


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with named levels of its index as columns."""
    return (frame.reset_index() if any(frame.index.names) else frame).rename(columns=str)


def _arrow(frame: pd.DataFrame, name: str) -> pa.Table:
    frame = _flat(frame)
    coded = [column for column in frame if isinstance(frame[column].dtype, pd.CategoricalDtype)]
    try:
        data = pa.Table.from_pandas(frame.astype(dict.fromkeys(coded, object)), preserve_index=False)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ConfigError(f"the DataFrame of {name} cannot be read: {' '.join(map(str, error.args))}") from None
    return data.replace_schema_metadata()
