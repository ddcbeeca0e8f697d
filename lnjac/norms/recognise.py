"""Recognise a LayerNorm or an RMSNorm by its outputs, whatever its class: its axis, its ε, its γ and its β.

A norm's forward is y = γ⊙z + β with z = (x−μ)/σ and σ = √(v+ε) (RMSNorm: μ = 0). Its outputs on five chosen tokens tell
its constants: a large zero-mean vector, its negative, the same moved by a constant, a small one whose σ shows ε, and another
direction as a check. `require_formula` then compares the formula with the module's own output on its real inputs.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lnjac.norms.calls import FunctionalCall, site_name
from lnjac.norms.decompose import normalise, pull_back, size_sq, wide_dtype
from lnjac.norms.layers import Norm, OtherNorm, Surrogate, exact_norms

LARGE = 1e6
"""Size of the chosen token: its variance makes any ε vanish."""

SMALL = 1e-3
"""Size of the small one: ε between 1e-12 and 1 is seen beside its variance."""

MISFIT = 1e-5
"""How far a module's outputs on the chosen tokens may be from a norm's: modules that compute in float32 are within 1e-6."""

SAMPLE = 16
"""Tokens, or up to twice as many, on which a module's output is compared with the formula's."""

ROUNDING = 64
"""Times the dtype's ε: how far the module's output may be from the formula's, relative to its size."""

BACKWARD_ROUNDING = 4096
"""The same of the gradient by a declared backward, which may cancel to a small part of what it is made from."""

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")
"""Attributes in which modules keep their ε: the exact value of the one that the outputs show to be near."""

KNOWN = (nn.LayerNorm, nn.RMSNorm, Norm)
"""Classes whose forward is known: the class itself, no subclass. Autograd keeps their input, and so guards it."""

PARTS = ("weight", "bias")
"""A norm's parameters: γ and β."""

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
        weight: γ in float64: (d,), or (…, d) where it differs by position, as by head; None where it is 1 throughout.
        bias: β likewise; None where it is 0 throughout.
        sizes: the sizes of the normalised axes, where `dims` > 1.
        rounding: how far its outputs on chosen tokens are from it in float64: 1e-7 where it computes in float32.
    """

    rms: bool
    axis: int
    dims: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    sizes: tuple[int, ...] = ()
    rounding: float = 0.0

    @property
    def by_position(self) -> bool:
        """Whether γ or β differ by position."""
        return any(p is not None and p.dim() > 1 for p in (self.weight, self.bias))

    def tokens(self, x: Tensor) -> Tensor:
        """Return the module's input or output as (…, d), the normalised axis last."""
        return as_tokens(x, self.axis, self.dims)

    def untokens(self, x: Tensor) -> Tensor:
        """Return tokens (…, d) as the module takes them."""
        return x.movedim(-1, self.axis) if self.dims == 1 else x.reshape(*x.shape[:-1], *self.sizes)

    def normalised(self, x: Tensor) -> Tensor:
        """Return z of tokens x: (…, d)."""
        return normalise(x, self.eps, rms=self.rms).z


def as_tokens(x: Tensor, axis: int, dims: int) -> Tensor:
    """Return x as (…, d): one axis moved to the end, or the last `dims` of them as one."""
    return x.movedim(axis, -1) if dims == 1 else x.flatten(-dims)


@dataclass(frozen=True)
class Layer:
    """An adapter: the LayerNorm that a class computes, for one that cannot be recognised by its outputs.

        lnjac.probe(model, adapters={MyNorm: lnjac.Layer(gamma=lambda m: 1 + m.scale)})

    It is verified at each call as every norm is.

    Attributes:
        axis: The normalised axis of the module's first argument.
        eps: The number added to the variance, or a function of the module; its attribute `eps` or the like unless given.
        gamma: A function of the module that gives γ: (d,); its parameter `weight`, if it has one, unless given.
        beta: A function of the module that gives β: (d,); its parameter `bias`, if it has one, unless given.
    """

    axis: int = -1
    eps: float | Callable[[Any], float] | None = None
    gamma: Callable[[Any], Tensor | None] | None = None
    beta: Callable[[Any], Tensor | None] | None = None
    rms: ClassVar[bool] = False

    def of(self, module: nn.Module, x: Tensor) -> "NormFormula":
        """Return the norm that the module computes. Raises Unrecognised if the adapter does not fit it."""
        try:
            eps = self.eps(module) if callable(self.eps) else self.eps
            gamma = self.gamma(module) if self.gamma else getattr(module, "weight", None)
            beta = self.beta(module) if self.beta else getattr(module, "bias", None)
        except Exception as error:
            raise Unrecognised(f"its adapter raises {type(error).__name__}: {error}") from None
        if eps is None:
            eps = next(
                (float(getattr(module, name)) for name in EPS_NAMES if getattr(module, name, None) is not None), None
            )
        if eps is None:
            raise Unrecognised(f"it has no attribute {', '.join(EPS_NAMES)}: give eps in its adapter")
        if not -x.dim() <= self.axis < x.dim():
            raise Unrecognised(f"its adapter gives axis {self.axis} for an input of {x.dim()} axes")
        d = x.shape[self.axis]
        for name, p in (("γ", gamma), ("β", beta)):
            if isinstance(p, Tensor) and p.numel() != d:
                raise Unrecognised(f"its adapter gives {p.numel()} entries of {name} for vectors of {d}")
        axis = self.axis if self.axis < 0 else self.axis - x.dim()
        return NormFormula(self.rms, axis, 1, eps, _constant(gamma), _constant(beta))


