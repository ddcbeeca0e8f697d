"""Capture the input and the output gradient of every call of every norm of a model, without disturbing the model."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lnjac.norms.backward import declared, declared_forward, functional_backward
from lnjac.norms.calls import Frame, FunctionalCall, followed, in_backward, plain_model, replaying, site_name
from lnjac.norms.decompose import pull_through, wide, wide_dtype
from lnjac.norms.layers import Surrogate
from lnjac.norms.recognise import (
    Adapter,
    NormFormula,
    Unrecognised,
    adapter_of,
    candidates,
    has_other_norms,
    is_known,
    other_kind,
    own_forward,
    own_state,
    recognise,
    recognise_function,
    require_backward,
    require_formula,
)

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""`loss(model, batch)`: the mean loss, and the number of tokens it is the mean of."""

Unknown = Literal["raise", "warn", "skip"]

MEASURED, FUNCTIONAL, NO_GRADIENT = "measured", "functional call", "no gradient"
NEVER, NO_TOKENS, NOT_FINITE = "never called", "no tokens", "not finite"
OTHER, REFUSED = "other kind of norm", "refused"


@dataclass
class Capture:
    """One call of a norm, as tokens (…, d): the normalised axis is the last.

    Attributes:
        site: The norm's dotted name; of a function called by no norm module, the calling module's with a number.
        call: Which call of it in this forward pass, from 0.
        x: The input: (…, d).
        grad: ∂L/∂y at the output: (…, d).
        weight: γ: (d,) in float64; None where it is 1 throughout.
        bias: β: (d,) in float64; None where it is 0 throughout.
        eps: Added to the variance, or to the mean square.
        rms: Whether it is an RMSNorm.
        backward: The declared surrogate backward; None for the exact one.
        replayed: Autograd's ∂L/∂x through the module's own forward with its exact backward: (…, d), in float32 or wider.
        forward_sq: ‖y − formula‖² and ‖formula‖² over a sample of tokens, y the module's own output.
        kept: Which of the call's tokens these are: (n,) int64; None for all.
        shape: The input's shape before the normalised axis.
    """

    site: str
    call: int
    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool
    backward: Surrogate | None = None
    replayed: Tensor | None = None
    forward_sq: tuple[float, float] = (0.0, 0.0)
    kept: Tensor | None = None
    shape: tuple[int, ...] = ()


