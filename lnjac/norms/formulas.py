"""A norm's backwards as values, and every measured column of `layers` with its formula. Without torch."""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from lnjac.columns import KEY, MEAN, SUM, VOLATILE, Column


class GradAt(str, Enum):
    """Where a norm's gradient is read: before its affine part (g = γ⊙G) or at its very output (g = G)."""

    normalized = "normalized"
    output = "output"


class Backward(NamedTuple):
    """A norm's backward: whether it subtracts ḡ, what part of z·m it subtracts (0 to 1), whether it divides by σ."""

    center: bool
    radial: float
    scale: bool


EXACT = Backward(True, 1.0, True)
SURROGATES = {
    "center_scale": Backward(True, 0.0, True),
    "projected": Backward(True, 1.0, False),
    "ste": Backward(False, 0.0, False),
    "scale": Backward(False, 0.0, True),
    "radial_scale": Backward(False, 1.0, True),
    "center": Backward(True, 0.0, False),
    "radial": Backward(False, 1.0, False),
}
"""The backwards compared with the exact one; center_scale and scale are Xu et al. 2019 (arXiv 1911.07013), "detach σ" and
DetachNorm."""
BACKWARDS = {"exact": EXACT, **SURROGATES}
"""All eight by name."""

SIGMA_QUANTILES = {"sigma_q05": 0.05, "sigma_q25": 0.25, "sigma_q50": 0.50, "sigma_q75": 0.75, "sigma_q95": 0.95}

ENERGIES = {
    "A": "A = d·ḡ², the mean part of ‖g‖²",
    "B": "B = d·m²/ρ, the radial part (along z) of ‖g‖²",
    "C": "C = ‖g‖² − A − B, the part that every backward keeps",
    "B1": "(1−ρ)·B",
    "B2": "(1−ρ)²·B",
}
"""The energies per token whose sums suffice for every flattened cosine, share and gain (docs/maths.md)."""

RSTD_POWERS = {"": 0, "_rstd": 1, "_rstd2": 2}
"""Suffix of a sum's column, and the power of 1/σ that weighs each token in it."""

CALL = (
    Column("site", "string", "", "the norm's dotted module name", KEY),
    Column("call", "int64", "", "which call of that module in one forward pass, from 0", KEY),
)
"""What names a norm's call in one pass."""

_G_SQ = "(sum_A + sum_B + sum_C)"
_R_RADIAL = f"(sum_B - 2 * sum_B1 + sum_B2) / {_G_SQ}"
_RADIAL_SHARE = "sum_B / (sum_B + sum_C)"


def _unless_rms(formula: str, rms: str = "nan") -> str:
    return f"where(norm == 'rmsnorm', {rms}, {formula})"


def _energy(name: str, power: int) -> str:
    return f"sum_{name}{list(RSTD_POWERS)[power]}"


_U_SQ = [f"({_energy('C', power)} + {_energy('B2', power)})" for power in range(3)]
"""Σ‖u‖²·σ^−power, u = σ·t."""


def _norm_sq(backward: Backward) -> str:
    kept = ["B2" if backward.radial else "B", "C", *([] if backward.center else ["A"])]
    return f"({' + '.join(_energy(name, 2 * backward.scale) for name in kept)})"


def flat_cos(backward: Backward) -> str:
    """Formula of cos(surrogate, true), both as one long vector over all tokens: what a weight gradient sees.

    In the orthogonal parts (mean, radial, kept) of a token, t = (0, (1−ρ)√B, √C)/σ and the surrogate is
    (√A or 0, √B or (1−ρ)√B, √C), over σ where it scales. RMSNorm has no mean part: its A is 0.
    """
    power = 1 + backward.scale
    dot = f"({_energy('B2' if backward.radial else 'B1', power)} + {_energy('C', power)})"
    return f"{dot} / sqrt({_norm_sq(backward)} * {_U_SQ[2]})"


def gain(backward: Backward) -> str:
    """Formula of ‖surrogate‖/‖true‖, both as one long vector over all tokens."""
    return f"sqrt({_norm_sq(backward)} / {_U_SQ[2]})"


def _number(name: str, meaning: str, pool: str = "") -> Column:
    return Column(name, "float64", "", meaning, pool=pool)


BY_TOKENS, BY_MEASURABLE = f"{MEAN}n_tokens", f"{MEAN}n_tokens - n_zero"