@dataclass(frozen=True)
class Rms(Layer):
    """An adapter: the RMSNorm that a class computes; see Layer."""

    rms: ClassVar[bool] = True


Adapter = Layer


def _constant(p: Any) -> Tensor | None:
    return p.detach().flatten().to(torch.float64, copy=True) if isinstance(p, Tensor) else None


def adapter_of(module: nn.Module, adapters: Mapping[Any, Adapter]) -> Adapter | None:
    """Return the adapter of a module's class, given by the class or by its name."""
    for cls in type(module).__mro__ if adapters else ():
        for key in (cls, cls.__name__):
            if key in adapters:
                return adapters[key]
    return None


def candidates(model: nn.Module, adapters: Mapping[Any, Adapter] | None = None) -> dict[str, nn.Module]:
    """Return the modules that look like a LayerNorm or an RMSNorm, by dotted name; of nested ones the innermost."""
    found = {
        site_name(name): module
        for name, module in model.named_modules()
        if is_candidate(module) or adapter_of(module, adapters or {}) is not None
    }
    outer = {parent for name in found for parent in _parents(name)}
    return {name: module for name, module in found.items() if name not in outer}


def _parents(name: str) -> list[str]:
    """Return the names of the modules around this one, the model's own, empty one first."""
    words = name.split(".")
    return [".".join(words[:n]) for n in range(len(words))] if name else []


def is_known(module: nn.Module) -> bool:
    """Return whether a module's forward is that of a KNOWN class: of the class itself, and not replaced in the module."""
    return type(module) in KNOWN and "forward" not in vars(module) and math.prod(module.normalized_shape) > 1  # type: ignore[arg-type]


def is_candidate(module: nn.Module) -> bool:
    """Return whether a module looks like a LayerNorm or an RMSNorm: by its class, its class's name, or its attributes."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    names = [cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    named = any(re.search("[Nn]orm(?![a-z])", name) for name in names)
    return (named or _has_eps(module)) and not other_kind(module)


def _has_eps(module: nn.Module) -> bool:
    """Return whether a module of one's own, without modules in it, has an attribute that norms keep their ε in."""
    if type(module).__module__.startswith("torch.") or any(True for _ in module.children()):
        return False
    return any(isinstance(getattr(module, name, None), float) for name in EPS_NAMES)


def other_kind(module: nn.Module) -> bool:
    """Return whether a module is a norm of another kind: BatchNorm, GroupNorm, and their like, or an OtherNorm."""
    return isinstance(module, OtherNorm) or any(OTHER_KINDS.search(cls.__name__) for cls in type(module).__mro__)


def has_other_norms(model: nn.Module) -> bool:
    """Return whether the model has norms that are declared, by an OtherNorm, to have nothing to measure."""
    return any(isinstance(module, OtherNorm) for module in model.modules())


def recognise(
    module: nn.Module,
    x: Tensor,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    adapter: Adapter | None = None,
) -> NormFormula:
    """Find the norm that a module computes, from its outputs on five chosen tokens.

    Of a class whose forward is known, the constants are read instead: on a GPU the chosen tokens would cost a fifth of an
    analysis. What is found either way is a guess until `require_formula` has compared it with the module's real output.

    Args:
        module: any module whose first argument is a tensor; its parameters are taken in float64.
        x: an input of the module, for its shape, which says along which axes it may normalise.
        args: the module's other arguments by place.
        kwargs: the module's arguments by name.
        adapter: what is known of the module's class.

    Raises:
        Unrecognised: when its outputs are not γ⊙z + β for one γ and one β, along the last axis, all trailing axes of
            `normalized_shape`, or the second axis (channels first).
    """
    if adapter is not None:
        return adapter.of(module, x)
    if is_known(module):
        return _as_declared(module, x)
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
        except Exception as error:  # a module may raise anything on an input that is not its model's
            if axis == -1:
                line = str(error).partition("\n")[0][:120]
                reasons.append(f"on chosen tokens it raises {type(error).__name__}: {line}")
    raise Unrecognised("; along its second axis, ".join(reasons))


