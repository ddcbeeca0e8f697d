"""Several runs trained as one model with a leading run dimension, R, where they differ in nothing but seed and optimizer.

Every run keeps its own `train.Training`, whose parameters and buffers are made views of the stack's tensors: it is
validated, analysed and written as ever. The forward pass is a vmap over the runs, the backward ordinary autograd outside
it, and no operation mixes runs.
"""

import copy
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from lnjac import config as configs
from lnjac import data, gpt, optim
from lnjac.config import Precision, RunConfig
from lnjac.credit import Method, _Linear, is_feedback, lead
from lnjac.progress import progress
from lnjac.train import Job, Training

log = logging.getLogger(__name__)

FREE = ("seed", "optimizer")
"""What stacked runs may differ in: neither has a part in the computation graph."""

LARGEST = 128
"""Runs in one stack at most."""

GPU_SHARE, RAM_SHARE = 0.8, 0.5
"""Shares of the free memory that a stack may take."""

CPU_BYTES = 2**27
"""What a stack on a CPU may take at most: a larger one runs no faster (benchmarks/stacked.py)."""

TOLERANCE = {Precision.fp64: 1e-9, Precision.fp32: 1e-3, Precision.bf16: 0.1}
"""Largest relative difference of a stacked gradient from a run's own, by rounding alone."""

NEGLIGIBLE = 0.01
"""Share of the whole gradient's norm below which a parameter's own is compared as if it had this norm: it may be rounding
alone, as that of a bias which softmax cannot see."""


def key(config: RunConfig) -> str | None:
    """Text equal for two configs whose runs may be stacked, given corpora of one sha256; None for one never stacked.

    Not with dropout, which draws from torch's own generator and would differ from the run alone; nor where the swaps
    read the state of the run's own optimizer.
    """
    if config.model.dropout > 0 or config.diagnostics.swap:
        return None
    plain = configs.to_dict(config)
    return json.dumps({name: value for name, value in plain.items() if name not in FREE}, sort_keys=True)


def most(config: RunConfig, vocab_size: int) -> int:
    """How many such runs fit into the memory that is free now, from 1 to LARGEST; an estimate (`bytes_per_run`)."""
    cuda = config.device is configs.Device.cuda or (config.device is configs.Device.auto and torch.cuda.is_available())
    budget = GPU_SHARE * torch.cuda.mem_get_info()[0] if cuda else min(RAM_SHARE * _available_ram(), CPU_BYTES)
    return max(1, min(LARGEST, int(budget / bytes_per_run(config, vocab_size))))


def bytes_per_run(config: RunConfig, vocab_size: int) -> int:
    """Estimate of what a stack holds for each run at its peak: weights, gradients, two moments, feedback, activations.

    What autograd saves for the backward pass is counted on one and on two sequences, half as much again allowed for what
    passes through it.
    """
    model = gpt.build(config, vocab_size)
    trained = sum(p.nbytes for p in optim.trained(model, config.method).values())
    held = sum(t.nbytes for t in gpt.saved(model).values())
    one, two = (_saved_bytes(model, config, sequences) for sequences in (1, 2))
    activations = one + (two - one) * (config.batch_size - 1)
    return int(2 * held + 3 * trained + 1.5 * activations)


def _saved_bytes(model: nn.Module, config: RunConfig, sequences: int) -> int:
    """What autograd saves in a stacked forward pass of one run, its own parameters and buffers left out."""
    parameters = {name: p.unsqueeze(0) for name, p in model.named_parameters()}
    buffers = {name: b.unsqueeze(0) for name, b in model.named_buffers()}
    known = {t.untyped_storage().data_ptr() for t in [*parameters.values(), *buffers.values()]}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    idx = torch.zeros(1, sequences, config.model.block_size, dtype=torch.int64)
    bf16 = config.precision is Precision.bf16
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        kept = losses(model, parameters, buffers, idx, idx)
    del kept  # alive until here, so that no address counts twice
    return sum(saved.values())


def _available_ram() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# The stacked forward pass


