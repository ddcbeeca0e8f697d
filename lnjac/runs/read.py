"""Find run folders and earlier merges, and read them: whole, unaltered, in the declared types, or not at all."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lnjac.errors import ConfigError
from lnjac.files import why
from lnjac.runs import folder as runs
from lnjac.runs.schema import CORE, KEYS, SCHEMA_VERSION, TABLES

OWNER = ("run_id", "diag_id")
"""What identifies a run with its diagnostics; curves carry only the first."""

_MARKS = {runs.STATUS, *runs.FILES.values()}
"""A folder that has one of these is a run's."""

_DECLARED = {name: runs.schema(columns) for name, columns in TABLES.items()}

Tables = dict[str, pa.Table]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """One run's folder, or the layers file of an earlier merge, under the name the user knows it by."""

    path: Path
    merged: bool


class Skip(NamedTuple):
    """A run, or an earlier merge, that was found and not merged; or a folder that cannot be searched."""

    path: str
    reason: str


class Found(NamedTuple):
    """What there is to merge, what could not be searched, and what else the user should know of how they were found."""

    sources: list[Source]
    skipped: list[Skip]
    notes: list[str]


class Unfit(Exception):
    """Why a source cannot be merged, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))


def owner(table: str) -> list[str]:
    """The columns of a table that say whose a row is."""
    return [key for key in OWNER if key in KEYS[table]]


def companion(layers: Path, table: str) -> Path:
    """Where a merge keeps this table, given the file that holds its layers."""
    return layers if table == "layers" else layers.with_suffix(f".{table}.parquet")


def companions(layers: Path) -> dict[str, Path]:
    """The files of a merge by table: those that every merge has, and of the tables in long form those that are there."""
    paths = {name: companion(layers, name) for name in TABLES}
    return {name: path for name, path in paths.items() if name in CORE or path.exists()}


def report_file(layers: Path) -> Path:
    return layers.with_suffix(".merge.json")


# Finding


def search(paths: Iterable[Path]) -> Found:
    """Find every run folder in or at the paths, and every merged file named; each once, however often it is named.

    A folder is the runs that it holds now, whatever was merged from it earlier. One that holds none (results brought
    home) is its one merged table, and a note says so. Raises ConfigError for a path that does not exist or cannot be meant.
    """
    found, seen = Found([], [], []), dict[str, bool]()
    files = dict[str, Path]()
    for path in paths:
        if path.is_dir():
            merges: list[Path] = []
            if _search_folder(path, os.path.realpath(path), seen, found, merges) or not merges:
                continue
            if len(merges) > 1:
                names = ", ".join(map(str, merges[:10])) + ", …" * (len(merges) > 10)
                raise ConfigError(f"{path} holds no run folders and {len(merges)} merged tables: name one of {names}")
            found.notes.append(f"{path} holds no run folders: its merged table {merges[0]} is read")
            layers = merges[0]
        elif not path.exists():
            raise ConfigError(f"{path} does not exist")
        elif path.name in (*runs.FILES.values(), runs.STATUS):
            raise ConfigError(f"{path} is one file of a run: name its folder, {path.parent}")
        else:
            layers = layers_file(path)
        if files.setdefault(os.path.realpath(layers), layers) is layers:
            found.sources.append(Source(layers, merged=True))
    return found


def _search_folder(folder: Path, real: str, seen: dict[str, bool], found: Found, merges: list[Path]) -> bool:
    """Add the runs in the folder to `found` and its merged tables to `merges`; return whether it holds any run.

    `real` is the folder's name without links, which costs a hundred times the rest to find for each folder alone.
    """
    if real not in seen:
        seen[real] = False  # for a link in it that leads back here
        try:
            seen[real] = _add_from(folder, real, seen, found, merges)
        except OSError as error:
            found.skipped.append(Skip(str(folder), why(error)))
            seen[real] = True  # it may
    return seen[real]


def _add_from(folder: Path, real: str, seen: dict[str, bool], found: Found, merges: list[Path]) -> bool:
    if os.path.exists(f"{real}/{runs.STATUS}"):  # nearly every run has one, and to list its folder costs far more
        found.sources.append(Source(folder, merged=False))
        return True
    with os.scandir(real) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    if any(entry.name in _MARKS for entry in inside):
        found.sources.append(Source(folder, merged=False))
        return True
    holds_runs = False
    for entry in inside:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.name.endswith(".runs.parquet"):
            merges.append(layers_file(path))
        try:
            is_folder = entry.is_dir()
        except OSError as error:  # a link to itself
            found.skipped.append(Skip(str(path), why(error)))
            continue
        if is_folder:
            inner = os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)
            holds_runs |= _search_folder(path, inner, seen, found, merges)
    return holds_runs


def layers_file(path: Path) -> Path:
    """X.parquet, for X.runs.parquet and its like too: a shell's *.parquet names all files of a merge."""
    for name in TABLES:
        if name != "layers" and path.name.endswith(f".{name}.parquet"):
            return path.with_name(path.name.removesuffix(f".{name}.parquet") + ".parquet")
    return path


