"""Make one run: admit its config, set up torch, resume its checkpoint, train it within its record."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import nn

from lnjac.config import identity as config_identity
from lnjac.config import schema
from lnjac.config.schema import Device, RunConfig
from lnjac.data import batches
from lnjac.data.corpus import Corpus
from lnjac.diagnostics.catalogue import chosen
from lnjac.errors import ConfigError
from lnjac.files import write_atomically
from lnjac.gpt import model as gpt
from lnjac.gpt import products
from lnjac.gpt.credit import is_feedback
from lnjac.gpt.settings import Precision
from lnjac.norms.layers import norms, unmatched
from lnjac.runs import folder as runs
from lnjac.runs.record import Record
from lnjac.seeding import sequence
from lnjac.text import layer_table
from lnjac.training import checkpoint, kept
from lnjac.training.loop import DTYPES, Training, device_of, train

log = logging.getLogger(__name__)


def admit(config: RunConfig, *, here: bool = True) -> Corpus:
    """Check everything that can be known before training, and return the corpus.

    Args:
        config: What to run.
        here: Whether it is for this machine, whose hardware must then allow it.

    Raises:
        ConfigError: With a line for every problem.
    """
    problems = schema.check(config)
    if here:
        problems += _hardware_problems(config)
    try:
        runs.table((), config_identity.columns(config), [{}])
        json.dumps(config_identity.to_dict(config))
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        problems.append(f"the config cannot be stored in a table: {error}; give its dataclass plain typed values")
    if not problems:
        sites = _sites(config)
        if not config.ln_backward.sites:
            problems.append("ln_backward.sites is empty: name a site, or use ln_backward=exact")
        problems += _site_problems(config, sites) if sites else _problems_without_sites(config)
    if problems:
        raise ConfigError("\n".join(problems))
    if (
        here
        and config.precision is Precision.bf16
        and device_of(config).type == "cpu"
        and not products.multiplies_bf16()
    ):
        _warn(
            "precision=bf16: this CPU multiplies no bf16, so products are made in fp32 and rounded, which saves no time"
        )
    corpus: Corpus = config.data.load()
    if problems := schema.check_corpus(config, len(corpus.train), len(corpus.val)):
        raise ConfigError("\n".join(problems))
    return corpus


def _site_problems(config: RunConfig, sites: list[str]) -> list[str]:
    return [
        f"ln_backward.sites={pattern} matches no norm of this model: it has {', '.join(sites)}"
        for pattern in unmatched(sites, config.ln_backward)
    ]


def _problems_without_sites(config: RunConfig) -> list[str]:
    """Return a line for each setting that needs a LayerNorm or an RMSNorm, for a model that has norms of another kind."""
    why = f"model.norm={config.model.norm.name}, whose Jacobian has no such parts"
    found = []
    if config.ln_backward.name != "exact":
        found.append(
            f"ln_backward={config.ln_backward.name} replaces parts of a norm's backward, but the norms are {why}: "
            "use ln_backward=exact, or model.norm=layernorm"
        )
    for name in ("swap", "distributions", "feedback_draws"):
        if value := getattr(config.diagnostics, name):
            found.append(
                f"diagnostics.{name}={value} compares parts of norms' backward, but the norms are {why}: "
                f"set diagnostics.{name}={'0' if name == 'feedback_draws' else 'false'}, or use model.norm=layernorm"
            )
    return found


def _sites(config: RunConfig) -> list[str]:
    """Return the names of the model's norms that have parts.

    They are kept, as a sweep checks thousands of configs of a few models.
    """
    key = repr((config.model, config.attn_mode))
    if key not in _KNOWN_SITES:
        with torch.device("meta"):
            _KNOWN_SITES[key] = [name for name, _ in norms(gpt.GPT(config.model, config.attn_mode, vocab_size=1))]
    return _KNOWN_SITES[key]


_KNOWN_SITES: dict[str, list[str]] = {}


def _hardware_problems(config: RunConfig) -> list[str]:
    cores = os.cpu_count() or 1
    if config.threads is not None and config.threads > cores:
        return [f"threads={config.threads} is more than this machine's {cores} cores: use threads={cores} or fewer"]
    if config.device is Device.cuda and not torch.cuda.is_available():
        return ["device=cuda, but torch finds no CUDA device: use device=cpu or device=auto"]
    if config.precision is Precision.bf16 and device_of(config).type == "cuda" and not torch.cuda.is_bf16_supported():
        return ["precision=bf16 is not supported by this GPU: use precision=fp32"]
    return []


_warn = cache(log.warning)
"""Warn once a process: a sweep checks all its jobs before it starts the first."""


@contextmanager
def execution(config: RunConfig) -> Iterator[None]:
    """Within the context, torch has the configured threads, determinism and dropout stream; afterwards those from before."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(config.threads or threads)
    if config.deterministic:  # cuBLAS is deterministic only with a workspace of a fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _set_deterministic(config.deterministic)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(int(sequence(config.seed, "dropout").generate_state(1, np.uint64)[0]))
            yield
    finally:
        torch.set_num_threads(threads)
        _set_deterministic(deterministic, warn_only)


def _set_deterministic(on: bool, warn_only: bool = False) -> None:
    """Set torch's determinism where it is another: torch imports its compiler to do so, which takes two seconds."""
    now = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if now != (on, warn_only):
        torch.use_deterministic_algorithms(on, warn_only=warn_only)


def run(config: RunConfig, folder: str | Path, corpus: Corpus | None = None, *, reuse: str | Path | None = None) -> str:
    """Train and measure one run and write it into folder.

    A run that is there already is left as it is; one that was interrupted goes on from its last checkpoint.

    Args:
        config: What to run, as `lnjac.compose` gives it.
        folder: Made if it is not there.
        corpus: What `admit` loaded, if it was called before.
        reuse: A folder of finished runs, searched with all below it. Where one has this run's config and other diagnostics,
            its weights are measured, and nothing is trained. One that has fewer `steps` and was made with keep_state=true
            is continued.

    Returns:
        The run's status: done or diverged.

    Raises:
        ConfigError: Before any work, for what `admit` finds and for a folder that holds another run or is being written.
    """
    corpus = corpus or admit(config)
    with execution(config), opened(config, folder, corpus) as record:
        if record.found:
            return record.found
        training = begin(config, corpus, record, reuse)
        train(training, record, lambda: save(training, record))
        conclude(training, record)
    if not config.keep_state:
        (record.path / runs.CHECKPOINT).unlink(missing_ok=True)
    _say(record)
    return record.status


def opened(config: RunConfig, folder: str | Path, corpus: Corpus) -> Record:
    """Return the run's record, a context manager."""
    identity = {
        "run_id": config_identity.run_id(config, corpus.sha256),
        "diag_id": config_identity.diag_id(config),
    }
    environment = _environment(config, corpus)
    record = Record(
        folder,
        identity,
        columns=config_identity.columns(config),
        metadata={"config": config_identity.to_dict(config), "provenance": environment},
        tables={diagnostic.table: diagnostic.columns for diagnostic in chosen(config.diagnostics)},
        tracker=config.tracker,
    )
    record.describe(**environment)
    record.seconds |= dict.fromkeys(("train_s", "eval_s", "diagnostics_s"), 0.0)
    return record


def begin(config: RunConfig, corpus: Corpus, record: Record, reuse: str | Path | None = None) -> Training:
    """Build the training; resume it from the run's checkpoint, or begin it from a finished run below `reuse`, if one fits."""
    for part in config.parts().values():
        for warning in part.warnings(config) if hasattr(part, "warnings") else ():
            log.warning(warning)
    training = Training(config, corpus)
    if not _resume(training, record) and reuse is not None:
        _begin_from(training, record, Path(reuse))
    log.info("run %s on %s: %s", record.identity["run_id"], training.device.type, _brief(config))
    return training


def _resume(training: Training, record: Record) -> bool:
    path = record.path / runs.CHECKPOINT
    if not path.exists():
        return False
    try:
        tensors, note = checkpoint.read(path, record.identity)
        record.resume(note["updates"], note["calls"])
    except (checkpoint.Unusable, ConfigError) as error:
        log.warning("%s is not used, the run starts anew: %s", path, error)
        return False
    checkpoint.restore(training, tensors, note)
    if note["commit"] != (commit := runs.provenance()["commit"]):
        log.warning("the checkpoint is of commit %s, this is %s", note["commit"], commit)
    return True


def would_begin(config: RunConfig, corpus: Corpus, reuse: Path | None) -> str:
    """Return in words how `run` would begin from finished runs below `reuse`; empty if there are none of this config."""
    start = kept.choose(config, corpus.sha256, kept.finished(reuse)) if reuse else kept.Start(None)
    if start.source is None:
        return f"; {start.problem}: it would be trained from the start" if start.problem else ""
    kind = "continue" if start.left(config.steps) else "analyse"
    return f"; it would {kind} {start.source.folder} after update {start.step}"


