"""The truth about one norm module: autograd in float64 through the module's own forward, and plain formulas of vectors.

It imports nothing of lnjac. A module is a norm if y = γ⊙z + β fits its own outputs, where z is the input normalised along
some axis, and γ and β may differ from token to token (as an AdaLN's do). Which axis, which ε, and whether the mean is
subtracted is found by trying; γ and β are found by least squares over random inputs.
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DRAWS = 12
"""Random inputs that the affine part, two numbers an entry, is fitted to."""

FITS = 1e-8
"""Largest misfit of a norm's output, relative to its size; the module runs in float64 throughout."""

NOISE = 8
"""Times the dtype's ε (float32's for half precision): the rule by which docs/columns.md counts a token in n_zero."""

EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)

COSINES = {
    "cos_center_vs_true": ("center_scale", "true"),
    "cos_ste_vs_true": ("ste", "true"),
    "cos_radial_vs_true": ("radial_scale", "true"),
    "cos_center_vs_ste": ("center_scale", "ste"),
}


@dataclass
class Call:
    """One call of a module: its arguments as they were then, and the gradient at its output once it has come."""

    site: str
    call: int
    module: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: str
    """The name of the output's type."""
    same_shape: bool
    """Whether the output is a tensor of the input's shape."""
    grad: Tensor | None = None
    functional: list["Functional"] = field(default_factory=list)
    """The functional norms that ran within the call, and within no module below it."""
    inside: int = 0
    """Calls of modules within this one."""


@dataclass(frozen=True)
class Fit:
    """The norm that a module computes. weight, bias: (…, d), an entry for each of the input's, the normalised axis last."""

    rms: bool
    axis: int
    dims: int
    eps: float
    weight: Tensor
    bias: Tensor

    def tokens(self, x: Tensor) -> Tensor:
        """Return x as (…, d), the normalised axis last."""
        return x.movedim(self.axis, -1) if self.dims == 1 else x.flatten(-self.dims)

    @property
    def conditional(self) -> bool:
        """Whether γ or β differs between the samples of a batch."""
        size = float(self.weight.abs().max())
        return any(float((p - p[:1]).abs().max()) > 1e-6 * size for p in (self.weight, self.bias))


class InFloat64(TorchFunctionMode):
    """Within the context a cast to a shorter float casts to float64, as many norms cast to float32 and back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args = tuple(_longer(arg) for arg in args)
        return func(*args, **{name: _longer(arg) for name, arg in (kwargs or {}).items()})


def _longer(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value


def own_forward(call: Call) -> Callable[[Tensor], Any]:
    """Return the module's own forward in float64 as a function of its first argument, the others as they were."""
    module = copy.deepcopy(call.module).double()
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    rest = [_double(value) for value in call.args]
    named = {name: _double(value) for name, value in call.kwargs.items()}

    def forward(x: Tensor) -> Any:
        with InFloat64():
            return module(x, *rest, **named)

    return forward


def _double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass
class Functional:
    """One call of F.layer_norm or F.rms_norm: its input, the norm that it is, and the gradient at its output."""

    x: Tensor
    fit: "Fit"
    grad: Tensor | None = None


@contextmanager
def watch(model: nn.Module) -> Iterator[list[Call]]:
    """Within the context, note each call of each module, in the order in which they end."""
    calls: list[Call] = []
    counts: Counter[str] = Counter()
    functional: list[list[Functional]] = [[]]
    started: list[int] = []
    handles = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        functional.append([])
        started.append(len(calls))

    for site, module in model.named_modules():

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, site: str = site) -> None:
            named = dict(kwargs)
            first, *rest = args or ((named.pop(next(iter(named))),) if named else (None,))
            number, counts[site] = counts[site], counts[site] + 1
            x = first.detach().clone() if isinstance(first, Tensor) and first.is_floating_point() else torch.empty(0)
            call = Call(
                site,
                number,
                module,
                x,
                tuple(rest),
                named,
                returned=type(output).__name__,
                same_shape=isinstance(output, Tensor) and output.shape == x.shape,
                functional=functional.pop(),
                inside=len(calls) - started.pop(),
            )
            calls.append(call)
            if isinstance(output, Tensor):
                _keep_grad(output, call)

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        with _Functional(functional):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keep_grad(output: Tensor, call: Call | Functional) -> None:
    if output.requires_grad:
        output.register_hook(lambda grad: setattr(call, "grad", grad.detach().clone()))


