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

SWAPS = [
    RUN_ID,
    DIAG_ID,
    STEP,
    Column(
        "place", "string", "", "where the backward was replaced: a site, a role of several sites (ln_1, ln_2), or all"
    ),
    Column(
        "surrogate",
        "string",
        "",
        "the backward put there: one of the seven; partial_radial, center_scale with a part of z·m subtracted; or exact",
    ),
    Column("radial", "float64", "", "how much of z·m the backward subtracts: 0, 1, or the part under partial_radial"),
    Column("level", "string", "", "what is compared: model, block or tensor"),
    Column("part", "string", "", "all, a block (embedding, blocks.0, …, ln_f, head), or a parameter's name"),
    Column(
        "grad_norm",
        "float64",
        "",
        "‖g‖, g the part's gradient by the run's method with the exact backward everywhere, of the mean loss",
    ),
    Column(
        "interpretable",
        "bool",
        "",
        "whether ‖g‖ is more than 8 roundings of the whole's; if not, every comparison is NaN",
    ),
    Column("grad_cos", "float64", "", "cos(ĝ, g), ĝ the gradient with the backward replaced"),
    Column("grad_gain", "float64", "", "‖ĝ‖/‖g‖"),
    Column(
        "update_cos",
        "float64",
        "",
        "cosine of the optimizer's updates by ĝ and by g, both from the run's own state, clipped alike, without decay",
    ),
    Column("update_gain", "float64", "", "ratio of those updates' norms"),
    Column(
        "precond_cos",
        "float64",
        "",
        "cos(P ĝ, P g), P the optimizer's preconditioner at its present state; null before it has one",
    ),
    Column("precond_gain", "float64", "", "‖P ĝ‖/‖P g‖"),
    Column(
        "descent",
        "float64",
        "",
        "⟨∇L, P ĝ⟩/⟨∇L, P ∇L⟩ over the part, ∇L the true gradient (bp, exact norms): first-order decrease against bp's",
    ),
    Column(
        "predicted_nats",
        "float64",
        "nats/token",
        "lr·⟨∇L, P ĝ⟩, lr before any schedule: the loss's decrease to first order; null per part",
    ),
    Column(
        "decrease_nats",
        "float64",
        "nats/token",
        "decrease that the step lr·P ĝ really makes on the diagnostic batch; null for doses, parts, one site of several",
    ),
    Column(
        "compounding",
        "float64",
        "",
        "(1 − grad_cos)/Σ over the place's sites of (1 − grad_cos); null but for whole gradients and several sites",
    ),
    Column(
        "shapley_center",
        "float64",
        "",
        "Shapley share of leaving out the centring in 1 − grad_cos over the 2³ backwards; whole gradient, rows of ste",
    ),
    Column("shapley_radial", "float64", "", "the same for leaving out the radial part"),
    Column("shapley_scale", "float64", "", "the same for leaving out 1/σ; the three sum to ste's 1 − grad_cos"),
]

TENSORS = [
    RUN_ID,
    DIAG_ID,
    STEP,
    Column(
        "kind", "string", "", "model: the whole gradient; parameter; norm_output, norm_input: ∂L/∂y and ∂L/∂x of a norm"
    ),
    Column("name", "string", "", "all, the parameter's name, or the norm's site"),
    Column("call", "int64", "", "which call of the norm in one forward pass, from 0; 0 for a parameter"),
    Column("block", "int64", "", "block number; null outside the blocks"),
    Column("n_entries", "int64", "", "entries of the tensor"),
    Column("norm", "float64", "", "‖ĝ‖, ĝ the gradient by the run's method and backward, of the mean loss"),
    Column("bp_norm", "float64", "", "‖g‖, g the true gradient: backprop, exact norms, the same weights and batch"),
    Column("interpretable", "bool", "", "whether both norms are more than rounding noise; if not, cos is NaN"),
    Column("cos", "float64", "", "cos(ĝ, g)"),
    Column("norm_ratio", "float64", "", "‖ĝ‖/‖g‖"),
    Column(
        "control_cos",
        "float64",
        "",
        "cos with the blocks' weights put back to their initial values: alignment that learning in the blocks did not make",
    ),
    Column("feedback_cos", "float64", "", "cos(B, W), for a weight with random feedback B; null for all else"),
    Column("feedback_angle_deg", "float64", "degrees", "the angle of B and W"),
]

MECHANISM = [
    RUN_ID,
    DIAG_ID,
    STEP,
    Column("place", "string", "", "a norm's site, or an attention or MLP layer's module name"),
    Column("call", "int64", "", "which call of that module in one forward pass, from 0"),
    Column("quantity", "string", "", "what was measured there: one of the quantities below"),
    Column("value", "float64", "", "its value; sums over tokens are of the summed loss"),
    Column("n", "int64", "", "tokens, rows, weights or draws it was taken over"),
]

QUANTITIES = {
    "gz": "Σ⟨g,z⟩ over tokens, at every norm",
    "gz_q": "at a norm that attention reads: the part of gz that returns by the queries, through their rows of B",
    "gz_k": "the same by the keys",
    "gz_v": "the same by the values",
    "gz_from_scores": "2⟨∂L/∂S,S⟩ with biases and β taken off: gz_q + gz_k where B = W; NaN under qk_norm",
    "gz_from_values": "⟨∂L/∂O,O⟩ with bias and β taken off, O attention's output: gz_v where B = W",
    "gz_head": "⟨p − y, B(γ⊙z)⟩: the part of gz that returns by the head, all of it at ln_f",
    "gz_from_logits": "⟨p − y, logits − Wβ⟩: gz_head where B = W",
    "branch_sq": "Σ over tokens of ‖·‖² of the gradient that returns to the residual through the branch starting here",
    "residual_sq": "the same of the gradient that passes the branch by, on the residual; 0 at ln_f",
    "branch_residual_cos": "cosine of the two over all tokens; NaN where one vanishes",
    "scores_pull": "2⟨∂L/∂S,S⟩, S = QKᵀ/√d_h: the loss's slope against the logarithm of a scale of all q and k",
    "values_pull": "⟨∂L/∂O,O⟩: the loss's slope against the logarithm of a scale of all v",
    "entropy": "nats, mean over rows with mass of the weights divided by their mass; NaN where a weight is negative",
    "row_mass": "Σ of a query's weights, mean over queries",
    "row_mass_relative": "the same over i/block_size for query i = 1, 2, …: near 1 for a sigmoid at initialisation",
    "saturation": "share of weights whose own score moves them by less than 1 % of the most that any score could",
    **{
        f"{column}_over_draws{suffix}": f"{what} over draws of the feedback of {column} (layers), at step 0"
        for column in ("enrichment_mean", "enrichment_radial", "enrichment_radial_share")
        for suffix, what in (("", "mean"), ("_stderr", "standard error of the mean"))
    },
}
"""What `mechanism` holds: each quantity and its meaning."""


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

TABLES = {table: list(known.values()) for table, known in FROZEN.items()}


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


KEYS = {table: tuple(with_role(KEY, known)) for table, known in FROZEN.items()}
"""What makes a row of each table unique."""


def in_order(tables: Iterable[str]) -> list[str]:
    """Return tables in the order in which they are shown: those of FROZEN first."""
    place = {name: number for number, name in enumerate(FROZEN)}
    return sorted(tables, key=lambda name: (place.get(name, len(place)), name))
