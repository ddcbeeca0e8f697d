"""Recognise a LayerNorm or an RMSNorm by its outputs, whatever its class: its axis, its ε, its γ and its β.

A norm's forward is y = γ⊙z + β with z = (x−μ)/σ and σ = √(v+ε) (RMSNorm: μ = 0). Its outputs on five chosen tokens tell
its constants: a large zero-mean vector, its negative, the same moved by a constant, a small one whose σ shows ε, and another
direction as a check. `require_formula` then compares the formula with the module's own output on its real inputs.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 1e6
"""Size of the chosen token: its variance makes any ε vanish."""

SMALL = 1e-3
"""Size of the small one: ε between 1e-12 and 1 is seen beside its variance."""

SAMPLE = 128
"""Tokens on which a module's output is compared with the formula's."""

ROUNDING = 64
"""Times the dtype's ε: how far the module's output may be from the formula's, relative to its size."""

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")
"""Attributes in which modules keep their ε: the exact value of the one that the outputs show to be near."""

OTHER_KINDS = re.compile(
    r"(batch|group|instance|local|spectral|weight|layerscale|cross)_?(response)?_?norm", re.IGNORECASE
)


class Unrecognised(ValueError):
    """Raised when a module's outputs are not those of a LayerNorm or an RMSNorm; the text says why."""


@dataclass(frozen=True)
class NormFormula:
    """The norm that a module computes.

    Attributes:
        rms: whether it leaves the mean in (RMSNorm).
        axis: the axis of the module's input that is normalised, negative; with `dims` > 1 it is the last of so many.
        dims: how many trailing axes are normalised together.
        eps: added to the variance, or to the mean square.
        weight: γ: (d,) in float64; None where it is 1 throughout.
        bias: β: (d,) in float64; None where it is 0 throughout.
    """

    rms: bool
    axis: int
    dims: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def tokens(self, x: Tensor) -> Tensor:
        """Return the module's input or output as (…, d), the normalised axis last."""
        return x.movedim(self.axis, -1) if self.dims == 1 else x.flatten(-self.dims)

    def output(self, x: Tensor) -> Tensor:
        """Return γ⊙z + β of tokens x: (…, d), in float64."""
        x = x.double()
        centred = x if self.rms else x - x.mean(-1, keepdim=True)
        y = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


