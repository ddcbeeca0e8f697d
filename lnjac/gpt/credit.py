"""Credit assignment: what stands in for the transposed weights when an error travels back.

A method changes only gradients, never a forward value: `loss.backward()` leaves its update in `.grad` and the loss stays
the true cross-entropy. Weight and bias gradients are always true given the error that arrives at a layer; the attention
product, the norms' γ and the residual stream stay exact.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.seeding import normal, stream, uniform

KINDS = ("qkv", "attn_proj", "fc", "mlp_proj", "head")
"""The kinds of matrix in a GPT that a policy can treat apart."""


class Transpose(str, Enum):
    """What a matrix's input gradient is made with: random feedback, or the true transposed weight."""

    random = "random"
    true = "true"


class Distribution(str, Enum):
    normal = "normal"
    uniform = "uniform"


class Inject(str, Enum):
    block = "block"
    sublayer = "sublayer"


class ErrorAt(str, Enum):
    logits = "logits"
    hidden = "hidden"


@dataclass
class Policy:
    """The transpose that each kind of matrix uses."""

    qkv: Transpose
    attn_proj: Transpose
    fc: Transpose
    mlp_proj: Transpose
    head: Transpose


ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·b + bias: (…, n), (n, m), (m,) -> (…, m).

    In fp32 on a CPU, where no graph is wanted, it is oneDNN's, which uses AVX-512 wherever the CPU has it: MKL, torch's
    choice, on Intel's alone.
    """
    if _by_onednn(a):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return out
    return F.linear(a, b.t(), bias)


def _by_onednn(a: Tensor) -> bool:
    plain = a.dtype == torch.float32 and a.device.type == "cpu" and not torch.is_grad_enabled()
    return ONEDNN and plain and not torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b, whose input gradient is g·B (Lillicrap et al. 2016); x: (…, in), W and B: (out, in).

    It does without `needs_input_grad`, which under torch.compile silently gave plain backprop.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor) -> Tensor:
        return product(x, weight.t(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
        x, _, bias, back = inputs
        ctx.save_for_backward(x, back)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, back = ctx.saved_tensors
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return product(g, back).view(x.shape), _outer(g, flat), g.sum(0) if ctx.has_bias else None, None


@dataclass
class Way:
    """How errors go back through a graph that allows both: by the method's feedback, or by W."""

    true: bool = False


class _Either(torch.autograd.Function):
    """_Linear whose backward decides between B and W when it runs, so that one forward pass serves both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, back: Tensor, way: Way) -> Tensor:
        ctx.save_for_backward(x, weight, back)
        ctx.has_bias, ctx.way = bias is not None, way
        return product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight, back = ctx.saved_tensors
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        below = product(g, weight if ctx.way.true else back).view(x.shape)
        return below, _outer(g, flat), g.sum(0) if ctx.has_bias else None, None, None


def _outer(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ·x: (n, out), (n, in) -> (out, in). oneDNN copies a transposed first operand: let it be the smaller one."""
    return product(g.t(), x) if g.shape[1] <= x.shape[1] else product(x.t(), g).t()


