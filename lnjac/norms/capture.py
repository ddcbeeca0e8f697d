"""Capture the input and the output gradient of every call of every norm of a model, without disturbing the model."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lnjac.norms.decompose import wide_dtype
from lnjac.norms.recognise import (
    KNOWN,
    NormFormula,
    Unrecognised,
    is_candidate,
    own_forward,
    recognise,
    require_formula,
)

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
    forward: Callable[[Tensor], Tensor] | None = None
    """The module's own forward of x: (…, d), with its exact backward, for half inputs in float32."""


Unknown = Literal["raise", "warn", "skip"]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that look like a LayerNorm or an RMSNorm, by dotted name; of nested ones the innermost."""
    found = {name: module for name, module in model.named_modules() if is_candidate(module)}
    outer = {parent for name in found for parent in _parents(name)}
    return {name: module for name, module in found.items() if name not in outer}


def _parents(name: str) -> list[str]:
    """Return the names of the modules around this one, the model's own, empty one first."""
    words = name.split(".")
    return [".".join(words[:n]) for n in range(len(words))] if name else []


@contextmanager
def capture(
    model: nn.Module, reduce: Callable[[Capture], Any] | None = None, *, unknown: Unknown = "raise"
) -> Iterator[list[Any]]:
    """Within the context, record every call of every norm whose gradient arrives; yields the list they go to.

        with capture(model) as calls:
            loss(model(batch)).backward()
        for c in calls: print(c.site, c.call, c.x.shape, c.grad.shape)

    One forward and backward pass per context. `reduce` turns each Capture into something smaller at the moment its
    gradient arrives, so that nothing else need be kept. Calls come in the order of the forward pass, and a module called
    more than once (tied layers) has its calls numbered in that order; recomputation under activation checkpointing,
    reentrant or not, counts as the call it repeats. A norm that nothing trainable feeds is captured too.

    A module is a norm by what it computes: its γ, β, ε and axis are found from its outputs on chosen tokens, and its
    output on the real ones is compared with the formula's (`lnjac.norms.recognise`). Unless `unknown` is "warn" or
    "skip", one that looks like a norm and computes something else is refused at the end of the context.

    Raises:
        ValueError: when the model has no norm, when it is compiled (hooks on a compiled module never fire), and when a
            module is refused; the text names each with the reason.
    """
    sites = candidates(model)
    if not sites:
        raise ValueError("the model has no LayerNorm or RMSNorm to capture")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(
            "hooks do not fire in a compiled module: capture one that is not compiled (compiled._orig_mod)"
        )
    recorder = _Recorder(reduce)
    found: list[Any] = []
    handles = [module.register_forward_hook(recorder.hook(site), with_kwargs=True) for site, module in sites.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += recorder.close()
    if recorder.refused and unknown != "skip":
        lines = [
            f"{site or 'the model'} ({type(sites[site]).__name__}) is not measured: {why}"
            for site, why in recorder.refused.items()
        ]
        if unknown == "raise":
            raise ValueError("\n".join([*lines, 'to measure the other norms alone, give unknown="warn" or "skip"']))
        warnings.warn("\n".join(lines), stacklevel=3)


class _Call:
    """One pass through a norm's forward, which holds its input until its gradient has come."""

    def __init__(
        self, when: int | None, module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.when, self.module, self.x, self.args, self.kwargs = when, module, x, args, kwargs


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
        self.refused: dict[str, str] = {}  # site -> why it is no norm

    def hook(self, site: str) -> Callable[..., Tensor | None]:
        def on_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
            when = None if recomputed else self._new_call(site)
            if not torch.is_grad_enabled():
                if when is not None:
                    self.waiting.setdefault(site, []).append(when)
                return None
            if not isinstance(output, Tensor):
                self.refused[site] = f"it returns {type(output).__name__} and no tensor"
                return None
            named = dict(kwargs)
            first, *rest = args or (named.pop(next(iter(named))),)
            x, replaced = first.detach(), None
            if type(module) not in KNOWN or not output.requires_grad:
                x = x.clone()  # autograd, which may keep no input here, would not notice one changed in place
            if not output.requires_grad:  # nothing below is trainable: give the gradient a place to arrive
                replaced = output = output.detach().requires_grad_().clone()
            call = _Call(when, module, x, tuple(rest), named)
            if recomputed:
                self.repeats.setdefault(site, []).append(call)
            output.register_hook(lambda grad: self._arrived(site, call, grad))  # type: ignore[no-untyped-call]
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

    def _arrived(self, site: str, call: _Call, grad: Tensor) -> None:
        if not self.open or site in self.refused:
            return
        if call.when is None:
            self._pair(site)
        assert call.when is not None
        try:
            # in float32 for a half input, whose rounding would hide a fault
            forward = own_forward(call.module, call.args, call.kwargs, wide_dtype(call.x.dtype))
            norm = recognise(call.module, call.x, call.args, call.kwargs)
            seen = Capture(
                site=site,
                call=self.order[site].index(call.when),
                x=norm.tokens(call.x),
                grad=norm.tokens(grad.detach()),
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
                rms=norm.rms,
                forward=_on_tokens(norm, forward, call.x.shape),
            )
            with torch.no_grad(), torch.autocast(call.x.device.type, enabled=False):
                require_formula(norm, seen.x, norm.tokens(forward(call.x)))
            self.results[call.when] = self.reduce(seen)
        except Unrecognised as error:
            self.refused[site] = str(error)
        del call.x


def _on_tokens(norm: NormFormula, forward: Callable[[Tensor], Tensor], shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """Return a module's forward of an input of this shape as a function of its tokens: (…, d)."""
    if norm.dims > 1:
        return lambda x: norm.tokens(forward(x.reshape(shape)))
    return lambda x: norm.tokens(forward(x.movedim(-1, norm.axis)))
