"""A run's folder, read and written without torch: tables, status, provenance.

Every file is written beside its final name and moved there in one step; `status.json` is written last. So a folder whose
status says `done` or `diverged` is whole, whatever happened to the process.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, SoftFileLock, Timeout

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.files import file_sha256, why, write_atomically
from lnjac.runs import packed
from lnjac.runs.schema import CORE, DTYPES, FROZEN, SCHEMA_VERSION, describe, in_order

STATUS = "status.json"
FILES = {name: f"{name}.parquet" for name in FROZEN} | {"runs": "run.parquet", "curves": "curve.parquet"}
"""The files of the known tables in a run's folder; those in long form are there only where they have rows."""
MODEL = "model.safetensors"
BATCH = "diagnostic_batch.safetensors"
CHECKPOINT = "checkpoint.safetensors"
JOURNAL = "rows.journal"
"""The rows of a run that is not finished."""
LOCK = ".lock"

SMALL = 200
"""Rows below which a file is written for speed: it is mostly footer, however its pages are encoded."""

ROW_GROUP = 1 << 18
"""Rows that are encoded at once: what a writer holds in memory beside the table."""

RUNNING, INTERRUPTED, DONE, FAILED, DIVERGED = "running", "interrupted", "done", "failed", "diverged"
FINISHED = (DONE, DIVERGED)

ARROW = dict(zip(DTYPES, (pa.int64(), pa.float64(), pa.string(), pa.bool_()), strict=True))


def file_of(table: str) -> str:
    """Return the name of a table's file in a run's folder."""
    return FILES.get(table, f"{table}.parquet")


def in_long_form(names: Iterable[str]) -> list[str]:
    """Return those of the names that a table in long form may have: its file is no other table's, and in the folder."""
    taken = (*CORE, *(Path(FILES[name]).stem for name in CORE))
    return in_order(name for name in names if name.isidentifier() and name not in taken)


def schema(columns: Iterable[Column]) -> pa.Schema:
    return pa.schema([pa.field(column.name, ARROW[column.dtype]) for column in columns])


