"""Keep each run's config in merged tables, so that the command that makes the run again can be told from them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lnjac.columns import VOLATILE, Column
from lnjac.runs.identity import is_absolute
from lnjac.runs.schema import OWNER, RUNS, Known

CONFIGS = "configs"
"""The table of a merge that has a row for each run."""

PATH = "PATH"
"""Stands for an absolute path."""

COLUMNS = [
    *(column for column in RUNS if column.name in OWNER),
    Column("config", "string", "", "the run's config as JSON; PATH stands for an absolute path", VOLATILE),
    Column("command", "string", "", "the words that started it by Hydra, as JSON; null of lnjac's own runs", VOLATILE),
]
"""Two makings of one run may differ in how they were executed, and so in their configs."""

KNOWN: Known = {column.name: column for column in COLUMNS}


def of_runs(runs: pa.Table, notes: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the table, given the rows of runs and for each the note in its file, which tells its config."""
    configs = [json.dumps(without_paths(note["config"])) for note in notes]
    commands = [[_without_path(word) for word in note.get("command", ())] for note in notes]
    values = {
        **{name: runs[name] for name in OWNER},
        "config": pa.array(configs, pa.string()),
        "command": pa.array([json.dumps(words) if words else None for words in commands], pa.string()),
    }
    return pa.table(values)


def without_paths(value: Any) -> Any:
    """Return plain values with PATH for each absolute path, which no other machine has."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    may_be = isinstance(value, str) and (
        value[:1] in "/\\~" or value[1:2] == ":"
    )  # pathlib takes a hundred times as long
    return PATH if may_be and is_absolute(value) else value


def _without_path(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={PATH}" if is_absolute(value.strip("'\"")) else word
