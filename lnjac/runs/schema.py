"""Every column of every table, written down once: the files' schema, the checks and docs/columns.md come from here."""

from collections.abc import Callable, Mapping, Sequence

from lnjac.columns import KEY, Column
from lnjac.norms.formulas import CALL
from lnjac.norms.formulas import COLUMNS as MEASURED

SCHEMA_VERSION = 2
"""Raised when a column is added or changes its name, type or meaning: tables of another version are not read."""


RUN_ID = Column(
    "run_id", "string", "", "identity of the run's science: config with seed, corpus content, numerics version", KEY
)
DIAG_ID = Column("diag_id", "string", "", "identity of the diagnostic's settings", KEY)
STEP = Column("step", "int64", "updates", "optimizer updates done when the row was measured", KEY)

MEASURED_AT = (RUN_ID, DIAG_ID, STEP)
"""The first columns of every table of measurements."""

LAYERS = [*MEASURED_AT, *MEASURED]

RUNS = [
    RUN_ID,
    DIAG_ID,
    Column("status", "string", "", "done, or diverged: the loss turned non-finite"),
    Column("diverged_step", "int64", "updates", "updates done when the loss turned non-finite; null otherwise"),
    Column("steps_done", "int64", "updates", "optimizer updates done"),
    Column(
        "train_loss_nats",
        "float64",
        "nats/token",
        "mean training loss of the last 10 updates (fewer in a shorter run)",
    ),
    Column(
        "val_loss_nats",
        "float64",
        "nats/token",
        "mean loss over the validation windows after the last update",
    ),
    Column(
        "unigram_nats",
        "float64",
        "nats/token",
        "the corpus's unigram cross-entropy on the same validation tokens",
    ),
    Column(
        "bigram_nats",
        "float64",
        "nats/token",
        "the corpus's bigram cross-entropy on the same validation tokens",
    ),
    Column("n_params", "int64", "", "parameters of the model, feedback excluded"),
    Column("n_params_trained", "int64", "", "parameters the optimizer updates"),
    Column("tokens_per_s", "float64", "tokens/s", "training tokens over train_s"),
    Column("train_s", "float64", "s", "wall time of the updates"),
    Column("eval_s", "float64", "s", "wall time of the validation losses"),
    Column("diagnostics_s", "float64", "s", "wall time of the diagnostics"),
    Column("wall_s", "float64", "s", "wall time from start to the writing of the rows"),
    Column("started_at", "string", "UTC", "when the run began"),
    Column("resumed_at", "int64", "updates", "updates of the checkpoint that it last went on from; 0: none"),
    Column("commit", "string", "", "git commit of the code; null outside a checkout"),
    Column("dirty", "bool", "", "whether tracked files of the package differed from that commit"),
    Column("lnjac_version", "string", "", "version of this package"),
    Column("numerics_version", "int64", "", "version of the numbers: part of run_id"),
    Column("torch_version", "string", "", "version of torch"),
    Column("python_version", "string", "", "version of Python"),
    Column("device", "string", "", "cpu, or the accelerator's product name"),
    Column("threads", "int64", "", "threads torch used"),
    Column("deterministic", "bool", "", "whether torch was held to deterministic algorithms"),
    Column("data_sha256", "string", "", "SHA-256 of the corpus: vocabulary and both splits"),
    Column("vocab_size", "int64", "", "tokens in the vocabulary"),
]

CURVES = [
    RUN_ID,
    Column("step", "int64", "updates", "optimizer updates done"),
    Column("train_loss_nats", "float64", "nats/token", "loss of the batch that made this update; null at step 0"),
    Column(
        "val_loss_nats",
        "float64",
        "nats/token",
        "validation loss after this update; null where it was not measured",
    ),
    Column("lr", "float64", "", "learning rate of this update; null at step 0"),
]

DISTRIBUTIONS = [
    *MEASURED_AT,
    *CALL,
    Column(
        "quantity",
        "string",
        "",
        "what is distributed over tokens: sigma, rho, radial_share (B/(B+C)), or a cosine by its column in layers",
    ),
    Column(
        "statistic",
        "string",
        "",
        "quantile; or position: over the tokens at positions from `at` to the next bin's, a mean, or for radial_share a "
        "ratio of sums",
    ),
    Column("at", "float64", "", "the quantile's level in [0, 1], or the bin's first position in the context"),
    Column("value", "float64", "", "the statistic; NaN where no token has the quantity"),
    Column(
        "n_tokens",
        "int64",
        "tokens",
        "tokens it was taken over: all for sigma and rho, else those that count in a mean cosine",
    ),
]

_KEYS_OF_DIAGNOSTICS = {
    "swaps": {"place": "string", "surrogate": "string", "radial": "float64", "part": "string"},
    "tensors": {"kind": "string", "name": "string", "call": "int64"},
    "mechanism": {"place": "string", "call": "int64", "quantity": "string"},
}
"""What tells rows of one run and step apart in the tables of lnjac.diagnostics, which declare their columns themselves."""

LONG = {
    "distributions": DISTRIBUTIONS,
    **{
        table: [*MEASURED_AT, *(Column(name, dtype, "", "") for name, dtype in keys.items())]
        for table, keys in _KEYS_OF_DIAGNOSTICS.items()
    },
}
"""Tables in long form, which a run has only if its diagnostics ask for them."""

CORE = {"layers": LAYERS, "runs": RUNS, "curves": CURVES}
"""Tables that every run has."""

TABLES = {**CORE, **LONG}
KEYS = {
    "layers": ("run_id", "diag_id", "step", "site", "call"),
    "runs": ("run_id", "diag_id"),
    "curves": ("run_id", "step"),
    "distributions": ("run_id", "diag_id", "step", "site", "call", "quantity", "statistic", "at"),
    **{table: ("run_id", "diag_id", "step", *keys) for table, keys in _KEYS_OF_DIAGNOSTICS.items()},
}
"""What makes a row of each table unique."""

VOLATILE = (
    "stacked",  # of earlier files: how many runs trained as one model
    *(
        column.name
        for column in RUNS
        if column.unit in ("s", "tokens/s", "UTC")
        or column.name in ("resumed_at", "commit", "dirty", "device", "threads", "deterministic")
        or column.name.endswith("_version")
    ),
)
"""Columns in which two runs of the same science may differ."""


def markdown(more: Mapping[str, Sequence[Column]], notes: Callable[[str], Sequence[str]]) -> str:
    """Return the text of docs/columns.md.

    Args:
        more: The columns of tables that are not declared here.
        notes: Gives further lines for one of these tables.
    """
    lines = [
        "# Columns",
        "",
        "Generated by `python -m lnjac columns`; a test keeps it equal to the declarations. Symbols are those of",
        "[maths.md](maths.md). `layers` and `runs` also carry the run's config as typed columns, each under its config",
        "name: `seed`, `steps`, `attn_mode`, `attn_mode.bias`, `model.n_embd`, `ln_backward.sites`, ….",
        "",
    ]
    for table, declared in {**TABLES, **more}.items():
        lines += [f"## {table}", "", "| column | dtype | unit | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{c.name}` | {c.dtype} | {c.unit} | {c.meaning} |" for c in declared]
        lines += ["", *notes(table), ""] if table in more else [""]
    return "\n".join(lines)
