"""Put the tables of many runs on top of one another, in a fixed order and each row once; the same run must agree with itself.

A run is known by its number: its place among all runs as they were read, one that was found twice included.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lnjac.columns import KEY, VOLATILE, Column
from lnjac.errors import ConfigError
from lnjac.runs.folder import SMALL
from lnjac.runs.read import Contents, Integers, Source, owner, positions
from lnjac.runs.schema import CORE, OWNER, Known, in_order, with_role

if TYPE_CHECKING:
    import pandas as pd

SAME_BY_OTHER_NAMES = ("data",)
"""Columns of the config in which equal runs may differ: one corpus may have two names, its content is in data_sha256."""

TIMES = ("s", "tokens/s", "UTC")
"""Units of columns that tell nothing of how a run was made."""


class Kind(NamedTuple):
    """The columns of a source's tables and what is known of them, and the first source that has just these."""

    schemas: Mapping[str, pa.Schema]
    known: Mapping[str, Known]
    first: Source


class Stacked(NamedTuple):
    """The tables of sources on top of one another, and for each row of a table the number of its run."""

    sources: list[Source]
    """Of each run."""
    tables: dict[str, pa.Table]
    numbers: dict[str, Integers]
    kinds: dict[Hashable, Kind]


class Combined(NamedTuple):
    """The tables without duplicates, what is known of their columns, and how many rows each lost."""

    tables: dict[str, pa.Table]
    known: dict[str, Known]
    duplicates: dict[str, int]


def stacked(source: Source, found: Contents) -> Stacked:
    """Return the tables of one source."""
    schemas = {name: table.schema for name, table in found.tables.items()}
    runs = found.tables["runs"]
    numbers = {name: positions(table, runs, owner(found.known[name])) for name, table in found.tables.items()}
    kind = (tuple(schemas.items()), tuple(tuple(known.values()) for known in found.known.values()))
    return Stacked([source] * runs.num_rows, found.tables, numbers, {kind: Kind(schemas, found.known, source)})


def together(parts: Sequence[Stacked]) -> Stacked:
    """Return the tables of all the parts on top of one another.

    Small ones are copied into one piece, as nearly all that they occupy is overhead.
    """
    sources, kinds = list[Source](), dict[Hashable, Kind]()
    tables: dict[str, list[pa.Table]] = {}
    numbers: dict[str, list[Integers]] = {}
    for part in parts:
        for name, rows in part.tables.items():
            tables.setdefault(name, []).append(rows)
            numbers.setdefault(name, []).append(len(sources) + part.numbers[name])
        sources += part.sources
        kinds.update((key, kind) for key, kind in part.kinds.items() if key not in kinds)
    return Stacked(
        sources,
        {name: _one_table(rows, _agreed(name, kinds.values())) for name, rows in tables.items()},
        {name: np.concatenate(each) for name, each in numbers.items()},
        kinds,
    )


