"""One run: train, validate, analyse, write rows."""

import json
import logging
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from lnjac.config import identity as config_identity
from lnjac.config import schema
from lnjac.config.schema import Device, RunConfig
from lnjac.data import batches
from lnjac.data.corpus import Corpus
from lnjac.errors import ConfigError
from lnjac.gpt import model as gpt
from lnjac.gpt.credit import ONEDNN, is_feedback
from lnjac.gpt.settings import Precision
from lnjac.norms import decompose
from lnjac.norms.layers import norms, unmatched
from lnjac.progress import progress
from lnjac.runs import folder as runs
from lnjac.runs import state as plan
from lnjac.runs.schema import DIAG_ID, RUN_ID, STEP, TABLES
from lnjac.seeding import sequence
from lnjac.text import layer_table
from lnjac.training import checkpoint
from lnjac.training import trackers as tracking
from lnjac.training.interruption import held_back
from lnjac.training.loop import Clock, Training, device_of

log = logging.getLogger(__name__)


LAST_LOSSES = 10
"""Updates whose mean loss is a run's train_loss_nats."""


def admit(config: RunConfig, *, here: bool = True) -> Corpus:
    """Everything that can be known before training: loads the corpus and raises ConfigError with every problem found.

    `here`: the run is for this machine, whose hardware must then allow it.
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
        problems += [
            f"ln_backward.sites={pattern} matches no norm of this model: it has {', '.join(sites)}"
            for pattern in unmatched(sites, config.ln_backward)
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    if here and config.precision is Precision.bf16 and device_of(config).type == "cpu" and not _computes_bf16():
        _warn("precision=bf16 is emulated by this CPU, about ten times slower than fp32: use precision=fp32")
    corpus: Corpus = config.data.load()
    if problems := schema.check_corpus(config, len(corpus.train), len(corpus.val)):
        raise ConfigError("\n".join(problems))
    return corpus


def _sites(config: RunConfig) -> list[str]:
    """Return the names of the model's norms. A sweep checks thousands of configs of a few models, so they are kept."""
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


def _computes_bf16() -> bool:
    """Whether oneDNN has bf16 products for this CPU (from AVX-512 on, in x86); where torch has no oneDNN, nobody knows."""
    return not ONEDNN or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_warn = cache(log.warning)
"""Once a process: a sweep checks all its jobs before it starts the first."""


