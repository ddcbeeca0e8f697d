"""Measure the norms of any model: watch its forward and backward passes, pool their statistics into rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lnjac.norms import decompose, distribution, formulas, ranks
from lnjac.norms.calls import plain_model, site_name
from lnjac.norms.capture import (
    FUNCTIONAL,
    MEASURED,
    NO_TOKENS,
    NOT_FINITE,
    OTHER,
    REFUSED,
    Capture,
    Coverage,
    Loss,
    Unknown,
    capture,
)
from lnjac.norms.formulas import GradAt
from lnjac.norms.recognise import (
    Adapter,
    Unrecognised,
    adapter_of,
    candidates,
    is_known,
    other_kind,
    recognise,
)

if TYPE_CHECKING:
    import pandas as pd


def probe(
    model: nn.Module,
    *,
    adapters: Mapping[Any, Adapter] | None = None,
    unknown: Unknown = "raise",
    max_tokens: int | None = None,
    grad_at: GradAt | str = GradAt.normalized,
    keep_tokens: bool = False,
    distributed: bool = True,
) -> Probe:
    """Return a probe that measures the backward of each norm of the model.

        probe = lnjac.probe(model)
        print(probe.plan())                       # each norm-like module, and as what it is recognised
        table = probe.measure(batches, loss)      # loss(model, batch) -> (mean loss, number of tokens)

        with probe.watch(step) as seen:           # or in your own loop, around its forward and backward pass
            mean, tokens = loss(model, batch)
            seen.tokens(tokens)
            mean.backward()
        table = probe.rows(step)

    A module is a norm by what it computes, whatever its class. At each call its own output, and autograd's gradient through
    its own forward, are compared with the formula's. F.layer_norm and F.rms_norm called by no norm module are measured as
    sites of their own. `coverage()` tells what became of each norm-like module.

    Args:
        model: Any module, compiled or not, or inside DistributedDataParallel.
        adapters: `lnjac.Layer` or `lnjac.Rms` by class or class name, for norms that cannot be recognised by their outputs.
        unknown: `raise` refuses a module that looks like a norm and computes something else; `warn` warns of it and measures
            the others; `skip` tells of it in `coverage` alone.
        max_tokens: Measure at most so many tokens of each call, spread evenly. Bounds the memory.
        grad_at: Where a norm's gradient is read: `normalized`, before its affine part (g = γ⊙∂L/∂y), or `output` (g = ∂L/∂y).
        keep_tokens: Keep seven numbers of each token at each norm, for `distributions`.
        distributed: Pool over the processes of torch.distributed: `rows` and `measure` are then collective calls. With
            False, or without torch.distributed, this process is measured alone.

    Raises:
        ValueError: `grad_at` is neither of the two, or `unknown` none of the three.
    """
    if unknown not in ("raise", "warn", "skip"):
        raise ValueError(f'unknown={unknown!r}: choose "raise", "warn" or "skip"')
    return Probe(model, adapters or {}, unknown, max_tokens, GradAt(grad_at), keep_tokens, distributed)


@dataclass
class CallSums:
    """Statistics of one call of a norm in one pass, of the loss as its backward pass had it.

    `sigma`: (n,) is kept for its quantiles, which do not add. `tokens` and their `positions` in their sequences serve
    distributions; they are None unless kept. `forward_sq` is ‖y − formula‖² and ‖formula‖² over a sample of tokens.
    """

    site: str
    call: int
    d: int
    rms: bool
    dtype: str
    backward: str
    sums: decompose.Sums
    sigma: Tensor
    forward_sq: tuple[float, float]
    positions: np.ndarray[Any, Any] | None = None
    tokens: decompose.Tokens | None = None

    def scaled(self, factor: float) -> CallSums:
        """Return the statistics of `factor` times the loss."""
        tokens = None if self.tokens is None else decompose.scaled_tokens(self.tokens, factor)
        return replace(self, sums=decompose.scaled(self.sums, factor), tokens=tokens)


@dataclass
class Pass:
    """One forward and backward pass that a probe watches. `scale`: what the loss was multiplied by before its backward."""

    scale: float = 1.0
    n_tokens: int = 0
    loss: Tensor | float = float("nan")
    mask: Tensor | None = None
    calls: list[CallSums] = field(default_factory=list)
    """What was measured at each call of a norm, in the order of the forward pass; filled when the pass is over."""
    edges: list[GradientEdge | None] = field(default_factory=list)
    """Where in autograd's graph the gradients arrive that are measured (see `capture`)."""
    begun: bool = False
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    """The shapes of the norms' inputs, before the normalised axis."""

    def tokens(self, n: int, loss: Tensor | float | None = None, *, mask: Tensor | None = None) -> None:
        """Tell how many tokens the loss is the mean of.

        Args:
            n: The number of tokens.
            loss: The mean loss, for the column loss_nats.
            mask: Which tokens count, (B, T) bool or whatever shape the norms' inputs have before their last axis: padded
                ones can be left out. Norms of another shape are measured whole. To be told before the backward pass.

        Raises:
            ValueError: n is not positive, or a mask comes after the backward pass has begun.
        """
        if n < 1:
            raise ValueError(f"the loss is the mean of {n} tokens: leave out a batch whose targets are all ignored")
        if mask is not None and self.begun:
            raise ValueError(
                "a mask came after the backward pass had begun: call seen.tokens(n, mask=…) before backward()"
            )
        self.n_tokens, self.mask = n, mask
        if loss is not None:
            self.loss = loss.detach() if isinstance(loss, Tensor) else loss