class _Fold(torch.autograd.Function):
    """scaled_dot_product_attention, which under vmap folds the runs into the batch: on a CPU torch loops over them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool
    ) -> tuple[Tensor, int]:
        runs, dims = info.batch_size, in_dims[:3]
        q, k, v = (lead(x, dim, runs).flatten(0, 1) for x, dim in zip((q, k, v), dims, strict=True))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        return out.view(runs, -1, *out.shape[1:]), 0


class _Rules(TorchFunctionMode):
    """Within it, calls for which torch has no batching rule, or a slow one on a CPU, take ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and kwargs.keys() <= {"dropout_p", "is_causal"}:
            return _Fold.apply(*args, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False))  # type: ignore[no-untyped-call]
        if (
            func is F.linear
            and len(args) == 3
            and args[0].device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        ):
            return _Linear.apply(*args, args[1])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def losses(
    template: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], idx: Tensor, targets: Tensor
) -> Tensor:
    """Each run's mean cross-entropy: (R,). Parameters and buffers: (R, *shape); idx, targets: (R, B, T)."""

    def loss(*own: Any) -> Tensor:
        parameters, buffers, idx, targets = own
        result: Tensor = functional_call(template, (parameters, buffers), (idx, targets))[1]
        return result

    with _Rules():
        result: Tensor = vmap(loss)(dict(parameters), dict(buffers), idx, targets)
        return result


# The stacked update