def is_candidate(module: nn.Module) -> bool:
    """Return whether a module looks like a LayerNorm or an RMSNorm: by its class, or by its class's name."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    names = [cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    return any(re.search("[Nn]orm(?![a-z])", name) for name in names) and not other_kind(module)


def other_kind(module: nn.Module) -> bool:
    """Return whether a module is a norm of another kind: BatchNorm, GroupNorm, InstanceNorm and their like."""
    return any(OTHER_KINDS.search(cls.__name__) for cls in type(module).__mro__)


def recognise(
    module: nn.Module, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> NormFormula:
    """Find the norm that a module computes, from its outputs on five chosen tokens.

    Args:
        module: any module whose first argument is a tensor; its parameters are taken in float64.
        x: an input of the module, for its shape, which says along which axes it may normalise.
        args: the module's other arguments by place.
        kwargs: the module's arguments by name.

    Raises:
        Unrecognised: when its outputs are not γ⊙z + β for one γ and one β, along the last axis, all trailing axes of
            `normalized_shape`, or the second axis (channels first).
    """
    sizes = getattr(module, "normalized_shape", None)
    dims = max(len(sizes), 1) if isinstance(sizes, (tuple, list)) else 1
    call = own_forward(module, args, kwargs or {}, torch.float64)
    reasons = []
    for axis, count in dict.fromkeys([(-1, dims), *([(1 - x.dim(), 1)] if x.dim() > 2 else [])]):
        shape = list(x.shape[-count:]) if count > 1 else [x.shape[axis]]
        try:
            return _along(module, call, x, axis, shape)
        except Unrecognised as error:
            reasons.append(str(error))
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError) as error:
            if axis == -1:
                reasons.append(f"on chosen tokens it raises {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    raise Unrecognised("; along its second axis, ".join(reasons))


def own_forward(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> Callable[[Tensor], Any]:
    """Return the module's own forward of its first argument, in this dtype, with its exact backward and without its hooks."""

    def forward(x: Tensor) -> Any:
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        cast = {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        rest = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        with _undisturbed(module):
            return torch.func.functional_call(module, cast, (x.to(dtype), *rest), dict(kwargs))

    return forward


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Within the context the module has no hooks, and the exact backward if it is one of lnjac's norms."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    held = {name: getattr(module, name) for name in names}
    rule = getattr(module, "backward_rule", None)
    try:
        for name, hooks in held.items():
            setattr(module, name, type(hooks)())
        if rule is not None:
            vars(module)["backward_rule"] = None
        yield
    finally:
        for name, hooks in held.items():
            setattr(module, name, hooks)
        if rule is not None:
            vars(module)["backward_rule"] = rule


def _along(module: nn.Module, call: Callable[[Tensor], Any], x: Tensor, axis: int, shape: list[int]) -> NormFormula:
    d = math.prod(shape)
    if d < 2:
        raise Unrecognised("its vectors have one entry")
    token = chosen(d).to(x.device)
    size = token.square().mean()
    tokens = torch.stack([LARGE * token, -LARGE * token, LARGE * (token + 1), SMALL * token, token.roll(1)])
    if len(shape) > 1:
        given = tokens.reshape(5, *[1] * (x.dim() - 1 - len(shape)), *shape)
    else:
        given = tokens.reshape(5, *[1] * (x.dim() - 2), d).movedim(-1, axis)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y = call(given)
    if not isinstance(y, Tensor) or y.shape != given.shape:
        raise Unrecognised("its output is no tensor of its input's shape")
    y = (y.movedim(axis, -1) if len(shape) == 1 else y.flatten(-len(shape))).reshape(5, d).double()
    if not y.isfinite().all():
        raise Unrecognised("its output is not finite")
    weight, bias = (y[0] - y[1]) / (2 * token / size.sqrt()), (y[0] + y[1]) / 2
    scale = weight.norm() + bias.norm()
    if not weight.norm() > 0:
        raise Unrecognised("its output does not depend on its input")
    if (y[2] - y[0]).norm() <= 1e-3 * scale:
        rms = False
    elif (y[2] - weight * (token + 1) / (token + 1).square().mean().sqrt() - bias).norm() <= 1e-3 * scale:
        rms = True
    else:
        raise Unrecognised("a constant added to its input changes its output in another way than a norm's")
    shrunk = float(((y[3] - bias) * weight * token).sum() / (weight * token).square().sum())  # SMALL / σ
    if not shrunk > 0:
        raise Unrecognised("the output of a small input points elsewhere")
    eps = max((SMALL / shrunk) ** 2 - SMALL**2 * float(size), 0.0)
    for name in EPS_NAMES:
        kept = getattr(module, name, None)
        if isinstance(kept, (int, float)) and abs(kept - eps) <= 1e-3 * kept + 1e-9 * SMALL**2:
            eps = float(kept)
    weight, bias = (_exactly(module, name, values) for name, values in (("weight", weight), ("bias", bias)))
    found = NormFormula(
        rms=rms,
        axis=axis,
        dims=len(shape),
        eps=eps,
        weight=None if torch.allclose(weight, torch.ones_like(weight), rtol=0, atol=1e-12) else weight,
        bias=None if not bias.abs().max() > 1e-12 * scale else bias,
    )
    if (apart := residual(found.output(tokens), y)) > 1e-3:
        raise Unrecognised(f"its outputs on chosen tokens are {apart:.2g} away from a norm's")
    if isinstance(module, nn.RMSNorm) and module.eps is None:  # it takes that of the dtype it computes in
        return replace(found, eps=torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps)
    return found


def _exactly(module: nn.Module, name: str, values: Tensor) -> Tensor:
    """Return the module's own parameter of this name in float64 where it has these values but for rounding."""
    own = getattr(module, name, None)
    if isinstance(own, Tensor) and own.numel() == values.numel():
        exact = own.detach().flatten().double()
        if torch.allclose(exact, values, rtol=1e-6, atol=1e-9):
            return exact
    return values


def require_formula(norm: NormFormula, x: Tensor, y: Tensor) -> None:
    """Raise Unrecognised unless y is the formula's output of x but for rounding.

    x, y: (…, d), the module's input and its output as it computes them. Up to `SAMPLE` tokens, spread evenly, are
    compared; the bound grows with |x|/σ, by which the subtraction of the mean loses digits.
    """
    rows, outputs = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    at = torch.arange(0, len(rows), max(1, len(rows) // SAMPLE), device=x.device)
    rows, outputs = rows[at].double(), outputs[at]
    if not (rows.isfinite().all() and outputs.isfinite().all()):
        return  # the analysis counts what is not finite
    centred = rows if norm.rms else rows - rows.mean(-1, keepdim=True)
    sigma = (centred.square().mean(-1) + norm.eps).sqrt()
    lost = float((rows.abs().amax(-1) / sigma).max()) if len(rows) else 0.0
    bound = ROUNDING * torch.finfo(outputs.dtype).eps * (1 + lost)
    if (apart := residual(norm.output(rows), outputs)) > bound:
        name = "RMSNorm" if norm.rms else "LayerNorm"
        raise Unrecognised(
            f"its output is {apart:.2g} of its size away from a {name}'s, more than the {bound:.1g} of rounding"
        )


def chosen(d: int) -> Tensor:
    """Return a vector of d entries in float64, none of them 0, whose mean is 0 and whose entries differ in size."""
    half = d // 2
    up = 1 + torch.arange(half, dtype=torch.float64) / half
    down = 1 + torch.arange(d - half, dtype=torch.float64).flip(0) / (d - half)
    return torch.cat([up, -down * up.sum() / down.sum()])


def residual(found: Tensor, true: Tensor) -> float:
    """Return ‖found − true‖/‖true‖, both as one long vector; 0 where both vanish."""
    found, true = found.detach().double(), true.detach().double()
    size, apart = float(true.norm()), float((found - true).norm())
    return apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