class Linear(nn.Module):
    """A linear layer that a method may give a feedback matrix. `kind` is one of KINDS, `init_std` W's initial spread."""

    bias: nn.Parameter | None
    feedback: Tensor | None

    def __init__(self, d_in: int, d_out: int, *, bias: bool, kind: str, init_std: float) -> None:
        super().__init__()
        self.kind, self.init_std = kind, init_std
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)
        self.register_buffer("feedback", None)
        self.feedback_rule: Callable[[Tensor, Tensor], Tensor] | None = None
        self.way: Way | None = None

    def backward_matrix(self) -> Tensor:
        """B: (out, in), the matrix whose product with the output's gradient is the input's gradient."""
        if self.feedback_rule is None or self.feedback is None:
            return self.weight.detach()
        return self.feedback_rule(self.weight.detach(), self.feedback.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) -> (…, out)."""
        if self.feedback_rule is None and torch._C._are_functorch_transforms_active():
            return F.linear(x, self.weight, self.bias)  # any transform of torch.func, jvp included
        back = self.weight if self.feedback_rule is None else self.backward_matrix()
        operands: list[Tensor | None] = [x, self.weight, self.bias, back]
        if torch.is_autocast_enabled(x.device.type):  # a Function's backward runs outside autocast: cast here
            dtype = torch.get_autocast_dtype(x.device.type)
            operands = [None if operand is None else operand.to(dtype) for operand in operands]
        out: Tensor = (
            _Linear.apply(*operands) if self.way is None else _Either.apply(*operands, self.way)  # type: ignore[no-untyped-call]
        )
        return out


def linears(model: nn.Module) -> list[tuple[str, Linear]]:
    """The model's linear layers of this class with their dotted names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


@contextmanager
def backprop(model: nn.Module) -> Iterator[None]:
    """Within the context the model's gradients are the true ones, whatever its method: no feedback, no cuts."""
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
def both_ways(model: nn.Module) -> Iterator[Way]:
    """Within the context a graph can be gone back through by the feedback, and by W once `true` is set on what is yielded."""
    layers, way = [layer for _, layer in linears(model) if layer.feedback_rule is not None], Way()
    try:
        for layer in layers:
            layer.way = way
        yield way
    finally:
        for layer in layers:
            layer.way = None


def draw(shape: tuple[int, ...], std: float, distribution: Distribution, generator: np.random.Generator) -> Tensor:
    """Zero-mean draws of standard deviation std, in float64."""
    if distribution is Distribution.normal:
        return normal(shape, generator) * std
    return (uniform(shape, generator) * 2 - 1) * (std * math.sqrt(3))


def _scale_problems(scale: float) -> Iterator[str]:
    if not (scale > 0 and math.isfinite(scale)):
        yield f"method.scale={scale} must be positive and finite: it multiplies the feedback's spread"


def is_feedback(parameter: str) -> bool:
    """Whether a parameter's or buffer's dotted name is that of a feedback matrix."""
    return parameter.rpartition(".")[2].startswith("feedback")


@dataclass
class Method:
    """Base of every method (conf/method/*.yaml); by itself it is backprop."""

    name: str

    can_tie: ClassVar[bool] = True
    """Whether embedding and head may share one matrix: only where both get gradients of one and the same kind."""

    def install(self, model: nn.Module, seed: int) -> None:
        """Give a model, already initialised, what the method needs: feedback matrices, cuts."""

    def refresh(self, model: nn.Module, seed: int, step: int) -> None:
        """Called before each update's forward pass."""

    def before_update(self, model: nn.Module) -> None:
        """Called between the (clipped) gradient and the optimizer's step."""

    def trains(self, parameter: str) -> bool:
        """Whether the optimizer gets this parameter."""
        return True

    def weight_decay(self, model: nn.Module, parameter: str, default: float) -> float:
        return default

    def problems(self, config: Any) -> Iterator[str]:
        if config.model.tie and not self.can_tie:
            yield (
                f"model.tie=true mixes two kinds of gradient in one matrix under method={self.name}: "
                "use model.tie=false, or method=bp"
            )


@dataclass
class Backprop(Method):
    """The true gradient."""


@dataclass
class Frozen(Method):
    """Blocks keep their initial weights; embeddings, ln_f and head learn by backprop through them.

    The control for every claim about alignment: what it reaches is not owed to learning in the blocks.
    """

    def trains(self, parameter: str) -> bool:
        return not parameter.startswith("blocks.")