def _as_declared(module: Any, x: Tensor) -> NormFormula:
    """Return the norm that a module of a KNOWN class is by its attributes."""
    return NormFormula(
        rms=isinstance(module, nn.RMSNorm) or getattr(module, "rms", False),
        axis=-1,
        dims=len(module.normalized_shape),
        eps=_default_eps(x) if module.eps is None else module.eps,
        weight=_constant(module.weight),
        bias=_constant(getattr(module, "bias", None)),
        sizes=tuple(module.normalized_shape),
    )


def recognise_function(call: FunctionalCall) -> NormFormula:
    """Return the norm that F.layer_norm or F.rms_norm computes by its arguments."""
    eps = _default_eps(call.x) if call.eps is None else call.eps
    weight, bias = _constant(call.weight), _constant(call.bias)
    return NormFormula(call.rms, -1, len(call.shape), eps, weight, bias, call.shape)


def _default_eps(x: Tensor) -> float:
    """Return the ε of an nn.RMSNorm that is given none: that of the dtype it computes in."""
    return torch.finfo(wide_dtype(x.dtype)).eps


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the module's parameters and buffers as they are now; those of a norm are small."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: t.detach().clone() for name, t in state.items()}


def own_forward(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    state: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = True,
) -> Callable[[Tensor], Any]:
    """Return the module's own forward as a function of its first argument, in one dtype and without its hooks.

    Args:
        module: Any module.
        args: Its other arguments by place.
        kwargs: Its arguments by name.
        dtype: Of the computation.
        state: Its parameters and buffers; those that it has now unless given.
        exact: Whether with the exact backward, or lnjac's own norms as they are.
    """
    known = own_state(module) if state is None else state

    def run(x: Tensor, dtype: torch.dtype | None) -> Any:
        def cast(t: Any) -> Any:
            return t.to(dtype) if dtype and isinstance(t, Tensor) and t.is_floating_point() else t

        with ExitStack() as stack:
            stack.enter_context(_without_hooks(module))
            if not is_known(module):  # it may draw random numbers
                devices = [x.device.index] if x.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
            if exact:
                stack.enter_context(exact_norms(module))
            state = {name: cast(t) for name, t in known.items()}
            return torch.func.functional_call(module, state, (cast(x), *map(cast, args)), dict(kwargs))

    def forward(x: Tensor) -> Any:
        try:
            return run(x, dtype)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
        # it converts its input to a dtype that its parameters are not of: run it in theirs
        own = next((t.dtype for t in known.values() if t.is_floating_point()), dtype)
        return run(x.to(own), None)

    return forward


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Within the context the module has no hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    held = {name: getattr(module, name) for name in names}
    try:
        vars(module).update({name: type(hooks)() for name, hooks in held.items()})  # setattr of a module is slow
        yield
    finally:
        vars(module).update(held)


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
    if not isinstance(y, Tensor) or not _widened(given.shape, y.shape, axis):
        raise Unrecognised("its output is no tensor of its input's shape")
    y = as_tokens(y, axis, len(shape)).double()
    positions, y = y.shape[1:-1], y.reshape(5, -1, d)  # (5, m, d): m > 1 where γ or β differ by position
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
    z = normalise(tokens, eps, rms=rms).z.unsqueeze(1)
    if (apart := residual(z * weight + bias, y)) > MISFIT:
        raise Unrecognised(f"its outputs on chosen tokens are {apart:.2g} away from a norm's")
    weight, bias = (_exactly(module, name, values) for name, values in zip(PARTS, (weight, bias), strict=True))
    kept_shape = (*positions, d) if len(weight) > 1 else (d,)
    found = NormFormula(
        rms=rms,
        axis=axis,
        dims=len(shape),
        eps=eps,
        weight=None
        if torch.allclose(weight, torch.ones_like(weight), rtol=0, atol=1e-12)
        else weight.reshape(kept_shape),
        bias=None if not bias.abs().max() > 1e-12 * scale else bias.reshape(kept_shape),
        sizes=tuple(shape) if len(shape) > 1 else (),
        rounding=apart,
    )
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        return replace(found, eps=_default_eps(x))
    return found


