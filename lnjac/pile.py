"""The tables of many runs stacked into one set: of one schema, in a fixed order, each row once.

A unit is one run of one source, numbered as they come; every row is some unit's.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lnjac import runs
from lnjac.config import ConfigError
from lnjac.sources import OWNER, Integers, Source, Tables, agreed, owner, positions
from lnjac.tables import CORE, KEYS, TABLES, VOLATILE

if TYPE_CHECKING:
    import pandas as pd

NO_SCIENCE = (*VOLATILE, "jacobian_residual", "data")
"""Columns in which equal runs may differ: the residual is nothing but rounding error, and one corpus may be read by
another name (its content is in data_sha256)."""

STACKED_AT_ONCE = 50
"""How many small tables are held one by one: such a one is mostly overhead, 290 KB a run, which is soon used again."""

Booleans = npt.NDArray[np.bool_]


class Stack(NamedTuple):
    """Rows of one table, and the unit of each."""

    rows: pa.Table
    units: Integers


class Combined(NamedTuple):
    """The tables without duplicates, how many rows each lost, and each run's unit, in the order of the table of runs."""

    tables: Tables
    duplicates: dict[str, int]
    units: Integers
    whole: Booleans
    """For each unit, whether all of its rows were kept."""


class Kind(NamedTuple):
    """The columns of a source's tables, and the first source that has just these."""

    schemas: Mapping[str, pa.Schema]
    first: Source


class Pile:
    """The tables of many sources, stacked on top of one another as they come."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        """Of each unit; and its kind:"""
        self.kinds: list[Kind] = []
        self.declared: dict[Hashable, Kind] = {}
        self.small: dict[str, list[Stack]] = {name: [] for name in TABLES}
        self.large: dict[str, list[Stack]] = {name: [] for name in TABLES}

    def declare(self, source: Source, schemas: Mapping[str, pa.Schema]) -> Kind:
        """Say what columns a source has: the order of the stacked tables' columns is the order of these calls."""
        return self.declared.setdefault(tuple(schemas.items()), Kind(schemas, source))

    def add(self, tables: Tables, sources: Sequence[Source], kinds: Sequence[Kind], *, below: bool = False) -> None:
        """Stack tables, on top of all others or below; `sources` and `kinds` have one for each row of runs."""
        first = len(self.sources)
        self.sources += sources
        self.kinds += kinds
        for name, rows in tables.items():
            held = self.small[name] if rows.num_rows < runs.SMALL else self.large[name]
            held.insert(0 if below else len(held), Stack(rows, first + positions(rows, tables["runs"], owner(name))))
            if len(self.small[name]) >= STACKED_AT_ONCE:
                self._settle(name)

    def stack(self, name: str) -> Stack:
        self._settle(name)
        self.large[name] = [self._united(name, self.large[name])]
        return self.large[name][0]

    def _settle(self, name: str) -> None:
        if self.small[name]:
            rows, units = self._united(name, self.small[name])
            self.large[name].append(Stack(rows.combine_chunks(), units))
            self.small[name] = []

    def has_rows(self, name: str) -> bool:
        return any(len(stack.units) for stack in self.small[name] + self.large[name])

    def _united(self, name: str, stacks: Sequence[Stack]) -> Stack:
        schema = agreed((kind.schemas[name], kind.first) for kind in self.declared.values() if name in kind.schemas)
        rows = pa.concat_tables([stack.rows for stack in stacks], promote_options="permissive")
        if not rows.schema.equals(schema):
            there = set(rows.column_names)
            columns = [rows[f.name].cast(f.type) if f.name in there else pa.nulls(len(rows), f.type) for f in schema]
            rows = pa.Table.from_arrays(columns, schema=schema)
        return Stack(rows, np.concatenate([stack.units for stack in stacks]))


def combine(pile: Pile, rtol: float) -> Combined:
    """The stacked tables in the order of docs/merging.md, each row once.

    Raises ConfigError where two sources hold the same run with other rows, or with science that differs by more than `rtol`.
    """
    units = _units(pile)
    names = [name for name in TABLES if name in CORE or pile.has_rows(name)]
    tables, duplicates, whole = {}, {}, np.ones(len(units), bool)
    for name in names:
        distinct, again = _distinct(name, pile.stack(name), units, rtol)
        tables[name], duplicates[name] = distinct.rows, len(again)
        whole[again] = False
        if name == "runs":
            kept = distinct.units
    return Combined(tables, duplicates, kept, whole)


def _units(pile: Pile) -> "pd.DataFrame":
    """Every unit in order: whose it is, its path, and its rank; of two equal runs the one of lower rank is kept.

    Ranked by when the run began, then by its identity, then by every other column in which equal runs may differ, and
    only at last by path: so neither the order of the sources nor whether they were merged before has a say.
    """
    stack = pile.stack("runs")
    volatile = [name for name in VOLATILE if name in stack.rows.column_names]
    table = stack.rows.select([*OWNER, *volatile]).take(np.argsort(stack.units))
    paths = [str(source.path) for source in pile.sources]
    table = table.append_column("path", pa.array(paths, pa.string()))
    by = dict.fromkeys(["started_at", *OWNER, *volatile, "path"])
    order = pc.sort_indices(table, sort_keys=[(column, "ascending") for column in by]).to_numpy()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    units: pd.DataFrame = table.select([*OWNER, "path"]).to_pandas()
    return units.assign(rank=rank.astype(np.int64))


