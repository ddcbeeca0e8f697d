"""The columns of a run and its curve, and what is known of any file's columns: each file describes its own.

Files written before they did so hold columns of `frozen.json`, which is never edited: nothing that is declared later changes
how they are read.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lnjac.columns import KEY, ROLES, VOLATILE, Column

SCHEMA_VERSION = 2
"""Raised only when files are laid out anew, or a column of old changes its meaning: tables of another version are not read.
A column that is added does not raise it."""

DTYPES = ("int64", "float64", "string", "bool")

RUN_ID = Column(
    "run_id", "string", "", "identity of the run's science: config with seed, corpus content, numerics version", KEY
)
DIAG_ID = Column("diag_id", "string", "", "identity of the diagnostic's settings", KEY)
STEP = Column("step", "int64", "updates", "optimizer updates done when the row was measured", KEY)
MEASURED_AT = (RUN_ID, DIAG_ID, STEP)
"""What every table of measurements begins with."""

RUNS = [
    RUN_ID,
    DIAG_ID,
    Column("status", "string", "", "done, or diverged: the loss turned non-finite"),
    Column("diverged_step", "int64", "updates", "updates done when the loss turned non-finite; null otherwise"),
    Column("steps_done", "int64", "updates", "optimizer updates done"),
    Column(
        "train_loss_nats", "float64", "nats/token", "mean training loss of the last 10 updates (fewer in a shorter run)"
    ),
    Column("val_loss_nats", "float64", "nats/token", "mean loss over the validation windows after the last update"),
    Column("unigram_nats", "float64", "nats/token", "the corpus's unigram cross-entropy on the same validation tokens"),
    Column("bigram_nats", "float64", "nats/token", "the corpus's bigram cross-entropy on the same validation tokens"),
    Column("n_params", "int64", "", "parameters of the model, feedback excluded"),
    Column("n_params_trained", "int64", "", "parameters the optimizer updates"),
    Column("tokens_per_s", "float64", "tokens/s", "training tokens over train_s", VOLATILE),
    Column("train_s", "float64", "s", "wall time of the updates", VOLATILE),
    Column("eval_s", "float64", "s", "wall time of the validation losses", VOLATILE),
    Column("diagnostics_s", "float64", "s", "wall time of the diagnostics", VOLATILE),
    Column("wall_s", "float64", "s", "wall time from start to the writing of the rows", VOLATILE),
    Column("started_at", "string", "UTC", "when the run began", VOLATILE),
    Column("resumed_at", "int64", "updates", "updates of the checkpoint that it last went on from; 0: none", VOLATILE),
    Column("commit", "string", "", "git commit of the code; null outside a checkout", VOLATILE),
    Column("dirty", "bool", "", "whether tracked files of the package differed from that commit", VOLATILE),
    Column("lnjac_version", "string", "", "version of this package", VOLATILE),
    Column("numerics_version", "int64", "", "version of the numbers: part of run_id", VOLATILE),
    Column("torch_version", "string", "", "version of torch", VOLATILE),
    Column("python_version", "string", "", "version of Python", VOLATILE),
    Column("device", "string", "", "cpu, or the accelerator's product name", VOLATILE),
    Column(
        "products", "string", "", "what made the linear layers' products; torch-fp32: bf16 by way of fp32", VOLATILE
    ),
    Column("threads", "int64", "", "threads torch used", VOLATILE),
    Column("deterministic", "bool", "", "whether torch was held to deterministic algorithms", VOLATILE),
    Column("data_sha256", "string", "", "SHA-256 of the corpus: vocabulary and both splits"),
    Column("vocab_size", "int64", "", "tokens in the vocabulary"),
]

CURVES = [
    RUN_ID,
    Column("step", "int64", "updates", "optimizer updates done", KEY),
    Column("train_loss_nats", "float64", "nats/token", "loss of the batch that made this update; null at step 0"),
    Column(
        "val_loss_nats", "float64", "nats/token", "validation loss after this update; null where it was not measured"
    ),
    Column("lr", "float64", "", "learning rate of this update; null at step 0"),
]

CORE = ("layers", "runs", "curves")
"""Tables that every run has; the others are in long form, and a run has them if its diagnostics ask for them."""

OWNER = ("run_id", "diag_id")
"""What identifies a run with its diagnostics; curves carry only the first."""

NEEDED = {"runs": ("status", "started_at")}
"""Columns without which a table cannot be read, beside its keys."""

Known = Mapping[str, Column]
"""Descriptions of a table's columns by name, in their order."""

FROZEN: dict[str, Known] = {
    table: {name: Column(name, *more) for name, *more in columns}
    for table, columns in json.loads(Path(__file__).with_name("frozen.json").read_text(encoding="utf-8")).items()
}
"""The tables and columns of files that do not describe theirs."""

_PLAIN = Column("", "", "", "")


def described(table: str, note: Mapping[str, Any]) -> Known:
    """Return what is known of a table's columns from the note in its file; frozen ones are as they always were."""
    return _described(table, json.dumps(note.get("columns")))


@lru_cache(maxsize=256)
def _described(table: str, text: str) -> Known:
    found, said = dict(FROZEN.get(table, {})), json.loads(text)
    for name, description in said.items() if isinstance(said, dict) else ():
        if name not in found and (column := _column(name, description)):
            found[name] = column
    return found


def _column(name: str, said: Any) -> Column | None:
    """The column of a description, or None if this lnjac cannot read it: a later one may know more types and roles."""
    try:
        own = {key: str(value) for key, value in said.items() if key in Column._fields[1:]}
    except AttributeError:
        return None
    column = _PLAIN._replace(name=name, **own)
    if column.dtype not in DTYPES or column.role not in ROLES:
        return None
    try:
        _ = column.reads
    except ValueError:
        return column._replace(pool="")
    return column


def describe(columns: Iterable[Column]) -> dict[str, dict[str, str]]:
    """Return the columns' descriptions for the note in a file, without what is at its default."""
    fields = Column._fields[1:]
    return {
        column.name: {key: getattr(column, key) for key in fields if getattr(column, key) != getattr(_PLAIN, key)}
        for column in columns
    }


def with_role(role: str, known: Known) -> list[str]:
    """Return the names of the columns with this role."""
    return [column.name for column in known.values() if column.role == role]


def in_order(tables: Iterable[str]) -> list[str]:
    """Return tables in the order in which they are shown: those of FROZEN first."""
    place = {name: number for number, name in enumerate(FROZEN)}
    return sorted(tables, key=lambda name: (place.get(name, len(place)), name))
