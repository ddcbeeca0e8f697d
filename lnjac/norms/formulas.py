"""A norm's backwards as values, and the names of the energies whose sums suffice for all of them. Without torch."""

from enum import Enum
from typing import NamedTuple


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

SIGMA_QUANTILES = {
    "sigma_q05": 0.05,
    "sigma_q25": 0.25,
    "sigma_q50": 0.50,
    "sigma_q75": 0.75,
    "sigma_q95": 0.95,
}

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
