"""Find run folders and earlier merges, and read one: whole, unaltered, in its columns' types, or not at all."""

import hashlib
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lnjac.columns import KEY, Column
from lnjac.errors import ConfigError
from lnjac.files import why
from lnjac.runs import configs
from lnjac.runs import folder as runs
from lnjac.runs.merged import companion, finish, layers_file
from lnjac.runs.packed import PACKED, Table, as_stored, unpack
from lnjac.runs.schema import CORE, NEEDED, OWNER, SCHEMA_VERSION, Known, described, with_role

_MARKS = {runs.STATUS, *runs.FILES.values()}
"""A folder that has one of these is a run's."""

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
    """Raised, with the reason in one line, when a source cannot be merged."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))


# Finding


def search(paths: Iterable[Path]) -> Found:
    """Find every run folder in or at the paths, and every merged file named; each once, however often it is named.

    A folder is the runs that it holds now, whatever was merged from it earlier. One that holds none (results brought
    home) is its one merged table, and a note says so. A merge that was cut off while its files were moved is finished.

    Raises:
        ConfigError: A path does not exist, or cannot be meant.
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
        else:
            layers = layers_file(path)
        finish(layers)
        if not (path.exists() or layers.exists()):
            raise ConfigError(f"{path} does not exist")
        if path.name in (*runs.FILES.values(), runs.STATUS):
            raise ConfigError(f"{path} is one file of a run: name its folder, {path.parent}")
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


# Reading


class Contents(NamedTuple):
    """The tables of a source, or of several on top of one another, and what is known of their columns."""

    tables: dict[str, pa.Table]
    known: dict[str, Known]
    numbers: dict[str, Integers]
    """For each row of a table the place of its run in `runs`."""


class Opened(NamedTuple):
    """The tables of a source as its files hold them: unaltered and of one run or merge, their columns not checked yet."""

    source: Source
    tables: dict[str, Table]

    @property
    def kind(self) -> Hashable:
        """What is equal for runs whose tables have the same columns, described in the same words."""
        if self.source.merged:
            return self.source
        return tuple((name, table.schema, repr(table.note.get("columns"))) for name, table in self.tables.items())

    def file(self, table: str) -> str:
        """Return the name of a table's file."""
        return companion(self.source.path, table).name if self.source.merged else runs.file_of(table)


def read(source: Source) -> Contents:
    """Return the tables of a source, their types and that they belong together checked. Raises Unfit."""
    return contents([opened(source)])


def opened(source: Source) -> Opened:
    """Return the tables of a source, its files verified. Raises Unfit."""
    return Opened(source, _of_merge(source.path) if source.merged else _of_run(source.path))


def contents(group: Sequence[Opened]) -> Contents:
    """Return the tables of sources of one kind, their types and that rows and runs belong together checked.

    Raises Unfit, with the reason for one of them: to know for which, try each alone.
    """
    found, first = Contents({}, {}, {}), group[0]
    for name, table in first.tables.items():
        rows = pa.Table.from_batches([rows for each in group for rows in each.tables[name].rows])
        found.known[name] = described(name, table.note)
        try:
            found.tables[name] = conform(rows.combine_chunks() if len(group) > 1 else rows, name, found.known[name])
        except Unfit as error:
            raise Unfit(f"{first.file(name)} {error}") from None
    if first.source.merged:
        _number_rows(found)
        return found
    for name in found.tables:
        found.numbers[name] = np.repeat(np.arange(len(group)), [each.tables[name].n_rows for each in group])
    _require_own_rows(found)
    notes = [each.tables["runs"].note for each in group]
    told = np.flatnonzero(["config" in note for note in notes])
    found.tables[configs.CONFIGS] = configs.of_runs(found.tables["runs"].take(told), [notes[number] for number in told])
    found.known[configs.CONFIGS], found.numbers[configs.CONFIGS] = configs.KNOWN, told
    return found


