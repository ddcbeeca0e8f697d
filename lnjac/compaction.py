"""What a merge remembers of the run folders it read, so that later merges need not open the unchanged ones again.

X.index.json lies beside X.parquet. It names each run whose rows and types stand in the merge just as they do in the run's
folder, by a proof: a hash of its status.json, which has the SHA-256 of each table, and of the tables' sizes and times of
change. A folder that gives the same proof is one that was read and verified; its rows are then taken from the merge, if
the merge's files are, by their SHA-256, those that were written with the index.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lnjac import runs
from lnjac.pile import Combined, Pile
from lnjac.sources import Source, Tables, companion, companions, index_file, owner, positions, report_file
from lnjac.tables import CORE, SCHEMA_VERSION, TABLES

Schemas = Mapping[str, pa.Schema]

TYPES = {str(dtype): dtype for dtype in runs.ARROW.values()}
"""Types by the name that the index gives them: runs with columns of others are read anew."""


VERSION = hashlib.sha256(repr((SCHEMA_VERSION, TABLES)).encode()).hexdigest()[:16]
"""Of all that a table is checked against: what was verified under other declarations is verified anew."""


_FILES = {file: None if name in CORE else file.encode() for name, file in runs.FILES.items()}
"""The files of a run, and what its status says if it has one of those that not every run has."""


def proof(source: Source) -> str:
    """What stays the same only while the source does; a folder that is renamed, or copied with its times, keeps it."""
    status = b""
    if source.merged:
        files = [*map(str, companions(source.path).values())]
    else:
        folder = os.fspath(source.path)
        with suppress(OSError), open(f"{folder}/{runs.STATUS}", "rb", buffering=0) as file:
            status = file.read()  # a folder without one is a state like another
        files = [f"{folder}/{file}" for file, listed in _FILES.items() if listed is None or listed in status]
    return hashlib.sha256(status + repr([_state(file) for file in files]).encode()).hexdigest()[:32]


def _state(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Index:
    """Of one merge: what it was asked, the SHA-256 of its report and its tables, and the runs that stand in it unchanged.

    `runs` has for each proof the run's row in the table of runs, and the number of its kind: the names and types of its
    own columns by table. Columns that only other runs have are null in its rows, and no part of it.
    """

    request: str
    report: str
    files: dict[str, str]
    runs: dict[str, tuple[int, int]]
    kinds: list[dict[str, list[tuple[str, str]]]]
    version: str = VERSION

    @classmethod
    def load(cls, layers: Path) -> "Index | None":
        """None where there is none that this lnjac reads."""
        try:
            index = cls(**json.loads(index_file(layers).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return index if index.version == VERSION else None

    def write(self, layers: Path) -> None:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}  # asdict copies every run's entry
        index_file(layers).write_text(json.dumps(plain), encoding="utf-8")

    def intact(self, layers: Path) -> bool:
        """Whether all files of the merge are as they were written."""
        files = {companion(layers, name): sha256 for name, sha256 in self.files.items()}
        files[report_file(layers)] = self.report
        return all(_is_file(path, sha256) for path, sha256 in files.items())

    def is_of(self, proofs: Sequence[str]) -> bool:
        """Whether the runs of these proofs, in this order, are the runs it knows, and would give columns in this order."""
        if len(proofs) != len(self.runs) or set(proofs) != self.runs.keys():
            return False
        kinds = list(dict.fromkeys(self.runs[proof][1] for proof in proofs))
        return kinds == sorted(kinds)

    def report_of(self, layers: Path) -> str | None:
        """What the merge said of itself; None if that is not what was written."""
        path = report_file(layers)
        return path.read_text(encoding="utf-8") if _is_file(path, self.report) else None

    def copy(self, layers: Path, to: Path) -> dict[str, str]:
        """Copy the merge's tables to another merge's place; returns their SHA-256. Raises Altered."""
        for name, sha256 in self.files.items():
            try:
                shutil.copyfile(companion(layers, name), companion(to, name))
            except OSError as error:
                raise Altered from error
            if not _is_file(companion(to, name), sha256):
                raise Altered
        return self.files

    @cached_property
    def schemas(self) -> list[Schemas]:
        return [
            {name: pa.schema([(column, TYPES[dtype]) for column, dtype in columns]) for name, columns in kind.items()}
            for kind in self.kinds
        ]

    def read(self, layers: Path, rows: Sequence[int]) -> Tables | None:
        """The tables of the runs in these rows of the table of runs, in its order; None unless all files are intact."""
        tables: Tables = {}
        try:
            for name, sha256 in self.files.items():
                with pa.memory_map(str(companion(layers, name))) as file:
                    content = file.read_buffer()
                    if hashlib.sha256(content).hexdigest() != sha256:
                        return None
                    tables[name] = pq.ParquetFile(pa.BufferReader(content)).read().replace_schema_metadata()
        except OSError:
            return None
        known = tables["runs"]
        if len(rows) == known.num_rows:
            return tables
        wanted = np.zeros(known.num_rows, bool)
        wanted[rows] = True
        of_run = {name: positions(table, known, owner(name)) for name, table in tables.items()}
        return {name: table.filter(pa.array(wanted[of_run[name]])) for name, table in tables.items()}


class Altered(Exception):
    """A merge's files are not those that were written with its index."""


def _is_file(path: Path, sha256: str) -> bool:
    try:
        return runs.file_sha256(path) == sha256
    except OSError:
        return False


def load(merges: Iterable[Path]) -> dict[Path, Index]:
    """The index of each merge that has one."""
    found = {layers: Index.load(layers) for layers in merges}
    return {layers: index for layers, index in found.items() if index is not None}


class Memory(NamedTuple):
    """What one earlier merge gave: the tables of some runs, the folder of each, and the columns of each."""

    tables: Tables
    sources: list[Source]
    schemas: list[Schemas]


def recall(proofs: Mapping[Source, str], merges: Mapping[Path, Index]) -> list[Memory]:
    """What these merges know of the sources; each source's rows come from one merge at most."""
    left = {proof: source for source, proof in proofs.items() if not source.merged}
    memories = []
    for layers, index in merges.items():
        hits = sorted((index.runs[proof], proof) for proof in left.keys() & index.runs.keys())
        if hits and (tables := index.read(layers, [row for (row, _), _ in hits])):
            schemas = [index.schemas[kind] for (_, kind), _ in hits]
            memories.append(Memory(tables, [left.pop(proof) for _, proof in hits], schemas))
    return memories


def remember(
    proofs: Mapping[Source, str], pile: Pile, combined: Combined
) -> tuple[dict[str, tuple[int, int]], list[dict[str, list[tuple[str, str]]]]]:
    """`runs` and `kinds` of the index: the runs of which every row was kept, and every column in its own type."""
    types = {
        name: dict(zip(table.schema.names, table.schema.types, strict=True)) for name, table in combined.tables.items()
    }
    kinds: list[dict[str, list[tuple[str, str]]]] = []
    numbers: dict[int, int | None] = {}
    for kind in pile.declared.values():
        own = {name: schema for name, schema in kind.schemas.items() if name in types}
        fits = all(types[name][field.name] == field.type in TYPES.values() for name in own for field in own[name])
        numbers[id(kind)] = len(kinds) if fits else None
        if fits:
            kinds.append({name: [(field.name, str(field.type)) for field in schema] for name, schema in own.items()})
    known = {}
    for row, unit in enumerate(combined.units.tolist()):
        source, number = pile.sources[unit], numbers[id(pile.kinds[unit])]
        if combined.whole[unit] and number is not None and not source.merged:
            known[proofs[source]] = (row, number)
    return known, kinds