class Probe:
    """Measures a model's norms: on given batches by `measure`, or in a loop of one's own by `watch` and `rows`."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[Any, Adapter],
        unknown: Unknown,
        max_tokens: int | None,
        grad_at: GradAt,
        keep_tokens: bool,
        distributed: bool,
    ) -> None:
        self.model, self.adapters, self.unknown, self.max_tokens = model, adapters, unknown, max_tokens
        self.grad_at, self.keep_tokens, self.distributed = grad_at, keep_tokens, distributed
        self.step: int | None = None
        self.passes: list[Pass] = []
        self.covered = Coverage()
        self.summed = False  # whether the passes' statistics are of the summed loss already

    def plan(self) -> pd.DataFrame:
        """Return a row for each norm-like module: site, class, kind (layernorm, rmsnorm, …), by which check, or why not."""
        import pandas as pd

        model = plain_model(self.model)
        sites = candidates(model, self.adapters)
        rows = []
        for name, module in model.named_modules():
            site = site_name(name)
            if site in sites:
                rows.append({"site": site, "class": type(module).__name__, **_planned(module, self.adapters)})
            elif other_kind(module):
                rows.append({"site": site, "class": type(module).__name__, "kind": OTHER, "check": "", "reason": ""})
        return pd.DataFrame(rows, columns=["site", "class", "kind", "check", "reason"])

    def coverage(self) -> pd.DataFrame:
        """Return a row for each norm-like module and function: site, class, state, reason.

        The state, over the passes watched at the last step: measured, functional call, no gradient, never called, no
        tokens, not finite, other kind of norm, or refused, for the reason given.
        """
        import pandas as pd

        covered = self.covered
        rows = [
            {"site": site, "class": covered.classes[site], "state": state, "reason": covered.reasons.get(site, "")}
            for site, state in covered.states.items()
        ]
        return pd.DataFrame(rows, columns=["site", "class", "state", "reason"])

    def measure(
        self, batches: Iterable[Any], loss: Loss, *, mask: Callable[[Any], Tensor] | None = None
    ) -> pd.DataFrame:
        """Return a row for each norm and call over all batches. The model is left as it was found.

        No parameter's gradient is computed, unless a reentrant checkpoint or torch.distributed needs a whole backward pass.
        Parameters' `.grad`, buffers and torch's random generators are put back. Hooks on parameters (such as those that step
        an optimizer in the backward pass) are suspended.

        Args:
            batches: Whatever `loss` takes, one after the other.
            loss: `loss(model, batch)` gives the mean loss and the number of tokens it is the mean of.
            mask: `mask(batch)` gives which tokens count, as `Pass.tokens` takes it.

        Returns:
            The measured columns of the table layers (docs/columns.md). `.attrs["coverage"]` has the state of each site.

        Raises:
            ValueError: A module is refused, no gradient arrived at any norm, a mask fits none, or the backward pass changed a
                parameter.
        """
        passes, covered = [], Coverage()
        for batch in batches:
            try:
                seen = self._pass(batch, loss, mask, whole=ranks.ranks() > 1)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower():
                    raise
                seen = self._pass(batch, loss, mask, whole=True)  # a reentrant checkpoint knows no other backward pass
            passes.append(seen)
            covered = _joined(covered, self.covered)
        self.step, self.passes, self.covered, self.summed = 0, passes, covered, True
        return self.rows()

    def _pass(self, batch: Any, loss: Loss, mask: Callable[[Any], Tensor] | None, *, whole: bool) -> Pass:
        """Measure one batch, by a `whole` backward pass or by one that leaves out the gradients of parameters."""
        self.step = None  # a step of its own, whatever was watched before
        with left_as_found(self.model), self.watch() as seen:
            mean, tokens = loss(self.model, batch)
            seen.tokens(tokens, mean, mask=None if mask is None else mask(batch))
            edges = [edge for edge in seen.edges if edge is not None]
            if mean.requires_grad and (whole or len(edges) < len(seen.edges)):
                mean.backward()  # type: ignore[no-untyped-call]
            elif mean.requires_grad and edges:  # else no gradient arrives, as `rows` says
                torch.autograd.grad(mean, edges, allow_unused=True)
        seen.edges.clear()
        seen.calls = [call.scaled(seen.n_tokens) for call in seen.calls]  # each batch's loss is a mean of its own
        return seen

    @contextmanager
    def watch(self, step: int = 0, *, scale: float = 1.0) -> Iterator[Pass]:
        """Within the context, measure one forward and backward pass; several of one step are pooled.

        The passes of one step add up to one gradient, that of the mean loss over all their tokens: k micro-batches of an
        update divide their losses by k. The first pass of another step forgets those of the step before.

        Args:
            step: The number of updates done, say.
            scale: What the loss is multiplied by before its backward, such as `scaler.get_scale()`.

        Yields:
            The pass, which must be told its number of tokens: `seen.tokens(n)`.
        """
        if step != self.step:
            self.step, self.passes, self.covered, self.summed = step, [], Coverage(), False
        seen, covered = Pass(scale), Coverage()
        try:
            with capture(
                self.model,
                lambda call: self._reduced(call, seen),
                unknown=self.unknown,
                adapters=self.adapters,
                max_tokens=self.max_tokens,
                coverage=covered,
                edges=seen.edges,
            ) as found:
                yield seen
        finally:
            self.covered = _joined(self.covered, covered)
        if seen.mask is not None and seen.shapes and tuple(seen.mask.shape) not in seen.shapes:
            of = ", ".join(map(str, sorted(seen.shapes)))
            raise ValueError(
                f"the mask of shape {tuple(seen.mask.shape)} fits no norm, whose inputs are of {of} tokens"
            )
        seen.calls = found
        self.passes.append(seen)
        every = [call for one in self.passes for call in one.calls]
        for site in {call.site for call in every} - {call.site for call in every if call.sums["n_tokens"]}:
            bad = any(call.sums["n_nonfinite"] for call in every if call.site == site)
            if self.covered.states[site] != REFUSED:
                self.covered.states[site] = NOT_FINITE if bad else NO_TOKENS

    def rows(self, step: int = 0) -> pd.DataFrame:
        """Return a row for each norm and call, pooled over the passes watched at this step, and over ranks.

        Returns:
            The measured columns of the table layers (docs/columns.md). `.attrs["coverage"]` has the state of each site.

        Raises:
            ValueError: No gradient arrived at any norm, another step is the one that was watched last, or a pass was not told
                its tokens.
        """
        passes = self._watched(step)
        tokens = 1 if self.summed else sum(seen.n_tokens for seen in passes)
        return self._table(passes, tokens)

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
        if any(not seen.n_tokens for seen in self.passes):
            raise ValueError("a pass was not told its tokens: call seen.tokens(n) within its context")
        return self.passes

    def _table(self, passes: Sequence[Pass], factor: int) -> pd.DataFrame:
        """Return the rows of `factor` times the loss."""
        import pandas as pd

        calls = [call.scaled(factor) for seen in passes for call in seen.calls]
        losses = [(float(seen.loss) * seen.n_tokens, seen.n_tokens) for seen in passes]
        states = dict(self.covered.states)
        if self.distributed and ranks.ranks() > 1:
            calls, losses, states = _over_ranks(calls, losses, states)
        groups = _by_call(calls)
        if not groups and NOT_FINITE not in states.values() and set(states.values()) != {OTHER}:
            raise ValueError(_nothing(states))
        loss = sum(value for value, _ in losses) / sum(n for _, n in losses)
        rows = [{**_row(parts), "loss_nats": loss} for parts in groups]
        bad = [f"{row['site']} {row['n_nonfinite']}" for row in rows if row["n_nonfinite"]]
        bad += [f"{site} all" for site, state in states.items() if state == NOT_FINITE]
        if bad:
            warnings.warn(f"tokens that are not finite are left out: {', '.join(bad)}", stacklevel=3)
        columns = [column.name for column in formulas.columns()]
        table = pd.DataFrame(rows, columns=columns).astype({"block": "Int64"})
        shares = decompose.ratios(
            dict(table.filter(like="sum_")), table["d"].to_numpy(), rms=table["norm"] == _kind(True)
        )
        table = table.assign(**shares)
        table.attrs["coverage"] = states
        return table

    def _reduced(self, call: Capture, seen: Pass) -> CallSums:
        """Decompose the call's gradient and add up."""
        seen.begun = True
        x, grad, replayed = call.x, call.grad, call.replayed
        assert replayed is not None
        if seen.scale != 1:
            grad, replayed = decompose.wide(grad) / seen.scale, replayed / seen.scale
        weight = call.weight if self.grad_at is GradAt.normalized else None
        if weight is not None and weight.dim() > 1:
            weight = weight.expand(call.shape + x.shape[-1:]).reshape(-1, x.shape[-1])
        if self.grad_at is GradAt.output and call.weight is not None:
            replayed = replay(decompose.wide(x), grad, call.eps, weight=None, rms=call.rms)
        index = call.kept
        seen.shapes.add(call.shape)
        if seen.mask is not None and tuple(seen.mask.shape) == call.shape:
            counted = seen.mask.to(x.device).reshape(-1).bool()
            index = counted.nonzero()[:, 0] if index is None else index[counted[index]]
            chosen = counted if call.kept is None else counted[call.kept]
            x, grad, replayed = (part.reshape(-1, part.shape[-1])[chosen] for part in (x, grad, replayed))
            weight = weight if weight is None or weight.dim() == 1 else weight[chosen]
        tokens = decompose.decompose(x, grad, call.eps, weight=weight, rms=call.rms, replayed=replayed)
        tokens, finite = decompose.finite(tokens)
        sums = {**decompose.sums(tokens, rms=call.rms), "n_nonfinite": int(finite.numel() - len(tokens.sigma))}
        positions = None
        if self.keep_tokens:
            length = call.shape[-1] if call.shape else 1
            at = torch.arange(finite.numel()) if index is None else index.cpu()
            positions = (at[finite.cpu()] % length).numpy()
        return CallSums(
            site=call.site,
            call=call.call,
            d=x.shape[-1],
            rms=call.rms,
            dtype=str(x.dtype).removeprefix("torch."),
            backward="exact" if call.backward is None else call.backward.name,
            sums=sums,
            sigma=tokens.sigma,
            forward_sq=call.forward_sq,
            positions=positions,
            tokens=tokens if self.keep_tokens else None,
        )


