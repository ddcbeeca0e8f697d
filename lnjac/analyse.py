"""Rows of any model's norms: capture each call, decompose its backward, merge micro-batches by their sums."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac import jacobian
from lnjac.capture import Capture, capture
from lnjac.config import GradAt
from lnjac.norm import Norm

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""(model, batch) -> the mean loss, and the number of tokens it is the mean of."""


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
    """One micro-batch's statistics of one call of a norm; sigma: (n,) is kept for its quantiles, which do not add."""

    site: str
    call: int
    d: int
    rms: bool
    dtype: torch.dtype
    sums: jacobian.Sums
    sigma: Tensor


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
    at = GradAt(grad_at)
    merged: dict[tuple[str, int], list[Measured]] = {}
    for batch in batches:
        with fresh_grads(model):
            for part in _measure_batch(model, batch, loss, at, watchers):
                merged.setdefault((part.site, part.call), []).append(part)
    if not merged:
        raise ValueError(
            "no gradient arrived at any norm: is the loss computed from the model's output, with grad enabled?"
        )
    return [_row(model, parts) for parts in merged.values()]


def _measure_batch(model: nn.Module, batch: Any, loss: Loss, at: GradAt, watchers: Sequence[Watcher]) -> list[Measured]:
    tokens = 0  # known with the loss, before any gradient arrives
    with ExitStack() as entered:
        found = entered.enter_context(capture(model, lambda call: measure(call, at, tokens)))
        for watcher in watchers:
            entered.enter_context(watcher.watch())
        value, tokens = loss(model, batch)
        if value.requires_grad:  # else no gradient arrives, which the caller says
            value.backward()  # type: ignore[no-untyped-call]
    for watcher in watchers:
        watcher.passed(batch, tokens)
    return found


def measure(call: Capture, at: GradAt, loss_tokens: int) -> Measured:
    """Reduce one call: replay the norm alone for autograd's own pullback, decompose, add up."""
    weight = call.weight if at is GradAt.normalized else None
    tokens = jacobian.decompose(
        call.x,
        call.grad,
        call.eps,
        weight=weight,
        rms=call.rms,
        replayed=replay(call.x, call.grad, call.eps, weight=weight, rms=call.rms),
        loss_tokens=loss_tokens,
    )
    sums = jacobian.sums(tokens, rms=call.rms)
    return Measured(call.site, call.call, call.x.shape[-1], call.rms, call.x.dtype, sums, tokens.sigma)


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
