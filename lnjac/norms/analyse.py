"""Rows of any model's norms: capture each call, decompose its backward, merge micro-batches by their sums."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.norms import decompose as jacobian
from lnjac.norms import distribution
from lnjac.norms.capture import Capture, Loss, capture
from lnjac.norms.formulas import GradAt
from lnjac.norms.layers import Norm
from lnjac.norms.recognise import Unrecognised


class Watcher(Protocol):
    """Measures more on the passes that `analyse` makes."""

    def watch(self) -> AbstractContextManager[Any]:
        """Entered around one batch's forward and backward pass."""

    def passed(self, batch: Any, tokens: int) -> None:
        """Called after it: parameters' `.grad` are of the batch's loss, the mean over so many tokens."""


@contextmanager
def fresh_grads(model: nn.Module) -> Iterator[None]:
    """Within the context parameters begin without `.grad`; afterwards they have what they had."""
    before = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.grad = None
        yield
    finally:
        for p, grad in before:
            p.grad = grad


@dataclass
class Measured:
    """One micro-batch's statistics of one call of a norm; sigma: (n,) is kept for its quantiles, which do not add.

    `tokens`, and the `length` of the sequences they come in, are there only when distributions are wanted.
    """

    site: str
    call: int
    d: int
    rms: bool
    dtype: torch.dtype
    sums: jacobian.Sums
    sigma: Tensor
    length: int
    tokens: jacobian.Tokens | None


@dataclass
class Analysis:
    """All micro-batches' statistics, by call of a norm, and their mean loss."""

    model: nn.Module
    calls: list[list[Measured]]
    loss_nats: float

    def rows(self) -> list[dict[str, Any]]:
        """A row of `layers` for each call: its measured columns."""
        return [{**_row(self.model, parts), "loss_nats": self.loss_nats} for parts in self.calls]

    def distributions(self, bins: int) -> list[dict[str, Any]]:
        """Rows of `distributions`, positions in so many bins. The analysis must have kept its tokens."""
        found = []
        for parts in self.calls:
            one = parts[0]
            tokens = jacobian.concatenate([part.tokens for part in parts if part.tokens is not None])
            positions = np.concatenate([np.arange(len(part.sigma)) % part.length for part in parts])
            for quantity in distribution.quantities(tokens, rms=one.rms):
                for statistic in (*distribution.spread(quantity), *distribution.profile(quantity, positions, bins)):
                    found.append({"site": one.site, "call": one.call, **statistic._asdict()})
        return found


def analyse(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    grad_at: GradAt | str = GradAt.normalized,
    watchers: Sequence[Watcher] = (),
) -> list[dict[str, Any]]:
    """One row per norm and call over all batches, as a dict of the measured columns of `layers` (docs/columns.md).

    `loss(model, batch)` gives the mean loss and the number of tokens it is the mean of. Parameters' `.grad` are left as
    they were found. Each of `watchers` sees the same passes. Raises ValueError where `capture` does, and when no gradient
    arrived at any norm.
    """
    return examine(model, batches, loss, grad_at=grad_at, watchers=watchers).rows()


def examine(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    grad_at: GradAt | str = GradAt.normalized,
    keep_tokens: bool = False,
    watchers: Sequence[Watcher] = (),
) -> Analysis:
    """What `analyse` makes its rows of; with `keep_tokens`, distributions too. Raises ValueError as it does."""
    at = GradAt(grad_at)
    merged: dict[tuple[str, int], list[Measured]] = {}
    total_loss, total_tokens = 0.0, 0
    for batch in batches:
        with fresh_grads(model):
            mean, tokens, parts = _measure_batch(model, batch, loss, at, keep_tokens, watchers)
            total_loss, total_tokens = total_loss + mean * tokens, total_tokens + tokens
            for part in parts:
                merged.setdefault((part.site, part.call), []).append(part)
    if not merged:
        raise ValueError(
            "no gradient arrived at any norm: is the loss computed from the model's output, with grad enabled?"
        )
    return Analysis(model, list(merged.values()), total_loss / total_tokens)