def _distinct(name: str, stack: Stack, units: "pd.DataFrame", rtol: float) -> tuple[Stack, Integers]:
    """The rows without duplicates, by the rank of their units, then by step, then as in the run's own file; and whose
    rows were dropped, a unit for each.
    """
    rows, unit = stack
    rank = units["rank"].to_numpy()[unit]
    step = rows["step"].to_numpy() if "step" in KEYS[name] else np.zeros_like(rank)
    if (((ahead := np.diff(rank)) < 0) | ((ahead == 0) & (np.diff(step) < 0))).any():
        order = np.lexsort((step, rank))
        rows, unit = _ordered(rows, order), unit[order]
    same = units.groupby(owner(name))["rank"]
    key = _key(rows, [key for key in KEYS[name] if key not in OWNER], np.asarray(same.ngroup(), np.int64)[unit])
    values, first = np.unique(key, return_index=True)
    again = np.ones(len(key), bool)
    again[first] = False
    _require_same_rows(name, units.assign(first=same.transform("min")), unit, again)
    if not again.any():
        return Stack(rows, unit), unit[again]
    twin = first[np.searchsorted(values, key[again])]
    _require_same_science(name, rows, twin, np.flatnonzero(again), units["path"].iloc[unit], rtol)
    return Stack(rows.filter(pa.array(~again)), unit[~again]), unit[again]


def _ordered(rows: pa.Table, order: Integers) -> pa.Table:
    """The rows in this order; where they move in large pieces (an earlier merge's, long runs), none is copied."""
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    if len(starts) * runs.SMALL > len(order):
        return rows.take(order)
    lengths = np.diff(starts, append=len(order))
    return pa.concat_tables([rows.slice(order[at], n) for at, n in zip(starts, lengths, strict=True)])


def _key(rows: pa.Table, names: Sequence[str], owners: Integers) -> Integers:
    """A number for each row, the same for the same owner and values in these columns; null equals null and NaN NaN."""
    key = owners
    for name in names:
        values = pc.unique(rows[name])
        if len(key) and int(key.max()) * len(values) > 2**62:
            key = np.unique(key, return_inverse=True)[1]
        key = key * len(values) + pc.index_in(rows[name], value_set=values).to_numpy()
    return key


def _require_same_rows(name: str, units: "pd.DataFrame", unit: Integers, again: Booleans) -> None:
    """A run that was found before (`first` < `rank`) brings the very rows that are there: no row more, none less."""
    n_rows = np.bincount(unit, minlength=len(units))
    n_new = np.bincount(unit[~again], minlength=len(units))
    by_rank = np.argsort(units["rank"].to_numpy())
    later = units.drop_duplicates(["path", *owner(name)]).query("first < rank")
    number, first = later.index.to_numpy(), by_rank[later["first"].to_numpy()]
    for i in np.flatnonzero((n_new[number] > 0) | (n_rows[number] != n_rows[first])):
        one, other = units.iloc[first[i]], units.iloc[number[i]]
        raise ConfigError(
            f"{one['path']} and {other['path']} both hold run {one['run_id']}, but not the same rows of {name}: "
            "drop one of them"
        )


def _require_same_science(
    name: str,
    table: pa.Table,
    kept: Integers,
    dropped: Integers,
    paths: "pd.Series[str]",
    rtol: float,
) -> None:
    """Rows `kept` and `dropped` have equal keys; `paths` names the source of each row of the table."""
    for column in table.column_names:
        if column in (*KEYS[name], *NO_SCIENCE):
            continue
        one, other = table[column].take(pa.array(kept)), table[column].take(pa.array(dropped))
        for i in np.flatnonzero(differs(one, other, rtol)):
            key = ", ".join(f"{key}={table[key][int(kept[i])]}" for key in KEYS[name])
            raise ConfigError(
                f"{paths.iloc[kept[i]]} and {paths.iloc[dropped[i]]} both hold the row of {name} with {key}, but "
                f"{column} is {one[int(i)]} in the one and {other[int(i)]} in the other: drop one of them"
                + (", or raise rtol" if pa.types.is_floating(one.type) else "")
            )


def differs(one: pa.ChunkedArray, other: pa.ChunkedArray, rtol: float) -> Booleans:
    """Where the values differ; null equals null and NaN equals NaN, but not each other."""
    if pa.types.is_null(one.type):
        return np.zeros(len(one), bool)
    if pa.types.is_floating(one.type):
        equal = np.isclose(one.to_numpy(), other.to_numpy(), rtol=rtol, atol=0, equal_nan=True)
    else:
        equal = pc.fill_null(pc.equal(one, other), True).to_numpy()
    return np.asarray(~equal | (one.is_null().to_numpy() != other.is_null().to_numpy()))