def _of_run(folder: Path) -> dict[str, Table]:
    sha256, found = _finished(folder).get("sha256"), dict[str, Table]()
    if not isinstance(sha256, dict):
        raise Unfit(f"{runs.STATUS} lists no files")
    written = [file.removesuffix(".parquet") for file in sha256 if file.endswith(".parquet")]
    small = _small_tables(folder, sha256.get(PACKED))
    for name in (*CORE, *runs.in_long_form(written)):
        file = runs.file_of(name)
        try:
            content, digest = _content(folder, file)
        except OSError as error:
            raise Unfit(_unread(file, error)) from None
        found[name] = small[digest] if digest in small else as_stored(*read_noted(folder / file, content))
        _require_noted(file, found[name].note, name, merged=False)
        if sha256.get(file) != digest:
            raise Unfit(f"{file} is not the file that the run wrote: its SHA-256 differs from {runs.STATUS}'s")
    if (n_runs := found["runs"].n_rows) != 1:
        raise Unfit(f"holds {n_runs} runs")
    return found


def _small_tables(folder: Path, sha256: str | None) -> dict[str, Table]:
    """Return a run's small tables by the SHA-256 of their Parquet files; none if they are not as the run wrote them."""
    try:
        content, digest = _content(folder, PACKED) if sha256 else (b"", "")
    except OSError:
        return {}
    return unpack(content) if digest == sha256 else {}


def _content(folder: Path, file: str) -> tuple[bytes, str]:
    """Return a file's content and its SHA-256."""
    with open(f"{folder}/{file}", "rb") as opened:  # a Path takes as long to make as the file to read
        content = opened.read()
    return content, hashlib.sha256(content).hexdigest()


def _of_merge(layers: Path) -> dict[str, Table]:
    found, written = dict[str, Table](), list[Any]()
    names = [*CORE]
    for name in names:
        path = companion(layers, name)
        found[name] = as_stored(*read_noted(path))
        note = found[name].note
        _require_noted(path.name, note, name, merged=True)
        written.append((note.get("merge_id"), rows := note.get("rows")))
        if name == "layers" and isinstance(rows, dict):  # which says what else the merge consists of
            names += runs.in_long_form(rows)
    n_rows = {name: table.n_rows for name, table in found.items()}
    if any(note != written[0] or note[1] != n_rows for note in written):
        raise Unfit("its files are not of one merge: merge again")
    if not n_rows["runs"]:
        raise Unfit("holds 0 runs")
    return found


