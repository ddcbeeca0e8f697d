"""Split a norm's radial part Σ⟨g,z⟩ by path, and measure the residual's gradients and attention's weights.

With y = γ⊙z + β what a norm hands on, ⟨g,z⟩ = ⟨∂L/∂y, y − β⟩. The part of it that returns through a linear layer with
feedback B (bp: B = W) is ⟨∂L/∂W − ∂L/∂b·βᵀ, B⟩; docs/diagnostics.md derives it, and the predictions.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lnjac.columns import KEY, Column
from lnjac.diagnostics.base import Diagnostic, Rows, Subject
from lnjac.gpt.attention import Attention, causal_mask
from lnjac.gpt.model import Block, SelfAttention
from lnjac.norms.decompose import dot, wide
from lnjac.norms.layers import Norm, norms
from lnjac.norms.probe import Pass

MECHANISM = [
    Column("place", "string", "", "a norm's site, or an attention or MLP layer's module name", KEY),
    Column("call", "int64", "", "which call of that module in one forward pass, from 0", KEY),
    Column("quantity", "string", "", "what was measured there: one of the quantities below", KEY),
    Column("value", "float64", "", "its value; sums over tokens are of the summed loss"),
    Column("n", "int64", "", "tokens, rows, weights or draws it was taken over"),
]

QUANTITIES = {
    "gz": "Σ⟨g,z⟩ over tokens, at every norm",
    "gz_q": "at a norm that attention reads: the part of gz that returns by the queries, through their rows of B",
    "gz_k": "the same by the keys",
    "gz_v": "the same by the values",
    "gz_from_scores": "2⟨∂L/∂S,S⟩ with biases and β taken off: gz_q + gz_k where B = W; NaN under qk_norm",
    "gz_from_values": "⟨∂L/∂O,O⟩ with bias and β taken off, O attention's output: gz_v where B = W",
    "gz_head": "⟨p − y, B(γ⊙z)⟩: the part of gz that returns by the head, all of it at ln_f",
    "gz_from_logits": "⟨p − y, logits − Wβ⟩: gz_head where B = W",
    "branch_sq": "Σ over tokens of ‖·‖² of the gradient that returns to the residual through the branch starting here",
    "residual_sq": "the same of the gradient that passes the branch by, on the residual; 0 at ln_f",
    "branch_residual_cos": "cosine of the two over all tokens; NaN where one vanishes",
    "scores_pull": "2⟨∂L/∂S,S⟩, S = QKᵀ/√d_h: the loss's slope against the logarithm of a scale of all q and k",
    "values_pull": "⟨∂L/∂O,O⟩: the loss's slope against the logarithm of a scale of all v",
    "entropy": "nats, mean over rows with mass of the weights divided by their mass; NaN where a weight is negative",
    "row_mass": "Σ of a query's weights, mean over queries",
    "row_mass_relative": "the same over i/block_size for query i = 1, 2, …: near 1 for a sigmoid at initialisation",
    "saturation": "share of weights whose own score moves them by less than 1 % of the most that any score could",
}
"""The quantities of the table mechanism that come from the shared pass."""

SATURATED = 0.01
"""A weight is saturated when its own score moves it by less than this share of the most that any score could."""

KEYS = 8
"""Keys, spread over the context of a batch's first sequence, whose weights are tested for saturation."""

MEANS = ("entropy", "row_mass", "row_mass_relative", "saturation")
SQUARES = ("branch_sq", "residual_sq", "branch_residual_cos")
"""Quantities that are means over their n, and those that are of second order in the gradient; the others are sums."""


