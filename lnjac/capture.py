"""Read each call of every norm of a model: what went in, and the gradient at what came out. The model is not disturbed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lnjac.norm import Norm


@dataclass
class Capture:
    """One call of a norm: x: (…, d) its input, grad: (…, d) = ∂L/∂y at its output, and what the norm is."""

    site: str
    call: int
    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


class NormSpec(NamedTuple):
    """What a norm module computes, whatever its class."""

    dims: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    rms: bool


def describe(module: nn.Module) -> NormSpec | None:
    """The norm this module is, or None. Knows nn.LayerNorm, nn.RMSNorm and lnjac.norm.Norm, and their subclasses."""
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm, Norm)):
        return None
    rms = module.rms if isinstance(module, Norm) else isinstance(module, nn.RMSNorm)
    return NormSpec(len(module.normalized_shape), module.weight, getattr(module, "bias", None), module.eps, rms)


@contextmanager
def capture(model: nn.Module, reduce: Callable[[Capture], Any] | None = None) -> Iterator[list[Any]]:
    """Within the context, record every call of every norm whose gradient arrives; yields the list they go to.

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
        raise ValueError("the model has no nn.LayerNorm, nn.RMSNorm or lnjac.norm.Norm to capture")
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError("hooks do not fire in a compiled module: capture the original (compiled._orig_mod)")
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
        recorder.open = False
        found += recorder.ordered()


class _Recorder:
    def __init__(self, reduce: Callable[[Capture], Any] | None) -> None:
        self.reduce = reduce or (lambda call: call)
        self.open = True
        self.clock = 0  # calls of any norm seen so far
        self.order: dict[str, list[int]] = {}  # site -> clock of each of its calls, recomputations left out
        self.waiting: dict[str, list[tuple[int, float]]] = {}  # calls without grad, which a recomputation may repeat
        self.results: dict[int, Any] = {}

    def hook(self, site: str, spec: NormSpec) -> Callable[..., Tensor | None]:
        def on_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            if not torch.is_grad_enabled():  # a reentrant checkpoint's first pass: its recomputation will match
                self.waiting.setdefault(site, []).append((self._new_call(site), _fingerprint(x)))
                return None
            replaced = None
            if not output.requires_grad:  # nothing below is trainable: give the gradient a place to arrive
                replaced = output = output.detach().requires_grad_()
            when = self._repeated(site, x)
            if when is None:
                when = self._new_call(site)
            call = self.order[site].index(when)
            output.register_hook(lambda grad: self._arrived(when, site, call, spec, x, grad))  # type: ignore[no-untyped-call]
            return replaced

        return on_forward

    def ordered(self) -> list[Any]:
        return [self.results[when] for when in sorted(self.results)]

    def _new_call(self, site: str) -> int:
        self.clock += 1
        self.order.setdefault(site, []).append(self.clock)
        return self.clock

    def _repeated(self, site: str, x: Tensor) -> int | None:
        """The clock of the call without grad that this one recomputes, if any."""
        waiting = self.waiting.get(site)
        if not waiting:
            return None
        mark = _fingerprint(x)
        match = next((i for i, (_, seen) in enumerate(waiting) if seen == mark), None)
        return None if match is None else waiting.pop(match)[0]

    def _arrived(self, when: int, site: str, call: int, spec: NormSpec, x: Tensor, grad: Tensor) -> None:
        if not self.open:
            return
        d_first = x.dim() - spec.dims
        eps = torch.finfo(x.dtype).eps if spec.eps is None else spec.eps
        flat = [None if p is None else p.detach().flatten() for p in (spec.weight, spec.bias)]
        self.results[when] = self.reduce(
            Capture(
                site,
                call,
                x.flatten(d_first),
                grad.detach().flatten(d_first),
                flat[0],
                flat[1],
                eps,
                spec.rms,
            )
        )


def _fingerprint(x: Tensor) -> float:
    return float(x.double().sum())
