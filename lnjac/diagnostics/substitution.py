"""Put each surrogate in place of the exact backward at some norms; compare the gradients and the next updates."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lnjac.columns import KEY, Column
from lnjac.diagnostics.base import Diagnostic, Rows, Subject
from lnjac.diagnostics.replacements import DOSES, Gradient, Graphs, add
from lnjac.diagnostics.settings import Parts
from lnjac.gpt.credit import backprop, is_feedback
from lnjac.gpt.optimizers import Optimizer, Rehearsal
from lnjac.norms.capture import Loss
from lnjac.norms.decompose import noise_sq
from lnjac.norms.formulas import EXACT, SURROGATES, Backward
from lnjac.norms.layers import exact_norms, norms

SWAPS = [
    Column(
        "place",
        "string",
        "",
        "where the backward was replaced: a site, a role of several sites (ln_1, ln_2), or all",
        KEY,
    ),
    Column(
        "surrogate",
        "string",
        "",
        "the backward put there: one of the seven; partial_radial, center_scale with a part of z·m subtracted; or exact",
        KEY,
    ),
    Column(
        "radial", "float64", "", "how much of z·m the backward subtracts: 0, 1, or the part under partial_radial", KEY
    ),
    Column("level", "string", "", "what is compared: model, block or tensor"),
    Column("part", "string", "", "all, a block (embedding, blocks.0, …, ln_f, head), or a parameter's name", KEY),
    Column(
        "grad_norm",
        "float64",
        "",
        "‖g‖, g the part's gradient by the run's method with the exact backward everywhere, of the mean loss",
    ),
    Column(
        "interpretable",
        "bool",
        "",
        "whether ‖g‖ is more than 8 roundings of the whole's; if not, every comparison is NaN",
    ),
    Column("grad_cos", "float64", "", "cos(ĝ, g), ĝ the gradient with the backward replaced"),
    Column("grad_gain", "float64", "", "‖ĝ‖/‖g‖"),
    Column(
        "update_cos",
        "float64",
        "",
        "cosine of the optimizer's updates by ĝ and by g, both from the run's own state, clipped alike, without decay",
    ),
    Column("update_gain", "float64", "", "ratio of those updates' norms"),
    Column(
        "precond_cos",
        "float64",
        "",
        "cos(P ĝ, P g), P the optimizer's preconditioner at its present state; null before it has one",
    ),
    Column("precond_gain", "float64", "", "‖P ĝ‖/‖P g‖"),
    Column(
        "descent",
        "float64",
        "",
        "⟨∇L, P ĝ⟩/⟨∇L, P ∇L⟩ over the part, ∇L the true gradient (bp, exact norms): first-order decrease against bp's",
    ),
    Column(
        "predicted_nats",
        "float64",
        "nats/token",
        "lr·⟨∇L, P ĝ⟩, lr before any schedule: the loss's decrease to first order; null per part",
    ),
    Column(
        "decrease_nats",
        "float64",
        "nats/token",
        "decrease that the step lr·P ĝ really makes on the diagnostic batch; null for doses, parts, one site of several",
    ),
    Column(
        "compounding",
        "float64",
        "",
        "(1 − grad_cos)/Σ over the place's sites of (1 − grad_cos); null but for whole gradients and several sites",
    ),
    Column(
        "shapley_center",
        "float64",
        "",
        "Shapley share of leaving out the centring in 1 − grad_cos over the 2³ backwards; whole gradient, rows of ste",
    ),
    Column("shapley_radial", "float64", "", "the same for leaving out the radial part"),
    Column("shapley_scale", "float64", "", "the same for leaving out 1/σ; the three sum to ste's 1 − grad_cos"),
]

ALL = "all"

STEPS = ("grad", "update", "precond")
"""A gradient g, the update by it, and P g: those of a replaced backward are compared with the exact one's."""