# Reading


def read(source: Source) -> Tables:
    """The tables of a source, cast to the schema and checked to belong together."""
    tables: Tables = {}
    sha256 = {} if source.merged else _finished(source.path).get("sha256", {})
    there = {name for name, file in runs.FILES.items() if name in CORE or file in sha256}
    notes = []
    for name in TABLES:  # layers first: their note says what an earlier merge consists of
        if name not in there:
            continue
        path = companion(source.path, name) if source.merged else source.path / runs.FILES[name]
        blob = None if source.merged else _bytes(path)
        tables[name], note = read_checked(path, name, source.merged, blob)
        if source.merged:
            notes.append((note.get("merge_id"), note.get("rows")))
            there |= set(note.get("rows") or ())
        elif blob is not None and sha256.get(path.name) != hashlib.sha256(blob).hexdigest():
            raise Unfit(f"{path.name} is not the file that the run wrote: its SHA-256 differs from {runs.STATUS}'s")
    n_rows = {name: table.num_rows for name, table in tables.items()}
    if source.merged and any(note != notes[0] or note[1] != n_rows for note in notes):
        raise Unfit("its files are not of one merge: merge again")
    _require_whole(tables, source.merged)
    return tables


def read_checked(path: Path, name: str, merged: bool, blob: bytes | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """One file of a run or of a merge, cast to the schema of this table, and its note."""
    data, note = read_noted(path, blob)
    if note.get("table") != name or bool(note.get("merged")) != merged:
        kind = "of an earlier merge" if merged else "of a run"
        raise Unfit(f"{path.name} does not hold the {name} {kind}")
    if (version := note.get("schema_version")) != SCHEMA_VERSION:
        raise Unfit(f"{path.name} has schema version {version}, this lnjac reads {SCHEMA_VERSION}")
    try:
        return conform(data, _DECLARED.get(name, pa.schema([]))), note
    except Unfit as error:
        raise Unfit(f"{path.name} {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unfit(_unread(path, error)) from None


def read_noted(
    path: Path, blob: bytes | None = None, columns: Sequence[str] | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """A table with the note that `runs.write_table` left in its footer; `blob` is the file's content, if already read."""
    try:
        data = runs.read_table(path if blob is None else pa.BufferReader(blob), columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Unfit(_unread(path, error)) from None
    try:
        note = json.loads((data.schema.metadata or {})[b"lnjac"])
    except (KeyError, ValueError):
        note = None
    if not isinstance(note, dict):
        raise Unfit(f"{path.name} was not written by lnjac")
    return data.replace_schema_metadata(), note


def _unread(path: Path, error: Exception) -> str:
    return f"{path.name} is missing" if isinstance(error, FileNotFoundError) else f"{path.name} cannot be read: {error}"


def _finished(folder: Path) -> dict[str, Any]:
    """The status of a finished run."""
    status = runs.read_status(folder)
    if not status:
        raise Unfit(runs.no_status(folder))
    if (state := status.get("status")) not in runs.FINISHED:
        raise Unfit(f"{state}: {status['error']}" if "error" in status else str(state))
    return status


def _require_whole(tables: Tables, merged: bool) -> None:
    """Every row belongs to a run of this source, every run is there once."""
    n_runs = tables["runs"].num_rows
    if n_runs == 0 or (n_runs > 1 and not merged):
        raise Unfit(f"holds {n_runs} runs")
    if len(pc.unique(_joined(tables["runs"], OWNER))) != n_runs:
        raise Unfit("holds the same run twice")
    for name, table in tables.items():
        known = _joined(tables["runs"], owner(name))
        if not pc.all(pc.is_in(_joined(table, owner(name)), value_set=known), min_count=0).as_py():
            raise Unfit(f"its {name} hold rows of a run that it does not have")


def positions(rows: pa.Table, known: pa.Table, names: Sequence[str]) -> Integers:
    """For each row the number of the run in `known` that has the same values in these columns."""
    if known.num_rows == 1:
        return np.zeros(rows.num_rows, np.int64)
    return np.asarray(pc.index_in(_joined(rows, names), value_set=_joined(known, names)).to_numpy(), np.int64)


def _joined(table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(*(table[name] for name in names), "/")


# Types


def conform(data: pa.Table, declared: pa.Schema) -> pa.Table:
    """Declared columns first and in their declared type, then the others in their own order and Arrow's widest type."""
    target = _target(data.schema, declared)
    if data.schema.equals(target):
        return data
    return pa.Table.from_arrays([_cast(data[field.name], field) for field in target], schema=target)


@lru_cache(maxsize=64)
def _target(found: pa.Schema, declared: pa.Schema) -> pa.Schema:
    there, known = set(found.names), set(declared.names)  # both are made anew at every access
    if missing := [name for name in declared.names if name not in there]:
        raise Unfit(f"lacks the column {', '.join(missing)}")
    if len(there) < len(found):
        raise Unfit("has two columns of one name")
    more = [field for field in found if field.name not in known]
    if nested := [field.name for field in more if pa.types.is_nested(field.type)]:
        raise Unfit(f"has lists or records in the column {', '.join(nested)}")
    return pa.schema([*declared, *(pa.field(field.name, _widest(field.type)) for field in more)])


def _cast(values: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if {_kind(values.type), _kind(field.type)} not in ({_kind(field.type)}, {"null", _kind(field.type)}):
        raise Unfit(f"has {field.name} as {values.type}, which is no {field.type}")
    try:
        return values.cast(field.type)
    except pa.ArrowException as error:
        raise Unfit(f"has a {field.name} that does not fit {field.type}: {error}") from None


def _widest(dtype: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(dtype):
        return _widest(dtype.value_type)
    if pa.types.is_integer(dtype):
        return pa.int64()
    if pa.types.is_floating(dtype):
        return pa.float64()
    if pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return pa.string()
    return dtype


def _kind(dtype: pa.DataType) -> str:
    """Types of one kind may be cast into each other: Arrow alone would also make text of a number."""
    widest = _widest(dtype)
    return "number" if widest in (pa.int64(), pa.float64()) else str(widest)


def agreed(schemas: Iterable[tuple[pa.Schema, Source]]) -> pa.Schema:
    """The union of the columns in order of first appearance: null gives way to any type, int64 to float64."""
    union: dict[str, tuple[pa.DataType, Source]] = {}
    for schema, source in schemas:
        for column, dtype in zip(schema.names, schema.types, strict=True):
            before, first = union.setdefault(column, (dtype, source))
            if before == pa.null() or {before, dtype} == {pa.int64(), pa.float64()}:
                union[column] = (dtype if before == pa.null() else pa.float64(), source)
            elif dtype not in (before, pa.null()):
                raise ConfigError(
                    f"{column} is {before} in {first.path} but {dtype} in {source.path}: merge them apart"
                )
    return pa.schema([(column, dtype) for column, (dtype, _) in union.items()])