@dataclass
class Segment:
    """Trained parameters, by name, with one weight decay in each run, side by side in one tensor: (R, entries)."""

    names: list[str]
    decays: tuple[float, ...]
    feedback: bool
    values: Tensor
    grads: Tensor

    def views(self, flat: Tensor, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's part of `values` or `grads`, or of one run's row of them: (R, *shape) or (*shape)."""
        sizes = [shapes[name].numel() for name in self.names]
        for name, part in zip(self.names, torch.split(flat, sizes, dim=-1), strict=True):
            yield name, part.view(*flat.shape[:-1], *shapes[name])


class Stack:
    """Trainings advanced together, update by update. Runs of equal optimizer settings should be neighbours."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.trainings = list(trainings)
        first = self.trainings[0]
        self.device, self.checked = first.device, False
        self.template = copy.deepcopy(first.model).train()
        self.shapes = {name: p.shape for name, p in first.model.named_parameters()}
        self.segments = self._partition()
        held = [name for name, _ in first.model.named_parameters() if name not in first.trained]
        held += [name for name, _ in first.model.named_buffers()]
        self.held = {name: torch.stack([_tensor(t.model, name).detach() for t in self.trainings]) for name in held}
        self._attach()
        self.steps = [self._optimize(start, count) for start, count in self._neighbours()]

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """Start and length of each row of runs that can share an optimizer."""
        start = 0
        for i in range(1, len(self.trainings) + 1):
            one = self.trainings[start]
            if i < len(self.trainings) and _elementwise(one):
                other = self.trainings[i].config.optimizer
                if type(other) is type(one.config.optimizer) and other == one.config.optimizer:
                    continue
            yield start, i - start
            start = i

    def _partition(self) -> list[Segment]:
        first = self.trainings[0]
        kinds: dict[tuple[tuple[float, ...], bool], list[str]] = {}
        for name in first.trained:
            decays = tuple(
                t.config.method.weight_decay(t.model, name, t.config.optimizer.weight_decay) for t in self.trainings
            )
            kinds.setdefault((decays, is_feedback(name)), []).append(name)
        segments = []
        for (decays, feedback), names in kinds.items():
            rows = [torch.cat([t.trained[name].detach().flatten() for name in names]) for t in self.trainings]
            values = torch.stack(rows)
            segments.append(Segment(names, decays, feedback, values, torch.zeros_like(values)))
        return segments

    def _attach(self) -> None:
        """Make the template's parameters, and every run's parameters and buffers, views of the stack's tensors."""
        parts: dict[str, Tensor] = dict(self.held)
        grads: dict[str, Tensor] = {}
        for segment in self.segments:
            parts |= segment.views(segment.values, self.shapes)
            grads |= segment.views(segment.grads, self.shapes)
        leaves = {name: nn.Parameter(parts[name], requires_grad=name in grads) for name in self.shapes}
        for name, grad in grads.items():
            leaves[name].grad = grad
        first_names = {id(p): name for name, p in self.template.named_parameters()}
        for name, p in list(self.template.named_parameters(remove_duplicate=False)):
            module, _, leaf = name.rpartition(".")
            setattr(self.template.get_submodule(module), leaf, leaves[first_names[id(p)]])
        self.parameters, self.grads = leaves, grads
        self.buffers = {name: stacked for name, stacked in self.held.items() if name not in leaves}
        for run, training in enumerate(self.trainings):
            for name, stacked in parts.items():
                _tensor(training.model, name).data = stacked[run]
            if not _elementwise(training):  # its own optimizer reads its own gradients
                for name, grad in grads.items():
                    training.trained[name].grad = grad[run]
        clips = [t.config.optimizer.grad_clip for t in self.trainings]
        limits = self.segments[0].values.new_tensor([math.inf if clip is None else clip for clip in clips])
        self.limits = None if all(clip is None for clip in clips) else limits

    def _optimize(self, start: int, count: int) -> "Steps":
        """What moves the runs start, …, start + count - 1, which have one setting of the optimizer."""
        training = self.trainings[start]
        if not _elementwise(training):
            return Steps(training.config, start, count, training.optimizer, [])
        groups, leaves = [], []
        for segment in self.segments:
            rows = segment.values[start : start + count].requires_grad_()
            rows.grad = segment.grads[start : start + count]
            leaves.append(rows)
            groups.append({"params": [rows], "weight_decay": segment.decays[start]})
        return Steps(training.config, start, count, training.config.optimizer.build(groups), leaves)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Every run's next batch: idx, targets: (R, B, T)."""
        batches = [training.batches for training in self.trainings]
        starts = np.concatenate([own.starts() for own in batches])
        both = data.gather(batches[0].split, starts, batches[0].block_size)
        idx, targets = (part.view(len(batches), -1, part.shape[-1]).to(self.device, non_blocking=True) for part in both)
        return idx, targets

    def losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Each run's loss on its batch: (R,)."""
        with self.trainings[0].autocast():
            return losses(self.template, self.parameters, self.buffers, *batch)

    def update(self) -> tuple[list[float], list[bool]]:
        """One update of every run; returns each one's loss in nats, and whether it stays.

        A run whose loss is not finite leaves the stack with model and optimizer as they were.
        """
        for training in self.trainings:
            training.model.train()
            training.config.method.refresh(training.model, training.config.seed, training.updates)
        if type(self.trainings[0].config.method).refresh is not Method.refresh:
            self._require_views()
        batch = self.draw()
        found = self.losses(batch)
        values: list[float] = found.tolist()
        stays = [math.isfinite(value) for value in values]
        if not all(stays):
            self.keep(stays)
            rows = torch.tensor(stays, device=self.device)
            batch = (batch[0][rows], batch[1][rows])
            if self.trainings:
                found = self.losses(batch)
        if self.trainings:
            self._step(found, batch)
        return values, stays

    def _step(self, found: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        self._backward(found)
        if not self.checked:
            for run in sorted({0, len(self.trainings) - 1}):
                self.check_gradients(run, (batch[0][run], batch[1][run]))
            self.checked = True
        if self.limits is not None:
            self._clip(self.limits)
        self.trainings[0].config.method.before_update(self.template)
        for name, leaf in self.parameters.items():
            if name in self.grads and leaf.grad is not self.grads[name]:
                assert leaf.grad is not None
                self.grads[name].copy_(leaf.grad)
                leaf.grad = self.grads[name]
        done = self.trainings[0].updates
        for steps in self.steps:
            lr = steps.config.optimizer.lr_at(done, steps.config.steps)
            for group in steps.optimizer.param_groups:
                group["lr"] = lr
            steps.optimizer.step()
        for training in self.trainings:
            training.updates += 1

    def _backward(self, found: Tensor) -> None:
        """Put every gradient into its segment. What gets none stays zero: feedback that the method moves itself."""
        leaves = [self.parameters[name] for segment in self.segments for name in segment.names]
        grads = iter(torch.autograd.grad(found.sum(), leaves, allow_unused=True))
        for segment in self.segments:
            parts = [next(grads) for _ in segment.names]
            if all(part is None for part in parts):
                continue
            flat = [
                (torch.zeros_like(self.grads[name]) if part is None else part).flatten(1)
                for name, part in zip(segment.names, parts, strict=True)
            ]
            torch.cat(flat, dim=1, out=segment.grads)

    def _clip(self, limits: Tensor) -> None:
        """nn.utils.clip_grad_norm_ for each run by itself."""
        clipped = [segment.grads for segment in self.segments if not segment.feedback]
        norm = torch.stack([torch.linalg.vector_norm(grads, dim=1) for grads in clipped]).norm(dim=0)
        factor = (limits / (norm + 1e-6)).clamp(max=1.0).masked_fill(limits.isinf(), 1.0)
        for grads in clipped:
            grads.mul_(factor.unsqueeze(1))

    def check_gradients(self, run: int, batch: tuple[Tensor, Tensor]) -> None:
        """Raises RuntimeError where the stack's gradient of a trained parameter is not the run's own `loss.backward()`.

        batch: (B, T) each. A wrong batching rule is silent otherwise: feedback alignment would become backprop.
        """
        training = self.trainings[run]
        before = [(p, p.grad) for p in training.model.parameters()]
        try:
            for p, _ in before:
                p.grad = None
            training.loss(training.model, batch)[0].backward()  # type: ignore[no-untyped-call]
            own = {name: p.grad for name, p in training.trained.items() if not is_feedback(name)}
        finally:
            for p, grad in before:
                p.grad = grad
        whole = math.sqrt(sum(float(grad.norm()) ** 2 for grad in own.values() if grad is not None))
        tolerance = TOLERANCE[training.config.precision]
        for name, expected in own.items():
            if expected is None:
                raise RuntimeError(
                    f"{name} gets no gradient under method={training.config.method.name}: train it alone"
                )
            off, size = float((self.grads[name][run] - expected).norm()), float(expected.norm())
            if math.isfinite(size) and not off <= tolerance * (size + NEGLIGIBLE * whole):
                raise RuntimeError(
                    f"the stacked gradient of {name} is off by {off:.3g} from that of the run alone, {size:.3g} "
                    f"(seed={training.config.seed}, {configs.to_dict(training.config)['method']['_target_']}): "
                    "do not stack these runs"
                )

    def _require_views(self) -> None:
        for run, training in enumerate(self.trainings):
            for name, stacked in self.held.items():
                if _tensor(training.model, name).data_ptr() != stacked[run].data_ptr():
                    method = training.config.method.name
                    raise RuntimeError(f"refresh() of method={method} replaced {name}: write into it with copy_()")

    def keep(self, stays: Sequence[bool]) -> None:
        """Go on with some of the runs; each of the others gets tensors of its own back."""
        for training, stay in zip(self.trainings, stays, strict=True):
            if not stay:
                release(training)
        self.trainings = list(itertools.compress(self.trainings, stays))
        if not self.trainings:
            return
        rows = torch.tensor(stays, device=self.device)
        for segment in self.segments:
            segment.values, segment.grads = segment.values[rows], segment.grads[rows]
            segment.decays = tuple(itertools.compress(segment.decays, stays))
        self.held = {name: stacked[rows] for name, stacked in self.held.items()}
        self._attach()
        before, self.steps, start = self.steps, [], 0
        for old in before:
            mine = stays[old.start : old.start + old.count]
            if any(mine):
                self.steps.append(self._optimize(start, sum(mine)))
                self.steps[-1].take_moments(old, torch.tensor(mine, device=self.device))
                start += sum(mine)


@dataclass
class Steps:
    """An optimizer and the runs it moves: neighbours with one setting, or one run. `leaves`: their rows of each segment,
    empty where the optimizer is a run's own."""

    config: RunConfig
    start: int
    count: int
    optimizer: torch.optim.Optimizer
    leaves: list[Tensor]

    def take_moments(self, old: "Steps", rows: Tensor) -> None:
        """Go on from another's state, of these rows of its runs."""
        for leaf, before in zip(self.leaves, old.leaves, strict=True):
            for name, value in old.optimizer.state[before].items():
                per_entry = isinstance(value, Tensor) and value.shape == before.shape
                self.optimizer.state[leaf][name] = value[rows] if per_entry else value


def release(training: Training) -> None:
    """Give a run's model tensors of its own."""
    for tensor in [*training.model.parameters(), *training.model.buffers()]:
        tensor.data = tensor.data.clone()
        tensor.grad = None


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), leaf)
    return found