TREATMENTS = [*SURROGATES.items(), *(("partial_radial", dose) for dose in DOSES)]

WHOLE = ("predicted_nats", "decrease_nats", "compounding", "shapley_center", "shapley_radial", "shapley_scale")
"""Columns that only a whole gradient has, and not every one."""


@dataclass
class Substitution(Diagnostic):
    """Put each surrogate in place of the exact backward, at each norm and at all together."""

    table = "swaps"
    columns = SWAPS
    cost = "about 35 backward passes at the default config, and a forward pass for each measured decrease"

    parts: Parts

    def begin(self, subject: Subject) -> None:
        self.measured = measure(subject, self.parts)  # here, before others hold memory: it takes the most

    def rows(self) -> Rows:
        return self.measured


def measure(subject: Subject, parts: Parts) -> Rows:
    """Return rows of `swaps`, none where the exact gradient is not finite. Model, optimizer and `.grad` stay as they were."""
    model, batches, loss = subject.model, subject.diagnostic_batches(), subject.loss
    optimizer, settings, dtype = subject.optimizer, subject.config.optimizer, subject.dtype
    named = {name: p for name, p in subject.trained.items() if not is_feedback(name)}
    parameters = list(named.values())
    before, tokens = subject.mean_loss(batches)
    true = true_gradient(model, batches, loss, parameters, tokens)
    graphs = Graphs(model, batches, loss, parameters, tokens)
    exact = graphs.exact()
    if not all(part.isfinite().all() for part in exact):
        return []
    p = preconditioner(optimizer, settings, parameters)
    rehearsal = Rehearsal(optimizer, settings, parameters)
    yardstick = Yardstick(exact, true, rehearsal, p, divide(list(named), parts), dtype)
    del true  # a gradient less to hold, of the fourteen that the peak is made of

    rows: Rows = []
    damages: dict[str, dict[Backward, float]] = {}
    for place, sites in places(model).items():
        treatments = [*TREATMENTS, ("exact", EXACT)] if place == ALL else TREATMENTS
        rms = all(module.rms for site, module in norms(model) if site in sites)
        distinct = list(dict.fromkeys(canonical(swap, rms=rms) for _, swap in treatments))
        compared: dict[Backward, Rows] = {}
        for swap, gradient in zip(distinct, graphs.swapped(sites, distinct), strict=True):
            compared[swap] = yardstick.compare(gradient)
            if p is not None and is_group(sites, norms(model)) and swap not in DOSES:
                with moved(parameters, (g * q * -settings.lr for g, q in zip(gradient, p, strict=True))):
                    compared[swap][0]["decrease_nats"] = before - subject.mean_loss(batches)[0]
        damage = {swap: 1 - compared[canonical(swap, rms=rms)][0]["grad_cos"] for _, swap in treatments}
        damages[place] = damage
        for surrogate, swap in treatments:
            whole, *others = compared[canonical(swap, rms=rms)]
            if len(sites) > 1 and swap != EXACT:
                whole = whole | {"compounding": _ratio(damage[swap], sum(damages[site][swap] for site in sites))}
            if surrogate == "ste":
                whole = whole | {f"shapley_{name}": share for name, share in shapley(damage).items()}
            key = {"place": place, "surrogate": surrogate, "radial": swap.radial}
            rows += [key | row for row in (whole, *others)]
    return rows


def places(model: nn.Module) -> dict[str, list[str]]:
    """Return the places where a backward is replaced, with their sites: each site, each role of several sites, all."""
    sites = [site for site, _ in norms(model)]
    roles: dict[str, list[str]] = {}
    for site in sites:
        roles.setdefault(site.rpartition(".")[2], []).append(site)
    several = {role: members for role, members in roles.items() if len(members) > 1}
    return {**{site: [site] for site in sites}, **several, ALL: sites} if sites else {}