@dataclass
class Mechanism(Diagnostic):
    """Measure the radial part by path, the residual's two gradients and attention's weights, by hooks on the shared pass."""

    table = "mechanism"
    columns = MECHANISM
    quantities = QUANTITIES
    cost = "no pass of its own, but hooks on the shared one"
    needs_optimizer = False

    def begin(self, subject: Subject) -> None:
        self.model = subject.model
        self.names = {module: name for name, module in self.model.named_modules()}
        self.layers = [module for module in self.model.modules() if isinstance(module, SelfAttention)]
        self.steepest = {layer: steepest(layer.mode, layer.block_size) for layer in self.layers}
        self.totals: dict[tuple[str, str], tuple[float, int]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.found: dict[tuple[str, str], tuple[float, int]] = {}  # of this pass: its value and n
        self.outputs: list[tuple[weakref.ref[Tensor], Norm]] = []
        self.fed_by: dict[nn.Module, Norm] = {}
        with ExitStack() as handles:
            for handle in self._hooks():
                handles.callback(handle.remove)
            yield

    def passed(self, batch: Any, seen: Pass) -> None:
        for layer in self.layers:
            if layer.qkv in self.fed_by:
                self._paths(layer, self.fed_by[layer.qkv])
        for key, (value, n) in self.found.items():
            power = 0 if key[1] in MEANS else 2 if key[1] in SQUARES else 1
            before, n_before = self.totals.get(key, (0.0, 0))
            self.totals[key] = (before + value * float(seen.n_tokens) ** power, n_before + n)

    def rows(self) -> Rows:
        places, quantities = list(self.names.values()), list(QUANTITIES)
        found = []
        for place, quantity in sorted(self.totals, key=lambda k: (places.index(k[0]), quantities.index(k[1]))):
            value, n = self.totals[place, quantity]
            if quantity in MEANS:
                value = value / n if n else math.nan
            elif quantity == "branch_residual_cos":
                size = math.sqrt(math.prod(self.totals[place, name][0] for name in ("branch_sq", "residual_sq")))
                value = value / size if size > 0 else math.nan
            found.append({"place": place, "call": 0, "quantity": quantity, "value": value, "n": n})
        return found

    def _record(self, place: nn.Module, quantity: str, value: float, n: int) -> None:
        self.found[self.names[place], quantity] = (value, n)

    def _hooks(self) -> Iterator[RemovableHandle]:
        for _, norm in norms(self.model):
            yield norm.register_forward_hook(self._hands_on)
        for block in (module for module in self.model.modules() if isinstance(module, Block)):
            for branch, of_branch in block.branches():
                start = self._first()
                for module in (branch, *of_branch):
                    yield module.register_forward_pre_hook(start)
        if not isinstance(self.model.ln_f, nn.Identity):
            yield self.model.ln_f.register_forward_pre_hook(self._branches)
        for reader in [*(layer.qkv for layer in self.layers), self.model.head]:
            yield reader.register_forward_hook(self._reads)
        for layer in self.layers:
            yield from self._attention(layer)

    # Norms and what reads them

    def _hands_on(self, norm: Norm, args: Any, output: Tensor) -> None:
        self.outputs.append((weakref.ref(output), norm))
        y = output.detach()  # a hook that held the output itself would keep it for ever
        _on_grad(output, lambda grad: self._record(norm, "gz", dot(grad, _without_bias(y, norm)), grad[..., 0].numel()))

    def _source(self, x: Tensor) -> Norm | None:
        """Return the norm whose very output x is, not its detached value, through which no gradient returns."""
        return next((norm for output, norm in self.outputs if output() is x), None)

    def _reads(self, linear: nn.Module, args: Any, output: Tensor) -> None:
        """Note the norm that feeds qkv or the head, and at the head measure its path."""
        if (norm := self._source(args[0])) is None:
            return
        self.fed_by[linear] = norm
        if linear is self.model.head:
            y, logits = args[0].detach(), output.detach()
            _on_grad(output, lambda grad: self._logits(norm, _without_bias(y, norm), logits, grad))

    def _logits(self, norm: Norm, scaled: Tensor, logits: Tensor, grad: Tensor) -> None:
        """Record ⟨p − y, logits − Wβ⟩ and ⟨p − y, B(γ⊙z)⟩. scaled: (B, T, d) = γ⊙z; logits, grad: (B, T, vocab)."""
        head, n = self.model.head, grad[..., 0].numel()
        by_token = wide(grad).flatten(0, -2).T @ scaled.flatten(0, -2)
        beta = None if norm.bias is None else norm.bias.detach()
        shift = 0.0 if beta is None else dot(grad.flatten(0, -2).sum(0), head.weight.detach() @ beta)
        self._record(norm, "gz_head", dot(by_token, head.backward_matrix()), n)
        self._record(norm, "gz_from_logits", dot(grad, logits) - shift, n)

    def _paths(self, layer: SelfAttention, norm: Norm) -> None:
        """Record Σ⟨g,z⟩ of attention's norm by path, from qkv's gradients and as attention's scales predict it."""
        qkv = layer.qkv
        assert qkv.weight.grad is not None
        (of_scores, n), (of_values, _) = (
            self.found[self.names[layer], name] for name in ("scores_pull", "values_pull")
        )
        grad, shift = qkv.weight.grad.double(), torch.zeros(3, dtype=torch.float64)
        if qkv.bias is not None:  # without it there is no β either
            assert qkv.bias.grad is not None
            bias, summed = qkv.bias.detach().double(), qkv.bias.grad.double()
            if norm.bias is not None:
                beta = norm.bias.detach().double()
                bias, grad = bias + qkv.weight.detach().double() @ beta, grad - torch.outer(summed, beta)
            shift = (summed * bias).view(3, -1).sum(1)
        q, k, v = (grad * qkv.backward_matrix()).view(3, -1).sum(1).tolist()
        by_scores = of_scores - float(shift[:2].sum()) if isinstance(layer.q_norm, nn.Identity) else math.nan
        paths = {
            "gz_q": q,
            "gz_k": k,
            "gz_v": v,
            "gz_from_scores": by_scores,
            "gz_from_values": of_values - float(shift[2]),
        }
        for quantity, value in paths.items():
            self._record(norm, quantity, value, n)

    # The residual

    def _first(self) -> Callable[[nn.Module, Any], tuple[Any, ...] | None]:
        """Return a hook for a branch and its norms, which separates the gradients at the one that is called first."""
        called: list[nn.Module] = []

        def start(entry: nn.Module, args: Any) -> tuple[Any, ...] | None:
            called.append(entry)
            return self._branches(entry, args) if len(called) == 1 else None

        return start

    def _branches(self, entry: nn.Module, args: Any) -> tuple[Any, ...] | None:
        """Separate, where a branch starts, the gradient that returns through it from the residual's."""
        x, *rest = args
        if not x.requires_grad:
            return None
        mine = x.view_as(x)
        if (norm := self._source(x)) is not None:
            self.outputs.append((weakref.ref(mine), norm))
        returned: list[Tensor] = []

        def all_returned(total: Tensor) -> None:
            branch = returned.pop()
            residual, n = total - branch, total[..., 0].numel()
            self._record(entry, "branch_sq", dot(branch, branch), n)
            self._record(entry, "residual_sq", dot(residual, residual), n)
            self._record(entry, "branch_residual_cos", dot(branch, residual), n)

        _on_grad(mine, returned.append)
        _on_grad(x, all_returned)
        return (mine, *rest)

    # Attention

    def _attention(self, layer: SelfAttention) -> Iterator[RemovableHandle]:
        """Yield hooks that hold q, k, v and the output o until o's gradient is there."""
        held: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            held[name] = x.detach()

        def attended(proj: nn.Module, args: Any) -> None:
            keep("o", args[0])
            _on_grad(args[0], lambda grad: self._attended(layer, grad, **{n: held.pop(n) for n in list(held)}))

        yield layer.qkv.register_forward_hook(lambda module, args, output: keep("v", output.chunk(3, dim=-1)[2]))
        yield layer.q_norm.register_forward_hook(lambda module, args, output: keep("q", output))
        yield layer.k_norm.register_forward_hook(lambda module, args, output: keep("k", output))
        yield layer.proj.register_forward_pre_hook(attended)

    def _attended(self, layer: SelfAttention, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """Record attention's quantities. q, k: (B, heads, T, d_h); v, o, grad = ∂L/∂o: (B, T, d)."""
        q, k, n = wide(q), wide(k), grad[..., 0].numel()
        v_heads, grad_heads = (wide(x).view(*x.shape[:2], layer.n_head, -1).transpose(1, 2) for x in (v, grad))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        with torch.enable_grad():
            weights = layer.mode.weights(scores.requires_grad_(), causal_mask(scores), layer.block_size)
            (by_scores,) = torch.autograd.grad(weights, scores, grad_heads @ v_heads.transpose(-2, -1))
        scores, weights = scores.detach(), weights.detach()
        self._record(layer, "scores_pull", 2 * dot(by_scores, scores), n)
        self._record(layer, "values_pull", dot(grad, o), n)
        entropies, mass = entropy(weights), weights.sum(-1)
        self._record(layer, "entropy", float(entropies.sum(dtype=torch.float64)), entropies.numel())
        self._record(layer, "row_mass", float(mass.sum(dtype=torch.float64)), mass.numel())
        relative = mass * layer.block_size / torch.arange(1, mass.shape[-1] + 1, device=mass.device)
        self._record(layer, "row_mass_relative", float(relative.sum(dtype=torch.float64)), mass.numel())
        flat = own_slopes(layer.mode, scores[:1], layer.block_size).abs() < SATURATED * self.steepest[layer]
        self._record(layer, "saturation", float(flat.sum()), flat.numel())


def _on_grad(x: Tensor, call: Callable[[Tensor], None]) -> None:
    """Call `call` with the whole gradient at x once it is there, if any can come."""
    if x.requires_grad:
        x.register_hook(call)  # type: ignore[no-untyped-call]


def _without_bias(y: Tensor, norm: Norm) -> Tensor:
    """Return γ⊙z of a norm's output y = γ⊙z + β."""
    return wide(y) if norm.bias is None else wide(y) - norm.bias.detach()


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of each row, divided by its mass: (…, T, T) -> (n,), without rows that have no mass.

    NaN throughout where a weight is negative: such weights are no distribution.
    """
    mass, tiny = weights.sum(-1), torch.finfo(weights.dtype).tiny
    found = mass.log() - (weights * weights.clamp(min=tiny).log()).sum(-1) / mass  # entr() is several times slower
    return torch.full_like(found, math.nan).flatten() if bool((weights < 0).any()) else found[mass > 0]


def own_slopes(mode: Attention, scores: Tensor, block_size: int) -> Tensor:
    """Return ∂wᵢⱼ/∂sᵢⱼ at KEYS of the keys j and every query i ≥ j: (1, heads, T, T) -> (n,), exact for any mode."""
    t, mask = scores.shape[-1], causal_mask(scores)
    keys = torch.arange(min(KEYS, t), device=scores.device) * t // min(KEYS, t)
    copies = torch.arange(len(keys), device=scores.device)  # one for each key, so that rows may couple their weights
    with torch.enable_grad():
        leaf = scores.expand(len(keys), -1, -1, -1).clone().requires_grad_()
        weights = mode.weights(leaf, mask, block_size)[copies, :, :, keys]
        (slopes,) = torch.autograd.grad(weights.sum(), leaf)
    seen = mask[:, keys].T.unsqueeze(1).expand(-1, scores.shape[1], -1)
    return slopes[copies, :, :, keys][seen]


def steepest(mode: Attention, block_size: int) -> float:
    """Return the largest |∂w/∂s| of a key beside one of score 0, over scores s from −20 to 20."""
    grid = torch.zeros(801, 1, 2, 2, dtype=torch.float64)
    grid[:, 0, 1, 1] = torch.linspace(-20, 20, 801, dtype=torch.float64)
    with torch.enable_grad():
        weights = mode.weights(grid.requires_grad_(), causal_mask(grid), block_size)
        (slopes,) = torch.autograd.grad(weights[:, 0, 1, 1].sum(), grid)
    return float(slopes[:, 0, 1, 1].abs().max())