@dataclass
class Coverage:
    """What became of each norm-like module and function: a state by site, and for a refused one the reason."""

    states: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return a line for each refused site."""
        return [
            f"{site or 'the model'} ({self.classes[site]}) is not measured: {reason}"
            for site, reason in self.reasons.items()
        ]


@contextmanager
def capture(
    model: nn.Module,
    reduce: Callable[[Capture], Any] | None = None,
    *,
    unknown: Unknown = "raise",
    adapters: Mapping[Any, Adapter] | None = None,
    max_tokens: int | None = None,
    coverage: Coverage | None = None,
    edges: list[GradientEdge | None] | None = None,
) -> Iterator[list[Any]]:
    """Within the context, record every call of every norm whose gradient arrives; yield the list of the calls.

        with capture(model) as calls:
            loss(model(batch)).backward()
        for c in calls: print(c.site, c.call, c.x.shape, c.grad.shape)

    One forward and backward pass per context. Calls come in the order of the forward pass, and a module called
    more than once (tied layers) has its calls numbered in that order; recomputation under activation checkpointing,
    reentrant or not, counts as the call it repeats. A norm that nothing trainable feeds is captured too. Code that
    torch.compile compiled runs uncompiled meanwhile.

    A module is a norm by what it computes: its γ, β, ε and axis are found from its outputs on chosen tokens, and its
    output and its pullback on the real ones are compared with the formula's (`lnjac.norms.recognise`). F.layer_norm and
    F.rms_norm called by no norm module are sites of their own, such as `blocks.0.layer_norm_1`.

    Args:
        model: Any module.
        reduce: Turns each Capture into something smaller when its gradient arrives, so that nothing else need be kept.
        unknown: `raise` refuses, at the end of the context, a module that looks like a norm and computes something else;
            `warn` warns of it, and `skip` leaves it to `coverage`.
        adapters: Adapters by class or class name, for norms that cannot be recognised by their outputs.
        max_tokens: At most so many tokens of each call are kept, spread evenly over them.
        coverage: Is filled with what became of each norm-like module.
        edges: Is filled with the place in autograd's graph at which each call's gradient arrives, for
            `torch.autograd.grad`; None for a call without grad, as those within a reentrant checkpoint are at first.

    Raises:
        ValueError: The model has no norm, it is run by torch.func, or a module is refused; the text names each with the
            reason.
    """
    model = plain_model(model)
    sites = candidates(model, adapters)
    coverage = Coverage() if coverage is None else coverage
    recorder = _Recorder(sites, reduce, adapters or {}, max_tokens, coverage, [] if edges is None else edges)
    coverage.classes |= {site: type(module).__name__ for site, module in sites.items()}
    for name, module in model.named_modules():
        if other_kind(module):
            coverage.states[site_name(name)] = OTHER
            coverage.classes[site_name(name)] = type(module).__name__
    found: list[Any] = []
    try:
        with eagerly(), followed(model, recorder.left, recorder.function):
            yield found
    finally:
        found += recorder.close()
    if not (sites or recorder.functions or has_other_norms(model)):
        raise ValueError("the model has no LayerNorm or RMSNorm: give an adapter for a norm under another name")
    if coverage.reasons and unknown != "skip":
        if unknown == "raise":
            hint = 'to measure the other norms alone, give unknown="warn" or "skip"'
            raise ValueError("\n".join([*coverage.lines(), hint]))
        warnings.warn("\n".join(coverage.lines()), stacklevel=3)


def eagerly() -> AbstractContextManager[Any]:
    """Return a context within which code that torch.compile compiled runs as it was written, so that hooks fire."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled, and importing it takes a second
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def _require_plain(site: str, output: Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        raise ValueError(
            f"{site} is run by torch.func (vmap, grad), which hides its gradients: call backward() on the plain model"
        )


@dataclass
class _Call:
    """One call of a norm, which holds its input until its gradient has come."""

    site: str
    when: int | None
    norm: NormFormula
    forward: Callable[[Tensor], Any]
    x: Tensor
    version: int
    kept: Tensor | None
    shape: tuple[int, ...]
    backward: Surrogate | None
    declared: Callable[[Tensor], Any] | None
    live: bool = True


def _is_exact(rule: Surrogate | None, norm: NormFormula, x: Tensor) -> bool:
    """Return whether a norm's declared backward is the exact one. x: (…, d)."""
    return rule is None or rule.surrogate(x.reshape(-1, x.shape[-1])[:1], norm.eps, rms=norm.rms) is None


class _Recorder:
    """Number the calls and pair each with its gradient.

    Under a reentrant checkpoint a segment's first pass runs without grad, and its recomputation, in the backward pass,
    gets the gradient. Segments are recomputed last to first, and each is done with before the next, so the calls of a site
    that were recomputed when a gradient first arrives there are its last ones still without.
    """

    def __init__(
        self,
        sites: Mapping[str, nn.Module],
        reduce: Callable[[Capture], Any] | None,
        adapters: Mapping[Any, Adapter],
        max_tokens: int | None,
        coverage: Coverage,
        edges: list[GradientEdge | None],
    ) -> None:
        self.sites, self.reduce = sites, reduce or (lambda call: call)
        self.adapters, self.max_tokens, self.coverage, self.edges = adapters, max_tokens, coverage, edges
        self.open = True
        self.clock = 0  # calls of any norm seen so far
        self.order: dict[str, list[int]] = {}  # site -> the clock of each of its calls, recomputations left out
        self.waiting: dict[str, list[int]] = {}  # site -> calls made without grad
        self.repeats: dict[str, list[_Call]] = {}  # site -> recomputations not yet paired with a waiting call
        self.results: dict[int, Any] = {}
        self.functions: set[str] = set()

    # what the forward pass tells

    def left(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Take note of a module that has computed its output; return another output where it needs one."""
        if frame.site not in self.sites or not self.open:
            return None
        when = self._called(frame.site)
        if not torch.is_grad_enabled():
            return None
        module, named = frame.module, dict(kwargs)
        first, *rest = args or (named.pop(next(iter(named))),)
        try:
            if not isinstance(output, Tensor) or not isinstance(first, Tensor):
                raise Unrecognised(f"it returns {type(output).__name__} and no tensor")
            if first.numel() == 0:
                self.coverage.states[frame.site] = NO_TOKENS
                return None
            _require_plain(frame.site, output)
            state = own_state(module)
            with replaying():
                adapter = adapter_of(module, self.adapters)
                norm = recognise(module, first, rest, named, adapter)
        except Unrecognised as error:
            self._refuse(frame, str(error))
            return None
        for call in frame.notes:  # the functions by which it computes are its own
            self._forget(call)
        forward = own_forward(module, rest, named, wide_dtype(first.dtype), state)
        rule = declared(module)
        surrogate = None if rule is None else declared_forward(module, rest, named, wide_dtype(first.dtype), state)
        return self._noted(
            frame.site,
            when,
            norm,
            forward,
            first,
            output,
            rule,
            surrogate,
            alone=not rest and not named,
            guarded=is_known(module),
        )[1]

    def function(self, call: FunctionalCall, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Take note of F.layer_norm or F.rms_norm, unless a norm module of a known class calls it."""
        owner = next((frame for frame in reversed(call.frames) if frame.site in self.sites), None)
        if not self.open or (owner is not None and is_known(owner.module)):
            return run(call.x)
        site = call.numbered()
        rule, output = functional_backward(site), run(call.x)
        self.functions.add(site)
        self.coverage.classes[site] = f"F.{call.name}"
        when = self._called(site)
        if call.x.numel() == 0:
            self.coverage.states[site] = NO_TOKENS
            return output
        if not torch.is_grad_enabled():
            return output
        _require_plain(site, output)
        dtype = wide_dtype(call.x.dtype)
        norm, forward = recognise_function(call), partial(call.on, dtype=dtype)
        surrogate = None if rule is None else partial(rule.through, call)
        note, replaced = self._noted(
            site,
            when,
            norm,
            forward,
            call.x,
            output,
            None if rule is None else rule.rule,
            surrogate,
            alone=True,
            guarded=True,
        )
        if owner is not None:
            owner.notes.append(note)
        return output if replaced is None else replaced

    def _called(self, site: str) -> int | None:
        """Number a call, and return its number; None for a recomputation within a backward pass."""
        if in_backward():
            return None
        self.clock += 1
        self.order.setdefault(site, []).append(self.clock)
        if not torch.is_grad_enabled():
            self.waiting.setdefault(site, []).append(self.clock)
            self.edges.append(None)
        return self.clock

    def _noted(
        self,
        site: str,
        when: int | None,
        norm: NormFormula,
        forward: Callable[[Tensor], Any],
        given: Tensor,
        output: Tensor,
        backward: Surrogate | None,
        surrogate: Callable[[Tensor], Any] | None,
        *,
        alone: bool,
        guarded: bool,
    ) -> tuple[_Call, Tensor | None]:
        """Keep a call until its gradient arrives; return it, and another output where the module's can have no gradient.

        `alone`: whether it has no other argument; `guarded`: whether autograd keeps its very input, and guards it.
        """
        x, kept = norm.tokens(given.detach()), None
        shape, n = tuple(x.shape[:-1]), x.numel() // x.shape[-1]
        if self.max_tokens is not None and n > self.max_tokens and alone and norm.axis == -1 and not norm.by_position:
            kept = torch.linspace(0, n - 1, self.max_tokens, dtype=torch.float64, device=x.device).round().long()
            x = x.reshape(n, -1)[kept]
        elif not guarded or torch.is_autocast_enabled(given.device.type) or not output.requires_grad:
            x = x.clone()  # autograd, which may keep another tensor than this, would not notice a change in place
        replaced = None
        if not output.requires_grad:  # nothing below is trainable: give the gradient a place to arrive
            replaced = output = output.detach().requires_grad_().clone()
        call = _Call(site, when, norm, forward, x, x._version, kept, shape, backward, surrogate)
        if when is None:
            self.repeats.setdefault(site, []).append(call)
        else:
            self.edges.append(get_gradient_edge(output))
        output.register_hook(lambda grad: self._arrived(call, grad))  # type: ignore[no-untyped-call]
        return call, replaced

    def _forget(self, call: _Call) -> None:
        call.live = False
        if call.when is not None:
            self.order[call.site].remove(call.when)
            self.results.pop(call.when, None)
        elif call in self.repeats.get(call.site, []):
            self.repeats[call.site].remove(call)

    def _refuse(self, frame: Frame, reason: str) -> None:
        """Refuse a module, unless it calls functional norms, which are measured in its place."""
        if any(call.live for call in frame.notes):
            self.coverage.states[frame.site] = FUNCTIONAL
        else:
            self.coverage.reasons[frame.site] = reason

    # what the backward pass tells

    def _pair(self, site: str) -> None:
        repeats, waiting = self.repeats.pop(site), self.waiting.get(site, [])
        for call, when in zip(repeats, waiting[-len(repeats) :], strict=True):
            call.when = when
        del waiting[-len(repeats) :]

    def _arrived(self, call: _Call, grad: Tensor) -> None:
        if not self.open or not call.live or call.site in self.coverage.reasons:
            return
        if call.when is None:
            self._pair(call.site)
        assert call.when is not None
        if call.when in self.results:
            raise ValueError(
                f"a second gradient arrived at {call.site}: make one backward pass in each context, without create_graph"
            )
        try:
            with replaying():
                self.results[call.when] = self.reduce(self._replayed(call, grad.detach()))
        except Unrecognised as error:
            self.coverage.reasons[call.site] = str(error)
        call.x = call.forward = call.declared = None  # type: ignore[assignment]

    def _replayed(self, call: _Call, grad: Tensor) -> Capture:
        """Run the norm alone once more, for its output and its pullback, and compare its output with the formula's."""
        norm, x = call.norm, call.x
        if x._version != call.version:
            raise Unrecognised("its input was changed in place after the call: write x = x + … in place of x += …")
        grad = norm.tokens(grad)
        if call.kept is not None:
            grad = grad.reshape(-1, grad.shape[-1])[call.kept]
        wider = wide(x)

        def replayed_by(forward: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
            return pull_through(lambda tokens: norm.tokens(forward(norm.untokens(tokens))), wider, grad)

        y, replayed = replayed_by(call.forward)
        with torch.no_grad():
            forward_sq = require_formula(norm, x, y, grad, replayed)
        if call.declared is not None and not _is_exact(call.backward, norm, wider):
            assert call.backward is not None
            require_backward(norm, call.backward, wider, grad, replayed_by(call.declared)[1])
        return Capture(
            site=call.site,
            call=self.order[call.site].index(call.when),  # type: ignore[arg-type]
            x=x,
            grad=grad,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            rms=norm.rms,
            backward=call.backward,
            replayed=replayed,
            forward_sq=forward_sq,
            kept=call.kept,
            shape=call.shape,
        )

    def close(self) -> list[Any]:
        """Return the results in the order of the forward pass, and drop the references that a spent graph still holds."""
        self.open = False
        results, self.results = self.results, {}
        site_at = {when: site for site, calls in self.order.items() for when in calls}
        arrived = {site_at[when] for when in results}
        states = self.coverage.states
        for site in [*self.sites, *sorted(self.functions)]:
            if site in self.coverage.reasons:
                states[site] = REFUSED
            elif site in arrived:
                states[site] = FUNCTIONAL if site in self.functions else MEASURED
            elif self.order.get(site):
                states.setdefault(site, NO_GRADIENT)
            elif site in self.sites:
                states.setdefault(site, NEVER)
        return [results[when] for when in sorted(results)]