COLUMNS = [
    *CALL,
    Column("block", "int64", "", "block number; null outside the blocks"),
    Column("role", "string", "", "last part of the site's name: ln_1, ln_2, ln_f, …"),
    Column("norm", "string", "", "layernorm or rmsnorm"),
    Column("site_backward", "string", "", "the backward this norm had while training and while measured"),
    Column(
        "n_backwards",
        "int64",
        "",
        "distinct ones among the eight backwards: 8; 4 for rmsnorm, where center is no factor",
    ),
    Column("d", "int64", "", "size of the normalised vectors"),
    Column("dtype", "string", "", "dtype of the norm's input; the measurement itself is in float64"),
    Column("loss_nats", "float64", "nats/token", "mean loss of the diagnostic batches"),
    Column("n_tokens", "int64", "tokens", "tokens measured", pool=SUM),
    Column(
        "n_zero",
        "int64",
        "tokens",
        "tokens whose g or t vanishes (below the dtype's tiny, or rounding noise): left out of the mean cosines",
        pool=SUM,
    ),
    Column("n_nonfinite", "int64", "tokens", "tokens whose input or gradient is not finite: left out", pool=SUM),
    # the original script's columns, under its names
    _number(
        "r_mean",
        "ΣA/Σ‖g‖²: share of the gradient's energy that mean-centring removes; NaN for rmsnorm",
        _unless_rms(f"sum_A / {_G_SQ}"),
    ),
    _number("r_radial", "Σ‖z·m‖²/Σ‖g‖²: size of the radial term against the gradient", _R_RADIAL),
    _number("sigma_mean", "mean over tokens of σ = √(v+ε) (rms for rmsnorm)", BY_TOKENS),
    _number("sigma_std", "sample standard deviation over tokens of σ"),
    _number(
        "cos_center_vs_true", "mean over tokens of cos(center_scale, true); for rmsnorm cos(scale, true)", BY_MEASURABLE
    ),
    _number("cos_ste_vs_true", "mean over tokens of cos(ste, true)", BY_MEASURABLE),
    _number("cos_center_vs_ste", "mean over tokens of cos(center_scale, ste); NaN for rmsnorm", BY_MEASURABLE),
    # what the original does not have
    _number(
        "cos_projected_vs_true",
        "mean over tokens of cos(projected, true): 1 up to rounding, as σ is a scalar",
        BY_MEASURABLE,
    ),
    _number(
        "cos_radial_vs_true",
        "mean over tokens of cos(radial_scale, true): what leaving out only the mean costs",
        BY_MEASURABLE,
    ),
    _number(
        "r_kept",
        "Σ‖u‖²/Σ‖g‖², u = σ·t; r_mean + r_radial + r_kept falls short of 1 by 2Σρ(1−ρ)B/Σ‖g‖²",
        f"(sum_C + sum_B2) / {_G_SQ}",
    ),
    _number(
        "share_mean", "ΣA/Σ‖g‖²; NaN for rmsnorm. The three shares sum to 1 exactly", _unless_rms(f"sum_A / {_G_SQ}")
    ),
    _number("share_radial", "ΣB/Σ‖g‖²", f"sum_B / {_G_SQ}"),
    _number("share_kept", "ΣC/Σ‖g‖²", f"sum_C / {_G_SQ}"),
    _number("radial_share", "ΣB/Σ(B+C): the gauge-invariant radial share", _RADIAL_SHARE),
    _number(
        "enrichment_mean",
        "d·r_mean: 1 for a gradient of random direction; NaN for rmsnorm",
        f"d * {_unless_rms(f'sum_A / {_G_SQ}')}",
    ),
    _number("enrichment_radial", "d·r_radial: 1 for a gradient of random direction", f"d * ({_R_RADIAL})"),
    _number(
        "enrichment_radial_share",
        "(d−1)·radial_share (rmsnorm: d·radial_share): 1 for a random direction",
        f"{_unless_rms('d - 1', 'd')} * ({_RADIAL_SHARE})",
    ),
    _number("rho_mean", "mean over tokens of ρ = v/(v+ε)", BY_TOKENS),
    *(_number(name, f"{q:.0%} quantile over tokens of σ") for name, q in SIGMA_QUANTILES.items()),
    _number(
        "rstd_cv",
        "coefficient of variation over tokens of 1/σ, weighted by ‖u‖²: flat_cos_projected is 1/√(1 + rstd_cv²)",
        f"sqrt(maximum({_U_SQ[0]} * {_U_SQ[2]} / ({_U_SQ[1]} * {_U_SQ[1]}) - 1, 0))",
    ),
    Column(
        "jacobian_residual",
        "float64",
        "",
        "‖t − autograd‖/‖t‖ of this norm replayed alone with the exact backward",
        VOLATILE,
    ),
    Column(
        "forward_residual",
        "float64",
        "",
        "‖y − γ⊙z − β‖/‖γ⊙z + β‖ of the module's own output y, over a sample of tokens",
        VOLATILE,
    ),
    *(
        _number(f"{stat}_{name}", f"{what} over all tokens as one long vector", formula(backward))
        for name, backward in SURROGATES.items()
        for stat, what, formula in (("flat_cos", f"cos({name}, true)", flat_cos), ("gain", f"‖{name}‖/‖true‖", gain))
    ),
    *(
        _number(f"sum_{energy}{suffix}", f"Σ over tokens of σ^−{power}·{energy}, for the summed loss; {what}", SUM)
        for energy, what in ENERGIES.items()
        for suffix, power in RSTD_POWERS.items()
    ),
]
"""The measured columns of `layers`. The two residuals are volatile: they are nothing but rounding error."""


class Metric(NamedTuple):
    """A further quantity per token, as a function of lnjac.norms.decompose.Tokens, and the column of its mean."""

    column: Column
    of: Callable[[Any], Any]


METRICS: dict[str, Metric] = {}
"""Further quantities by name, which `lnjac.norms.decompose.metric` adds."""


def columns() -> list[Column]:
    """Return the measured columns of `layers`, those of METRICS included."""
    return [*COLUMNS, *(metric.column for metric in METRICS.values())]
