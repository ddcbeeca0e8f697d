"""Optimizers and their learning-rate schedules (conf/optimizer/*.yaml)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lnjac.gpt.methods import Method


class Decay(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class Optimizer(ABC):
    """The base of every optimizer, whose lr rises over `warmup_steps` and decays to lr·final_lr_ratio at the last update."""

    name: str
    lr: float
    weight_decay: float
    warmup_steps: int
    decay: Decay
    final_lr_ratio: float
    grad_clip: float | None

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return a torch optimizer of these parameter groups."""

    def preconditioner(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
        """Return P, of the parameter's shape, such that without momentum the optimizer would now step by −lr·P⊙g.

        Return None if the optimizer has no such factor, or no state yet.
        """
        return None

    def lr_at(self, update: int, updates: int) -> float:
        """Return the learning rate of update number `update` (from 0) of `updates`."""
        if update < self.warmup_steps:
            return self.lr * (update + 1) / self.warmup_steps
        done = (update - self.warmup_steps) / max(1, updates - 1 - self.warmup_steps)
        match self.decay:
            case Decay.constant:
                return self.lr
            case Decay.linear:
                share = 1 - done
            case Decay.cosine:
                share = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * share)

    def problems(self, config: Any) -> Iterator[str]:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            yield f"optimizer.lr={self.lr} must be positive and finite: try 1e-3"
        if not 0 <= self.weight_decay < math.inf:
            yield f"optimizer.weight_decay={self.weight_decay} must not be negative or infinite"
        if not 0 <= self.warmup_steps <= max(config.steps, 0):
            yield f"optimizer.warmup_steps={self.warmup_steps} must lie between 0 and steps={config.steps}"
        if not 0 <= self.final_lr_ratio <= 1:
            yield f"optimizer.final_lr_ratio={self.final_lr_ratio} must lie in [0, 1]"
        if self.grad_clip is not None and not self.grad_clip > 0:
            yield f"optimizer.grad_clip={self.grad_clip} must be positive, or null for none"


@dataclass
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    beta1: float
    beta2: float
    eps: float

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def preconditioner(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
        """Return 1/(√v̂ + ε), and 0 for an entry that has had no gradient yet."""
        if not (state := optimizer.state.get(parameter)):
            return None
        v = state["exp_avg_sq"]
        corrected = v / (1 - self.beta2 ** float(state["step"]))
        return torch.where(v > 0, 1 / (corrected.sqrt() + self.eps), 0.0)

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                yield f"optimizer.{field}={getattr(self, field)} must lie in [0, 1)"
        if not 0 <= self.eps < math.inf:
            yield f"optimizer.eps={self.eps} must not be negative or infinite: Adam's usual value is 1e-8"


@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent; weight decay is coupled (added to the gradient)."""

    momentum: float
    nesterov: bool

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def preconditioner(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
        return torch.ones_like(parameter, requires_grad=False)

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if not 0 <= self.momentum < 1:
            yield f"optimizer.momentum={self.momentum} must lie in [0, 1)"
        if self.nesterov and self.momentum == 0:
            yield "optimizer.nesterov=true needs momentum: set optimizer.momentum=0.9, or nesterov=false"


def trained(model: nn.Module, method: Method) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer gets, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if method.trains(name)}


def groups(model: nn.Module, method: Method, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of one weight decay each, which the method may set for some."""
    by_decay: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained(model, method).items():
        by_decay.setdefault(method.weight_decay(model, name, weight_decay), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]


class Rehearsal:
    """A copy of a run's optimizer that computes its update by any gradient from its present state.

    It steps from parameters at zero, where weight decay has nothing to decay and a small update loses no digits. Their values
    after the step are the update. An optimizer whose update depends on the parameters other than by decay is not served.
    The learning rate is the configured one, before any schedule.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.clip, self.lr = settings.grad_clip, settings.lr
        self.parameters = [torch.zeros_like(p) for p in parameters]
        self.optimizer = settings.build([{"params": self.parameters, "weight_decay": 0.0}])
        self.states = [optimizer.state.get(p, {}) for p in parameters]

    @torch.no_grad()
    def update(self, gradient: Sequence[Tensor | None]) -> list[Tensor]:
        """Return each parameter's update by its gradient, 0 if that is None. The next call overwrites the tensors."""
        for mine, grad, state in zip(self.parameters, gradient, self.states, strict=True):
            mine.zero_()
            if grad is not None:
                grad = grad.contiguous()  # fused kernels read another layout wrongly
                mine.grad = grad if self.clip is None else grad.clone()  # clipped in place
                self.optimizer.state[mine] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        return self.parameters
