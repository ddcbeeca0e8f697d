"""Kinds of norm (conf/model/norm), and their placements in a block (conf/model/placement).

Each is a dataclass with one method of its own. A file conf/model/norm/NAME.yaml or conf/model/placement/NAME.yaml names it
and gives its fields.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lnjac.gpt.settings import Model
from lnjac.norms.layers import Norm, OtherNorm


@dataclass
class Kind(ABC):
    """The base of every kind of norm."""

    name: str

    @abstractmethod
    def make(self, d: int, model: Model) -> Norm | OtherNorm:
        """Return a norm of vectors of d entries, with initial values, as the model's affine, bias and eps want it."""


@dataclass
class LayerNorm(Kind):
    """γ⊙(x − μ)/σ + β (Ba et al. 2016, arXiv 1607.06450)."""

    def make(self, d: int, model: Model) -> Norm:
        return Norm(d, eps=model.eps, affine=model.affine, bias=model.bias)


@dataclass
class RMSNorm(Kind):
    """γ⊙x/rms(x) (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def make(self, d: int, model: Model) -> Norm:
        return Norm(d, eps=model.eps, rms=True, affine=model.affine)


@dataclass
class Pointwise(Kind):
    """The base of kinds γ⊙f(x) + β whose f acts on each entry alone.

    The Jacobian of f is diagonal. It has no centring, radial and scaling part, so there is nothing to measure or replace.
    """

    def learned(self) -> Mapping[str, float]:
        """Return the initial values of f's own scalar parameters, by name."""
        return {}

    @abstractmethod
    def value(self, x: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return f(x), of x's shape, with the present values of the parameters that `learned` names."""

    def make(self, d: int, model: Model) -> OtherNorm:
        return PointwiseNorm(d, self, affine=model.affine, bias=model.bias)

    def problems(self, config: Any) -> Iterator[str]:
        for name, value in self.learned().items():
            if not math.isfinite(value):
                yield f"model.norm.{name}={value} must be finite: it is the initial value of a learnt scalar"

    def warnings(self, config: Any) -> Iterator[str]:
        yield f"model.norm={self.name} has a diagonal Jacobian, without the three parts: layers has no rows of it"


class PointwiseNorm(OtherNorm):
    """γ⊙f(x) + β of a Pointwise kind, over a last axis of size d."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, d: int, kind: Pointwise, *, affine: bool, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.learned = nn.ParameterDict({name: torch.tensor(value) for name, value in kind.learned().items()})
        self.register_parameter("weight", nn.Parameter(torch.ones(d)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(d)) if affine and bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (…, d) to (…, d)."""
        y = self.kind.value(x, dict(self.learned.items()))
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return repr(self.kind)


@dataclass
class DyT(Pointwise):
    """γ⊙tanh(αx) + β, α a learnt scalar (Zhu et al. 2025, arXiv 2503.10622)."""

    alpha: float

    def learned(self) -> Mapping[str, float]:
        return {"alpha": self.alpha}

    def value(self, x: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        return (learned["alpha"] * x).tanh()


@dataclass
class Placement(ABC):
    """The base of every placement of norms around a block's branches, attention and then the MLP."""

    name: str

    norms: ClassVar[tuple[str, ...]] = ("ln",)
    """The norms of each branch. A site's name is one of these with _1 for attention or _2 for the MLP."""
    embedding: ClassVar[bool] = False
    """Whether the embedding is normalised, at ln_e."""
    final: ClassVar[bool] = True
    """Whether the last block's output is normalised, at ln_f."""

    @abstractmethod
    def add(self, h: Tensor, branch: nn.Module, norms: Sequence[nn.Module]) -> Tensor:
        """Return the residual stream behind a branch, (B, T, d).

        Args:
            h: the stream before it, (B, T, d).
            branch: attention or the MLP.
            norms: the branch's norms, in the order of the class's `norms`.
        """


@dataclass
class PreLN(Placement):
    """h + f(norm(h)), and a norm before the head (Xiong et al. 2020, arXiv 2002.04745)."""

    def add(self, h: Tensor, branch: nn.Module, norms: Sequence[nn.Module]) -> Tensor:
        (ln,) = norms
        out: Tensor = h + branch(ln(h))
        return out


@dataclass
class PostLN(Placement):
    """norm(h + f(h)), without a norm before the head (Vaswani et al. 2017)."""

    final = False

    def add(self, h: Tensor, branch: nn.Module, norms: Sequence[nn.Module]) -> Tensor:
        (ln,) = norms
        out: Tensor = ln(h + branch(h))
        return out


@dataclass
class PeriLN(Placement):
    """h + norm(f(norm(h))), with norms of the embedding and before the head (Kim et al. 2025, arXiv 2502.02732)."""

    norms = ("ln", "ln_out")
    embedding = True

    def add(self, h: Tensor, branch: nn.Module, norms: Sequence[nn.Module]) -> Tensor:
        ln, ln_out = norms
        out: Tensor = h + ln_out(branch(ln(h)))
        return out
