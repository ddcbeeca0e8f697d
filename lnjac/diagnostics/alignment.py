"""Compare a method's gradient with the true one: at each norm, of each parameter and as a whole."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lnjac.columns import KEY, Column
from lnjac.diagnostics.base import Diagnostic, Rows, Subject
from lnjac.gpt import model as gpt
from lnjac.gpt.credit import backprop, both_ways, is_feedback, linears
from lnjac.norms.capture import Capture, Loss, capture
from lnjac.norms.decompose import dot, noise_sq
from lnjac.norms.layers import Norm, Surrogate, exact_norms, norms
from lnjac.norms.probe import Pass, block_of, fresh_grads, replay

TENSORS = [
    Column(
        "kind",
        "string",
        "",
        "model: the whole gradient; parameter; norm_output, norm_input: ∂L/∂y and ∂L/∂x of a norm",
        KEY,
    ),
    Column("name", "string", "", "all, the parameter's name, or the norm's site", KEY),
    Column("call", "int64", "", "which call of the norm in one forward pass, from 0; 0 for a parameter", KEY),
    Column("block", "int64", "", "block number; null outside the blocks"),
    Column("n_entries", "int64", "", "entries of the tensor"),
    Column("norm", "float64", "", "‖ĝ‖, ĝ the gradient by the run's method and backward, of the mean loss"),
    Column("bp_norm", "float64", "", "‖g‖, g the true gradient: backprop, exact norms, the same weights and batch"),
    Column("interpretable", "bool", "", "whether both norms are more than rounding noise; if not, cos is NaN"),
    Column("cos", "float64", "", "cos(ĝ, g)"),
    Column("norm_ratio", "float64", "", "‖ĝ‖/‖g‖"),
    Column(
        "control_cos",
        "float64",
        "",
        "cos with the blocks' weights put back to their initial values: alignment that learning in the blocks did not make",
    ),
    Column("feedback_cos", "float64", "", "cos(B, W), for a weight with random feedback B; null for all else"),
    Column("feedback_angle_deg", "float64", "degrees", "the angle of B and W"),
]

Key = tuple[str, str, int]
"""kind, name and call of a row of `tensors`."""


class Products(NamedTuple):
    """Additive statistics of two gradients, the method's ĝ and the true g, of the summed loss."""

    n: int
    dot: float
    own_sq: float
    bp_sq: float


def products(own: Tensor, bp: Tensor, scale: float = 1.0) -> Products:
    """Return the statistics of two gradients of one shape, times `scale` those of the summed loss."""
    return Products(own.numel(), *(dot(a, b) * scale**2 for a, b in ((own, bp), (own, own), (bp, bp))))


def total(parts: Iterable[Products]) -> Products:
    return Products(*map(sum, zip(*parts, strict=True)))


class AgainstBackprop:
    """Watch the method's pass on a batch, then make backprop's, and accumulate the statistics of both gradients."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.rules = {site: module.backward_rule for site, module in norms(model)}
        self.tokens = 0
        self.own: dict[str, Tensor] = {}  # gradients of the summed loss by parameter
        self.bp: dict[str, Tensor] = {}
        self.at_norms: dict[Key, list[Products]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        with capture(self.model, lambda call: ((call.site, call.call), call.grad)) as calls:
            yield
        self.arrived = dict(calls)

    def passed(self, batch: Any, tokens: int) -> None:
        self._add(self.own, [p.grad for p in self._parameters().values()], tokens)
        with fresh_grads(self.model), backprop(self.model), exact_norms(self.model):
            with capture(self.model, lambda call: self._compare(call, tokens)):
                self.loss(self.model, batch)[0].backward()  # type: ignore[no-untyped-call]
            self._add(self.bp, [p.grad for p in self._parameters().values()], tokens)
        self.tokens += tokens

    def make(self, batch: Any) -> None:
        """Make both passes, with one forward pass where the method differs from backprop in its layers' feedback alone."""
        if getattr(self.model, "broadcast", None) is None and all(map(_is_exact, self.rules.values())):
            self._make_at_once(batch)
            return
        with fresh_grads(self.model):
            with self.watch():
                value, tokens = self.loss(self.model, batch)
                value.backward()  # type: ignore[no-untyped-call]
            self.passed(batch, tokens)

    def _make_at_once(self, batch: Any) -> None:
        calls: list[tuple[str, Norm, Tensor, Tensor]] = []
        with ExitStack() as handles, both_ways(self.model) as way:
            for site, norm in norms(self.model):
                keep = functools.partial(lambda site, m, args, y: calls.append((site, m, args[0].detach(), y)), site)
                handles.callback(norm.register_forward_hook(keep).remove)
            value, tokens = self.loss(self.model, batch)
            ends = [*(y for *_, y in calls), *self._parameters().values()]
            own = torch.autograd.grad(value, ends, retain_graph=True, allow_unused=True)
            way.true = True
            true = torch.autograd.grad(value, ends, allow_unused=True)
        counted: dict[str, int] = {}
        self.arrived = {}
        for (site, norm, x, _), mine, grad in zip(calls, own, true, strict=False):
            counted[site] = call = counted.get(site, -1) + 1
            self.arrived[site, call] = mine
            weight = None if norm.weight is None else norm.weight.detach()
            self._compare(Capture(site, call, x, grad, weight, None, norm.eps, norm.rms), tokens)
        self._add(self.own, own[len(calls) :], tokens)
        self._add(self.bp, true[len(calls) :], tokens)
        self.tokens += tokens

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if not is_feedback(name)}

    def _add(self, sums: dict[str, Tensor], grads: Sequence[Tensor | None], tokens: int) -> None:
        for (name, p), grad in zip(self._parameters().items(), grads, strict=True):
            summed = torch.zeros_like(p) if grad is None else grad * tokens
            sums[name] = summed if name not in sums else sums[name].add_(summed)

    def _compare(self, call: Capture, tokens: int) -> None:
        """Accumulate the method's gradient against the true gradient for one norm call."""
        own = self.arrived.pop((call.site, call.call), None)
        own = torch.zeros_like(call.grad) if own is None else own
        sides = {
            "norm_output": (own, call.grad),
            "norm_input": (_below(call, own, self.rules.get(call.site)), _below(call, call.grad, None)),
        }
        for kind, (mine, true) in sides.items():
            self.at_norms.setdefault((kind, call.site, call.call), []).append(products(mine, true, tokens))

    def pairs(self) -> dict[Key, Products]:
        found = {("parameter", name, 0): products(own, self.bp[name]) for name, own in self.own.items()}
        sites = [name for name, _ in self.model.named_modules()]
        by_site = sorted(self.at_norms, key=lambda key: (sites.index(key[1]), key[2]))
        return {
            ("model", "all", 0): total(found.values()),
            **found,
            **{key: total(self.at_norms[key]) for key in by_site},
        }


