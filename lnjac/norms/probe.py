"""Measure the norms of any model: watch its forward and backward passes, pool their statistics into rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.norms import decompose, distribution
from lnjac.norms.capture import Capture, Loss, capture
from lnjac.norms.formulas import GradAt
from lnjac.norms.layers import Norm
from lnjac.norms.recognise import Unrecognised

if TYPE_CHECKING:
    import pandas as pd


def probe(model: nn.Module, *, grad_at: GradAt | str = GradAt.normalized, keep_tokens: bool = False) -> Probe:
    """Return a probe that measures the backward of each norm of the model.

        probe = lnjac.probe(model)
        table = probe.measure(batches, loss)      # loss(model, batch) -> (mean loss, number of tokens)

        with probe.watch(step) as seen:           # or in your own loop, around its forward and backward pass
            mean, tokens = loss(model, batch)
            seen.tokens(tokens)
            mean.backward()
        table = probe.rows(step)

    Args:
        model: Any module with nn.LayerNorm, nn.RMSNorm or lnjac's Norm in it. Of a compiled one, the original.
        grad_at: Where a norm's gradient is read: `normalized`, before its affine part (g = γ⊙∂L/∂y), or `output` (g = ∂L/∂y).
        keep_tokens: Keep seven numbers of each token at each norm, for `distributions`.

    Raises:
        ValueError: `grad_at` is neither of the two.
    """
    return Probe(model, GradAt(grad_at), keep_tokens)


@dataclass
class CallSums:
    """Statistics of one call of a norm in one pass; `sigma`: (n,) is kept for its quantiles, which do not add.

    `tokens`, and the `length` of the sequences that they come in, serve distributions; `tokens` is None unless kept.
    """

    site: str
    call: int
    d: int
    rms: bool
    dtype: torch.dtype
    sums: decompose.Sums
    sigma: Tensor
    length: int
    tokens: decompose.Tokens | None


@dataclass
class Pass:
    """One forward and backward pass that a probe watches."""

    n_tokens: int = 0
    loss: Tensor | float = float("nan")
    calls: list[CallSums] = field(default_factory=list)
    """What was measured at each call of a norm, in the order of the forward pass; filled when the pass is over."""

    def tokens(self, n: int, loss: Tensor | float | None = None) -> None:
        """Tell, before the backward pass, how many tokens the loss is the mean of, and its value for the column loss_nats.

        A loss that is divided once more, as by the k micro-batches of an update, is a mean of k times as many tokens.
        """
        self.n_tokens = n
        if loss is not None:
            self.loss = loss.detach() if isinstance(loss, Tensor) else loss


class Probe:
    """Measures a model's norms: on given batches by `measure`, or in a loop of one's own by `watch` and `rows`."""

    def __init__(self, model: nn.Module, grad_at: GradAt, keep_tokens: bool) -> None:
        self.model, self.grad_at, self.keep_tokens = model, grad_at, keep_tokens
        self.step: int | None = None
        self.passes: list[Pass] = []

    def measure(self, batches: Iterable[Any], loss: Loss) -> pd.DataFrame:
        """Return a row for each norm and call over all batches; parameters' `.grad` are left as they were found.

        Args:
            batches: Whatever `loss` takes, one after the other.
            loss: `loss(model, batch)` gives the mean loss and the number of tokens it is the mean of.

        Returns:
            The measured columns of the table layers (docs/columns.md).

        Raises:
            ValueError: The model has no norm, is compiled, or no gradient arrived at any norm.
        """
        self.step, self.passes = None, []
        for batch in batches:
            with fresh_grads(self.model), self.watch() as seen:
                mean, tokens = loss(self.model, batch)
                seen.tokens(tokens, mean)
                if mean.requires_grad:  # else no gradient arrives, as `rows` says
                    mean.backward()  # type: ignore[no-untyped-call]
        return self.rows()

    @contextmanager
    def watch(self, step: int = 0) -> Iterator[Pass]:
        """Within the context, measure one forward and backward pass; several of one step are pooled.

        The first pass of another step forgets those of the step before. The pass must be told its number of tokens
        (`seen.tokens(n)`) before its backward, which raises ValueError otherwise.
        """
        if step != self.step:
            self.step, self.passes = step, []
        seen = Pass()
        with capture(self.model, lambda call: self._reduced(call, seen.n_tokens)) as seen.calls:
            yield seen
        self.passes.append(seen)

    def rows(self, step: int = 0) -> pd.DataFrame:
        """Return a row for each norm and call, pooled over the passes watched at this step.

        Raises:
            ValueError: No gradient arrived at any norm, or another step is the one that was watched last.
        """
        import pandas as pd

        passes = self._watched(step)
        loss = sum(float(seen.loss) * seen.n_tokens for seen in passes) / sum(seen.n_tokens for seen in passes)
        rows = [{**_row(self.model, parts), "loss_nats": loss} for parts in _by_call(passes)]
        return pd.DataFrame(rows).astype({"block": "Int64"})

    def distributions(self, bins: int, step: int = 0) -> pd.DataFrame:
        """Return the spread of each norm's quantities over the tokens seen at this step, and over positions in `bins` bins.

        Raises:
            ValueError: As `rows` does, or the probe was not made with keep_tokens=True.
        """
        import pandas as pd

        return pd.DataFrame(distributions(self._watched(step), bins))

    def _watched(self, step: int) -> list[Pass]:
        if step != self.step and self.passes:
            raise ValueError(f"step {step} is not the one that was watched last, {self.step}: ask for its rows in time")
        if not any(seen.calls for seen in self.passes):
            raise ValueError(
                "no gradient arrived at any norm: is the loss computed from the model's output, with grad enabled?"
            )
        return self.passes

    def _reduced(self, call: Capture, loss_tokens: int) -> CallSums:
        """Replay the norm alone for autograd's own pullback, decompose its gradient, add up."""
        if loss_tokens < 1:
            raise ValueError(
                "a gradient came before the pass was told its tokens: call seen.tokens(n) before backward()"
            )
        weight = call.weight if self.grad_at is GradAt.normalized else None
        if call.forward is not None and self.grad_at is GradAt.normalized:
            replayed = _through(call.forward, call.x, call.grad)
        else:
            replayed = replay(call.x, call.grad, call.eps, weight=weight, rms=call.rms)
        tokens = decompose.decompose(
            call.x, call.grad, call.eps, weight=weight, rms=call.rms, replayed=replayed, loss_tokens=loss_tokens
        )
        sums = decompose.sums(tokens, rms=call.rms)
        size = math.sqrt(sum(sums[f"sum_{energy}_rstd2"] for energy in "ABC"))
        if (apart := math.sqrt(sums["sum_residual_sq"])) > PULLBACK * size:
            raise Unrecognised(f"its input gradient is {apart / size:.2g} of its size away from the formula's")
        return CallSums(
            site=call.site,
            call=call.call,
            d=call.x.shape[-1],
            rms=call.rms,
            dtype=call.x.dtype,
            sums=sums,
            sigma=tokens.sigma,
            length=call.x.shape[-2] if call.x.dim() > 1 else 1,
            tokens=tokens if self.keep_tokens else None,
        )


