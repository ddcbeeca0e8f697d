"""Every column of every table, written down once: the files' schema, the checks and docs/columns.md come from here."""

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

LAYERS = [RUN_ID, DIAG_ID, STEP, *MEASURED]

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
    RUN_ID,
    DIAG_ID,
    STEP,
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

LONG = {"distributions": DISTRIBUTIONS, "swaps": SWAPS, "tensors": TENSORS, "mechanism": MECHANISM}
"""Tables in long form, which a run has only if its diagnostics ask for them."""

CORE = {"layers": LAYERS, "runs": RUNS, "curves": CURVES}
"""Tables that every run has."""

TABLES = {**CORE, **LONG}
KEYS = {
    "layers": ("run_id", "diag_id", "step", "site", "call"),
    "runs": ("run_id", "diag_id"),
    "curves": ("run_id", "step"),
    "distributions": ("run_id", "diag_id", "step", "site", "call", "quantity", "statistic", "at"),
    "swaps": ("run_id", "diag_id", "step", "place", "surrogate", "radial", "part"),
    "tensors": ("run_id", "diag_id", "step", "kind", "name", "call"),
    "mechanism": ("run_id", "diag_id", "step", "place", "call", "quantity"),
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


def markdown() -> str:
    """The text of docs/columns.md."""
    lines = [
        "# Columns",
        "",
        "Generated by `python -m lnjac columns`; a test keeps it equal to `lnjac/runs/schema.py`. Symbols are those of",
        "[maths.md](maths.md). `layers` and `runs` also carry the run's config as typed columns, each under its config",
        "name: `seed`, `steps`, `attn_mode`, `attn_mode.bias`, `model.n_embd`, `ln_backward.sites`, ….",
        "",
    ]
    for table, declared in TABLES.items():
        lines += [f"## {table}", "", "| column | dtype | unit | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{c.name}` | {c.dtype} | {c.unit} | {c.meaning} |" for c in declared]
        if table == "mechanism":
            lines += ["", "| quantity | meaning |", "| --- | --- |"]
            lines += [f"| `{name}` | {meaning} |" for name, meaning in QUANTITIES.items()]
        lines.append("")
    return "\n".join(lines)