def distributions(passes: Iterable[Pass], bins: int) -> list[dict[str, Any]]:
    """Return rows of the table distributions over the passes' tokens. Raises ValueError where those were not kept."""
    found = []
    for parts in _by_call([call for seen in passes for call in seen.calls]):
        one, kept = parts[0], [part.tokens for part in parts if part.tokens is not None]
        if not kept:
            raise ValueError("distributions need each token's numbers: make the probe with keep_tokens=True")
        positions = np.concatenate([part.positions for part in parts if part.positions is not None])
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


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Within the context a pass may run that leaves no trace: `.grad`, buffers and torch's generators are put back.

    Raises:
        ValueError: A parameter changed, by a hook that cannot be suspended.
    """
    parameters = list(model.parameters())
    buffers = [
        (module, name, b, b.detach().clone())
        for module in model.modules()
        for name, b in module.named_buffers(recurse=False)
    ]
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    versions = [p._version for p in parameters]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(d or 0 for d in devices)))
        stack.enter_context(fresh_grads(model))
        stack.enter_context(_without_parameter_hooks(parameters))
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
                    if getattr(module, name) is not buffer:  # a forward may put another tensor in its place
                        setattr(module, name, buffer)
    if versions != [p._version for p in parameters]:
        raise ValueError(
            "the backward pass changed parameters: take off the hook that steps an optimizer, or use `watch` in the loop"
        )


@contextmanager
def _without_parameter_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    tables = [hooks for p in parameters for name in names if (hooks := getattr(p, name, None))]
    held = [dict(hooks) for hooks in tables]
    try:
        for hooks in tables:
            hooks.clear()  # autograd holds this very dict: another in its place would not be seen
        yield
    finally:
        for hooks, before in zip(tables, held, strict=True):
            hooks.update(before)


def replay(x: Tensor, grad: Tensor, eps: float, *, weight: Tensor | None, rms: bool) -> Tensor:
    """Return autograd's ∂L/∂x through this norm alone by its exact backward, in x's dtype. x, grad: (…, d); weight: (d,)."""
    d, gamma = (x.shape[-1],), None if weight is None else weight.to(x.dtype)

    def norm(leaf: Tensor) -> Tensor:
        return F.rms_norm(leaf, d, gamma, eps) if rms else F.layer_norm(leaf, d, gamma, None, eps)

    return decompose.pull_through(norm, x, grad)[1]


def block_of(name: str) -> int | None:
    """Return the first number in a dotted name: `blocks.0.ln_1` -> 0; None where there is none."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