def is_group(sites: Sequence[str], every: Sequence[tuple[str, nn.Module]]) -> bool:
    """Return whether these are all sites of their roles; a role may have a single one, such as ln_f."""
    roles = {site.rpartition(".")[2] for site in sites}
    return all(site in sites for site, _ in every if site.rpartition(".")[2] in roles)


def canonical(swap: Backward, *, rms: bool) -> Backward:
    """Return the one name of equal backwards: RMSNorm has no mean to subtract."""
    return swap._replace(center=True) if rms else swap


def shapley(damage: Mapping[Backward, float]) -> dict[str, float]:
    """Return each factor's Shapley share in the damage of leaving out all three: its mean over the orders of doing so.

    `damage` of each of the seven surrogates; that of the exact backward is 0.
    """
    names = Backward._fields
    without = {
        frozenset(n for n, kept in zip(names, swap, strict=True) if not kept): swap for swap in SURROGATES.values()
    }
    cost = {left_out: damage[swap] for left_out, swap in without.items()} | {frozenset(): 0.0}
    shares = dict.fromkeys(names, 0.0)
    for name in names:
        others = [other for other in names if other != name]
        for size in range(len(names)):
            weight = 1 / (len(names) * math.comb(len(others), size))
            for earlier in map(frozenset, combinations(others, size)):
                shares[name] += weight * (cost[earlier | {name}] - cost[earlier])
    return shares


class Part(NamedTuple):
    """A part of the gradient, and the numbers of its tensors."""

    level: str
    name: str
    tensors: list[int]


def divide(names: Sequence[str], finest: Parts) -> list[Part]:
    """Divide the gradient: the whole, then the blocks, then the tensors, down to `finest`."""
    blocks: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        blocks.setdefault(part_of(name), []).append(i)
    parts = [Part("model", ALL, list(range(len(names))))]
    if finest is not Parts.model:
        parts += [Part("block", name, tensors) for name, tensors in blocks.items()]
    if finest is Parts.tensor:
        parts += [Part("tensor", name, [i]) for i, name in enumerate(names)]
    return parts


def part_of(parameter: str) -> str:
    """Return a parameter's part: blocks.0 of `blocks.0.attn.qkv.weight`, embedding of `wte.weight`, head of `head.weight`."""
    words = parameter.split(".")
    for i, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[: i + 1])
    return "embedding" if words[0] in ("wte", "wpe") else words[0]