def distributions(passes: Iterable[Pass], bins: int) -> list[dict[str, Any]]:
    """Return rows of the table distributions over the passes' tokens. Raises ValueError where those were not kept."""
    found = []
    for parts in _by_call(passes):
        one, kept = parts[0], [part.tokens for part in parts if part.tokens is not None]
        if not kept:
            raise ValueError("distributions need each token's numbers: make the probe with keep_tokens=True")
        positions = np.concatenate([np.arange(len(part.sigma)) % part.length for part in parts])
        for quantity in distribution.quantities(decompose.concatenate(kept), rms=one.rms):
            for statistic in (*distribution.spread(quantity), *distribution.profile(quantity, positions, bins)):
                found.append({"site": one.site, "call": one.call, **statistic._asdict()})
    return found


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


def block_of(name: str) -> int | None:
    """The first number in a dotted name: `blocks.0.ln_1` -> 0; None where there is none."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


def _by_call(passes: Iterable[Pass]) -> list[list[CallSums]]:
    """The statistics of all passes, by call of a norm."""
    found: dict[tuple[str, int], list[CallSums]] = {}
    for seen in passes:
        for part in seen.calls:
            found.setdefault((part.site, part.call), []).append(part)
    return list(found.values())


def _row(model: nn.Module, parts: Sequence[CallSums]) -> dict[str, Any]:
    one = parts[0]
    module = model.get_submodule(one.site)
    rule = module.backward_rule if isinstance(module, Norm) else None
    total, sigma = decompose.add([part.sums for part in parts]), torch.cat([part.sigma for part in parts])
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
        **decompose.summary(total, sigma, one.d, rms=one.rms),
    }
