"""The tables of many runs stacked into one set: of one schema, in a fixed order, each row once.

A unit is one run of one source, numbered as they come; every row is some unit's.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs.read import OWNER, Integers, Source, Tables, agreed, owner, positions
from lnjac.runs.schema import CORE, KEYS, RUNS, TABLES, VOLATILE

if TYPE_CHECKING:
    import pandas as pd

NO_SCIENCE = (*VOLATILE, "jacobian_residual", "data")
"""Columns in which equal runs may differ: the residual is nothing but rounding error, and one corpus may be read by
another name (its content is in data_sha256)."""

CONDITIONS = [c.name for c in RUNS if c.name in VOLATILE and c.unit not in ("s", "tokens/s", "UTC")]
"""How a run was made: columns that can explain why its numbers differ from those of an equal run."""

Booleans = npt.NDArray[np.bool_]


class Stack(NamedTuple):
    """Rows of one table, and the unit of each."""

    rows: pa.Table
    units: Integers


class Combined(NamedTuple):
    """The tables without duplicates, and how many rows each lost."""

    tables: Tables
    duplicates: dict[str, int]


class Pile:
    """The tables of many sources, stacked on top of one another as they come."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        """Of each unit."""
        self.declared: dict[Hashable, Declared] = {}
        """The columns that the sources have; the stacked tables have theirs in the order of this."""
        self.stacks: dict[str, list[Stack]] = {name: [] for name in TABLES}

    def add(self, source: Source, tables: Tables) -> None:
        schemas = {name: table.schema for name, table in tables.items()}
        self.declared.setdefault(tuple(schemas.items()), Declared(schemas, source))
        first = len(self.sources)
        self.sources += [source] * tables["runs"].num_rows
        for name, rows in tables.items():
            self.stacks[name].append(Stack(rows, first + positions(rows, tables["runs"], owner(name))))

    def extend(self, other: "Pile") -> None:
        """Stack all that another pile holds on top."""
        for schemas, declared in other.declared.items():
            self.declared.setdefault(schemas, declared)
        first = len(self.sources)
        self.sources += other.sources
        for name, stacks in other.stacks.items():
            self.stacks[name] += [Stack(rows, first + units) for rows, units in stacks]

    def compact(self) -> None:
        """Make one table of each kind; small ones are copied, as nearly all that they occupy is overhead."""
        for name, stacks in self.stacks.items():
            if stacks:
                small = sum(len(stack.units) for stack in stacks) < runs.SMALL * len(stacks)
                rows, units = self.stack(name)
                self.stacks[name] = [Stack(rows.combine_chunks() if small else rows, units)]

    def stack(self, name: str) -> Stack:
        """All rows of one table, with the columns of all sources."""
        schema = agreed((kind.schemas[name], kind.first) for kind in self.declared.values() if name in kind.schemas)
        rows = pa.concat_tables([stack.rows for stack in self.stacks[name]], promote_options="permissive")
        if not rows.schema.equals(schema):
            there = set(rows.column_names)
            columns = [rows[f.name].cast(f.type) if f.name in there else pa.nulls(len(rows), f.type) for f in schema]
            rows = pa.Table.from_arrays(columns, schema=schema)
        return Stack(rows, np.concatenate([stack.units for stack in self.stacks[name]]))

    def has_rows(self, name: str) -> bool:
        return any(len(stack.units) for stack in self.stacks[name])


class Declared(NamedTuple):
    """The columns of a source's tables, and the first source that has just these."""

    schemas: Mapping[str, pa.Schema]
    first: Source


def combine(pile: Pile, rtol: float) -> Combined:
    """The stacked tables in the order of docs/merging.md, each row once.

    Raises ConfigError where two sources hold the same run with other rows, or with science that differs by more than `rtol`.
    """
    units = _units(pile)
    tables, duplicates = {}, {}
    for name in TABLES:
        if name in CORE or pile.has_rows(name):
            tables[name], duplicates[name] = _distinct(name, pile, units, rtol)
    return Combined(tables, duplicates)


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


def _distinct(name: str, pile: Pile, units: "pd.DataFrame", rtol: float) -> tuple[pa.Table, int]:
    """The rows without duplicates, by the rank of their units, then by step, then as in the run's own file.

    And how many rows were dropped.
    """
    rows, unit = pile.stack(name)
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
    _require_same_rows(name, pile, units.assign(first=same.transform("min")), unit, again)
    if not again.any():
        return rows, 0
    twin = first[np.searchsorted(values, key[again])]
    _require_same_science(name, pile, Stack(rows, unit), twin, np.flatnonzero(again), rtol)
    return rows.filter(pa.array(~again)), int(again.sum())


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