def _begin_from(training: Training, record: Record, reuse: Path) -> None:
    start = kept.choose(training.config, training.corpus.sha256, kept.finished(reuse))
    if start.source is None:
        if start.problem:
            log.warning("%s; it is trained from the start", start.problem)
        return
    try:
        taken = kept.take_over(record, training.config, start)
    except ConfigError as error:
        log.warning("%s is not used, the run is trained from the start: %s", start.source.folder, error)
        return
    left = start.left(training.config.steps)
    said = f"{left} updates are left" if left else "nothing is trained"
    log.info("begins from %s after update %d: %s", start.source.folder, start.step, said)
    if others := kept.differing(taken.made, record.described):
        log.warning("its digits may differ from those of a run made here: it was made with %s", "; ".join(others))
    kept.go_on(training, record, start, taken)


def differing(folder: Path, config: RunConfig, *, here: bool) -> list[str]:
    """Return a line for each thing in which a finished run was made otherwise than this config is, as far as that is known.

    Args:
        folder: The finished run's.
        config: What is to run.
        here: Whether it is for this machine.
    """
    (made,) = runs.read_table(folder / runs.FILES["runs"], list(kept.MAKING)).to_pylist()
    known = {**_code(), **(_machine(config) if here else {})}
    return kept.differing(made, known if config.threads is None else known | {"threads": config.threads})


def save(training: Training, record: Record) -> None:
    """Write a checkpoint, if any are wanted. On a full disk there is none, with a warning, and the run goes on."""
    if training.config.checkpoint.every is None:
        return
    try:
        write_atomically(record.path / runs.CHECKPOINT, lambda path: _write_state(path, training, record))
    except OSError as error:
        log.warning("no checkpoint after update %d: %s", training.updates, error)


def _write_state(path: Path, training: Training, record: Record) -> None:
    tensors, note = checkpoint.state(training)
    note |= {**record.identity, "calls": record.calls, "commit": runs.provenance()["commit"]}
    checkpoint.write(path, tensors, note)


def conclude(training: Training, record: Record) -> None:
    """Describe the trained run in its record, and save its weights, diagnostic batch and, if asked for, its state."""
    config = training.config
    with record.timing("eval_s"):
        baselines = batches.baselines(training.corpus, config.eval.tokens)
    tokens, train_s = training.updates * config.batch_size * config.model.block_size, record.seconds["train_s"]
    record.describe(
        steps_done=training.updates,
        unigram_nats=baselines.unigram_nats,
        bigram_nats=baselines.bigram_nats,
        n_params=_size(dict(training.model.named_parameters())),
        n_params_trained=_size(training.trained),
        tokens_per_s=tokens / train_s if train_s else None,
    )
    idx, targets = (torch.stack(part) for part in zip(*training.diagnostic_batches(), strict=True))
    record.save(runs.BATCH, lambda path: save_file({"idx": idx, "targets": targets}, path))
    if config.save_model:
        state = {name: value.detach().cpu().contiguous() for name, value in gpt.saved(training.model).items()}
        record.save(runs.MODEL, lambda path: save_file(state, path))
    if config.keep_state:
        record.save(runs.CHECKPOINT, lambda path: _write_state(path, training, record))


def _size(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(p.numel() for name, p in parameters.items() if not is_feedback(name))


def _environment(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Return the code, machine and data that make the numbers."""
    return {
        **_code(),
        "numerics_version": config_identity.NUMERICS_VERSION,
        **_machine(config),
        "threads": torch.get_num_threads(),
        "deterministic": config.deterministic,
        "data_sha256": corpus.sha256,
        "vocab_size": corpus.vocab_size,
    }


def _code() -> dict[str, Any]:
    from lnjac import __version__

    return {**runs.provenance(), "lnjac_version": __version__, "torch_version": str(torch.__version__)}


def _machine(config: RunConfig) -> dict[str, str]:
    device = device_of(config)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "products": products.chosen(DTYPES[config.precision], device),
    }


def _brief(config: RunConfig) -> str:
    names = [f"{group}={part.name}" for group, part in config.parts().items() if hasattr(part, "name")]
    return " ".join([*names, f"seed={config.seed}", f"steps={config.steps}"])


def _say(record: Record) -> None:
    """Log the run's outcome and the original script's table."""
    (result,), layers = (record.tables[name].rows for name in ("runs", "layers"))
    if record.status == runs.DIVERGED:
        log.warning("diverged after %d updates: the loss is not finite", result["diverged_step"])
    else:
        losses = (result[f"{name}_nats"] for name in ("val_loss", "unigram", "bigram"))
        log.info("validation loss %.4f nats (unigram %.4f, bigram %.4f); %.1f s", *losses, result["wall_s"])
    if layers:
        last = max(row["step"] for row in layers)
        log.info("norms after step %d\n%s", last, layer_table([row for row in layers if row["step"] == last]))
    log.info("written to %s", record.path)