def _widened(given: torch.Size, output: torch.Size, axis: int) -> bool:
    """Return whether the output has the input's shape, but for axes of size 1 along which γ or β differ."""
    same = len(given) == len(output) and given[0] == output[0] and given[axis] == output[axis]
    return same and all(a in (b, 1) for a, b in zip(given, output, strict=True))


def _exactly(module: nn.Module, name: str, values: Tensor) -> Tensor:
    """Return the module's own parameter of this name in float64 where it has these values but for rounding."""
    own = getattr(module, name, None)
    if isinstance(own, Tensor) and own.numel() == values.numel():
        exact = own.detach().double().reshape(values.shape)
        if torch.allclose(exact, values, rtol=1e-6, atol=1e-9):
            return exact
    return values


def require_formula(
    norm: NormFormula, x: Tensor, y: Tensor, grad: Tensor | None = None, pulled: Tensor | None = None
) -> tuple[float, float]:
    """Raise Unrecognised unless a module computes the formula, on a sample of tokens and but for rounding.

    At most twice `SAMPLE` tokens, spread evenly, are compared. Left out are those whose squares the dtype cannot hold, and
    pullbacks near its smallest numbers, which have lost digits. The bound grows with |x|/σ, by which the subtraction of the
    mean loses digits. What is left of g/σ in a pullback may be a small part of it, so a difference of pullbacks is compared
    with g/σ.

    Args:
        norm: The formula.
        x: The module's input: (…, d).
        y: Its own output: (…, d).
        grad: ∂L/∂y: (…, d).
        pulled: ∂L/∂x through the module's own forward: (…, d).

    Returns:
        ‖y − formula‖² and ‖formula‖² over the sample.
    """
    d = x.shape[-1]
    every, limits = max(1, x.numel() // d // SAMPLE), torch.finfo(y.dtype)

    def sample(t: Tensor) -> Tensor:
        return t.reshape(-1, d)[::every].double()

    weight, bias = (p if p is None or p.dim() == 1 else sample(p.expand(x.shape)) for p in (norm.weight, norm.bias))
    inputs = sample(x)
    z, rstd = normalise(inputs, norm.eps, rms=norm.rms)
    true = z if weight is None else z * weight
    true = true if bias is None else true + bias
    sizes = [size_sq(true - sample(y)), size_sq(true)]
    if grad is not None and pulled is not None:
        g = sample(grad) if weight is None else sample(grad) * weight
        apart_sq, g_sq = size_sq(pull_back(g, z, rstd, rms=norm.rms) - sample(pulled)), size_sq(g * rstd)
        precise = g_sq > (limits.tiny / limits.eps) ** 2  # subnormal numbers have fewer digits
        sizes += [apart_sq * precise, g_sq * precise]
    by_token = torch.stack([*sizes, torch.linalg.vector_norm(inputs, math.inf, dim=-1) * rstd[:, 0]])
    held = by_token.isfinite().all(0) & (size_sq(inputs) < limits.max / 4)
    by_token = by_token.where(held, 0.0)
    *squares, lost = torch.stack([*by_token[:-1].sum(-1), by_token[-1].max()]).tolist()  # the device is waited for once
    bound = ROUNDING * max(limits.eps, norm.rounding) * (1 + lost)
    for what, apart, size in zip(("output", "input gradient"), squares[::2], squares[1::2], strict=False):
        if apart > bound**2 * size:
            off = math.sqrt(apart / size) if size > 0 else math.inf
            name = "RMSNorm" if norm.rms else "LayerNorm"
            raise Unrecognised(
                f"its {what} is {off:.2g} of its size away from a {name}'s, more than the {bound:.1g} of rounding"
            )
    return squares[0], squares[1]


def require_backward(norm: NormFormula, rule: Surrogate, x: Tensor, grad: Tensor, found: Tensor) -> None:
    """Raise Unrecognised unless the gradient that a norm's declared backward gives is the one of the rule's own expression.

    x: the input, grad: ∂L/∂y, found: ∂L/∂x with the declared backward: (…, d) each.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        expression = rule.surrogate(leaf, norm.eps, rms=norm.rms)
        assert expression is not None
        g = grad.to(leaf.dtype) if norm.weight is None else (grad * norm.weight).to(leaf.dtype)
        (true,) = torch.autograd.grad(expression, leaf, g)
    finite = (found + true).isfinite().all(-1)
    off, bound = residual(found[finite], true[finite]), BACKWARD_ROUNDING * torch.finfo(leaf.dtype).eps
    if off > bound:
        raise Unrecognised(
            f"its backward {rule.name} gives a gradient {off:.2g} of its size away from the formula's, "
            f"more than the {bound:.1g} of rounding"
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
