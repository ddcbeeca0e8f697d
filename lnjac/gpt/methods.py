"""Methods of credit assignment (conf/method), which choose feedback, trained parameters and weight decay."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lnjac.gpt.credit import KINDS, Broadcast, ErrorAt, Feedback, FeedbackLinear, Inject, Layers, linears
from lnjac.seeding import normal, stream, uniform


class Transpose(str, Enum):
    """How a matrix passes the error on, by random feedback or by its true transpose."""

    random = "random"
    true = "true"


class Distribution(str, Enum):
    normal = "normal"
    uniform = "uniform"


@dataclass
class Policy:
    """The transpose that each kind of matrix uses."""

    qkv: Transpose
    attn_proj: Transpose
    fc: Transpose
    mlp_proj: Transpose
    head: Transpose


def draw(shape: tuple[int, ...], std: float, distribution: Distribution, generator: np.random.Generator) -> Tensor:
    """Return draws of mean zero and standard deviation std, in float64."""
    if distribution is Distribution.normal:
        return normal(shape, generator) * std
    return (uniform(shape, generator) * 2 - 1) * (std * math.sqrt(3))


@dataclass
class Method:
    """The base of every method; by itself it is backprop."""

    name: str

    can_tie: ClassVar[bool] = True
    """Whether embedding and head may share a matrix, which takes gradients of one kind for both."""

    def install(self, model: nn.Module, seed: int) -> None:
        """Give an initialised model the feedback matrices and cuts that the method needs."""

    def refresh(self, model: nn.Module, seed: int, step: int) -> None:
        """Change the feedback before an update's forward pass."""

    def before_update(self, model: nn.Module) -> None:
        """Change gradients between the clipping and the optimizer's step."""

    def trains(self, parameter: str) -> bool:
        """Return whether the optimizer gets the parameter of this name."""
        return True

    def weight_decay(self, model: nn.Module, parameter: str, default: float) -> float:
        """Return the weight decay of a parameter; `default` is the optimizer's."""
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

    It is the control for claims about alignment, because its loss owes nothing to learning in the blocks.
    """

    def trains(self, parameter: str) -> bool:
        return not parameter.startswith("blocks.")


@dataclass
class FeedbackMethod(Method):
    """The base of the methods that replace Wᵀ, each layer by a rule B(W, M) of its weight and a stored matrix M.

    M has W's own initial spread times `scale`, so that errors have the size of backprop's at step 0.
    """

    policy: Policy
    distribution: Distribution
    scale: float

    can_tie: ClassVar[bool] = False
    layerwise: ClassVar[bool] = True
    """Whether the method is its layers' feedback alone, and so is backprop if every transpose is true."""

    @property
    def changes(self) -> bool:
        """Whether the feedback has to be changed between two updates."""
        return False

    def rule(self, weight: Tensor, m: Tensor) -> Tensor:
        """Return B of W and M, all (out, in)."""
        return m

    def draw_feedback(self, layer: Feedback, generator: np.random.Generator) -> Tensor:
        return draw(tuple(layer.matrix.shape), layer.init_std * self.scale, self.distribution, generator)

    def give(self, layers: Layers, seed: int) -> None:
        """Draw M for each layer, from a stream of the layer's name."""
        for name, layer in layers:
            layer.feedback = self.draw_feedback(layer, stream(seed, "feedback", name)).to(layer.weight)
            layer.feedback_rule = self.rule

    def renew(self, layers: Layers, seed: int, step: int) -> None:
        """Change the layers' M before an update's forward pass."""

    def follow(self, layers: Layers) -> None:
        """Give each M the gradient by which the optimizer changes it."""

    def chosen(self, model: nn.Module) -> Layers:
        """Return the layers of our GPT that use random feedback."""
        return [
            (name, layer)
            for name, layer in linears(model)
            if isinstance(layer, FeedbackLinear) and getattr(self.policy, layer.kind) is Transpose.random
        ]

    def install(self, model: nn.Module, seed: int) -> None:
        self.give(self.chosen(model), seed)

    def refresh(self, model: nn.Module, seed: int, step: int) -> None:
        self.renew(self.chosen(model), seed, step)

    def before_update(self, model: nn.Module) -> None:
        self.follow(self.chosen(model))

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if not (self.scale > 0 and math.isfinite(self.scale)):
            yield f"method.scale={self.scale} must be positive and finite: it multiplies the feedback's spread"
        if self.layerwise and all(getattr(self.policy, kind) is Transpose.true for kind in KINDS):
            yield f"method={self.name} with every method.policy.* = true is backprop: use method=bp, or set one to random"