@dataclass
class FeedbackMethod(Method):
    """Base of the methods that replace Wᵀ layer by layer: a stored matrix M per layer, and a rule B(W, M).

    M has W's own initial spread times `scale`, so that errors keep the size they have under backprop at step 0.
    """

    policy: Policy
    distribution: Distribution
    scale: float

    can_tie: ClassVar[bool] = False

    def rule(self, weight: Tensor, m: Tensor) -> Tensor:
        """B from W and M: (out, in)."""
        return m

    def draw_feedback(self, layer: Linear, generator: np.random.Generator) -> Tensor:
        return draw(tuple(layer.weight.shape), layer.init_std * self.scale, self.distribution, generator)

    def chosen(self, model: nn.Module) -> list[tuple[str, Linear]]:
        """The layers whose policy is random."""
        return [(n, layer) for n, layer in linears(model) if getattr(self.policy, layer.kind) is Transpose.random]

    def install(self, model: nn.Module, seed: int) -> None:
        for name, layer in self.chosen(model):
            layer.feedback = self.draw_feedback(layer, stream(seed, "feedback", name)).to(layer.weight)
            layer.feedback_rule = self.rule

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        yield from _scale_problems(self.scale)
        if all(getattr(self.policy, kind) is Transpose.true for kind in KINDS):
            yield f"method={self.name} with every method.policy.* = true is backprop: use method=bp, or set one to random"


@dataclass
class FeedbackAlignment(FeedbackMethod):
    """B is drawn once and never changes (Lillicrap et al. 2016, Nat. Commun. 7:13276)."""


@dataclass
class SignSymmetric(FeedbackMethod):
    """B has W's present signs (Liao et al. 2016; Moskovitz et al. 2018, arXiv 1812.06488): B = |M|⊙sign(W).

    usf: one magnitude for all, the spread of M's draw. frsf: |M| drawn once. brsf: |M| drawn anew for each update.
    """

    uniform: bool
    redraw: bool

    def rule(self, weight: Tensor, m: Tensor) -> Tensor:
        return m.abs() * weight.sign()

    def draw_feedback(self, layer: Linear, generator: np.random.Generator) -> Tensor:
        if self.uniform:
            return torch.tensor(layer.init_std * self.scale, dtype=torch.float64)
        return super().draw_feedback(layer, generator)

    def install(self, model: nn.Module, seed: int) -> None:
        super().install(model, seed)
        self.refresh(model, seed, 0)  # so that an analysis before the first update sees that update's feedback

    def refresh(self, model: nn.Module, seed: int, step: int) -> None:
        if not self.redraw:
            return
        for name, layer in self.chosen(model):
            assert layer.feedback is not None
            layer.feedback.copy_(self.draw_feedback(layer, stream(seed, "feedback", name, step)))

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if self.uniform and self.redraw:
            yield "method.uniform=true leaves nothing to redraw: set method.redraw=false, or use method=brsf"


@dataclass
class KolenPollack(FeedbackMethod):
    """B receives W's own update, and both decay by `decay`, so W − B shrinks by 1 − lr·decay a step (Akrout et al. 2019).

    So under AdamW, and under SGD without momentum; with momentum W − B is a heavy ball that decay alone drives. `decay`
    replaces the optimizer's weight decay for these matrices: AdamW's 1e-2 would leave plain fa over short runs.
    """

    decay: float

    def install(self, model: nn.Module, seed: int) -> None:
        super().install(model, seed)
        for _, layer in self.chosen(model):
            assert layer.feedback is not None
            feedback = nn.Parameter(layer.feedback)
            del layer.feedback  # a buffer's name must be given up before a parameter can take it
            layer.feedback = feedback

    def before_update(self, model: nn.Module) -> None:
        for _, layer in self.chosen(model):
            assert layer.feedback is not None
            layer.feedback.grad = layer.weight.grad

    def weight_decay(self, model: nn.Module, parameter: str, default: float) -> float:
        layer, _, leaf = parameter.rpartition(".")
        mine = leaf in ("weight", "feedback") and any(layer == name for name, _ in self.chosen(model))
        return self.decay if mine else default

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if not self.decay > 0:
            yield f"method.decay={self.decay} must be positive: without decay kp is plain fa (use method=fa)"
        elif not (step := config.optimizer.lr * self.decay) < 1:
            yield (
                f"optimizer.lr * method.decay = {step:.3g} must stay below 1, or weights and feedback overshoot zero: "
                f"try method.decay={0.01 / config.optimizer.lr:.3g}"
            )

    def warnings(self, config: Any) -> Iterator[str]:
        shrink = config.optimizer.lr * self.decay * config.steps
        if shrink < 1:
            yield (
                f"kp: lr * decay * steps = {shrink:.3g} < 1, so W - B keeps {math.exp(-shrink):.0%} of its start and kp is "
                "close to plain fa: raise method.decay or steps"
            )