def _elementwise(training: Training) -> bool:
    """Whether the run's optimizer class itself, no parent of it, says so."""
    return bool(vars(type(training.config.optimizer)).get("elementwise", False))


# Runs


def train_stacked(jobs: Sequence[Job]) -> list[int | Exception | None]:
    """Train several entered jobs as one stack; returns each one's updates done when something turned non-finite, or None.

    The jobs' configs have one `key`, their corpora one content, and none has an update behind it. An error raised while
    one run is measured is returned in its place, and ends that run alone. Each run's clock gets an equal share of an
    update's time; its wall time is the whole stack's. No checkpoints are written: a stack that is interrupted starts anew.

    Before the first update the gradients of the first and the last run are compared with those of the run alone
    (`Stack.check_gradients`).
    """
    _require_stackable(jobs)
    order = sorted(range(len(jobs)), key=lambda i: repr(configs.to_dict(jobs[i].config)["optimizer"]))
    ended: list[int | Exception | None] = [None] * len(jobs)
    for job in jobs:
        job.stacked = len(jobs)
    running = [i for i in order if _observe(jobs[i], ended, i)]
    if not running:
        return ended
    config = jobs[0].config
    tokens = config.batch_size * config.model.block_size
    try:
        stack = Stack([jobs[i].training for i in running])
        with progress(config.steps, tokens * len(running)) as report:
            while running and (done := stack.trainings[0].updates) < config.steps:
                start = time.perf_counter()
                values, stays = stack.update()
                share = (time.perf_counter() - start) / len(running)
                measured = []
                for i, value, stay in zip(running, values, stays, strict=True):
                    jobs[i].clock.train += share
                    if not stay:
                        ended[i] = done
                        continue
                    settings = jobs[i].config.optimizer
                    measured.append(_observe(jobs[i], ended, i, value, settings.lr_at(done, config.steps)))
                running = list(itertools.compress(running, stays))
                if not all(measured):
                    stack.keep(measured)
                    running = list(itertools.compress(running, measured))
                healthy = [value for value in values if math.isfinite(value)]
                report.tokens = tokens * len(running)
                if healthy:
                    report.tick(done + 1, sum(healthy) / len(healthy))
    finally:
        for job in jobs:
            release(job.training)
    return ended


def _observe(
    job: Job, ended: list[int | Exception | None], i: int, loss: float | None = None, lr: float | None = None
) -> bool:
    """Measure what is due; False where the run ends here, by an error or a loss that is not finite."""
    try:
        if job.record.observe(loss, lr):
            return True
        ended[i] = job.training.updates
    except Exception as error:
        log.warning("run %s ends: %s: %s", job.identity["run_id"], type(error).__name__, error)
        ended[i] = error
    return False


def _require_stackable(jobs: Sequence[Job]) -> None:
    keys = {key(job.config) for job in jobs}
    if len(keys) != 1 or None in keys:
        raise ValueError("these runs differ in more than seed and optimizer, or have dropout: train each by itself")
    if len({job.corpus.sha256 for job in jobs}) != 1:
        raise ValueError("these runs have different corpora: train each by itself")
    if any(job.resumed or job.training.updates for job in jobs):
        raise ValueError("a run that goes on from a checkpoint is not stacked: train it by itself")
