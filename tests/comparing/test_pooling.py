"""Calls of one norm pooled from their rows, against the same tokens measured as one call."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.decomposed import measured

from lnjac.columns import Column
from lnjac.comparing.pooling import NORM, needed, pooled
from lnjac.errors import ConfigError
from lnjac.norms import decompose as jacobian
from lnjac.norms import formulas
from lnjac.norms.decompose import Tokens
from lnjac.norms.formulas import ENERGIES, RSTD_POWERS

D = 12
KNOWN = {column.name: column for column in formulas.columns()}
SPREAD = ("sigma_std", "sigma_q50", "jacobian_residual", "cos_center_vs_ste")
"""What a sum does not hold, and, of rmsnorm, what is NaN throughout."""


def tokens(seed: int, n: int, *, rms: bool) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) * 0.02
    grad = torch.randn(n, D, generator=generator, dtype=torch.float64) * seed
    return jacobian.decompose(x, grad, 1e-5, rms=rms, replayed=grad)


def row(part: Tokens, site: str, call: int, *, rms: bool) -> dict[str, Any]:
    found = measured(jacobian.sums(part, rms=rms), part.sigma, D, rms=rms)
    ids = {"run_id": "r", "diag_id": "d", "step": 5, "site": site, "call": call}
    return ids | {"d": D, "norm": "rmsnorm" if rms else "layernorm"} | found


@pytest.mark.parametrize("rms", [False, True])
def test_pooled_calls_are_as_one_call_of_all_tokens(rms: bool):
    parts = [tokens(1, 40, rms=rms), tokens(5, 10, rms=rms)]
    rows = [row(part, "ln", call, rms=rms) for call, part in enumerate(parts)]
    rows.append(row(parts[0], "ln_f", 0, rms=rms))
    whole = row(jacobian.concatenate(parts), "ln", 0, rms=rms)
    sums = [f"sum_{energy}{suffix}" for energy in ENERGIES for suffix in RSTD_POWERS]
    metrics = [name for name in whole if name not in (*NORM, "call", "d", "norm", *SPREAD) and "_q" not in name]
    assert {"radial_share", "r_radial", "flat_cos_ste", "gain_center", "cos_center_vs_true", *sums} <= {*metrics}
    found = pooled(pd.DataFrame(rows), metrics, KNOWN)
    assert found[NORM].to_numpy().tolist() == [["r", "d", 5, "ln"], ["r", "d", 5, "ln_f"]]
    np.testing.assert_allclose(found.loc[0, metrics].astype(float), [whole[name] for name in metrics], rtol=1e-9)
    np.testing.assert_allclose(found.loc[1, metrics].astype(float), [rows[2][name] for name in metrics], rtol=1e-9)
    naive = np.mean([one["radial_share"] for one in rows[:2]])
    assert abs(naive / whole["radial_share"] - 1) > 1e-3  # averaging the calls' ratios gives another number


def test_what_does_not_add_is_missing_where_there_are_several_calls():
    rows = [row(tokens(1 + call, 9, rms=False), site, call, rms=False) for site, call in (("a", 0), ("a", 1), ("b", 0))]
    found = pooled(pd.DataFrame(rows), ["sigma_q50"], KNOWN)
    assert np.isnan(found["sigma_q50"][0])
    assert found["sigma_q50"][1] == rows[2]["sigma_q50"]


def test_a_metric_of_ones_own_is_pooled_as_its_mean_over_all_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formulas, "METRICS", {})

    @jacobian.metric("mean over tokens of log₂ σ", "octaves")
    def log2_sigma(tokens: Tokens) -> torch.Tensor:
        return tokens.sigma.log2()

    assert formulas.columns()[-1][:4] == ("log2_sigma", "float64", "octaves", "mean over tokens of log₂ σ")
    parts = [tokens(1, 40, rms=False), tokens(5, 10, rms=False)]
    parts[0].measurable[:25] = False
    rows = pd.DataFrame([row(part, "ln", call, rms=False) for call, part in enumerate(parts)])
    whole = row(jacobian.concatenate(parts), "ln", 0, rms=False)["log2_sigma"]
    known = {column.name: column for column in formulas.columns()}
    assert needed(["log2_sigma"], known) == [*NORM, "log2_sigma", "n_tokens", "n_zero"]
    np.testing.assert_allclose(pooled(rows, ["log2_sigma"], known)["log2_sigma"], [whole], rtol=1e-12)
    assert np.isnan(pooled(rows, ["log2_sigma"], KNOWN)["log2_sigma"][0])  # without its description


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("sum", 4.0),
        ("minimum", 1.0),
        ("mean weighted by n", 2.5),
        ("mean weighted by n / n", 2.0),
        ("mean weighted by 1", 2.0),
        ("x / n", 4 / 4),
        ("x / lost", np.nan),
        ("", np.nan),
    ],
)
def test_a_column_is_pooled_as_its_description_says(pool: str, expected: float):
    rows = pd.DataFrame({"run_id": "r", "diag_id": "d", "step": 0, "site": "a", "x": [1.0, 3.0], "n": [1, 3]})
    known = {
        "m": Column("m", "float64", "", "", pool=pool),
        "x": Column("x", "float64", "", "", pool="sum"),
        "n": Column("n", "int64", "", "", pool="sum"),
    }
    np.testing.assert_equal(pooled(rows.assign(m=rows["x"]), ["m"], known)["m"].tolist(), [expected])


def test_a_description_that_pools_texts_is_named():
    rows = pd.DataFrame({"run_id": "r", "diag_id": "d", "step": 0, "site": "a", "x": [1.0, 3.0], "norm": "layernorm"})
    known = {"x": Column("x", "float64", "", "", pool="norm * 2"), "norm": Column("norm", "string", "", "")}
    with pytest.raises(ConfigError, match="cannot be pooled by the description of x"):
        pooled(rows, ["x"], known)