def _measure_batch(
    model: nn.Module, batch: Any, loss: Loss, at: GradAt, keep_tokens: bool, watchers: Sequence[Watcher]
) -> tuple[float, int, list[Measured]]:
    """The batch's mean loss, the tokens it is the mean of, and what was measured at each call of a norm."""
    tokens = 0  # known with the loss, before any gradient arrives
    with ExitStack() as entered:
        found = entered.enter_context(capture(model, lambda call: measure(call, at, tokens, keep_tokens=keep_tokens)))
        for watcher in watchers:
            entered.enter_context(watcher.watch())
        value, tokens = loss(model, batch)
        if value.requires_grad:  # else no gradient arrives, which the caller says
            value.backward()  # type: ignore[no-untyped-call]
    for watcher in watchers:
        watcher.passed(batch, tokens)
    return value.item(), tokens, found


def measure(call: Capture, at: GradAt, loss_tokens: int, *, keep_tokens: bool = False) -> Measured:
    """Reduce one call: replay the norm alone for autograd's own pullback, decompose, add up."""
    weight = call.weight if at is GradAt.normalized else None
    if call.forward is not None and at is GradAt.normalized:
        replayed = _through(call.forward, call.x, call.grad)
    else:
        replayed = replay(call.x, call.grad, call.eps, weight=weight, rms=call.rms)
    tokens = jacobian.decompose(
        call.x,
        call.grad,
        call.eps,
        weight=weight,
        rms=call.rms,
        replayed=replayed,
        loss_tokens=loss_tokens,
    )
    sums = jacobian.sums(tokens, rms=call.rms)
    size = math.sqrt(sum(sums[f"sum_{energy}_rstd2"] for energy in "ABC"))
    if (apart := math.sqrt(sums["sum_residual_sq"])) > PULLBACK * size:
        raise Unrecognised(f"its input gradient is {apart / size:.2g} of its size away from the formula's")
    return Measured(
        site=call.site,
        call=call.call,
        d=call.x.shape[-1],
        rms=call.rms,
        dtype=call.x.dtype,
        sums=sums,
        sigma=tokens.sigma,
        length=call.x.shape[-2] if call.x.dim() > 1 else 1,
        tokens=tokens if keep_tokens else None,
    )


PULLBACK = 0.02
"""How far a norm's own pullback may be from the formula's, relative to ‖g‖/σ: bf16 rounds by 3e-3."""


def _through(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Return autograd's ∂L/∂x through a norm's own forward. x, grad: (…, d)."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaf = x.detach().clone().requires_grad_()
        y = forward(leaf)
        return torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]


def replay(x: Tensor, grad: Tensor, eps: float, *, weight: Tensor | None, rms: bool) -> Tensor:
    """Autograd's ∂L/∂x through this norm alone, with its exact backward, in x's dtype. x, grad: (…, d); weight: (d,)."""
    d = (x.shape[-1],)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaf = x.detach().clone().requires_grad_()
        gamma = None if weight is None else weight.to(x.dtype)
        y = F.rms_norm(leaf, d, gamma, eps) if rms else F.layer_norm(leaf, d, gamma, None, eps)
        return torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]


def _row(model: nn.Module, parts: Sequence[Measured]) -> dict[str, Any]:
    one = parts[0]
    module = model.get_submodule(one.site)
    rule = module.backward_rule if isinstance(module, Norm) else None
    return {
        "site": one.site,
        "call": one.call,
        "block": block_of(one.site),
        "role": one.site.rpartition(".")[2],
        "norm": "rmsnorm" if one.rms else "layernorm",
        "site_backward": "exact" if rule is None else rule.name,
        "n_backwards": 4 if one.rms else 8,
        "d": one.d,
        "dtype": str(one.dtype).removeprefix("torch."),
        **jacobian.summary(
            jacobian.add([part.sums for part in parts]),
            torch.cat([part.sigma for part in parts]),
            one.d,
            rms=one.rms,
        ),
    }


def block_of(name: str) -> int | None:
    """The first number in a dotted name: `blocks.0.ln_1` -> 0; None where there is none."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)
