"""Layers and feedback of credit assignment, by which an error travels back through other matrices than the weights.

A method changes gradients and no forward value. `loss.backward()` leaves the method's gradient in `.grad`, and the loss stays
the true cross-entropy. Weight and bias gradients are true given the error that arrives at a layer. The attention product,
the norms' γ and the residual stream stay exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.gpt.products import product

KINDS = ("qkv", "attn_proj", "fc", "mlp_proj", "head")
"""The kinds of matrix in a GPT that a policy can treat apart."""


class Inject(str, Enum):
    block = "block"
    sublayer = "sublayer"


class ErrorAt(str, Enum):
    logits = "logits"
    hidden = "hidden"


@dataclass
class Route:
    """How errors pass a layer on their way back: through the method's feedback B, or through W if `true` is set."""

    true: bool = False


class _Product(torch.autograd.Function):
    """y = x·Wᵀ + b, whose input gradient is g·B (Lillicrap et al. 2016); x: (…, in), W and B: (out, in).

    A route may send the error through W instead; it is asked as the error passes, so that one forward pass serves both.
    `needs_input_grad` is not consulted: under torch.compile that silently gave plain backprop.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor, route: Route | None) -> Tensor:
        return product(x, weight.t(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, back, ctx.route = inputs
        ctx.save_for_backward(x, back, *([weight] if ctx.route else []))
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, back, *true = ctx.saved_tensors
        if true and ctx.route.true:
            (back,) = true
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return product(g, back).view(x.shape), _outer(g, flat), g.sum(0) if ctx.has_bias else None, None, None


def _outer(g: Tensor, x: Tensor) -> Tensor:
    """Return gᵀ·x, (out, in), of g: (n, out) and x: (n, in)."""
    # oneDNN copies a transposed first operand: let it be the smaller one
    return product(g.t(), x) if g.shape[1] <= x.shape[1] else product(x.t(), g).t()


class Feedback(nn.Module):
    """The part of a linear layer that passes errors back, by its weight, or by a rule B(W, M) of it and of a stored matrix M.

    It stands before the layer's own class (`FeedbackLinear` here, any class of another model in `lnjac.gpt.feedback`).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    feedback: Tensor | None
    feedback_rule: Callable[[Tensor, Tensor], Tensor] | None = None
    route: Route | None = None
    canary: "Canary | None" = None
    transposed: bool = False
    """Whether the weight is stored as (in, out), as in transformers' Conv1D. W, M and B are (out, in) all the same."""
    init_std: float
    """The spread of W as it was drawn."""

    @property
    def matrix(self) -> Tensor:
        """W, (out, in)."""
        return self.oriented(self.weight)

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (out, in)."""
        return tensor.t() if self.transposed else tensor

    def backward_matrix(self) -> Tensor:
        """Return B, (out, in), by which the output's gradient is multiplied to give the input's."""
        if self.feedback_rule is None or self.feedback is None:
            return self.matrix.detach()
        return self.feedback_rule(self.matrix.detach(), self.feedback.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b, (…, out), of x: (…, in)."""
        if self.feedback_rule is None and torch._C._are_functorch_transforms_active():
            return F.linear(x, self.matrix, self.bias)  # any transform of torch.func, jvp included
        if self.canary is not None and self.route is None and torch.is_grad_enabled():
            return self.canary.output(self, x)
        return self.output(*self.operands(x))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return x, W, b and B in the dtype that they are multiplied in."""
        operands = (x, self.matrix, self.bias, self.backward_matrix())
        if not torch.is_autocast_enabled(x.device.type):
            return operands
        dtype = torch.get_autocast_dtype(x.device.type)  # a Function's backward runs outside autocast: cast here
        x, weight, bias, back = operands
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), back.to(dtype)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, weight, bias, back, self.route)  # type: ignore[no-untyped-call]
        return out


class Canary(Protocol):
    """Watches a layer's first passes, to see that errors went back through its feedback."""

    def output(self, layer: Feedback, x: Tensor) -> Tensor:
        """Return the layer's output."""


class FeedbackLinear(Feedback):
    """A linear layer of the GPT that a method may give feedback; `kind` is one of KINDS."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, kind: str, init_std: float) -> None:
        super().__init__()
        self.kind, self.init_std = kind, init_std
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)
        self.register_buffer("feedback", None)


Layers = list[tuple[str, Feedback]]
"""Layers with their dotted names."""


def linears(model: nn.Module) -> Layers:
    """Return the model's layers that have or may have feedback, with their dotted names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Feedback)]


@contextmanager
def backprop(model: nn.Module) -> Iterator[None]:
    """Make the model's gradients the true ones within the context, whatever its method."""
    layers = [layer for _, layer in linears(model)]
    rules, broadcast = [layer.feedback_rule for layer in layers], getattr(model, "broadcast", None)
    try:
        for layer in layers:
            layer.feedback_rule = None
        if broadcast is not None:
            setattr(model, "broadcast", None)  # noqa: B010 (nn.Module's typing knows no attribute that may be None)
        yield
    finally:
        for layer, rule in zip(layers, rules, strict=True):
            layer.feedback_rule = rule
        if broadcast is not None:
            model.broadcast = broadcast


@contextmanager
def both_ways(model: nn.Module) -> Iterator[Route]:
    """Let a graph made within the context serve a pass back through the feedback, and one through W if `true` is set."""
    layers, route = [layer for _, layer in linears(model) if layer.feedback_rule is not None], Route()
    try:
        for layer in layers:
            layer.route = route
        yield route
    finally:
        for layer in layers:
            layer.route = None


def is_feedback(parameter: str) -> bool:
    """Return whether a parameter or buffer of this dotted name is a feedback matrix."""
    return parameter.rpartition(".")[2].startswith("feedback")


class Broadcast(nn.Module):
    """Direct feedback, which cuts a model at chosen points and gives each part's output e·B, e the error at the top."""

    def __init__(self, feedback: list[Tensor], inject: Inject, error: ErrorAt) -> None:
        super().__init__()
        self.inject, self.error, self.n_points = inject, error, len(feedback)
        for i, matrix in enumerate(feedback):
            self.register_buffer(f"feedback_{i}", matrix)

    def cutter(self, outputs: list[Tensor]) -> "Cut":
        """Return the cut of one forward pass, which adds each output to `outputs` and returns its detached value."""

        def cut(h: Tensor, point: str) -> Tensor:
            if len(outputs) == self.n_points or (point == "sublayer" and self.inject is Inject.block):
                return h
            outputs.append(h)
            return h.detach()

        return cut

    def teach(self, outputs: list[Tensor], logits: Tensor, targets: Tensor, head: FeedbackLinear) -> Tensor:
        """Return a scalar of value zero whose gradient at output ℓ is e·B_ℓ.

        Args:
            outputs: the parts' outputs, each (B, T, d).
            logits: (B, T, vocab); e is the cross-entropy's derivative by them, or by the head's input if `error` is hidden.
            targets: (B, T) int64.
            head: the last layer, which is not taught.
        """
        with torch.no_grad():
            hits = torch.arange(logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)
            e = (logits.softmax(-1) - hits.to(logits.dtype)) / targets.numel()
            if self.error is ErrorAt.hidden:
                e = e @ head.weight
            taught = [(e @ getattr(self, f"feedback_{i}")).to(h.dtype) for i, h in enumerate(outputs)]
        total = torch.stack([(h * error).sum() for h, error in zip(outputs, taught, strict=True)]).sum()
        return total - total.detach()


Cut = Callable[[Tensor, str], Tensor]


def keep(h: Tensor, point: str) -> Tensor:
    """Return the output itself, as every method but dfa does."""
    return h
