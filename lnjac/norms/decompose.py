"""The backward of LayerNorm and RMSNorm taken apart: pure functions of tensors.

Notation, per token of size d (docs/maths.md): input x, σ = √(v+ε), z = (x−μ)/σ (RMSNorm: μ = 0, v = mean(x²)),
ρ = v/(v+ε), g = ∂L/∂z, ḡ = mean(g), m = mean(g⊙z). The exact pullback is t = (g − ḡ − z·m)/σ; every surrogate leaves
out some of its three factors. With A = d·ḡ², B = d·m²/ρ, C = ‖g‖² − A − B, the sums over tokens of
{A, B, C, (1−ρ)B, (1−ρ)²B} × {1, σ⁻¹, σ⁻²} suffice for every flattened share, cosine and gain of all of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lnjac.columns import Column, evaluate
from lnjac.norms import formulas
from lnjac.norms.formulas import BY_MEASURABLE, ENERGIES, EXACT, RSTD_POWERS, SIGMA_QUANTILES, Backward

CHUNK_ELEMENTS = 1 << 17
"""Elements taken to float64 at a time on a CPU: a megabyte, so that the passes over a chunk stay in cache."""

ACCELERATOR_CHUNK_ELEMENTS = 1 << 22
"""The same on an accelerator, where launching a kernel costs more than its work on a small chunk."""

ROUNDING_SQ = (64 * torch.finfo(torch.float64).eps) ** 2
"""A pullback this much shorter than what it was made from, squared, is rounding noise without a direction."""


HALF_EPS = torch.finfo(torch.float32).eps
"""Stands for the ε of the half dtypes, whose gradients are accumulated in float32."""

NOISE = 8
"""Times the dtype's ε: a token whose gradient is so much shorter than the longest of its call holds rounding errors, as
the first query's does, which softmax over one key leaves without any."""


ROUNDED = 1 / 16
"""Root mean square of a gradient's entries, over that of the gradient it is part of and the dtype's ε, up to which it counts
as noise. Gradients that vanish in exact arithmetic were measured at 0.002 to 0.03, in fp64, fp32 and bf16."""


def center(g: Tensor) -> Tensor:
    """g − ḡ over the last axis; g: (…, d)."""
    return g - g.mean(-1, keepdim=True)


def remove_radial(z: Tensor, g: Tensor) -> Tensor:
    """g − z·mean(g⊙z) over the last axis; z, g: (…, d)."""
    return g - z * (g * z).mean(-1, keepdim=True)


def pull_back(g: Tensor, z: Tensor, rstd: Tensor, backward: Backward = EXACT, *, rms: bool = False) -> Tensor:
    """Pull ∂L/∂z back to ∂L/∂x by a backward. g, z: (…, d); rstd = 1/σ: (…, 1).

    Exact for any ε with `EXACT` (Ba et al. 2016; Zhang & Sennrich 2019 for rms). For RMSNorm there is no mean to remove,
    so `center` has no effect. The map is symmetric, as its two projections commute (z ⊥ 1): it is its own transpose.
    """
    if backward.center and not rms:
        g = center(g)
    if backward.radial == 1:
        g = remove_radial(z, g)
    elif backward.radial:
        g = g - backward.radial * z * (g * z).mean(-1, keepdim=True)
    return g * rstd if backward.scale else g