class _Functional(TorchFunctionMode):
    """Notes the functional norms under the module that is running."""

    def __init__(self, running: list[list[Functional]]) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.layer_norm, F.rms_norm):
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            given = bound.arguments
            x, shape, eps = given["input"].detach().clone(), tuple(given["normalized_shape"]), given["eps"]
            d = math.prod(shape)
            weight, bias = (given.get(name) for name in ("weight", "bias"))
            fit = Fit(
                func is F.rms_norm,
                -1,
                len(shape),
                torch.finfo(x.dtype).eps if eps is None else eps,
                torch.ones(d) if weight is None else weight.detach().flatten(),
                torch.zeros(d) if bias is None else bias.detach().flatten(),
            )
            call = Functional(x, fit)
            _keep_grad(output, call)
            self.running[-1].append(call)
        return output


def fit(call: Call) -> Fit | None:
    """Return the norm that the module of this call computes with the call's other arguments; None if it computes none."""
    x = call.x.double()
    if x.dim() < 2 or x.numel() == 0 or not call.same_shape:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(DRAWS):
        scale = 10 ** (3 * torch.rand(x.shape[0], generator=generator, dtype=torch.float64) - 2)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        inputs.append(noise * scale.reshape(-1, *[1] * (x.dim() - 1)))
    try:
        forward = own_forward(call)
        with torch.no_grad():
            outputs = [forward(one) for one in [*inputs, x]]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError):
        return None
    if any(not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point() for y in outputs):
        return None
    for axis, dims in _axes(call.module, x):
        for rms in (False, True):
            own = _own_numbers(call.module)
            d = math.prod(x.shape[-dims:]) if dims > 1 else x.shape[axis]
            for eps in dict.fromkeys((*own, *(number / d for number in own), *EPSILONS)):  # ε/d: x over its length
                if found := _fitted(inputs, outputs, x, Fit(rms, axis, dims, eps, x, x)):
                    return found
    return None


def _axes(module: nn.Module, x: Tensor) -> list[tuple[int, int]]:
    sizes = getattr(module, "normalized_shape", None)
    many = [(-1, len(sizes))] if isinstance(sizes, tuple) and len(sizes) > 1 else []
    return many + [(axis, 1) for axis in range(-1, -x.dim(), -1) if x.shape[axis] > 1]


def _own_numbers(module: nn.Module) -> list[float]:
    """Return the numbers among the attributes of a module and of those below it that may be its ε."""
    return [v for part in module.modules() for v in vars(part).values() if isinstance(v, float) and 0 <= v < 1]


def _fitted(inputs: list[Tensor], outputs: list[Tensor], x: Tensor, guess: Fit) -> Fit | None:
    z = torch.stack([normalise(guess.tokens(one), guess.rms, guess.eps)[0] for one in inputs])
    y = torch.stack([guess.tokens(one) for one in outputs[:-1]]).double()
    if not (z.isfinite().all() and y.isfinite().all()):
        return None
    spread = z - z.mean(0)
    weight = (spread * y).sum(0) / spread.square().sum(0)
    bias = y.mean(0) - weight * z.mean(0)
    true = guess.tokens(outputs[-1]).double()
    at_x = weight * normalise(guess.tokens(x), guess.rms, guess.eps)[0] + bias
    fits = float((weight * z + bias - y).norm()) <= FITS * float(y.norm())
    fits = fits and float((at_x - true).norm()) <= FITS * float(true.norm())
    if not fits or float((weight * z).norm()) <= 1e-3 * float(y.norm()):
        return None
    return Fit(guess.rms, guess.axis, guess.dims, guess.eps, weight, bias)