class Broadcast(nn.Module):
    """Direct feedback: cuts a model at chosen points and hands each part's output e·B, e the error at the top."""

    def __init__(self, feedback: list[Tensor], inject: Inject, error: ErrorAt) -> None:
        super().__init__()
        self.inject, self.error, self.n_points = inject, error, len(feedback)
        for i, matrix in enumerate(feedback):
            self.register_buffer(f"feedback_{i}", matrix)

    def cutter(self, outputs: list[Tensor]) -> "Cut":
        """A cut for one forward pass: appends each output to be taught to `outputs` and goes on from its detached value."""

        def cut(h: Tensor, point: str) -> Tensor:
            if len(outputs) == self.n_points or (point == "sublayer" and self.inject is Inject.block):
                return h
            outputs.append(h)
            return h.detach()

        return cut

    def teach(self, outputs: list[Tensor], logits: Tensor, targets: Tensor, head: Linear) -> Tensor:
        """Zero in value; its gradient at output ℓ: (B, T, d) is e·B_ℓ, e = ∂CE/∂logits or, at hidden, ∂CE/∂(head's input)."""
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
    """The cut of every method but dfa: none."""
    return h


@dataclass
class DirectFeedback(Method):
    """dfa: each block learns from the top error through its own fixed matrix (Nøkland 2016; Launay et al. 2020).

    Blocks are cut from each other, the first one not from the embedding, which therefore learns through it. With
    `cut_head` the last part (block or sublayer) is taught as the others are; without it, it gets its true gradient.
    B_ℓ has the head's initial spread times `scale` where the error is at the logits, scale/√d where it is before the head.
    """

    inject: Inject
    error: ErrorAt
    cut_head: bool
    policy: Policy
    distribution: Distribution
    scale: float

    can_tie: ClassVar[bool] = False

    def install(self, model: nn.Module, seed: int) -> None:
        within = FeedbackAlignment(self.name, self.policy, self.distribution, self.scale)
        within.install(model, seed)
        head: Linear = model.head  # type: ignore[assignment]
        vocab, d = head.weight.shape
        rows, std = (vocab, head.init_std) if self.error is ErrorAt.logits else (d, 1 / math.sqrt(d))
        per_block = 1 if self.inject is Inject.block else 2
        points = per_block * len(model.blocks) - (0 if self.cut_head else 1)  # type: ignore[arg-type]
        model.broadcast = Broadcast(
            [
                draw(
                    (rows, d),
                    std * self.scale,
                    self.distribution,
                    stream(seed, "feedback", "broadcast", i),
                ).to(head.weight)
                for i in range(points)
            ],
            self.inject,
            self.error,
        )

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if self.policy.head is Transpose.random:
            yield (
                "method.policy.head=random makes no sense under dfa, whose head learns by its own true gradient: "
                "set it to true, or use method=fa"
            )
        if config.model.n_layer == 1 and self.inject is Inject.block and not self.cut_head:
            yield "dfa teaches nothing in one block that gets its true gradient: set method.cut_head=true, or use method=bp"
        yield from _scale_problems(self.scale)