def _require_same_rows(name: str, pile: Pile, units: "pd.DataFrame", unit: Integers, again: Booleans) -> None:
    """A run that was found before (`first` < `rank`) brings the very rows that are there: no row more, none less."""
    n_rows = np.bincount(unit, minlength=len(units))
    n_new = np.bincount(unit[~again], minlength=len(units))
    by_rank = np.argsort(units["rank"].to_numpy())
    later = units.drop_duplicates(["path", *owner(name)]).query("first < rank")
    number, first = later.index.to_numpy(), by_rank[later["first"].to_numpy()]
    for i in np.flatnonzero((n_new[number] > 0) | (n_rows[number] != n_rows[first])):
        raise ConfigError(
            f"{pile.sources[first[i]].path} and {pile.sources[number[i]].path} both hold run "
            f"{units['run_id'].iloc[number[i]]}, but not the same rows of {name}; "
            f"{_conditions(pile, first[i], number[i])}: drop one of them"
        )


def _require_same_science(name: str, pile: Pile, stack: Stack, kept: Integers, dropped: Integers, rtol: float) -> None:
    """Rows `kept` and `dropped` have equal keys. Raises ConfigError, naming the largest difference, where they differ."""
    rows, unit = stack
    found = []
    for column in rows.column_names:
        if column not in (*KEYS[name], *NO_SCIENCE):
            one, other = rows[column].take(pa.array(kept)), rows[column].take(pa.array(dropped))
            if len(at := np.flatnonzero(differs(one, other, rtol))):
                sizes = _relative(one.take(pa.array(at)), other.take(pa.array(at)))
                worst = int(np.argmax(sizes))
                found.append((float(sizes[worst]), column, int(at[worst]), len(at)))
    if not found:
        return
    relative, column, i, _ = max(found, key=lambda each: each[0])
    one, other = (rows[column][int(at[i])] for at in (kept, dropped))
    key = ", ".join(f"{key}={rows[key][int(kept[i])]}" for key in KEYS[name])
    first, second = unit[kept[i]], unit[dropped[i]]
    size = f", a relative difference of {relative:.2g} where rtol allows {rtol:.2g}" if np.isfinite(relative) else ""
    more = sum(n for *_, n in found) - 1
    raise ConfigError(
        f"{pile.sources[first].path} and {pile.sources[second].path} both hold the row of {name} with {key}, but "
        f"{column} is {one} in the one and {other} in the other{size}"
        + (f" ({more} more values differ, none by more)" if more else "")
        + f"; {_conditions(pile, first, second)}: drop one of them"
        + (", or raise rtol" if size else "")
    )


def _conditions(pile: Pile, one: int, other: int) -> str:
    """In which of CONDITIONS two units differ, for a reader."""
    rows, units = pile.stack("runs")
    table = rows.select(CONDITIONS).take(pa.array([np.flatnonzero(units == unit)[0] for unit in (one, other)]))
    pairs = [(name, *table[name].to_pylist()) for name in CONDITIONS]
    apart = [f"{name} ({first} and {second})" for name, first, second in pairs if first != second]
    return f"the two runs differ in {', '.join(apart)}" if apart else f"the two runs agree in {', '.join(CONDITIONS)}"


def _relative(one: pa.ChunkedArray, other: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """|one − other| over the larger of them; infinite where one of them is no finite number."""
    if not pa.types.is_floating(one.type):
        return np.full(len(one), np.inf)
    a, b = one.to_numpy(), other.to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    return np.where(np.isfinite(a) & np.isfinite(b), relative, np.inf)


def differs(one: pa.ChunkedArray, other: pa.ChunkedArray, rtol: float) -> Booleans:
    """Where the values differ; null equals null and NaN equals NaN, but not each other."""
    if pa.types.is_null(one.type):
        return np.zeros(len(one), bool)
    if pa.types.is_floating(one.type):
        equal = np.isclose(one.to_numpy(), other.to_numpy(), rtol=rtol, atol=0, equal_nan=True)
    else:
        equal = pc.fill_null(pc.equal(one, other), True).to_numpy()
    return np.asarray(~equal | (one.is_null().to_numpy() != other.is_null().to_numpy()))
