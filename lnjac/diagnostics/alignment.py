"""How far a method's gradient is the true one: per norm, per parameter and as a whole, at the same weights and batches."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lnjac.gpt.credit import backprop, both_ways, is_feedback, linears
from lnjac.gpt.model import replaced
from lnjac.norms.analyse import analyse, block_of, fresh_grads, replay
from lnjac.norms.capture import Capture, Loss, capture
from lnjac.norms.decompose import dot, noise_sq
from lnjac.norms.formulas import GradAt
from lnjac.norms.layers import Norm, Surrogate, exact_norms, norms

OVER_DRAWS = ("enrichment_mean", "enrichment_radial", "enrichment_radial_share")
"""Columns of a layer row that are averaged over draws of the feedback."""

Key = tuple[str, str, int]
"""kind, name and call of a row of `tensors`."""


@dataclass
class Pair:
    """Additive statistics of two gradients, the method's ĝ and the true g, of the summed loss."""

    n: int = 0
    dot: float = 0.0
    own_sq: float = 0.0
    bp_sq: float = 0.0

    def add(self, own: Tensor, bp: Tensor, scale: float = 1.0) -> None:
        """own, bp: of one shape; `scale` takes them to the summed loss's."""
        self.n += own.numel()
        self.dot += dot(own, bp) * scale**2
        self.own_sq += dot(own, own) * scale**2
        self.bp_sq += dot(bp, bp) * scale**2


def total(pairs: Iterable[Pair]) -> Pair:
    """The two gradients of all the pairs' tensors together."""
    parts = list(pairs)
    return Pair(*(sum(getattr(part, name) for part in parts) for name in ("n", "dot", "own_sq", "bp_sq")))


class Comparison:
    """Watches the method's pass on a batch, then makes bp's on it; holds the one's gradients at the norms until the other."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.rules = {site: module.backward_rule for site, module in norms(model)}
        self.tokens = 0
        self.own: dict[str, Tensor] = {}  # gradients of the summed loss by parameter
        self.bp: dict[str, Tensor] = {}
        self.at_norms: dict[Key, Pair] = {}

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
        """Both passes, by one forward pass where nothing but layers' feedback tells the method from bp."""
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
        """Add one call of a norm, whose true gradient this is, to what the method's was there."""
        own = self.arrived.pop((call.site, call.call), None)
        own = torch.zeros_like(call.grad) if own is None else own
        sides = {
            "norm_output": (own, call.grad),
            "norm_input": (_below(call, own, self.rules.get(call.site)), _below(call, call.grad, None)),
        }
        for kind, (mine, true) in sides.items():
            self.at_norms.setdefault((kind, call.site, call.call), Pair()).add(mine, true, tokens)

    def pairs(self) -> dict[Key, Pair]:
        found: dict[Key, Pair] = {}
        for name, own in self.own.items():
            found["parameter", name, 0] = pair = Pair()
            pair.add(own, self.bp[name])
        sites = [name for name, _ in self.model.named_modules()]
        by_site = sorted(self.at_norms, key=lambda key: (sites.index(key[1]), key[2]))
        return {("model", "all", 0): total(found.values()), **found, **{key: self.at_norms[key] for key in by_site}}


def _is_exact(rule: Surrogate | None) -> bool:
    return rule is None or rule.surrogate(torch.zeros(1, 1), 1.0, rms=False) is None


def _below(call: Capture, grad: Tensor, rule: Surrogate | None) -> Tensor:
    """∂L/∂x through this norm alone of grad = ∂L/∂y: (…, d), by the rule's backward; None: the exact one."""
    with torch.enable_grad(), torch.autocast(call.x.device.type, enabled=False):
        x = call.x.clone().requires_grad_()
        expression = None if rule is None else rule.surrogate(x, call.eps, rms=call.rms)
        if expression is None:
            return replay(call.x, grad, call.eps, weight=call.weight, rms=call.rms)
        below = grad if call.weight is None else grad * call.weight
        return torch.autograd.grad(expression, x, below.to(expression.dtype))[0]


