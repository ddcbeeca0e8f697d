"""The training loop, and the model with its method, optimizer and batches that it advances update by update."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lnjac.config.schema import Device, RunConfig
from lnjac.data import batches as data
from lnjac.data.corpus import Corpus
from lnjac.diagnostics import base as diagnostics
from lnjac.diagnostics.base import Rows
from lnjac.diagnostics.catalogue import chosen
from lnjac.diagnostics.settings import Split
from lnjac.gpt import model as gpt
from lnjac.gpt import optimizers as optim
from lnjac.gpt.credit import is_feedback
from lnjac.gpt.settings import Precision
from lnjac.interruption import held_back
from lnjac.progress import progress
from lnjac.runs.record import Record
from lnjac.seeding import stream
from lnjac.training.checkpoint import Timer
from lnjac.training.graph import Passes, captured

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}


def train(training: "Training", record: Record, save: Callable[[], None]) -> None:
    """Train to the last update and record what is due on the way; a loss that is not finite ends the run as diverged.

    `save()` writes a checkpoint, from time to time and when the process is told to stop.
    """
    config = training.config
    tokens, saving = config.batch_size * config.model.block_size, Timer(config.checkpoint.every)
    healthy = not record.has_diverged and (training.updates > 0 or observe(training, record))
    with progress(config.steps, tokens, training.updates) as report, held_back() as stopping:
        while healthy and training.updates < config.steps:
            with record.timing("train_s"):
                loss = training.update()
            healthy = math.isfinite(loss) and observe(training, record, loss)
            if healthy:
                report.tick(training.updates, loss)
                if saving() and training.updates < config.steps:
                    save()
                stopping(save)
    if not healthy:
        record.diverged(training.updates)


def observe(training: "Training", record: Record, train_loss: float | None = None) -> bool:
    """Record what is due after the updates done so far; return False for a validation loss that is not finite."""
    step = training.updates
    val_loss = lr = None
    if evaluates(training.config, step):
        with _timing(record, "eval_s"):
            val_loss = training.validation_loss()
    healthy = val_loss is None or math.isfinite(val_loss)
    measure(training, record, healthy=healthy)
    if train_loss is not None:
        lr = training.optimizer.param_groups[0]["lr"]
    if train_loss is not None or val_loss is not None:
        record.scalars(step, train_loss=train_loss, val_loss=val_loss if healthy else None, lr=lr)
    return healthy


def evaluates(config: RunConfig, step: int) -> bool:
    """Return whether the validation loss is due after so many updates."""
    return step == config.steps or (config.eval.every is not None and step % config.eval.every == 0)


def measure(training: "Training", record: Record, *, healthy: bool = True) -> None:
    """Record the diagnostics that are due after the updates done so far."""
    step = training.updates
    if step == 0:
        with _timing(record, "diagnostics_s"):
            for table, rows in training.before().items():
                record.rows(table, rows, step)
    if healthy and step in training.measured_at:
        with _timing(record, "diagnostics_s"):
            found = training.diagnose()
        layers = found.pop("layers")
        record.layers(layers, step)
        for table, rows in found.items():
            record.rows(table, rows, step)


@contextmanager
def _timing(record: Record, column: str) -> Iterator[None]:
    """Time a part that is no update, once the device has finished the last update."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    with record.timing(column):
        yield


class Training:
    """A model with its method, optimizer and batches, advanced one update at a time. `updates` counts those done."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self.config, self.corpus, self.vocab_size = config, corpus, corpus.vocab_size
        self.device = device_of(config)
        self.model = gpt.build(config, corpus.vocab_size).to(self.device)
        self.trained = optim.trained(self.model, config.method)
        groups = optim.groups(self.model, config.method, config.optimizer.weight_decay)
        self.optimizer = config.optimizer.build(groups)
        self.batches = data.Batches(
            corpus.train, config.batch_size, config.model.block_size, stream(config.seed, "batches")
        )
        self.diagnostics = chosen(config.diagnostics)
        self.measured_at = set(config.diagnostics.at(config.steps))
        self.passes: Passes | None = None  # captured at the first update
        self.updates = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return DTYPES[self.config.precision]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        """Return the mean cross-entropy of a batch (idx, targets), (B, T) each, and the number of its tokens."""
        idx, targets = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision is Precision.bf16):
            return model(idx, targets)[1], targets.numel()

    def update(self) -> float:
        """Make one update and return its batch's loss in nats. A non-finite loss leaves model and optimizer as they were."""
        config = self.config
        self.model.train()
        config.method.refresh(self.model, config.seed, self.updates)
        lr = config.optimizer.lr_at(self.updates, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.batches.next()
        if self.passes is None:
            self.passes = captured(self._passes, batch, self.model.parameters(), self.device)
        if not math.isfinite(value := self.passes(batch).item()):
            return value
        if config.optimizer.grad_clip is not None:
            trained = [parameter for name, parameter in self.trained.items() if not is_feedback(name)]
            nn.utils.clip_grad_norm_(trained, config.optimizer.grad_clip)
        config.method.before_update(self.model)
        self.optimizer.step()
        self.updates += 1
        return value

    def _passes(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss, _ = self.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def validation_loss(self) -> float:
        """Return the mean loss in nats per token over the validation windows."""
        block_size, evaluation = self.config.model.block_size, self.config.eval
        self.model.eval()
        windows = data.windows(self.corpus.val, block_size, evaluation.batch_size, evaluation.tokens)
        return self.mean_loss(windows)[0]

    @torch.no_grad()
    def mean_loss(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Return the loss over all batches in nats per token, and the number of their tokens."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            loss, n = self.loss(self.model, batch)
            total += loss.double() * n
            count += n
        return float(total) / count, count

    def diagnostic_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the batches (idx, targets) of each measurement: the same at every step and for every mode of one seed."""
        settings = self.config.diagnostics
        split = self.corpus.train if settings.split is Split.train else self.corpus.val
        source = data.Batches(
            split,
            settings.batch_size,
            self.config.model.block_size,
            stream(self.config.seed, "diagnostic"),
        )
        return [source.next() for _ in range(settings.batches)]

    def before(self) -> dict[str, Rows]:
        """Make the diagnostics' measurements before the first update; return their rows by table."""
        return diagnostics.before(self.diagnostics, self)

    def diagnose(self) -> dict[str, Any]:
        """Return the rows of each table, measured on the diagnostic batches with dropout off."""
        return diagnostics.measure(self.diagnostics, self)


def device_of(config: RunConfig) -> torch.device:
    if config.device is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device.value)