def _is_exact(rule: Surrogate | None) -> bool:
    return rule is None or rule.surrogate(torch.zeros(1, 1), 1.0, rms=False) is None


def _below(call: Capture, grad: Tensor, rule: Surrogate | None) -> Tensor:
    """Pull grad = ∂L/∂y: (…, d) back through this norm alone by the rule's backward, None for the exact one."""
    with torch.enable_grad(), torch.autocast(call.x.device.type, enabled=False):
        x = call.x.clone().requires_grad_()
        expression = None if rule is None else rule.surrogate(x, call.eps, rms=call.rms)
        if expression is None:
            return replay(call.x, grad, call.eps, weight=call.weight, rms=call.rms)
        below = grad if call.weight is None else grad * call.weight
        return torch.autograd.grad(expression, x, below.to(expression.dtype))[0]


@dataclass
class Alignment(Diagnostic):
    """Compare the method's gradient with the true one, now and, as a control, at the blocks' initial weights."""

    table = "tensors"
    columns = TENSORS
    cost = "a pass by backprop; for the control, where blocks have moved, one of each, which mostly share their forward pass"
    needs_optimizer = False

    def begin(self, subject: Subject) -> None:
        self.subject, self.batches = subject, list[Any]()
        self.now = AgainstBackprop(subject.model, subject.loss)

    def watch(self) -> AbstractContextManager[None]:
        return self.now.watch()

    def passed(self, batch: Any, seen: Pass) -> None:
        self.now.passed(batch, seen.n_tokens)
        self.batches.append(batch)

    def rows(self) -> Rows:
        pairs, control = self.now.pairs(), self._control().pairs()
        cos, control_cos = self._cosines(pairs), self._cosines(control)
        feedback = feedback_cosines(self.subject.model)
        found = []
        for key, pair in pairs.items():
            kind, name, call = key
            of_feedback = feedback.get(name) if kind == "parameter" else None
            found.append(
                {
                    "kind": kind,
                    "name": name,
                    "call": call,
                    "block": block_of(name),
                    "n_entries": pair.n,
                    "norm": math.sqrt(pair.own_sq) / self.now.tokens,
                    "bp_norm": math.sqrt(pair.bp_sq) / self.now.tokens,
                    "interpretable": not math.isnan(cos[key]),
                    "cos": cos[key],
                    "norm_ratio": math.sqrt(pair.own_sq / pair.bp_sq) if pair.bp_sq > 0 else math.nan,
                    "control_cos": control_cos[key],
                    "feedback_cos": of_feedback,
                    "feedback_angle_deg": None if of_feedback is None else math.degrees(math.acos(of_feedback)),
                }
            )
        return found

    def _control(self) -> AgainstBackprop:
        """Return the comparison at the blocks' initial weights, which is the one at hand where they never moved."""
        model = self.subject.model
        initial = gpt.block_weights(gpt.build(self.subject.config, self.subject.vocab_size).to(self.subject.device))
        now = dict(model.named_parameters())
        if all(torch.equal(now[name], value) for name, value in initial.items()):
            return self.now
        control = AgainstBackprop(model, self.subject.loss)
        with gpt.replaced(model, initial):
            for batch in self.batches:
                control.make(batch)
        return control

    def _cosines(self, pairs: Mapping[Key, Products]) -> dict[Key, float]:
        """Return each cosine; NaN where a gradient is rounding noise beside the whole one, or at norms beside the largest."""
        scales: dict[str, tuple[float, float]] = {}
        for (kind, _, _), pair in pairs.items():
            own, bp = scales.get(kind, (0.0, 0.0))
            scales[kind] = max(own, pair.own_sq / pair.n), max(bp, pair.bp_sq / pair.n)
        scales["parameter"] = scales["model"]
        found = {}
        for key, pair in pairs.items():
            own_floor, bp_floor = (noise_sq(self.subject.dtype, scale) * pair.n for scale in scales[key[0]])
            clear = pair.own_sq > own_floor and pair.bp_sq > bp_floor
            found[key] = pair.dot / math.sqrt(pair.own_sq * pair.bp_sq) if clear else math.nan
        return found


def feedback_cosines(model: nn.Module) -> dict[str, float]:
    """Return cos(B, W) by the weight's name, for every layer with feedback."""
    found = {}
    for name, layer in linears(model):
        if layer.feedback_rule is None:
            continue
        w, b = layer.weight.detach().double(), layer.backward_matrix().double()
        cos = float((w * b).sum() / (w.norm() * b.norm()))  # NaN where either is zero, which np.clip keeps
        found[f"{name}.weight"] = float(np.clip(cos, -1, 1))
    return found
