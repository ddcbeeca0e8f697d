"""Keep an unfinished run's rows on disk as they come in: a line for each call, with a checksum.

Once a call has returned, its line is the operating system's: whatever ends the process, SIGKILL included, loses none. Lines
are not forced through to the disk (fsync), which would cost milliseconds a call on a disk and seconds on some network file
systems. So a machine that loses its power may lose the last seconds. A line that it cut is found by its checksum.
"""

import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lnjac.files import why, write_atomically

log = logging.getLogger(__name__)

Entry = Mapping[str, Any]

FORMAT = 1
"""Raised when entries change their form: another format's journal is not read."""

_encoded = json.JSONEncoder(separators=(",", ":")).encode


class Damaged(ValueError):
    """Raised when a line before the last one is not as it was written."""


class Journal:
    """The writing side of a journal. The first line replaces whatever an earlier start left, unless `keep` was called.

    A line that the file system refuses is kept in memory and written with the next one.
    """

    def __init__(self, path: Path, header: Entry) -> None:
        self.path, self.header = path, header
        self.lines = 0
        self.file: BinaryIO | None = None
        self.pending = b""
        self.refused = False

    def add(self, entry: Entry) -> None:
        """Append an entry of JSON values."""
        if not self.lines:
            self.pending = _line({"format": FORMAT, **self.header})
        self.pending += _line(entry)
        self.lines += 1
        try:
            if self.file is None:
                self.file = self.path.open("wb", buffering=0)
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending) :]
            self.refused = False
        except OSError as error:
            if not self.refused:
                log.warning(
                    "%s cannot be written (%s): rows are in memory alone, and are written as soon as it can",
                    self.path,
                    why(error),
                )
            self.refused = True

    def keep(self, header: Entry, entries: Iterable[Entry]) -> None:
        """Replace the file by one with this header and these entries alone, to which `add` appends."""
        lines = [_line({"format": FORMAT, **header}), *map(_line, entries)]
        write_atomically(self.path, lambda temporary: temporary.write_bytes(b"".join(lines)))
        self.lines = len(lines) - 1
        self.file = self.path.open("ab", buffering=0)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the entries of a journal; a last line that was cut is left out.

    Raises:
        Damaged: A line is not as it was written, or the journal is of another format.
        FileNotFoundError: There is none.
    """
    *lines, _ = path.read_bytes().split(b"\n")  # a whole line ends in \n
    entries = [_entry(line, number) for number, line in enumerate(lines, 1)]
    header = entries.pop(0) if entries else {}
    if entries and header.get("format") != FORMAT:
        raise Damaged(f"it has format {header.get('format')}, this lnjac reads {FORMAT}")
    return header, entries


def _line(entry: Entry) -> bytes:
    text = _encoded(entry).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _entry(line: bytes, number: int) -> dict[str, Any]:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise Damaged(f"line {number} was altered after it was written: its checksum differs")
    entry: dict[str, Any] = json.loads(text)
    return entry
