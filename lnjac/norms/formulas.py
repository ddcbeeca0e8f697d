"""Names and constants of a norm's backward that need no torch: the surrogates, the energies and the sums that suffice."""

from enum import Enum


class GradAt(str, Enum):
    """Where a norm's gradient is read: before its affine part (g = γ⊙G) or at its very output (g = G)."""

    normalized = "normalized"
    output = "output"


SURROGATES = {
    "center_scale": (True, False, True),
    "projected": (True, True, False),
    "ste": (False, False, False),
    "scale": (False, False, True),
    "radial_scale": (False, True, True),
    "center": (True, False, False),
    "radial": (False, True, False),
}
"""The backwards that are compared with the exact one: whether each centres, removes the radial part, scales by 1/σ."""

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