class Alignment:
    """Rows of `tensors`, for `analyse(…, watchers=[…])`. `dtype` is what the passes compute in: its rounding is the gate.

    `initial` holds the blocks' initial parameters by name, for the control.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, dtype: torch.dtype, initial: Mapping[str, Tensor]) -> None:
        self.model, self.loss, self.initial = model, loss, initial
        self.dtype = dtype
        self.now = Comparison(model, loss)
        self.watch = self.now.watch
        self.batches: list[Any] = []

    def passed(self, batch: Any, tokens: int) -> None:
        self.now.passed(batch, tokens)
        self.batches.append(batch)

    def rows(self) -> list[dict[str, Any]]:
        pairs, control = self.now.pairs(), self._control().pairs()
        cos, control_cos = self._cosines(pairs), self._cosines(control)
        feedback = feedback_cosines(self.model)
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

    def _control(self) -> Comparison:
        """The comparison at the blocks' initial weights; where they still are those, as at step 0, it is the one at hand."""
        now = dict(self.model.named_parameters())
        if all(torch.equal(now[name], value) for name, value in self.initial.items()):
            return self.now
        control = Comparison(self.model, self.loss)
        with replaced(self.model, self.initial):
            for batch in self.batches:
                control.make(batch)
        return control

    def _cosines(self, pairs: Mapping[Key, Pair]) -> dict[Key, float]:
        """Each pair's cosine; NaN where either gradient is rounding noise: beside the whole one, or at norms the largest."""
        scales: dict[str, tuple[float, float]] = {}
        for (kind, _, _), pair in pairs.items():
            own, bp = scales.get(kind, (0.0, 0.0))
            scales[kind] = max(own, pair.own_sq / pair.n), max(bp, pair.bp_sq / pair.n)
        scales["parameter"] = scales["model"]
        found = {}
        for key, pair in pairs.items():
            own_floor, bp_floor = (noise_sq(self.dtype, scale) * pair.n for scale in scales[key[0]])
            clear = pair.own_sq > own_floor and pair.bp_sq > bp_floor
            found[key] = pair.dot / math.sqrt(pair.own_sq * pair.bp_sq) if clear else math.nan
        return found


def feedback_cosines(model: nn.Module) -> dict[str, float]:
    """cos(B, W) by the weight's name, for every layer with feedback."""
    found = {}
    for name, layer in linears(model):
        if layer.feedback_rule is None:
            continue
        w, b = layer.weight.detach().double(), layer.backward_matrix().double()
        cos = float((w * b).sum() / (w.norm() * b.norm()))  # NaN where either is zero, which np.clip keeps
        found[f"{name}.weight"] = float(np.clip(cos, -1, 1))
    return found


def over_draws(
    model: nn.Module,
    draws: Iterable[Mapping[str, Tensor]],
    batches: Sequence[Any],
    loss: Loss,
    *,
    grad_at: GradAt | str = GradAt.normalized,
) -> list[dict[str, Any]]:
    """Rows of `mechanism`: mean and standard error over draws of the feedback, given by name, of each norm's enrichments.

    No rows where the draws leave the model's feedback as it is: where it has none, or no random one.
    """
    state = model.state_dict()
    values: dict[tuple[str, int, str], list[float]] = {}
    for draw in draws:
        if all(torch.equal(state[name], value.to(state[name])) for name, value in draw.items()):
            continue
        with replaced(model, draw):
            for row in analyse(model, batches, loss, grad_at=grad_at):
                for column in OVER_DRAWS:
                    values.setdefault((row["site"], row["call"], column), []).append(row[column])
    found = []
    for (site, call, column), over in values.items():
        error = float(np.std(over, ddof=1)) / math.sqrt(len(over)) if len(over) > 1 else math.nan
        for suffix, value in (("", float(np.mean(over))), ("_stderr", error)):
            quantity = f"{column}_over_draws{suffix}"
            found.append({"place": site, "call": call, "quantity": quantity, "value": value, "n": len(over)})
    return found
