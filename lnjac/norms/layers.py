"""LayerNorm and RMSNorm whose backward can leave out scaling, mean-centring or radial removal.

The forward value never depends on the choice. A surrogate is written with `detach` alone, so that it survives
torch.compile, vmap and forward mode: the backward's linear map is symmetric (`lnjac.norms.decompose.pull_back`), so
applying it to x itself, with z and σ held constant, gives an expression whose gradient is that very map.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.norms.decompose import normalise, pull_back
from lnjac.norms.formulas import BACKWARDS, EXACT, Backward


class Surrogate(Protocol):
    """A backward of a norm's normalisation, and the sites that have it (conf/ln_backward)."""

    name: str
    sites: list[str]

    @abstractmethod
    def surrogate(self, x: Tensor, eps: float, *, rms: bool) -> Tensor | None:
        """Return an expression whose gradient with respect to x is the backward: (…, d) -> (…, d); None for the exact one."""


@dataclass
class Factors:
    """The backward as three switches (conf/ln_backward/*.yaml); `sites` are names or globs, as in `matches`."""

    name: str
    sites: list[str]
    center: bool
    radial: bool
    scale: bool

    def value(self) -> Backward:
        return Backward(self.center, float(self.radial), self.scale)

    def problems(self, config: Any) -> Iterator[str]:
        mine = self.value()
        if mine != BACKWARDS.get(self.name, mine):
            right = next(name for name, backward in BACKWARDS.items() if backward == mine)
            yield f"ln_backward={self.name} with other factors than its own would be mislabelled: use ln_backward={right}"

    def surrogate(self, x: Tensor, eps: float, *, rms: bool) -> Tensor | None:
        """Return M(x), where M pulls ∂L/∂z back by the chosen factors with z and σ constant; its gradient is Mᵀ = M."""
        if self.value() == EXACT:
            return None
        z, rstd = normalise(x.detach(), eps, rms=rms)  # not no_grad, which forward mode would look through
        return pull_back(x, z, rstd, self.value(), rms=rms)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or, with `rms`, RMSNorm (Zhang & Sennrich 2019) over the last axis of size d."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, d: int, *, eps: float, rms: bool = False, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.rms = (d,), eps, rms
        self.register_parameter("weight", nn.Parameter(torch.ones(d)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(d)) if affine and bias and not rms else None)
        self.backward_rule: Surrogate | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (…, d) to γ⊙z + β: (…, d)."""
        surrogate = None if self.backward_rule is None else self.backward_rule.surrogate(x, self.eps, rms=self.rms)
        if surrogate is None:
            return self._plain(x, self.weight, self.bias)
        value = self._plain(x, self.weight, self.bias).detach()  # rounded as the exact norm's, to the last bit
        z = self._plain(x.detach(), None, None) + (surrogate - surrogate.detach())
        y = z if self.weight is None else z * self.weight
        y = y if self.bias is None else y + self.bias
        return value + (y - y.detach()).to(value.dtype)  # bf16 where autocast makes the ordinary norm's so

    def _plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def extra_repr(self) -> str:
        rule = "exact" if self.backward_rule is None else self.backward_rule.name
        return f"{self.normalized_shape[0]}, eps={self.eps}, rms={self.rms}, backward={rule}"


class OtherNorm(nn.Module):
    """The base of norms without the parts of a LayerNorm's Jacobian: the probe names them, and measures nothing there."""


def matches(site: str, patterns: Iterable[str]) -> bool:
    """Return whether `all`, a site's dotted name (`blocks.0.ln_1`), its role (`ln_1`) or a glob of either is a pattern."""
    role = site.rpartition(".")[2]
    return any(p == "all" or fnmatchcase(site, p) or fnmatchcase(role, p) for p in patterns)


@contextmanager
def other_backwards(model: nn.Module, rule_of: Callable[[str], Surrogate | None]) -> Iterator[None]:
    """Within the context each norm has the backward that `rule_of(site)` gives, None for the exact one."""
    before = [(module, module.backward_rule) for _, module in norms(model)]
    try:
        for site, module in norms(model):
            module.backward_rule = rule_of(site)
        yield
    finally:
        for module, rule in before:
            module.backward_rule = rule


def exact_norms(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context within which every norm of the model has its exact backward."""
    return other_backwards(model, lambda site: None)


def norms(model: nn.Module) -> list[tuple[str, Norm]]:
    """Return the model's norms of this class with their dotted names, in order of definition."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Norm)]


def listed(patterns: str | Iterable[str]) -> list[str]:
    """Return one pattern or several, as `matches` takes them."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def unmatched(sites: Iterable[str], rule: Any) -> list[str]:
    """Return the patterns of the rule that match none of these sites."""
    names = list(sites)
    return [pattern for pattern in rule.sites if not any(matches(name, [pattern]) for name in names)]
