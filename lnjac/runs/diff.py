"""Compare two merged tables: rows that only one has, and values of science that differ.

Two measurements of one run may differ as in merging (docs/merging.md, Duplicates).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import pandas as pd
import pyarrow as pa

from lnjac.columns import KEY
from lnjac.errors import ConfigError
from lnjac.runs.combine import differences, science
from lnjac.runs.configs import CONFIGS
from lnjac.runs.frames import contents
from lnjac.runs.merge import RTOL
from lnjac.runs.merged import finish, layers_file
from lnjac.runs.read import Contents, Source, Unfit, read
from lnjac.runs.schema import Known, in_order, with_role

Merge = str | PathLike[str] | pd.DataFrame | Sequence[pd.DataFrame]
"""A merge: its path, or data frames of its tables."""


@dataclass(frozen=True)
class Difference:
    """What differs in one table between `one` and `other`; keys are its columns that name a row.

    `only_one` and `only_other`: the keys of their rows. `columns`: those that only one of them has. `changed`: a row for
    each changed value, with its key, `column`, `one`, `other` and, for numbers, the `relative` difference.
    """

    table: str
    only_one: pd.DataFrame
    only_other: pd.DataFrame
    columns: list[str]
    changed: pd.DataFrame

    def __bool__(self) -> bool:
        return bool(len(self.only_one) or len(self.only_other) or self.columns or len(self.changed))

    def lines(self, one: str, other: str) -> list[str]:
        """For a reader: a line for each kind of difference, with an example."""
        found = []
        for rows, name in ((self.only_one, one), (self.only_other, other)):
            if len(rows):
                found.append(f"{len(rows)} rows only in {name}, such as {_key(rows)}")
        if self.columns:
            found.append(f"columns that only one has: {', '.join(self.columns)}")
        for column, rows in self.changed.groupby("column", sort=False):
            worst = rows.sort_values("relative", ascending=False).head(1)
            values = f"{worst['one'].iloc[0]} and {worst['other'].iloc[0]} at {_key(worst[list(self.only_one)])}"
            found.append(f"{column} differs in {len(rows)} rows, such as {values}")
        return [f"{self.table}: {line}" for line in found]


def diff(one: Merge, other: Merge, rtol: float = RTOL) -> list[Difference]:
    """Compare each table of two merges with its counterpart; a table that one lacks has no rows there.

    Args:
        one: A merged table, or a folder with an all.parquet; or DataFrames of it, as `lnjac.load` returns them.
        other: Another.
        rtol: The relative difference up to which floats are equal.

    Returns:
        A Difference for each table that one of them has.

    Raises:
        ConfigError: One of them is missing or cannot be read, or a column is of two types.
    """
    first, second = _merge(one), _merge(other)
    found = []
    for name in in_order({**first.tables, **second.tables}.keys() - {CONFIGS}):  # run_id stands for a config's science
        one_table = first.tables[name] if name in first.tables else second.tables[name][:0]
        other_table = second.tables[name] if name in second.tables else one_table[:0]
        known = {**second.known.get(name, {}), **first.known.get(name, {})}
        found.append(_difference(name, one_table, other_table, known, rtol))
    return found


def _merge(given: Merge) -> Contents:
    if isinstance(given, pd.DataFrame):
        return contents([given])
    if not isinstance(given, (str, PathLike)):
        return contents(given)
    path = Path(given)
    layers = layers_file(path / "all.parquet" if path.is_dir() else path)
    finish(layers)
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a merged table, or a folder with an all.parquet")
    try:
        return read(Source(layers, merged=True))
    except Unfit as error:
        raise ConfigError(f"{path}: {error}") from None


def _difference(name: str, one: pa.Table, other: pa.Table, known: Known, rtol: float) -> Difference:
    key = with_role(KEY, known)
    frames = [table.select(key).to_pandas() for table in (one, other)]
    if not any(map(len, frames)):  # pandas cannot join two columns of text without rows
        frames = [frame.astype(object) for frame in frames]
    sides = [frame.reset_index(names=side) for frame, side in zip(frames, ("one", "other"), strict=True)]
    rows = sides[0].merge(sides[1], how="outer", on=key, sort=False)
    both = rows[rows["one"].notna() & rows["other"].notna()]
    at = [pa.array(both[side].astype("int64")) for side in ("one", "other")]
    changed = []
    for column in science(one.column_names, known):
        if column in other.column_names:
            changed.append(_changed(both[key], column, one[column].take(at[0]), other[column].take(at[1]), rtol))
    return Difference(
        table=name,
        only_one=rows.loc[rows["other"].isna(), key],
        only_other=rows.loc[rows["one"].isna(), key],
        columns=sorted({*one.column_names} ^ {*other.column_names}),
        changed=pd.concat(changed, ignore_index=True),
    )


def _changed(
    keys: pd.DataFrame, column: str, one: pa.ChunkedArray, other: pa.ChunkedArray, rtol: float
) -> pd.DataFrame:
    """A row for each pair of values that differ."""
    if {str(one.type), str(other.type)} == {"int64", "double"}:
        one, other = one.cast(pa.float64()), other.cast(pa.float64())
    if one.type != other.type:
        raise ConfigError(f"{column} is {one.type} in the one and {other.type} in the other: they cannot be compared")
    at, relative = differences(one, other, rtol)
    values = [side.take(pa.array(at)).to_pylist() for side in (one, other)]
    return keys.iloc[at].assign(column=column, one=values[0], other=values[1], relative=relative)


def _key(rows: pd.DataFrame) -> str:
    """The first row's key."""
    return " ".join(f"{name}={value}" for name, value in rows.iloc[0].items())