def normalise(x: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return z: (…, d), σ: (…, 1) and the variance without ε (RMSNorm: the mean square): (…, 1)."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    sigma = (variance + eps).sqrt()
    return centred / sigma, sigma, variance


def pullback(call: Call | Functional, found: Fit) -> Tensor:
    """Return ∂L/∂x through the norm alone, as autograd has it in float64. Of x's shape."""
    at = call.x.double().requires_grad_()
    assert call.grad is not None
    if isinstance(call, Call):
        y = own_forward(call)(at)
    else:
        shape, weight, bias = at.shape[-found.dims :], found.weight.double(), found.bias.double()
        y = F.rms_norm(at, shape, None, found.eps) if found.rms else F.layer_norm(at, shape, None, None, found.eps)
        y = y * weight.reshape(shape) + bias.reshape(shape)
    (t,) = torch.autograd.grad(y, at, call.grad.double())
    return t


def numbers(call: Call | Functional, found: Fit, loss_tokens: int) -> dict[str, Any]:
    """Return the numbers of a call's row by vectors per token. `loss_tokens`: how many tokens the loss is the mean of."""
    assert call.grad is not None
    x, grad, t = (found.tokens(a.double()) for a in (call.x, call.grad, pullback(call, found)))
    d = x.shape[-1]
    g = (found.weight * grad).reshape(-1, d)
    x, t = x.reshape(-1, d), t.reshape(-1, d)
    z, sigma, variance = normalise(x, found.rms, found.eps)
    mean = torch.zeros_like(g) if found.rms else g.mean(-1, keepdim=True).expand_as(g)
    axis = z / z.norm(dim=-1, keepdim=True)
    radial = (g * axis).sum(-1, keepdim=True) * axis
    along = z * (g * z).mean(-1, keepdim=True)
    backwards = {
        "true": t,
        "center_scale": (g - mean) / sigma,
        "projected": sigma * t,
        "ste": g,
        "scale": g / sigma,
        "radial_scale": (g - along) / sigma,
        "center": g - mean,
        "radial": g - along,
    }
    noise = NOISE * min(torch.finfo(call.grad.dtype).eps, torch.finfo(torch.float32).eps)
    size = g.norm(dim=-1)
    told = (size > noise * size.max()) & ((sigma * t).norm(dim=-1) > 64 * torch.finfo(torch.float64).eps * size)
    total = float(g.square().sum())
    A, B = float(mean.square().sum()), float(radial.square().sum())
    true = t.flatten()
    unless_rms = math.nan if found.rms else 1.0
    cosines = {
        name: float(F.cosine_similarity(backwards[a][told], backwards[b][told], dim=-1, eps=0.0).mean())
        for name, (a, b) in COSINES.items()
    }
    flat = {
        f"flat_cos_{name}": float(vector.flatten() @ true / (vector.norm() * true.norm()))
        for name, vector in backwards.items()
        if name != "true"
    }
    gains = {f"gain_{name}": float(v.norm() / true.norm()) for name, v in backwards.items() if name != "true"}
    if found.rms:
        cosines["cos_center_vs_ste"] = math.nan
    return {
        "norm": "rmsnorm" if found.rms else "layernorm",
        "d": d,
        "n_tokens": len(g),
        "n_zero": int((~told).sum()),
        "r_mean": unless_rms * A / total,
        "r_radial": float(along.square().sum()) / total,
        "r_kept": float((sigma * t).square().sum()) / total,
        "share_radial": B / total,
        "radial_share": B / (total - A),
        "sigma_mean": float(sigma.mean()),
        "sigma_std": float(sigma.std()) if len(g) > 1 else math.nan,
        "sigma_q50": float(sigma.quantile(0.5)),
        "rho_mean": float((variance / sigma.square()).mean()),
        **cosines,
        **flat,
        **gains,
        "sum_A": A * loss_tokens**2,
        "sum_B": B * loss_tokens**2,
        "sum_C": (total - A - B) * loss_tokens**2,
    }