def _one_table(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    rows = pa.concat_tables(tables, promote_options="permissive")
    if not rows.schema.equals(schema):
        there = set(rows.column_names)
        columns = [rows[f.name].cast(f.type) if f.name in there else pa.nulls(len(rows), f.type) for f in schema]
        rows = pa.Table.from_arrays(columns, schema=schema)
    return rows.combine_chunks() if len(rows) < SMALL * len(tables) else rows


def _agreed(name: str, kinds: Iterable[Kind]) -> pa.Schema:
    """The union of a table's columns in order of first appearance: null gives way to any type, int64 to float64."""
    union: dict[str, tuple[pa.DataType, Source]] = {}
    for kind in kinds:
        for field in kind.schemas.get(name, ()):
            before, first = union.setdefault(field.name, (field.type, kind.first))
            if before == pa.null() or {before, field.type} == {pa.int64(), pa.float64()}:
                union[field.name] = (field.type if before == pa.null() else pa.float64(), kind.first)
            elif field.type not in (before, pa.null()):
                raise ConfigError(
                    f"{field.name} is {before} in {first.path} but {field.type} in {kind.first.path}: merge them apart"
                )
    return pa.schema([(column, dtype) for column, (dtype, _) in union.items()])


def combine(found: Stacked, rtol: float) -> Combined:
    """Return the tables in the order of docs/merging.md, each row once.

    Raises:
        ConfigError: Two sources hold the same run with other rows, or with science that differs by more than `rtol`; or
            they describe a column in two ways.
    """
    ranked = _ranked(found)
    combined = Combined({}, {}, {})
    for name in in_order(found.tables):
        if name in CORE or len(found.tables[name]):
            known = _known(name, found)
            rows, combined.duplicates[name] = _distinct(name, found, known, ranked, rtol)
            there = set(rows.column_names)
            first = [column for column in known if column in there]
            combined.tables[name] = rows.select(dict.fromkeys([*first, *rows.column_names]))
            combined.known[name] = {column: known[column] for column in first}
    return combined


def _known(name: str, found: Stacked) -> Known:
    """What the sources know of a table's columns, in which they must agree."""
    union: dict[str, tuple[Column, Source]] = {}
    for kind in found.kinds.values():
        for column in kind.known.get(name, {}).values():
            before, first = union.setdefault(column.name, (column, kind.first))
            for field in ("role", "pool"):
                one, other = getattr(before, field), getattr(column, field)
                if one != other:
                    raise ConfigError(
                        f"the {field} of {column.name} in {name} is {one!r} in {first.path} but {other!r} in "
                        f"{kind.first.path}: merge them apart"
                    )
    return {name: column for name, (column, _) in union.items()}


def _ranked(found: Stacked) -> "pd.DataFrame":
    """For every number of a run: whose it is, its path, and its rank; of two equal runs the one of lower rank is kept.

    Ranked by when the run began, then by its identity, then by every other column in which equal runs may differ, and
    only at last by path: so neither the order of the sources nor whether they were merged before has a say.
    """
    rows = found.tables["runs"]
    volatile = [name for name in with_role(VOLATILE, _known("runs", found)) if name in rows.column_names]
    table = rows.select(dict.fromkeys([*OWNER, *volatile])).take(np.argsort(found.numbers["runs"]))
    paths = [str(source.path) for source in found.sources]
    table = table.append_column("path", pa.array(paths, pa.string()))
    by = dict.fromkeys(["started_at", *OWNER, *volatile, "path"])
    order = pc.sort_indices(table, sort_keys=[(column, "ascending") for column in by]).to_numpy()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ranked: pd.DataFrame = table.select([*OWNER, "path"]).to_pandas()
    return ranked.assign(rank=rank.astype(np.int64))


def _distinct(name: str, found: Stacked, known: Known, ranked: "pd.DataFrame", rtol: float) -> tuple[pa.Table, int]:
    """The rows without duplicates, by the rank of their runs, then by step, then as in the run's own file.

    And how many rows were dropped.
    """
    rows, number = found.tables[name], found.numbers[name]
    keys, whose = with_role(KEY, known), owner(known)
    rank = ranked["rank"].to_numpy()[number]
    order = np.lexsort((rows["step"].to_numpy(), rank) if "step" in keys else (rank,))
    if (np.diff(order) != 1).any():
        rows, number = rows.take(order), number[order]
    same = ranked.groupby(whose)["rank"]
    names: pd.DataFrame = rows.select([key for key in keys if key not in whose]).to_pandas()
    names = names.assign(**{"": same.ngroup().to_numpy()[number]})  # no column has this name
    group = names.groupby(list(names), dropna=False, sort=False).ngroup().to_numpy()  # numbered as they appear
    first = np.unique(group, return_index=True)[1]
    again = np.ones(len(group), bool)
    again[first] = False
    _require_same_rows(name, found, ranked.assign(first=same.transform("min")), whose, number, again)
    if not again.any():
        return rows, 0
    dropped = np.flatnonzero(again)
    _require_same_science(name, found, known, rows, number, first[group[dropped]], dropped, rtol)
    return rows.filter(pa.array(~again)), len(dropped)


def _require_same_rows(
    name: str,
    found: Stacked,
    ranked: "pd.DataFrame",
    whose: list[str],
    number: Integers,
    again: npt.NDArray[np.bool_],
) -> None:
    """A run that was found before (`first` < `rank`) brings the very rows that are there: no row more, none less."""
    n_rows = np.bincount(number, minlength=len(ranked))
    n_new = np.bincount(number[~again], minlength=len(ranked))
    by_rank = np.argsort(ranked["rank"].to_numpy())
    later = ranked.drop_duplicates(["path", *whose]).query("first < rank")
    mine, first = later.index.to_numpy(), by_rank[later["first"].to_numpy()]
    for i in np.flatnonzero((n_new[mine] > 0) | (n_rows[mine] != n_rows[first])):
        raise ConfigError(
            f"{found.sources[first[i]].path} and {found.sources[mine[i]].path} both hold run "
            f"{ranked['run_id'].iloc[mine[i]]}, but not the same rows of {name}; "
            f"{_conditions(found, first[i], mine[i])}: drop one of them"
        )


def _require_same_science(
    name: str,
    found: Stacked,
    known: Known,
    rows: pa.Table,
    number: Integers,
    kept: Integers,
    dropped: Integers,
    rtol: float,
) -> None:
    """Rows `kept` and `dropped` have equal keys. Raises ConfigError, naming the largest difference, where they differ."""
    differing = []
    for column in science(rows.column_names, known):
        one, other = rows[column].take(pa.array(kept)), rows[column].take(pa.array(dropped))
        at, sizes = differences(one, other, rtol)
        if len(at):
            worst = int(np.argmax(sizes))
            differing.append((float(sizes[worst]), column, int(at[worst]), len(at)))
    if not differing:
        return
    relative, column, i, _ = max(differing, key=lambda each: each[0])
    one, other = (rows[column][int(at[i])] for at in (kept, dropped))
    key = ", ".join(f"{key}={rows[key][int(kept[i])]}" for key in with_role(KEY, known))
    first, second = number[kept[i]], number[dropped[i]]
    size = ""
    if pa.types.is_floating(rows[column].type) and np.isfinite(relative):
        size = f", a relative difference of {relative:.2g} where rtol allows {rtol:.2g}"
    more = sum(n for *_, n in differing) - 1
    raise ConfigError(
        f"{found.sources[first].path} and {found.sources[second].path} both hold the row of {name} with {key}, but "
        f"{column} is {one} in the one and {other} in the other{size}"
        + (f" ({more} more values differ, none by more)" if more else "")
        + f"; {_conditions(found, first, second)}: drop one of them"
        + (", or raise rtol" if size else "")
    )


def _conditions(found: Stacked, one: int, other: int) -> str:
    """In which columns of how a run was made two runs differ, for a reader."""
    rows, known = found.tables["runs"], _known("runs", found)
    names = [name for name in with_role(VOLATILE, known) if known[name].unit not in TIMES and name in rows.column_names]
    table = rows.take(pa.array([np.flatnonzero(found.numbers["runs"] == run)[0] for run in (one, other)]))
    pairs = [(name, *table[name].to_pylist()) for name in names]
    apart = [f"{name} ({first} and {second})" for name, first, second in pairs if first != second]
    return f"the two runs differ in {', '.join(apart)}" if apart else f"the two runs agree in {', '.join(names)}"


# Science


def science(columns: Iterable[str], known: Known) -> Iterator[str]:
    """Give the columns in which two measurements of one run must agree."""
    for name in columns:
        if name not in SAME_BY_OTHER_NAMES and (name not in known or known[name].role not in (KEY, VOLATILE)):
            yield name


def differences(one: pa.ChunkedArray, other: pa.ChunkedArray, rtol: float) -> tuple[Integers, npt.NDArray[np.float64]]:
    """Return where two columns of one type differ, floats by more than `rtol`, and by how much of the larger value.

    Null equals null and NaN equals NaN, but not each other. A difference is infinite if one of the two is no finite number.
    """
    if pa.types.is_null(one.type):
        different = np.zeros(len(one), bool)
    elif pa.types.is_floating(one.type):
        different = ~np.isclose(one.to_numpy(), other.to_numpy(), rtol=rtol, atol=0, equal_nan=True)
    else:
        different = ~pc.fill_null(pc.equal(one, other), True).to_numpy()
    at = np.flatnonzero(different | (one.is_null().to_numpy() != other.is_null().to_numpy()))
    if not (pa.types.is_floating(one.type) or pa.types.is_integer(one.type)):
        return at, np.full(len(at), np.inf)
    a, b = (side.take(pa.array(at)).to_numpy() for side in (one, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    return at, np.where(np.isfinite(a) & np.isfinite(b), relative, np.inf)
