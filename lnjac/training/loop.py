"""A model with its method, optimizer and batches, advanced one update at a time."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lnjac.config.schema import Device, RunConfig
from lnjac.data import batches as data
from lnjac.data.corpus import Corpus
from lnjac.diagnostics import substitution as swap
from lnjac.diagnostics.alignment import Alignment, over_draws
from lnjac.diagnostics.attention import Mechanism
from lnjac.diagnostics.settings import Split
from lnjac.gpt import model as gpt
from lnjac.gpt import optimizers as optim
from lnjac.gpt.credit import is_feedback
from lnjac.gpt.settings import Precision
from lnjac.norms.analyse import examine
from lnjac.seeding import sequence, stream
from lnjac.training.graph import Passes, captured


def device_of(config: RunConfig) -> torch.device:
    if config.device is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device.value)


@dataclass
class Clock:
    """Wall seconds spent on each part of a run."""

    train: float = 0.0
    evaluate: float = 0.0
    diagnose: float = 0.0
    before: float = 0.0
    """Wall seconds up to the checkpoint that the run goes on from."""
    started: float = field(default_factory=time.perf_counter)

    def wall(self) -> float:
        """Seconds since the run began, what lay between an interruption and its continuation left out."""
        return self.before + time.perf_counter() - self.started

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        if part != "train" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # what is left of the update is not this part's
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start)


class Training:
    """A model with its method, optimizer and batches, advanced one update at a time. `updates` counts those done."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self.config, self.corpus, self.device = config, corpus, device_of(config)
        self.model = gpt.build(config, corpus.vocab_size).to(self.device)
        self.initial = gpt.block_weights(self.model) if config.diagnostics.alignment else {}
        self.trained = optim.trained(self.model, config.method)
        groups = optim.groups(self.model, config.method, config.optimizer.weight_decay)
        self.optimizer = config.optimizer.build(groups)
        self.batches = data.Batches(
            corpus.train, config.batch_size, config.model.block_size, stream(config.seed, "batches")
        )
        self.passes: Passes | None = None  # captured at the first update
        self.updates = 0

    def autocast(self) -> AbstractContextManager[Any]:
        bf16 = self.config.precision is Precision.bf16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix products are computed in."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[self.config.precision.value]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        """Mean cross-entropy of a batch (idx, targets): (B, T) each, and the number of tokens it is the mean of."""
        idx, targets = (part.to(self.device, non_blocking=True) for part in batch)
        with self.autocast():
            return model(idx, targets)[1], targets.numel()

    def update(self) -> float:
        """One update; returns its batch's loss in nats. A non-finite loss leaves model and optimizer as they were."""
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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the coming updates depend on: weights, feedback, optimizer and generators; tensors, and plain values."""
        tensors = {f"model.{name}": value for name, value in gpt.saved(self.model).items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items() if value is not None}
        tensors["generator.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {"updates": self.updates, "batches": self.batches.rng.bit_generator.state}

    def restore(self, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        gpt.load_saved(self.model, weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                moments.setdefault(int(i), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(tensors["generator.cpu"])
        if self.device.type == "cuda" and "generator.cuda" in tensors:  # else it was begun on a CPU
            torch.cuda.set_rng_state(tensors["generator.cuda"], self.device)
        self.updates, self.batches.rng.bit_generator.state = note["updates"], note["batches"]

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats per token over the validation windows."""
        evaluation = self.config.eval
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for batch in data.windows(
            self.corpus.val, self.config.model.block_size, evaluation.batch_size, evaluation.tokens
        ):
            loss, n = self.loss(self.model, batch)
            total += loss.double() * n
            count += n
        return float(total) / count

    def diagnostic_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The batches (idx, targets) the norms are analysed on: the same at every step and for every mode of one seed."""
        settings = self.config.diagnostics
        split = self.corpus.train if settings.split is Split.train else self.corpus.val
        source = data.Batches(
            split,
            settings.batch_size,
            self.config.model.block_size,
            stream(self.config.seed, "diagnostic"),
        )
        return [source.next() for _ in range(settings.batches)]

    def diagnose(self) -> dict[str, list[dict[str, Any]]]:
        """Measured columns of the rows of each table, with dropout off."""
        self.model.eval()
        settings, batches = self.config.diagnostics, self.diagnostic_batches()
        found: dict[str, list[dict[str, Any]]] = {}
        if settings.swap:  # first: the most memory, before anything else is held
            found["swaps"] = swap.measure(
                self.model,
                batches,
                self.loss,
                trained=self.trained,
                optimizer=self.optimizer,
                settings=self.config.optimizer,
                dtype=self.dtype,
                parts=settings.swap_parts,
            )
        watchers = self._watchers()
        analysis = examine(
            self.model,
            batches,
            self.loss,
            grad_at=settings.grad_at,
            keep_tokens=settings.distributions,
            watchers=list(watchers.values()),
        )
        found |= {"layers": analysis.rows(), **{table: watcher.rows() for table, watcher in watchers.items()}}
        if settings.distributions:
            found["distributions"] = analysis.distributions(settings.position_bins)
        return {table: [{"step": self.updates, **row} for row in rows] for table, rows in found.items()}

    def _watchers(self) -> dict[str, Alignment | Mechanism]:
        """What measures more on the analysis's passes, by the table it fills."""
        settings, found = self.config.diagnostics, dict[str, Alignment | Mechanism]()
        if settings.alignment:
            found["tensors"] = Alignment(self.model, self.loss, dtype=self.dtype, initial=self.initial)
        if settings.attention:
            found["mechanism"] = Mechanism(self.model)
        return found

    def over_draws(self) -> list[dict[str, Any]]:
        """Rows of `mechanism`: enrichments over other draws of the feedback, from seeds apart from the run's own streams."""
        config = self.config
        self.model.eval()
        seeds = (
            int(sequence(config.seed, "feedback draws", i).generate_state(1, np.uint64)[0])
            for i in range(config.diagnostics.feedback_draws)
        )
        draws = (gpt.feedback(replace(config, seed=seed), self.corpus.vocab_size) for seed in seeds)
        rows = over_draws(self.model, draws, self.diagnostic_batches(), self.loss, grad_at=config.diagnostics.grad_at)
        return [{"step": self.updates, **row} for row in rows]