class Yardstick:
    """The exact gradient g with its update u, P and P∇L, with which other gradients ĝ are compared.

    All comparisons follow from seven sums over a tensor or part: ‖·‖² and the product with g's own, of ĝ, of its update û
    and of Pĝ, then the slope ⟨∇L, Pĝ⟩.
    """

    def __init__(
        self,
        exact: Gradient,
        true: Gradient,
        rehearsal: Rehearsal,
        p: Gradient | None,
        parts: Sequence[Part],
        dtype: torch.dtype,
    ) -> None:
        self.exact, self.rehearsal, self.parts = exact, rehearsal, parts
        self.preconditioned = p is not None
        self.p = [torch.zeros_like(g) for g in exact] if p is None else p
        self.true_step = [q * g for q, g in zip(self.p, true, strict=True)]
        self.update = [update.clone() for update in rehearsal.update(exact)]
        self.members = exact[0].new_zeros(len(exact), len(parts), dtype=torch.float64)
        for i, part in enumerate(parts):
            self.members[part.tensors, i] = 1
        self.of_tensors = self._products(exact, self.update, range(len(exact)))
        self.own = self.of_tensors @ self.members
        sizes = self.members.new_tensor([g.numel() for g in exact]) @ self.members
        grad_sq = self.own[0]
        self.interpretable = grad_sq > noise_sq(dtype, float(grad_sq[0] / sizes[0])) * sizes
        self.given = [
            {"level": part.level, "part": part.name, "grad_norm": norm, "interpretable": sound, **dict.fromkeys(WHOLE)}
            for part, norm, sound in zip(parts, grad_sq.sqrt().tolist(), self.interpretable.tolist(), strict=True)
        ]
        self.steepest = (self._products(true, self.update, range(len(exact))) @ self.members)[-1]

    def compare(self, gradient: Gradient) -> Rows:
        """Return a row for each part, the whole first, without the place's columns and with those of WHOLE still null."""
        clipped = self.rehearsal.clip is not None  # by the whole gradient's norm: then every tensor's update changes
        changed = [i for i, (a, b) in enumerate(zip(gradient, self.exact, strict=True)) if clipped or a is not b]
        update = self.rehearsal.update([g if i in changed else None for i, g in enumerate(gradient)])
        of_tensors = self.of_tensors.clone()
        if changed:
            of_tensors[:, changed] = self._products(gradient, update, changed)
        *sums, slope = of_tensors @ self.members
        columns = {"descent": slope / self.steepest}
        for name, sq, product, own_sq in zip(STEPS, sums[::2], sums[1::2], self.own[:-1:2], strict=True):
            columns |= {f"{name}_cos": product / (sq * own_sq).sqrt(), f"{name}_gain": (sq / own_sq).sqrt()}
        values = {name: torch.where(self.interpretable, x, math.nan).tolist() for name, x in columns.items()}
        if not self.preconditioned:
            values |= {name: [None] * len(self.parts) for name in ("precond_cos", "precond_gain", "descent")}
        compared = zip(*values.values(), strict=True)
        rows = [given | dict(zip(values, row, strict=True)) for given, row in zip(self.given, compared, strict=True)]
        if self.preconditioned:
            rows[0]["predicted_nats"] = self.rehearsal.lr * float(slope[0])
        return rows

    def _products(self, gradient: Gradient, update: Gradient, tensors: Sequence[int]) -> Tensor:
        """Return the sums of these tensors: (7, n), one tensor after the other, so that float64 copies stay in cache."""
        fixed = (self.exact, self.update, self.p, self.true_step)
        columns = [_products(*(each[i].flatten().double() for each in (gradient, update, *fixed))) for i in tensors]
        return torch.stack(columns, dim=1)


def _products(hat: Tensor, hat_update: Tensor, g: Tensor, update: Tensor, p: Tensor, true_step: Tensor) -> Tensor:
    """Return the sums of one tensor: (7,), all given as (n,)."""
    compared = ((hat, g), (hat_update, update), (hat * p, p * g))
    return torch.stack([a @ b for mine, own in compared for a, b in ((mine, mine), (mine, own))] + [hat @ true_step])


def preconditioner(
    optimizer: torch.optim.Optimizer, settings: Optimizer, parameters: Sequence[nn.Parameter]
) -> Gradient | None:
    """Return the optimizer's P, None where it has none; 0 for a parameter without state, which has had no gradient yet."""
    found = [settings.preconditioner(optimizer, p) for p in parameters]
    if all(p is None for p in found):
        return None
    return [torch.zeros_like(like) if p is None else p for p, like in zip(found, parameters, strict=True)]


def true_gradient(
    model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: Sequence[nn.Parameter], total: int
) -> Gradient:
    """Return ∇L by backprop through exact norms, whatever the model's method."""
    found = []
    for batch in batches:
        with backprop(model), exact_norms(model):
            value, tokens = loss(model, batch)
            mean = value * (tokens / total)
            found.append(list(torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True)))
    return reduce(add, found)


@contextmanager
def moved(parameters: Sequence[nn.Parameter], step: Iterable[Tensor]) -> Iterator[None]:
    """Within the context the parameters hold other tensors, a step away from their own; a kept graph stays valid."""
    own = [p.data for p in parameters]
    try:
        for p, change in zip(parameters, step, strict=True):
            p.data = p.data + change
        yield
    finally:
        for p, tensor in zip(parameters, own, strict=True):
            p.data = tensor


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