@dataclass
class FeedbackAlignment(FeedbackMethod):
    """B is drawn once and never changes (Lillicrap et al. 2016, Nat. Commun. 7:13276)."""


@dataclass
class SignSymmetric(FeedbackMethod):
    """B has W's present signs (Liao et al. 2016; Moskovitz et al. 2018, arXiv 1812.06488): B = |M|⊙sign(W).

    usf has one magnitude, the spread of M's draw; frsf draws |M| once; brsf draws |M| anew for each update.
    """

    uniform: bool
    redraw: bool

    def rule(self, weight: Tensor, m: Tensor) -> Tensor:
        return m.abs() * weight.sign()

    @property
    def changes(self) -> bool:
        return self.redraw

    def draw_feedback(self, layer: Feedback, generator: np.random.Generator) -> Tensor:
        if self.uniform:
            return torch.tensor(layer.init_std * self.scale, dtype=torch.float64)
        return super().draw_feedback(layer, generator)

    def give(self, layers: Layers, seed: int) -> None:
        super().give(layers, seed)
        self.renew(layers, seed, 0)  # so that an analysis before the first update sees that update's feedback

    def renew(self, layers: Layers, seed: int, step: int) -> None:
        if not self.redraw:
            return
        for name, layer in layers:
            assert layer.feedback is not None
            layer.feedback.copy_(self.draw_feedback(layer, stream(seed, "feedback", name, step)))

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if self.uniform and self.redraw:
            yield "method.uniform=true leaves nothing to redraw: set method.redraw=false, or use method=brsf"


@dataclass
class KolenPollack(FeedbackMethod):
    """B receives W's own update, and both decay by `decay`, so W − B shrinks by 1 − lr·decay a step (Akrout et al. 2019).

    This holds under AdamW, and under SGD without momentum; with momentum W − B is a heavy ball that decay alone drives.
    `decay` replaces the optimizer's weight decay for these matrices, because AdamW's 1e-2 leaves plain fa over short runs.
    """

    decay: float

    @property
    def changes(self) -> bool:
        return True

    def install(self, model: nn.Module, seed: int) -> None:
        super().install(model, seed)
        for _, layer in self.chosen(model):
            assert layer.feedback is not None
            feedback = nn.Parameter(layer.feedback)
            del layer.feedback  # a buffer's name must be given up before a parameter can take it
            layer.feedback = feedback

    def follow(self, layers: Layers) -> None:
        for _, layer in layers:
            assert layer.feedback is not None
            grad = layer.weight.grad
            # a copy, because a GradScaler divides every gradient in place
            layer.feedback.grad = None if grad is None else layer.oriented(grad).clone()

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


@dataclass
class DirectFeedback(FeedbackMethod):
    """Each block learns from the top error through its own fixed matrix (dfa: Nøkland 2016; Launay et al. 2020).

    Blocks are cut from each other. The first one is not cut from the embedding, which learns through it. With `cut_head`
    the last part (block or sublayer) is taught as the others are; without it, it gets its true gradient. B_ℓ has the
    head's initial spread times `scale` if the error is at the logits, and scale/√d if it is before the head.
    """

    inject: Inject
    error: ErrorAt
    cut_head: bool

    layerwise: ClassVar[bool] = False

    def install(self, model: nn.Module, seed: int) -> None:
        super().install(model, seed)
        head: FeedbackLinear = model.head  # type: ignore[assignment]
        vocab, d = head.weight.shape
        rows, std = (vocab, head.init_std) if self.error is ErrorAt.logits else (d, 1 / math.sqrt(d))
        per_block = 1 if self.inject is Inject.block else 2
        points = per_block * len(model.blocks) - (0 if self.cut_head else 1)  # type: ignore[arg-type]
        drawn = [
            draw((rows, d), std * self.scale, self.distribution, stream(seed, "feedback", "broadcast", i))
            for i in range(points)
        ]
        model.broadcast = Broadcast([matrix.to(head.weight) for matrix in drawn], self.inject, self.error)

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if self.policy.head is Transpose.random:
            yield (
                "method.policy.head=random makes no sense under dfa, whose head learns by its own true gradient: "
                "set it to true, or use method=fa"
            )
        if config.model.n_layer == 1 and self.inject is Inject.block and not self.cut_head:
            yield "dfa teaches nothing in one block that gets its true gradient: set method.cut_head=true, or use method=bp"