def table(
    declared: Sequence[Column], config: Sequence[tuple[Column, Any]], rows: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """Rows as one typed table: declared columns, then the config's (the same in every row).

    Raises KeyError when a row lacks a declared column or holds one that is not declared: a row is never silently cut.
    """
    for row in rows:
        if unknown := set(row) ^ {column.name for column in declared}:
            raise KeyError(f"row and declared columns differ in {sorted(unknown)}")
    data: dict[str, list[Any]] = {column.name: [row[column.name] for row in rows] for column in declared}
    data |= {column.name: [value] * len(rows) for column, value in config}
    return pa.table(data, schema=schema([*declared, *(column for column, _ in config)]))


def write_table(path: Path, data: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Write a table with checksums on every page and over its footer; `metadata` goes there as JSON under the key `lnjac`.

    Column statistics are left out: in files of ten rows they are most of the bytes, and nothing here reads them. Nor do
    small files gain by dictionaries or zstd, which double the time that each takes to write and to read; in large ones
    only text repeats enough for a dictionary, and numbers shrink further with their bytes side by side. The file is
    written where it is: what must not be seen half-written goes through `write_atomically`.
    """
    small = data.num_rows < SMALL
    text = [field.name for field in data.schema if pa.types.is_string(field.type)]
    numbers = [field.name for field in data.schema if pa.types.is_floating(field.type)]
    note = json.dumps({"schema_version": SCHEMA_VERSION, **metadata})
    with pq.ParquetWriter(
        path,
        data.schema.remove_metadata(),
        compression="snappy" if small else "zstd",
        use_dictionary=False if small else text,
        use_byte_stream_split=False if small else numbers,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(data, row_group_size=ROW_GROUP)
        writer.add_key_value_metadata({"lnjac": note, SEAL: UNSEALED})
    with path.open("r+b") as file:
        start, footer = _footer(file)
        at = _seal(footer)
        assert at is not None
        file.seek(start + at)
        file.write(hashlib.sha256(footer).hexdigest().encode())


SEAL, UNSEALED = "lnjac.footer_sha256", "0" * 64
"""Key of the footer's own SHA-256, and the value that stands there while the footer is hashed.

Pages carry checksums; the footer, with the columns' names, types and places, has none in Parquet.
"""


def _require_sealed(file: pa.NativeFile) -> None:
    """Raise ArrowInvalid if the footer is not the one that `write_table` wrote; one without a checksum passes."""
    _, footer = _footer(file)
    file.seek(0)
    if (at := _seal(footer)) is None:  # another program's, or an earlier lnjac's
        return
    found = footer[at : at + len(UNSEALED)]
    plain = footer[:at] + UNSEALED.encode() + footer[at + len(UNSEALED) :]
    if hashlib.sha256(plain).hexdigest().encode() != found:
        raise pa.ArrowInvalid("its footer was altered after it was written: its SHA-256 differs")


def _footer(file: "BinaryIO | pa.NativeFile") -> tuple[int, bytes]:
    """Return where the footer begins, and its bytes with its length and the mark that end the file."""
    size: int = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little") + 8
    start = max(0, size - length)
    file.seek(start)
    return start, file.read()


def _seal(footer: bytes) -> int | None:
    """Return where the SHA-256 stands in the footer: after its key and Thrift's header of a text of 64 bytes."""
    mark = SEAL.encode() + b"\x18\x40"
    at = footer.rfind(mark)
    return None if at < 0 else at + len(mark)


class RunFolder:
    """The writing side of one run's folder, claimed until `release`: no other process may write to it meanwhile.

    Raises InUse when another process holds it. `identity` (run_id, diag_id) goes into every status.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = claimed(self.path)
        for left in self.path.glob(".*.tmp"):  # by a writer that was killed: nobody else may write here
            left.unlink(missing_ok=True)
        self.written: dict[str, str] = {}
        self.small: dict[str, packed.Table] = {}

    def release(self) -> None:
        self.lock.release()

    def status(self, state: str, **more: Any) -> None:
        """Say what became of the run: running, interrupted, done, failed or diverged, with an `error` or `step` if any.

        The status also holds the SHA-256 of each file written so far: one that an earlier run left in the folder is not
        in it.
        """
        text = json.dumps({"status": state, "at": now(), **self.identity, **more, "sha256": self.written}, indent=1)
        write_atomically(self.path / STATUS, lambda temporary: temporary.write_text(text + "\n"))

    def write(
        self,
        name: str,
        columns: Sequence[Column],
        rows: Sequence[Mapping[str, Any]],
        config: Sequence[tuple[Column, Any]],
        metadata: Mapping[str, Any],
    ) -> None:
        """Write a table, with the descriptions of those columns that files did not always have.

        Args:
            name: One of CORE, or any other name for a table in long form.
            columns: The table's columns; those with the role of a key name a row, `run_id` among them.
            rows: A value for each column.
            config: Columns of the config and their values. Only layers and runs hold them, the others are joined by run_id.
            metadata: What else the file's note holds.
        """
        if name not in (*CORE, *in_long_form([name])):
            raise ConfigError(f"a table cannot be called {name!r}: choose a name like `swaps`")
        data = table(columns, config if name in ("layers", "runs") else (), rows)
        own = describe(column for column in columns if column.name not in FROZEN.get(name, {}))
        note = {"table": name, **metadata, **({"columns": own} if own else {})}
        self.save_table(name, data, note)

    def save_table(self, name: str, data: pa.Table, metadata: Mapping[str, Any]) -> None:
        """Write a table, and keep it for `pack` if it is small."""
        file, note = file_of(name), {"schema_version": SCHEMA_VERSION, **metadata}
        self.save(file, lambda path: write_table(path, data, note))
        if data.nbytes <= packed.LARGEST:
            self.small[self.written[file]] = packed.as_stored(data, note)

    def pack(self) -> None:
        """Write the small tables once more, into one file, from which a merge has them sooner."""
        self.save(packed.PACKED, lambda path: path.write_bytes(packed.pack(self.small)))

    def save(self, file: str, write: Callable[[Path], object]) -> None:
        """Let `write` make one of the folder's files; on any error it stays as it was."""
        write_atomically(self.path / file, write)
        self.written[file] = file_sha256(self.path / file)


class InUse(Exception):
    """Raised when a run's folder is held by another process; `alive` is False where nobody can say if that is alive."""

    def __init__(self, said: str, *, alive: bool = True) -> None:
        super().__init__(said)
        self.alive = alive


def claimed(folder: Path) -> FileLock:
    """Claim the folder for this process, until the lock is released; it goes with its process, however that ends.

    Raises InUse when another process holds it. Without flock (some network file systems) the lock is its file, which a
    killed process leaves behind; filelock removes it where it names a process of this host that is gone.
    """
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            raise InUse(f"{folder} is being written by another process") from None
        raise InUse(
            f"{folder} is locked, and its file system offers no flock to tell whether by a living process: "
            f"if no run writes there, delete {folder / LOCK}",
            alive=False,
        ) from None
    return lock


def read_status(folder: Path) -> dict[str, Any]:
    """The folder's status; {} when there is none or it is not readable as one."""
    try:
        found = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def no_status(folder: Path) -> str:
    """Say why `read_status` finds none."""
    try:
        (folder / STATUS).read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{STATUS}: {why(error)}"
    return f"no readable {STATUS}"


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the note that `write_table` put into the footer. Raises ValueError for a file that is not lnjac's."""
    with _opened(path) as source:
        return note_in(pq.read_metadata(source).metadata)


def note_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return the note among a file's or a schema's metadata. Raises ValueError if there is none."""
    found = json.loads((metadata or {}).get(b"lnjac", b"null"))
    if not isinstance(found, dict):
        raise ValueError("it was not written by lnjac")
    return found


def read_table(path: Path | pa.NativeFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, or only some of its columns, verifying the checksums of its footer and its pages."""
    with _opened(path) as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        return file.read(columns, use_threads=file.metadata.num_rows >= SMALL)


@contextmanager
def _opened(path: Path | pa.NativeFile) -> Iterator[pa.NativeFile]:
    """Open a Parquet file, or take an open one, and verify its footer."""
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise OSError("it is not a regular file")  # a pipe would be waited for
    with pa.OSFile(str(path)) if isinstance(path, Path) else nullcontext(path) as file:
        _require_sealed(file)
        yield file


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def provenance(folder: Path | None = None) -> dict[str, Any]:
    """Return which code runs, lnjac's or that of another folder: git commit, whether tracked files differ, Python version."""
    here = folder or Path(__file__).resolve().parents[1]
    commit = _git(here, "rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(_git(here, "status", "--porcelain", "--untracked-files=no", ".")),
        "python_version": platform.python_version(),
    }


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
