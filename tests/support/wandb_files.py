"""Read the files that W&B writes offline: records of protobuf in LevelDB's log format, without a reader of W&B's own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 1 << 15
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def messages(file: Path) -> Iterator[Any]:
    """Yield every record of a run-*.wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += HEADER + length
        if at > len(data):  # not written to its end yet
            return
        parts = (b"" if kind in (FULL, FIRST) else parts) + data[at - length : at]
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


def history(file: Path) -> dict[tuple[str, int], list[float]]:
    """Return the values drawn, by curve and step."""
    found: dict[tuple[str, int], list[float]] = {}
    for record in messages(file):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if not name.startswith("_"):
                found.setdefault((name, int(row["_step"])), []).append(value)
    return found
