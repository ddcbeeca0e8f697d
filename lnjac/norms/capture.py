"""Capture the input and the output gradient of every call of every norm of a model, without disturbing the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lnjac.norms.layers import Norm

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""`loss(model, batch)`: the mean loss, and the number of tokens it is the mean of."""


@dataclass
class Capture:
    """One call of a norm: its input x: (…, d), the gradient at its output grad = ∂L/∂y: (…, d), and the norm's parameters."""

    site: str
    call: int
    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


class NormSpec(NamedTuple):
    """The formula that a norm module computes, whatever its class."""

    dims: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    rms: bool


def describe(module: nn.Module) -> NormSpec | None:
    """Return the formula of a norm: nn.LayerNorm, nn.RMSNorm, lnjac's Norm, or a subclass; None for another module."""
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm, Norm)):
        return None
    rms = module.rms if isinstance(module, Norm) else isinstance(module, nn.RMSNorm)
    return NormSpec(len(module.normalized_shape), module.weight, getattr(module, "bias", None), module.eps, rms)


@contextmanager
def capture(model: nn.Module, reduce: Callable[[Capture], Any] | None = None) -> Iterator[list[Any]]:
    """Within the context, record every call of every norm whose gradient arrives; yield the list of the calls.

        with capture(model) as calls:
            loss(model(batch)).backward()
        for c in calls: print(c.site, c.call, c.x.shape, c.grad.shape)

    One forward and backward pass per context. `reduce` turns each Capture into something smaller at the moment its
    gradient arrives, so that nothing else need be kept. Calls come in the order of the forward pass, and a module called
    more than once (tied layers) has its calls numbered in that order; recomputation under activation checkpointing,
    reentrant or not, counts as the call it repeats. A norm that nothing trainable feeds is captured too.

    Raises ValueError when the model has no norm, or is compiled (hooks on a compiled module never fire).
    """
    sites = {name: spec for name, module in model.named_modules() if (spec := describe(module)) is not None}
    if not sites:
        raise ValueError("the model has no nn.LayerNorm, nn.RMSNorm or lnjac.norms.layers.Norm to capture")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(
            "hooks do not fire in a compiled module: capture one that is not compiled (compiled._orig_mod)"
        )
    recorder = _Recorder(reduce)
    found: list[Any] = []
    handles = [
        model.get_submodule(site).register_forward_hook(recorder.hook(site, spec), with_kwargs=True)
        for site, spec in sites.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += recorder.close()


class _Call:
    """One pass through a norm's forward, which holds its input until its gradient has come."""

    def __init__(self, when: int | None, x: Tensor) -> None:
        self.when, self.x = when, x


class _Recorder:
    """Number the calls and pair each with its gradient.

    Under a reentrant checkpoint a segment's first pass runs without grad, and its recomputation, in the backward pass,
    gets the gradient. Segments are recomputed last to first, and each is done with before the next, so the calls of a site
    that were recomputed when a gradient first arrives there are its last ones still without.
    """

    def __init__(self, reduce: Callable[[Capture], Any] | None) -> None:
        self.reduce = reduce or (lambda call: call)
        self.open = True
        self.clock = 0  # calls of any norm seen so far
        self.order: dict[str, list[int]] = {}  # site -> the clock of each of its calls, recomputations left out
        self.waiting: dict[str, list[int]] = {}  # site -> calls made without grad
        self.repeats: dict[str, list[_Call]] = {}  # site -> recomputations not yet paired with a waiting call
        self.results: dict[int, Any] = {}

    def hook(self, site: str, spec: NormSpec) -> Callable[..., Tensor | None]:
        def on_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
            when = None if recomputed else self._new_call(site)
            if not torch.is_grad_enabled():
                if when is not None:
                    self.waiting.setdefault(site, []).append(when)
                return None
            x, replaced = (args[0] if args else next(iter(kwargs.values()))).detach(), None
            if not output.requires_grad:  # nothing below is trainable: give the gradient a place to arrive
                x = x.clone()  # autograd, which keeps no input here, would not notice one changed in place
                replaced = output = output.detach().requires_grad_().clone()
            call = _Call(when, x)
            if recomputed:
                self.repeats.setdefault(site, []).append(call)
            output.register_hook(lambda grad: self._arrived(site, spec, call, grad))  # type: ignore[no-untyped-call]
            return replaced

        return on_forward

    def close(self) -> list[Any]:
        """Return the results in the order of the forward pass, and drop the references that a spent graph still holds."""
        self.open = False
        results, self.results = self.results, {}
        return [results[when] for when in sorted(results)]

    def _new_call(self, site: str) -> int:
        self.clock += 1
        self.order.setdefault(site, []).append(self.clock)
        return self.clock

    def _pair(self, site: str) -> None:
        repeats, waiting = self.repeats.pop(site), self.waiting.get(site, [])
        for call, when in zip(repeats, waiting[-len(repeats) :], strict=True):
            call.when = when
        del waiting[-len(repeats) :]

    def _arrived(self, site: str, spec: NormSpec, call: _Call, grad: Tensor) -> None:
        if not self.open:
            return
        if call.when is None:
            self._pair(site)
        assert call.when is not None
        x = call.x
        first = x.dim() - spec.dims
        weight, bias = (None if p is None else p.detach().flatten() for p in (spec.weight, spec.bias))
        self.results[call.when] = self.reduce(
            Capture(
                site=site,
                call=self.order[site].index(call.when),
                x=x.flatten(first),
                grad=grad.detach().flatten(first),
                weight=weight,
                bias=bias,
                eps=_default_eps(x.dtype) if spec.eps is None else spec.eps,
                rms=spec.rms,
            )
        )
        del call.x


def _default_eps(dtype: torch.dtype) -> float:
    """Return nn.RMSNorm's ε where none is given: that of the dtype it computes in, float32 for half precision."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps
