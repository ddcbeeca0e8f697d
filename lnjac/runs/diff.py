"""Two merged tables side by side: rows that only one has, and values of science that differ.

What may differ between two measurements of one run, and by how much, is what merging says (docs/merging.md, Duplicates).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lnjac.errors import ConfigError
from lnjac.runs.merge import RTOL
from lnjac.runs.pile import NO_SCIENCE, differs
from lnjac.runs.placing import finish
from lnjac.runs.read import Source, Unfit, layers_file, read
from lnjac.runs.schema import KEYS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Difference:
    """What differs in one table between `one` and `other`; keys are those of `lnjac.runs.schema.KEYS`.

    `only_one` and `only_other`: the keys of their rows. `columns`: those that only one of them has. `changed`: a row for
    each changed value, with its key, `column`, `one`, `other` and, for numbers, the `relative` difference.
    """

    table: str
    only_one: "pd.DataFrame"
    only_other: "pd.DataFrame"
    columns: list[str]
    changed: "pd.DataFrame"

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


def diff(one: Path, other: Path, rtol: float = RTOL) -> list[Difference]:
    """Each table of two merges against its counterpart; a table that one lacks has no rows there."""
    first, second = _tables(one), _tables(other)
    for tables, others in ((first, second), (second, first)):
        tables.update({name: table[:0] for name, table in others.items() if name not in tables})
    return [_difference(name, first[name], second[name], rtol) for name in KEYS if name in first]


def _tables(path: Path) -> dict[str, pa.Table]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a merged table, or a folder with an all.parquet")
    layers = layers_file(path / "all.parquet" if path.is_dir() else path)
    finish(layers)
    try:
        return read(Source(layers, merged=True))
    except Unfit as error:
        raise ConfigError(f"{path}: {error}") from None


def _difference(name: str, one: pa.Table, other: pa.Table, rtol: float) -> Difference:
    import pandas as pd

    key = list(KEYS[name])
    sides = [table.select(key).to_pandas().reset_index(names=side) for table, side in ((one, "one"), (other, "other"))]
    rows = sides[0].merge(sides[1], how="outer", on=key, sort=False)
    both = rows[rows["one"].notna() & rows["other"].notna()]
    at = [pa.array(both[side].astype("int64")) for side in ("one", "other")]
    shared = [column for column in one.column_names if column in other.column_names]
    changed = []
    for column in shared:
        if column not in (*key, *NO_SCIENCE):
            changed.append(_changed(both[key], column, one[column].take(at[0]), other[column].take(at[1]), rtol))
    return Difference(
        table=name,
        only_one=rows.loc[rows["other"].isna(), key],
        only_other=rows.loc[rows["one"].isna(), key],
        columns=sorted({*one.column_names} ^ {*other.column_names}),
        changed=pd.concat(changed, ignore_index=True),
    )


def _changed(
    keys: "pd.DataFrame", column: str, one: pa.ChunkedArray, other: pa.ChunkedArray, rtol: float
) -> "pd.DataFrame":
    """A row for each pair of values that differ; relative to the larger, infinite if they are no two numbers."""
    if {str(one.type), str(other.type)} == {"int64", "double"}:
        one, other = one.cast(pa.float64()), other.cast(pa.float64())
    if one.type != other.type:
        raise ConfigError(f"{column} is {one.type} in the one and {other.type} in the other: they cannot be compared")
    at = np.flatnonzero(differs(one, other, rtol))
    values = [side.take(pa.array(at)).to_pylist() for side in (one, other)]
    relative = [_relative(*pair) for pair in zip(*values, strict=True)]
    return keys.iloc[at].assign(column=column, one=values[0], other=values[1], relative=relative)


def _relative(one: Any, other: Any) -> float:
    """|one − other| over the larger of them; infinite where one of them is no finite number."""
    if isinstance(one, (int, float)) and isinstance(other, (int, float)) and np.isfinite([one, other]).all():
        return abs(one - other) / max(abs(one), abs(other))
    return np.inf


def _key(rows: "pd.DataFrame") -> str:
    """The first row's key."""
    return " ".join(f"{name}={value}" for name, value in rows.iloc[0].items())
