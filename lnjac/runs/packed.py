"""Keep a finished run's small tables once more in one file, which is read in a twentieth of the time that Parquet takes.

Each table stands there under the SHA-256 of its Parquet file. So it is found only by who has read and hashed that very file,
and can never be older or newer than it.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

PACKED = "rows.arrows"

LARGEST = 200_000
"""Bytes in memory up to which a table is packed: Parquet keeps a larger one in fewer, and is quick to read it."""

INDEX = pa.schema([("sha256", pa.string()), ("note", pa.string())])
"""The table that comes first: for each of the others its Parquet file's SHA-256 and note."""


class Table(NamedTuple):
    """The rows of one table in one piece or several, without metadata, and the note in its file."""

    rows: list[pa.RecordBatch]
    schema: bytes
    """As Arrow writes it: bytes are compared and hashed in a hundredth of the time that a schema takes."""
    note: dict[str, Any]

    @property
    def n_rows(self) -> int:
        return sum(rows.num_rows for rows in self.rows)


def as_stored(data: pa.Table, note: dict[str, Any]) -> Table:
    """Return a table as `unpack` does."""
    data = data.replace_schema_metadata()
    return Table(data.to_batches() or [_empty(data.schema)], data.schema.serialize().to_pybytes(), note)


def pack(tables: Mapping[str, Table]) -> bytes:
    """Return the content of the file, given each table by the SHA-256 of its Parquet file."""
    notes = [json.dumps(table.note) for table in tables.values()]
    index = pa.table([list(tables), notes], schema=INDEX)
    sink = pa.BufferOutputStream()
    for rows, schema, _ in (as_stored(index, {}), *tables.values()):
        sink.write(schema)
        sink.write(pa.concat_batches(rows).serialize())
    content: bytes = sink.getvalue().to_pybytes()
    return content


def unpack(content: bytes) -> dict[str, Table]:
    """Return the tables by the SHA-256 of their Parquet files, given the content of the file, which must be unaltered."""
    source, found = pa.BufferReader(content), []
    while (start := source.tell()) < len(content):
        pa.ipc.read_message(source)
        schema = content[start : source.tell()]
        found.append((pa.ipc.read_record_batch(pa.ipc.read_message(source), _schema(schema)), schema))
    (index, _), *tables = found
    return {
        sha256: Table([rows], schema, json.loads(note))
        for (rows, schema), sha256, note in zip(tables, *index.to_pydict().values(), strict=True)
    }


@lru_cache(maxsize=256)
def _schema(content: bytes) -> pa.Schema:
    """Return a schema; runs of one sweep share it."""
    return pa.ipc.read_schema(pa.py_buffer(content))


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema)