def _planned(module: nn.Module, adapters: Mapping[Any, Adapter]) -> dict[str, str]:
    """Return the kind of a norm-like module, the check by which it is recognised, and why it is not."""
    sizes = [getattr(module, "normalized_shape", ()), *(p.shape for p in module.parameters(recurse=False))]
    d = next((math.prod(size) for size in sizes if len(size)), None)
    if d is None:
        return {"kind": "", "check": "its outputs, when it is called", "reason": ""}
    adapter = adapter_of(module, adapters)
    check = (
        "its adapter" if adapter else "its class's attributes" if is_known(module) else "its outputs on chosen tokens"
    )
    tail = sizes[0] if sizes[0] else (d,)
    first = next(module.parameters(), torch.empty(0))
    shapes, reasons = [(2, 2, *tail), (2, d, 2, 2)], []  # channels last, channels first
    for shape in shapes:
        try:
            norm = recognise(module, torch.zeros(shape, dtype=first.dtype, device=first.device), adapter=adapter)
        except Unrecognised as error:
            reasons.append(str(error))
        else:
            check = f"{check}, and its output and gradient at each call"
            return {"kind": _kind(norm.rms), "check": check, "reason": ""}
    return {"kind": REFUSED, "check": check, "reason": reasons[0]}


def _kind(rms: bool) -> str:
    return "rmsnorm" if rms else "layernorm"