def pull_through(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = forward(x), and autograd's ∂L/∂x through it given grad = ∂L/∂y; without autocast, and detached."""
    device = x.device.type
    plain = (
        torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    )  # it is slow to enter
    with torch.enable_grad(), plain:
        leaf = x.detach().requires_grad_()
        y = forward(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]


class Normalised(NamedTuple):
    """z: (…, d), the normalised input; rstd = 1/σ: (…, 1)."""

    z: Tensor
    rstd: Tensor


def normalise(x: Tensor, eps: float, *, rms: bool = False) -> Normalised:
    """z and 1/σ of x: (…, d), the variance by two passes (mean(x²) − μ² loses every digit once μ ≫ σ)."""
    centred = x if rms else center(x)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return Normalised(centred * rstd, rstd)


@dataclass
class Tokens:
    """Per-token scalars of one norm's backward, float64, each of shape (n,)."""

    sigma: Tensor
    rho: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    cos_projected: Tensor
    """cos(u, replay) against autograd's own t; NaN where the norm was not replayed."""
    residual_sq: Tensor
    """‖t − replay‖²; NaN where the norm was not replayed."""
    measurable: Tensor
    """Whether ‖g‖ and ‖t‖ exceed the tiny of the dtype they came in, and g and t are more than rounding noise (bool)."""


def decompose(
    x: Tensor,
    grad: Tensor,
    eps: float,
    *,
    weight: Tensor | None = None,
    rms: bool = False,
    replayed: Tensor | None = None,
) -> Tokens:
    """Measure one call of a norm.

    Args:
        x: The input: (…, d).
        grad: ∂L/∂y: (…, d).
        eps: Added to the variance, or to the mean square.
        weight: Takes grad to g = γ⊙∂L/∂y: (d,), or one for each token: (n, d).
        rms: Whether it is an RMSNorm.
        replayed: Autograd's own ∂L/∂x through this norm, to be compared with the formula: (…, d).

    Returns:
        Per-token scalars.
    """
    d = x.shape[-1]
    gamma = None if weight is None else weight.detach().double()
    by_token = gamma if gamma is not None and gamma.dim() > 1 else None
    parts = []
    for c, g, replayed_, gamma_ in _chunks(x, grad, replayed, by_token):  # copies, which are changed in place
        if not rms:
            c -= c.mean(-1, keepdim=True)  # c = σ·z
        v = size_sq(c) / d
        if gamma is not None:
            g *= gamma if by_token is None else gamma_
        mean = torch.zeros_like(v) if rms else g.mean(-1)
        if not rms:
            g -= mean.unsqueeze(-1)
        along = torch.where(v > 0, torch.linalg.vecdot(g, c) / (d * v), 0.0)  # of c: g's radial part is along·c
        kept = size_sq(g.addcmul_(c, along.unsqueeze(-1), value=-1))
        part = [v, mean, along, kept]
        if replayed_ is not None:
            part.append(size_sq(replayed_))
            rstd = (v + eps).rsqrt()
            rest = along * rstd * (eps / (v + eps))  # t's radial part, the 1−ρ of g/σ's that its removal leaves
            replayed_.addcmul_(g, rstd.unsqueeze(-1), value=-1).addcmul_(c, rest.unsqueeze(-1), value=-1)
            part.append(size_sq(replayed_))  # ‖replay − t‖²
        parts.append(torch.stack(part))
    v, mean, along, kept, *compared = torch.cat(parts, -1)
    rstd = (v + eps).rsqrt()
    rho = v * rstd.square()  # 1 - ε/σ² would lose its digits where v ≪ ε
    mean_part, radial_part = d * mean.square(), d * v * along.square()
    g_sq = mean_part + radial_part + kept
    t_sq = (kept + (1 - rho).square() * radial_part) * rstd.square()
    residual_sq = cos_projected = torch.full_like(rho, math.nan)
    if compared:
        # t stands for the projected surrogate, whose direction it has; ⟨t, replay⟩ follows from ‖replay − t‖²
        replayed_sq, residual_sq = compared
        cos_projected = (t_sq + replayed_sq - residual_sq) / (2 * (t_sq * replayed_sq).sqrt())
    tiny, noise = torch.finfo(grad.dtype).tiny, NOISE * min(torch.finfo(grad.dtype).eps, HALF_EPS)
    largest = g_sq.nan_to_num(0, 0, 0).max() if len(g_sq) else 0.0
    measurable = (g_sq > tiny**2) & (t_sq > tiny**2) & (t_sq > ROUNDING_SQ * g_sq * rstd.square())
    return Tokens(
        sigma=rstd.reciprocal(),
        rho=rho,
        A=mean_part,
        B=radial_part,
        C=kept,
        cos_projected=cos_projected,
        residual_sq=residual_sq,
        measurable=measurable & (g_sq > noise**2 * largest),
    )


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several calls or micro-batches as one."""
    return Tokens(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Tokens)})


def size_sq(v: Tensor) -> Tensor:
    """‖v‖² over the last axis: (…, d) -> (…,)."""
    size: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return size.square()


def _chunks(x: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Copies of the tensors, (…, d) each, as matching float64 pieces of (rows, d); None stays None.

    Each piece lies where the one before lay: fresh memory would cost more than a pass over it.
    """
    d, device = x.shape[-1], x.device
    most, n = max(1, (CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS) // d), x.numel() // d
    rows = max(1, math.ceil(n / max(1, math.ceil(n / most))))  # pieces of one size
    copies = [
        None if a is None else (a.detach().reshape(-1, d), torch.empty(rows, d, dtype=torch.float64, device=device))
        for a in (x, *others)
    ]
    for start in range(0, max(n, 1), rows):
        yield tuple(
            None if pair is None else pair[1][: n - start].copy_(pair[0][start : start + rows]) for pair in copies
        )


def cosines(tokens: Tokens, *, rms: bool = False) -> dict[str, Tensor]:
    """Cosine of each direction with the true pullback, per token: (n,); NaN where a vector vanishes.

    N = C + (1−ρ)B is ⟨h, u⟩, U = C + (1−ρ)²B is ‖u‖². A factor of σ does not turn a token's vector: center_scale and
    center share a cosine, as do ste and scale, radial_scale and radial.
    """
    a, b, c, slack = tokens.A, tokens.B, tokens.C, 1 - tokens.rho
    n, u = c + slack * b, c + slack.square() * b
    found = {
        "cos_center_vs_true": n / ((b + c) * u).sqrt(),
        "cos_ste_vs_true": n / ((a + b + c) * u).sqrt(),
        "cos_center_vs_ste": ((b + c) / (a + b + c)).sqrt(),
        "cos_projected_vs_true": tokens.cos_projected,
        "cos_radial_vs_true": (u / (a + u)).sqrt(),
    }
    if rms:
        found["cos_center_vs_ste"] = torch.full_like(a, math.nan)
    return found


def metric(meaning: str, unit: str = "") -> Callable[[Callable[[Tokens], Tensor]], Callable[[Tokens], Tensor]]:
    """Make a function of tokens, of values (n,), a column of `layers`: its mean over the measurable tokens.

    Args:
        meaning: The column's meaning, as docs/columns.md has it for the others. Its name is the function's.
        unit: The column's unit; empty for a pure number.
    """

    def register(function: Callable[[Tokens], Tensor]) -> Callable[[Tokens], Tensor]:
        name = function.__name__
        formulas.METRICS[name] = formulas.Metric(Column(name, "float64", unit, meaning, pool=BY_MEASURABLE), function)
        return function

    return register


def per_token(tokens: Tokens, *, rms: bool = False) -> dict[str, Tensor]:
    """What a row holds as a mean over its measurable tokens: (n,) each."""
    return {**cosines(tokens, rms=rms), **{name: metric.of(tokens) for name, metric in formulas.METRICS.items()}}


Sums = dict[str, float]
"""Additive statistics of any number of tokens: those of micro-batches, ranks and runs merge by `add`."""


def sums(tokens: Tokens, *, rms: bool = False) -> Sums:
    """Reduce tokens to their sufficient statistics: energies weighted by 1/σ's powers, and sums of per-token quantities."""
    slack = 1 - tokens.rho
    energies = {"A": tokens.A, "B": tokens.B, "C": tokens.C, "B1": slack * tokens.B, "B2": slack.square() * tokens.B}
    assert list(energies) == list(ENERGIES)
    weights = torch.stack([tokens.sigma.pow(-power) for power in RSTD_POWERS.values()])
    weighted = (torch.stack(list(energies.values())).unsqueeze(1) * weights).sum(-1)  # (energies, powers)
    means = per_token(tokens, rms=rms)
    added = torch.stack(list(means.values()))[:, tokens.measurable].sum(-1)
    more = {"sigma": tokens.sigma, "rho": tokens.rho, "residual_sq": tokens.residual_sq}
    totals = torch.stack([*more.values(), (~tokens.measurable).double()]).sum(-1)
    names = [f"sum_{e}{s}" for e in energies for s in RSTD_POWERS] + [f"sum_{name}" for name in (*means, *more)]
    values = torch.cat([weighted.flatten(), added, totals]).tolist()  # the device is waited for once
    return {**dict(zip([*names, "n_zero"], values, strict=True)), "n_tokens": tokens.sigma.numel(), "n_nonfinite": 0}


def scaled(total: Sums, factor: float) -> Sums:
    """Return the statistics of `factor` times the loss: its energies grow with the square."""
    energies = {f"sum_{name}{suffix}" for name in ENERGIES for suffix in RSTD_POWERS} | {"sum_residual_sq"}
    return {name: value * factor**2 if name in energies else value for name, value in total.items()}


def scaled_tokens(tokens: Tokens, factor: float) -> Tokens:
    """Return the tokens of `factor` times the loss."""
    squares = {name: getattr(tokens, name) * factor**2 for name in ("A", "B", "C", "residual_sq")}
    return replace(tokens, **squares)


def finite(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """Return those of a replayed norm's tokens whose numbers are finite, and which they are: (n,) bool."""
    kept = (tokens.A + tokens.B + tokens.C + tokens.sigma + tokens.residual_sq).isfinite()
    if bool(kept.all()):
        return tokens, kept
    return Tokens(**{f.name: getattr(tokens, f.name)[kept] for f in fields(tokens)}), kept


def add(parts: Sequence[Sums]) -> Sums:
    """The statistics of all tokens together."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def ratios(total: Mapping[str, Any], d: Any, *, rms: Any = False) -> dict[str, Any]:
    """Return the columns that are formulas of the added statistics, of one row or many: shares, cosines, gains, …"""
    values = {name: np.asarray(value, np.float64) for name, value in total.items()}
    values |= {"d": d, "norm": np.where(rms, "rmsnorm", "layernorm")}
    return {column.name: evaluate(column.formula, values) for column in formulas.COLUMNS if column.formula}


def summary(total: Mapping[str, float], sigma: Tensor) -> dict[str, float]:
    """Every measured column of a layer row but `ratios`, from the added statistics and, for quantiles, every σ: (n,)."""
    n, n_zero = int(total["n_tokens"]), int(total["n_zero"])
    found: dict[str, float] = {
        column.name: _ratio(total[f"sum_{column.name}"], n - n_zero)
        for column in formulas.columns()
        if column.pool == BY_MEASURABLE
    }
    sigmas = sigma.double().cpu().numpy()  # numpy's quantile takes any number of tokens, torch's 2^24
    found |= dict(zip(SIGMA_QUANTILES, np.quantile(sigmas, list(SIGMA_QUANTILES.values())).tolist(), strict=True))
    return found | {
        "n_tokens": n,
        "n_zero": n_zero,
        "n_nonfinite": int(total["n_nonfinite"]),
        "sigma_mean": total["sum_sigma"] / n,
        "sigma_std": float(sigmas.std(ddof=1)) if n > 1 else math.nan,
        "rho_mean": total["sum_rho"] / n,
        "jacobian_residual": math.sqrt(_ratio(total["sum_residual_sq"], total["sum_C_rstd2"] + total["sum_B2_rstd2"])),
        **{name: total[name] for name in (f"sum_{e}{s}" for e in ENERGIES for s in RSTD_POWERS)},
    }


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for the half dtypes, any other dtype as it is."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(wide_dtype(x.dtype))


def dot(a: Tensor, b: Tensor) -> float:
    """Σ a⊙b of two tensors of one shape, their rows' sums added in float64."""
    return float((wide(a) * wide(b)).sum(-1).sum(dtype=torch.float64))


def noise_sq(dtype: torch.dtype, mean_square: float) -> float:
    """Mean square of a gradient's entries that is rounding noise of products in this dtype, beside that of the whole."""
    return (ROUNDED * torch.finfo(dtype).eps) ** 2 * mean_square


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