def read_checked(path: Path, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """Return one table of a run, in its columns' types, and its note. Raises Unfit."""
    data, note = read_noted(path)
    _require_noted(path.name, note, name, merged=False)
    try:
        return conform(data, name, described(name, note)), note
    except Unfit as error:
        raise Unfit(f"{path.name} {error}") from None


def _require_noted(file: str, note: Mapping[str, Any], name: str, merged: bool) -> None:
    """Raise Unfit unless a file's note says that it holds this table, of this version."""
    if note.get("table") != name or bool(note.get("merged")) != merged:
        kind = "of an earlier merge" if merged else "of a run"
        raise Unfit(f"{file} does not hold the {name} {kind}")
    if (version := note.get("schema_version")) != SCHEMA_VERSION:
        raise Unfit(f"{file} has schema version {version}, this lnjac reads {SCHEMA_VERSION}")


def read_noted(
    path: Path, blob: bytes | None = None, columns: Sequence[str] | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Return a table and the note in its footer; `blob` is the file's content, if already read. Raises Unfit."""
    try:
        data = runs.read_table(path if blob is None else pa.BufferReader(blob), columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Unfit(_unread(path.name, error)) from None
    try:
        note = runs.note_in(data.schema.metadata)
    except ValueError:
        raise Unfit(f"{path.name} was not written by lnjac") from None
    return data.replace_schema_metadata(), note


def _unread(file: str, error: Exception) -> str:
    return f"{file} is missing" if isinstance(error, FileNotFoundError) else f"{file} cannot be read: {error}"


def _finished(folder: Path) -> dict[str, Any]:
    """The status of a finished run."""
    status = runs.read_status(folder)
    if not status:
        raise Unfit(runs.no_status(folder))
    if (state := status.get("status")) not in runs.FINISHED:
        raise Unfit(f"{state}: {status['error']}" if "error" in status else str(state))
    return status


def _require_own_rows(found: Contents) -> None:
    """Raise Unfit unless every row holds the identity of the run in whose folder it is."""
    table = found.tables["runs"]
    for name, rows in found.tables.items():
        for key in owner(found.known[name]):
            own = pc.equal(rows[key], table[key].take(found.numbers[name]))
            if not pc.all(own, skip_nulls=False, min_count=0).as_py():
                raise Unfit(f"its {name} hold rows of a run that it does not have")


def _number_rows(found: Contents) -> None:
    """Number the rows of an earlier merge by its runs. Raises Unfit if one is of none, or a run is there twice."""
    table = found.tables["runs"]
    if len(pc.unique(_joined(table, OWNER))) != table.num_rows:
        raise Unfit("holds the same run twice")
    for name, rows in found.tables.items():
        by = owner(found.known[name])
        number = pc.index_in(_joined(rows, by), value_set=_joined(table, by))
        if number.null_count:
            raise Unfit(f"its {name} hold rows of a run that it does not have")
        found.numbers[name] = np.asarray(number.to_numpy(), np.int64)


def owner(known: Known) -> list[str]:
    """Return the columns of a table that name the run of a row."""
    return [name for name in OWNER if name in known and known[name].role == KEY]


def _joined(table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(*(table[name] for name in names), "/")


# Types


def conform(data: pa.Table, name: str, known: Known) -> pa.Table:
    """Return the table with described columns first and in their type, then the others in Arrow's widest type.

    A described column that is not there is left out, but for those that the table cannot be read without. Raises Unfit.
    """
    target = _target(data.schema, name, tuple(known.values()))
    if data.schema.equals(target):
        return data
    return pa.Table.from_arrays([_cast(data[field.name], field) for field in target], schema=target)


@lru_cache(maxsize=256)
def _target(found: pa.Schema, name: str, columns: tuple[Column, ...]) -> pa.Schema:
    known = {column.name: column for column in columns}
    there, needed = set(found.names), [*with_role(KEY, known), *NEEDED.get(name, ())]
    if "run_id" not in needed:
        raise Unfit(f"does not describe the columns that name a row of {name}: run_id must be one")
    if missing := [column for column in needed if column not in there]:
        raise Unfit(f"lacks the column {', '.join(missing)}")
    if len(there) < len(found):
        raise Unfit("has two columns of one name")
    more = [field for field in found if field.name not in known]
    if nested := [field.name for field in more if pa.types.is_nested(field.type)]:
        raise Unfit(f"has lists or records in the column {', '.join(nested)}")
    own = runs.schema(column for column in columns if column.name in there)
    return pa.schema([*own, *(pa.field(field.name, _widest(field.type)) for field in more)])


def _cast(values: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if {_kind(values.type), _kind(field.type)} not in ({_kind(field.type)}, {"null", _kind(field.type)}):
        raise Unfit(f"has {field.name} as {values.type}, which is no {field.type}")
    try:
        return values.cast(field.type)
    except pa.ArrowException as error:
        raise Unfit(f"has a {field.name} that does not fit {field.type}: {error}") from None


def _widest(dtype: pa.DataType) -> pa.DataType:
    if pa.types.is_integer(dtype):
        return pa.int64()
    if pa.types.is_floating(dtype):
        return pa.float64()
    return pa.string() if pa.types.is_large_string(dtype) else dtype


def _kind(dtype: pa.DataType) -> str:
    """Types of one kind may be cast into each other: Arrow alone would also make text of a number."""
    widest = _widest(dtype)
    return "number" if widest in (pa.int64(), pa.float64()) else str(widest)
