"""Several rows of one norm at one step (its calls in a forward pass) as one row: sums add, ratios are made of added sums."""

from typing import TYPE_CHECKING

from lnjac.norms.formulas import ENERGIES, RSTD_POWERS, SURROGATES

if TYPE_CHECKING:
    import pandas as pd

KEY = ["run_id", "diag_id", "step", "site"]
NEEDED = [
    "n_tokens",
    "n_zero",
    "d",
    "norm",
    *(f"sum_{energy}{suffix}" for energy in ENERGIES for suffix in RSTD_POWERS),
]
"""Columns that pooling reads beside the pooled ones."""


def pooled(rows: "pd.DataFrame", metrics: list[str]) -> "pd.DataFrame":
    """One row for each norm and step: KEY and the metrics.

    The shares, flattened cosines and gains (docs/maths.md) come from added sums; a mean over tokens is weighed by them. What
    cannot be had from sums (quantiles, spread, the residual) is NaN where calls differ in it.
    """
    groups = rows.groupby(KEY, sort=False)
    total = groups[[name for name in NEEDED if name not in ("d", "norm")]].sum(min_count=1)
    total = total.join(groups[["d", "norm"]].first())
    ratios = _ratios(total)
    out = {}
    for metric in metrics:
        if metric in ratios:
            out[metric] = ratios[metric]
        elif metric in total:
            out[metric] = total[metric]
        elif metric.startswith("cos_") or metric in ("sigma_mean", "rho_mean"):
            weight = rows["n_tokens"] - (rows["n_zero"] if metric.startswith("cos_") else 0)
            keys = [rows[name] for name in KEY]
            above = (rows[metric] * weight).groupby(keys, sort=False).sum(min_count=1)
            out[metric] = above / weight.groupby(keys, sort=False).sum()
        else:
            out[metric] = groups[metric].first().where(groups[metric].nunique() == 1)
    return total[[]].assign(**out).reset_index()


def _ratios(total: "pd.DataFrame") -> "dict[str, pd.Series[float]]":
    a, b, c, b1, b2 = (total[f"sum_{energy}"] for energy in ENERGIES)
    rms = total["norm"] == "rmsnorm"
    g_sq = a + b + c
    mean, radial, radial_share = (a / g_sq).where(~rms), (b - 2 * b1 + b2) / g_sq, b / (b + c)
    found = {
        "r_mean": mean,
        "r_radial": radial,
        "r_kept": (c + b2) / g_sq,
        "share_mean": mean,
        "share_radial": b / g_sq,
        "share_kept": c / g_sq,
        "radial_share": radial_share,
        "enrichment_mean": total["d"] * mean,
        "enrichment_radial": total["d"] * radial,
        "enrichment_radial_share": (total["d"] - 1 + rms) * radial_share,
    }
    powers = list(RSTD_POWERS)
    u_sq = [total[f"sum_C{suffix}"] + total[f"sum_B2{suffix}"] for suffix in RSTD_POWERS]
    found["rstd_cv"] = (u_sq[0] * u_sq[2] / u_sq[1] ** 2 - 1).clip(lower=0) ** 0.5
    for name, (center, is_radial, scale) in SURROGATES.items():
        once, twice = powers[1 + scale], powers[2 * scale]
        dot = total[f"sum_{'B2' if is_radial else 'B1'}{once}"] + total[f"sum_C{once}"]
        norm_sq = total[f"sum_{'B2' if is_radial else 'B'}{twice}"] + total[f"sum_C{twice}"]
        norm_sq += total[f"sum_A{twice}"].where(rms | (not center), 0.0)
        found[f"flat_cos_{name}"] = dot / (norm_sq * u_sq[2]) ** 0.5
        found[f"gain_{name}"] = (norm_sq / u_sq[2]) ** 0.5
    return found