@contextmanager
def execution(config: RunConfig) -> Iterator[None]:
    """torch's threads, determinism and dropout stream as configured, and as they were afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(config.threads or threads)
    if config.deterministic:  # cuBLAS is deterministic only with a workspace of a fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(int(sequence(config.seed, "dropout").generate_state(1, np.uint64)[0]))
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def run(config: RunConfig, folder: Path, corpus: Corpus | None = None) -> str:
    """Train, analyse and write one run into folder; returns its status, done or diverged.

    A run that is there already is left as it is; one that was interrupted goes on from its last checkpoint. Raises
    ConfigError before any work for what `admit` finds, and for a folder that holds another run or is being written. On
    any other error, and on Ctrl-C, the folder's status says why it failed, and the error goes on.
    """
    corpus = corpus or admit(config)
    with execution(config), Job(config, folder, corpus) as job:
        return job.found or job.finish(_train(job))


class Job:
    """One run being made: its training, what it measures on its way, and its folder, held while in the `with` block.

    `found` is its status once the folder holds it, finished; at the start, that of an earlier making.
    """

    def __init__(self, config: RunConfig, folder: Path, corpus: Corpus) -> None:
        self.config, self.corpus = config, corpus
        self.identity = {
            "run_id": config_identity.run_id(config, corpus.sha256),
            "diag_id": config_identity.diag_id(config),
        }
        self.started_at, self.clock = runs.now(), Clock()
        self.resumed = 0
        self.found: str | None = None
        self.checkpoint = Path(folder) / runs.CHECKPOINT
        self.tracker = tracking.Guarded(config.tracker)
        try:
            self.out = runs.RunFolder(folder, self.identity)
        except runs.InUse as error:
            raise ConfigError(f"{error}: wait for it, or choose another folder") from None

    def __enter__(self) -> "Job":
        try:
            self._begin()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        before = plan.state(self.out.path, self.identity)
        self.found = before.name if before.finished else None
        if self.found:
            log.info("run %s is in %s already: %s", self.identity["run_id"], self.out.path, self.found)
            if before.reason:
                log.warning("%s: %s", self.out.path, before.reason)
            return
        if before.name == plan.FOREIGN:
            raise ConfigError(f"{self.out.path} {before.reason}: choose another folder, or delete it")
        self.out.status(runs.RUNNING)
        for part in self.config.parts().values():
            for warning in part.warnings(self.config) if hasattr(part, "warnings") else ():
                log.warning(warning)
        self.training = Training(self.config, self.corpus)
        self.record = Record(self.training, self.identity, self.clock, self.tracker)
        if before.reason:
            log.info("run again: %s", before.reason.splitlines()[0])
        self._resume()
        shown = config_identity.column_values(self.config)
        self.tracker.start(
            tracking.TrackedRun("-".join(self.identity.values()), self.out.path, shown, after=self.resumed)
        )
        log.info("run %s on %s: %s", self.identity["run_id"], self.training.device.type, _brief(self.config))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if self.found or isinstance(error, ConfigError):  # finished, or refused before any work: it stays as it is
                return
            if isinstance(error, Exception):
                text = "".join(traceback.format_exception(error))
                self.out.status(runs.FAILED, error=f"{type(error).__name__}: {error}", traceback=text)
            elif error is not None:  # Ctrl-C, or a cluster's notice
                self.out.status(runs.INTERRUPTED)
        finally:
            try:
                failed = isinstance(error, Exception)
                self.tracker.end(self.found or (runs.FAILED if failed else runs.INTERRUPTED))
            finally:
                self.out.release()

    def save(self) -> None:
        """Write a checkpoint, if any are wanted. A full disk costs the checkpoint, not the run: it is said."""
        if self.config.checkpoint.every is None:
            return
        tensors, note = self.training.state()
        spent = asdict(self.clock) | {"before": self.clock.wall()}
        del spent["started"]
        note |= {
            **self.identity,
            "rows": self.record.rows,
            "spent": spent,
            "started_at": self.started_at,
            "commit": runs.provenance()["commit"],
        }
        try:
            checkpoint.write(self.checkpoint, tensors, note)
        except OSError as error:
            log.warning("no checkpoint after update %d: %s", self.training.updates, error)

    def _resume(self) -> None:
        """Put the run where its checkpoint left off, if it has one that can be used."""
        if not self.checkpoint.exists():
            return
        try:
            tensors, note = checkpoint.read(self.checkpoint, self.identity)
        except checkpoint.Unusable as error:
            log.warning("%s is not used, the run starts anew: %s", self.checkpoint, error)
            return
        self.training.restore(tensors, note)
        self.record.rows = note["rows"]
        self.clock = self.record.clock = Clock(**note["spent"])
        self.started_at, self.resumed = note["started_at"], self.training.updates
        log.info("goes on from the checkpoint after update %d", self.resumed)
        if note["commit"] != (commit := runs.provenance()["commit"]):
            log.warning("the checkpoint is of commit %s, this is %s", note["commit"], commit)

    def finish(self, diverged_step: int | None) -> str:
        """Write rows and status; returns the status. `diverged_step`: updates done when something turned non-finite."""
        config, training, clock = self.config, self.training, self.clock
        status = runs.DONE if diverged_step is None else runs.DIVERGED
        with clock.timing("evaluate"):
            baselines = batches.baselines(self.corpus, config.eval.tokens)
        curve = self.record.rows["curves"]
        losses = [row["train_loss_nats"] for row in curve if row["train_loss_nats"] is not None][-LAST_LOSSES:]
        tokens = training.updates * config.batch_size * config.model.block_size
        result = {
            **self.identity,
            "status": status,
            "diverged_step": diverged_step,
            "steps_done": training.updates,
            "train_loss_nats": sum(losses) / len(losses) if losses else None,
            "val_loss_nats": curve[-1]["val_loss_nats"] if status == runs.DONE else None,
            "unigram_nats": baselines.unigram_nats,
            "bigram_nats": baselines.bigram_nats,
            "n_params": sum(p.numel() for name, p in training.model.named_parameters() if not is_feedback(name)),
            "n_params_trained": sum(p.numel() for name, p in training.trained.items() if not is_feedback(name)),
            "tokens_per_s": tokens / clock.train if clock.train else None,
            "train_s": clock.train,
            "eval_s": clock.evaluate,
            "diagnostics_s": clock.diagnose,
            "wall_s": clock.wall(),
            "started_at": self.started_at,
            "resumed_at": self.resumed,
            **_environment(config, training),
        }
        _write(self.out, training, self.identity, {**self.record.rows, "runs": [result]})
        more = {"step": diverged_step} if status == runs.DIVERGED else {"val_loss_nats": result["val_loss_nats"]}
        self.out.status(status, **more)
        self.found = status
        self.checkpoint.unlink(missing_ok=True)
        _say(result, self.record.rows["layers"])
        log.info("written to %s", self.out.path)
        return status


class Record:
    """What a run measures on its way: the rows of each table but `runs`."""

    def __init__(self, training: Training, identity: dict[str, str], clock: Clock, tracker: tracking.Guarded) -> None:
        self.training, self.identity, self.clock, self.tracker = training, identity, clock, tracker
        self.analysed_at = set(training.config.diagnostics.at(training.config.steps))
        self.rows: dict[str, list[dict[str, Any]]] = {"layers": [], "curves": []}

    def observe(self, train_loss: float | None = None, lr: float | None = None) -> bool:
        """Measure what is due after the updates done so far, leaving out what is not finite; False for a loss that is not."""
        done, config = self.training.updates, self.training.config
        val_loss = None
        if done == config.steps or (config.eval.every is not None and done % config.eval.every == 0):
            with self.clock.timing("evaluate"):
                val_loss = self.training.validation_loss()
        healthy = val_loss is None or math.isfinite(val_loss)
        if done == 0 and config.diagnostics.feedback_draws:
            with self.clock.timing("diagnose"):
                drawn = self.training.over_draws()
            if drawn:  # none without random feedback, and then no table
                self._keep("mechanism", drawn)
        if healthy and done in self.analysed_at:
            with self.clock.timing("diagnose"):
                found = self.training.diagnose()
            found["layers"] = [row for row in found["layers"] if math.isfinite(row["sum_C_rstd2"])]
            for table, rows in found.items():
                self._keep(table, rows)
            self.tracker.layers(done, found["layers"])
        if train_loss is not None or val_loss is not None:
            val_loss = val_loss if healthy else None
            point = {"train_loss_nats": train_loss, "val_loss_nats": val_loss, "lr": lr}
            self.rows["curves"].append({"run_id": self.identity["run_id"], "step": done, **point})
            self.tracker.scalars(done, point)
        return healthy

    def _keep(self, table: str, rows: list[dict[str, Any]]) -> None:
        self.rows.setdefault(table, []).extend({**self.identity, **row} for row in rows)


def _train(job: Job) -> int | None:
    """Run all updates; returns the number of updates done when something turned non-finite, or None."""
    training, record, config = job.training, job.record, job.config
    if training.updates == 0 and not record.observe():
        return 0
    saving = checkpoint.Timer(config.checkpoint.every)
    tokens = config.batch_size * config.model.block_size
    with progress(config.steps, tokens, training.updates) as report, held_back() as stopping:
        while training.updates < config.steps:
            with record.clock.timing("train"):
                loss = training.update()
            if not (math.isfinite(loss) and record.observe(loss, training.optimizer.param_groups[0]["lr"])):
                return training.updates
            report.tick(training.updates, loss)
            if saving() and training.updates < config.steps:
                job.save()
            stopping(job.save)
    return None


def _write(
    out: runs.RunFolder, training: Training, identity: dict[str, str], tables: dict[str, list[dict[str, Any]]]
) -> None:
    config = training.config
    metadata = {**identity, "config": config_identity.to_dict(config), "provenance": _environment(config, training)}
    declared = {**TABLES, "layers": [RUN_ID, DIAG_ID, STEP, *decompose.columns()]}
    for name, rows in tables.items():
        out.write(name, declared[name], rows, config_identity.columns(config), metadata)
    idx, targets = (torch.stack(part) for part in zip(*training.diagnostic_batches(), strict=True))
    out.save(runs.BATCH, lambda path: save_file({"idx": idx, "targets": targets}, path))
    if config.save_model:
        state = {name: value.detach().cpu().contiguous() for name, value in gpt.saved(training.model).items()}
        out.save(runs.MODEL, lambda path: save_file(state, path))


def _environment(config: RunConfig, training: Training) -> dict[str, Any]:
    """Which code, machine and data made the numbers."""
    from lnjac import __version__

    device = training.device
    return {
        **runs.provenance(),
        "lnjac_version": __version__,
        "numerics_version": config_identity.NUMERICS_VERSION,
        "torch_version": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "deterministic": config.deterministic,
        "data_sha256": training.corpus.sha256,
        "vocab_size": training.corpus.vocab_size,
    }


def _brief(config: RunConfig) -> str:
    names = [f"{group}={part.name}" for group, part in config.parts().items() if hasattr(part, "name")]
    return " ".join([*names, f"seed={config.seed}", f"steps={config.steps}"])


def _say(result: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    """The run's outcome and the original script's table."""
    if result["status"] == runs.DIVERGED:
        log.warning("diverged after %d updates: the loss is not finite", result["diverged_step"])
    else:
        losses = (result[f"{name}_nats"] for name in ("val_loss", "unigram", "bigram"))
        log.info("validation loss %.4f nats (unigram %.4f, bigram %.4f); %.1f s", *losses, result["wall_s"])
    if layers:
        last = max(row["step"] for row in layers)
        log.info("norms after step %d\n%s", last, layer_table([row for row in layers if row["step"] == last]))
