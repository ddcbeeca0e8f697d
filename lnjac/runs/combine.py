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
from lnjac.runs.configs import CONFIGS
from lnjac.runs.folder import SMALL
from lnjac.runs.read import Contents, Integers, Source, owner
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


def stacked(sources: Sequence[Source], found: Contents) -> Stacked:
    """Return the tables of sources, given the one of each run."""
    schemas = {name: table.schema for name, table in found.tables.items()}
    kind = (tuple(schemas.items()), tuple(tuple(known.values()) for known in found.known.values()))
    return Stacked([*sources], found.tables, found.numbers, {kind: Kind(schemas, found.known, sources[0])})


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
        {name: _one_table(name, rows, kinds.values()) for name, rows in tables.items()},
        {name: np.concatenate(each) for name, each in numbers.items()},
        kinds,
    )


def _one_table(name: str, tables: Sequence[pa.Table], kinds: Iterable[Kind]) -> pa.Table:
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
    rows = pa.concat_tables(tables, promote_options="permissive")
    return rows.combine_chunks() if len(rows) < SMALL * len(tables) else rows


def combine(found: Stacked, rtol: float) -> Combined:
    """Return the tables in the order of docs/merging.md, each row once. Those of `found` are dropped, as memory is short.

    Raises:
        ConfigError: Two sources hold the same run with other rows, or with science that differs by more than `rtol`; or
            they describe a column in two ways.
    """
    found = _ordered(found)
    combined = Combined({}, {}, {})
    for name in in_order(found.tables):
        if name in CORE or len(found.tables[name]):
            known = _known(name, found)
            rows, combined.duplicates[name] = _distinct(name, found, known, rtol)
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


def _ordered(found: Stacked) -> Stacked:
    """The tables, runs numbered and rows ordered by when the run began: of two equal runs the first is kept.

    Then by the run's identity, by every other column in which equal runs may differ, and only at last by path: so neither
    the order of the sources nor whether they were merged before has a say. A run's rows come by step, then as in its file.
    """
    rows = found.tables["runs"]
    volatile = [name for name in with_role(VOLATILE, _known("runs", found)) if name in rows.column_names]
    by = [*dict.fromkeys(["started_at", *OWNER, *volatile])]
    paths = pa.array([str(found.sources[number].path) for number in found.numbers["runs"]], pa.string())
    keys = [(column, "ascending") for column in (*by, "")]  # no column of a table has this name
    order = pc.sort_indices(rows.select(by).append_column("", paths), sort_keys=keys).to_numpy()
    before = found.numbers["runs"][order]
    now = np.empty(len(before), np.int64)
    now[before] = np.arange(len(before))
    tables, numbers = {}, {}
    for name in [*found.tables]:
        rows, number = found.tables.pop(name), now[found.numbers[name]]
        order = np.lexsort((rows["step"].to_numpy(), number) if "step" in rows.column_names else (number,))
        if (np.diff(order) != 1).any():
            schema, columns, places = rows.schema, rows.columns[::-1], pa.array(order)
            del rows  # so each column is freed when it has been copied
            rows = pa.Table.from_arrays([columns.pop().take(places) for _ in schema], schema=schema)
        tables[name], numbers[name] = rows, number[order]
    return Stacked([found.sources[number] for number in before], tables, numbers, found.kinds)


def _distinct(name: str, found: Stacked, known: Known, rtol: float) -> tuple[pa.Table, int]:
    """The rows without duplicates, and how many those are."""
    rows, number = found.tables[name], found.numbers[name]
    whose = owner(known)
    runs: pd.DataFrame = found.tables["runs"].select(whose).to_pandas()
    run = np.asarray(runs.groupby(whose, sort=False).ngroup(), np.int64)  # the same number for the same run
    names = rows.select([key for key in with_role(KEY, known) if key not in whose]).to_pandas()
    names = names.assign(**{"": run[number]})
    group = names.groupby(list(names), dropna=False, sort=False).ngroup().to_numpy()  # numbered as they appear
    first = np.unique(group, return_index=True)[1]
    again = np.ones(len(group), bool)
    again[first] = False
    if name != CONFIGS:  # which merges of earlier versions lack
        _require_same_rows(name, found, run, again)
    if not again.any():
        return rows, 0
    dropped = np.flatnonzero(again)
    _require_same_science(name, found, known, first[group[dropped]], dropped, rtol)
    return rows.filter(pa.array(~again)), len(dropped)


def _require_same_rows(name: str, found: Stacked, run: Integers, again: npt.NDArray[np.bool_]) -> None:
    """A run that was found before, in another source, brings the very rows that are there: no row more, none less."""
    import pandas as pd

    number, n_runs = found.numbers[name], len(run)
    places = {source: place for place, source in enumerate(found.sources)}
    counts = pd.DataFrame({"run": run, "source": [places[source] for source in found.sources], "number": range(n_runs)})
    counts["rows"] = np.bincount(number, minlength=n_runs)
    counts["new"] = np.bincount(number[~again], minlength=n_runs)
    counts = counts.groupby(["run", "source"], sort=False).agg({"number": "first", "rows": "sum", "new": "sum"})
    first = counts.groupby("run", sort=False)[["number", "rows"]].transform("first")
    wrong = (counts["number"] != first["number"]) & ((counts["new"] > 0) | (counts["rows"] != first["rows"]))
    for one, other in zip(first["number"][wrong], counts["number"][wrong], strict=True):
        raise ConfigError(
            f"{found.sources[one].path} and {found.sources[other].path} both hold run "
            f"{found.tables['runs']['run_id'][other]}, but not the same rows of {name}; "
            f"{_conditions(found, one, other)}: drop one of them"
        )


def _require_same_science(
    name: str, found: Stacked, known: Known, kept: Integers, dropped: Integers, rtol: float
) -> None:
    """Rows `kept` and `dropped` have equal keys. Raises ConfigError, naming the largest difference, where they differ."""
    rows, number = found.tables[name], found.numbers[name]
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
        + f"; {_conditions(found, int(first), int(second))}: drop one of them"
        + (", or raise rtol" if size else "")
    )


def _conditions(found: Stacked, one: int, other: int) -> str:
    """In which columns of how a run was made two runs differ, for a reader."""
    rows, known = found.tables["runs"], _known("runs", found)
    names = [name for name in with_role(VOLATILE, known) if known[name].unit not in TIMES and name in rows.column_names]
    table = rows.take(pa.array([one, other]))
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