def _joined(before: Coverage, now: Coverage) -> Coverage:
    """Return the coverage of both; a site measured in one is measured."""
    counts = (MEASURED, FUNCTIONAL)
    states = {**before.states, **now.states}
    states |= {
        site: state for site, state in before.states.items() if state in counts and now.states.get(site) != REFUSED
    }
    return Coverage(states, {**before.reasons, **now.reasons}, {**before.classes, **now.classes})


def _nothing(states: Mapping[str, str]) -> str:
    """Return why there is no row."""
    found = {site: state for site, state in states.items() if state != OTHER}
    known = ", ".join(f"{site or 'the model'}: {state}" for site, state in found.items())
    if not found:
        return "no gradient arrived at any norm: no pass was watched"
    return (
        f"no gradient arrived at any norm: is the loss computed from the model's output, with grad enabled? ({known})"
    )


def _by_call(calls: Iterable[CallSums]) -> list[list[CallSums]]:
    """Return the statistics of all passes, by call of a norm, without calls of which no token counts."""
    found: dict[tuple[str, int], list[CallSums]] = {}
    for part in calls:
        found.setdefault((part.site, part.call), []).append(part)
    return [parts for parts in found.values() if any(part.sums["n_tokens"] for part in parts)]


def _over_ranks(
    calls: list[CallSums], losses: list[tuple[float, int]], states: dict[str, str]
) -> tuple[list[CallSums], list[tuple[float, int]], dict[str, str]]:
    """Return the calls, losses and states of all ranks, in the order of the lowest rank that has each."""
    plain = [{**_plain(call), "sigma": call.sigma.double().tolist()} for call in calls]
    found = ranks.gathered({"calls": plain, "losses": losses, "states": states})
    whole = [
        CallSums(
            **{
                **call,
                "sigma": torch.tensor(call["sigma"], dtype=torch.float64),
                "forward_sq": tuple(call["forward_sq"]),
            }
        )
        for part in found
        for call in part["calls"]
    ]
    joined = Coverage()
    for part in found:
        joined = _joined(joined, Coverage(part["states"]))
    return whole, [(value, n) for part in found for value, n in part["losses"]], joined.states


def _plain(call: CallSums) -> dict[str, Any]:
    """Return a call's statistics without its tokens."""
    return {name: value for name, value in vars(call).items() if name not in ("tokens", "positions", "sigma")}


def _row(parts: Sequence[CallSums]) -> dict[str, Any]:
    one = parts[0]
    total, sigma = decompose.add([part.sums for part in parts]), torch.cat([part.sigma for part in parts])
    apart, size = (sum(part.forward_sq[i] for part in parts) for i in (0, 1))
    return {
        "site": one.site,
        "call": one.call,
        "block": block_of(one.site),
        "role": one.site.rpartition(".")[2],
        "norm": _kind(one.rms),
        "site_backward": one.backward,
        "n_backwards": 4 if one.rms else 8,
        "d": one.d,
        "dtype": one.dtype,
        **decompose.summary(total, sigma),
        "forward_residual": math.sqrt(apart / size) if size > 0 else math.nan,
    }
