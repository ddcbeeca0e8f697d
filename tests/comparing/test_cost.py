"""Costs of backwards, computed by hand."""

import math
from pathlib import Path

import pytest
from support.tables import COSTS, study

from lnjac.comparing import intervals as stats
from lnjac.comparing.cost import cost
from lnjac.errors import ConfigError


def test_cost_is_paired_with_exact_and_sites_are_told_apart(tmp_path: Path):
    found = cost(study(tmp_path, COSTS))
    rows = found.costs.rows.set_index(["attn_mode", "a"])
    assert rows["b"].unique().tolist() == ["exact"]
    assert rows["difference"].to_dict() == pytest.approx(
        {
            ("softmax", "center_scale"): 1.0,
            ("softmax", "center_scale@ln_f"): 0.5,
            ("sigmoid", "center_scale"): 0.25,
            ("sigmoid", "center_scale@ln_f"): 0.0,
        }
    )
    assert found.by == "attn_mode"
    assert found.differences is not None
    differences = found.differences.rows.set_index("ln_backward")
    assert differences[["a", "b"]].drop_duplicates().to_numpy().tolist() == [["softmax", "sigmoid"]]
    assert differences["difference"].to_dict() == pytest.approx({"center_scale": 0.75, "center_scale@ln_f": 0.5})
    assert differences["mean_a"].to_dict() == pytest.approx({"center_scale": 1.0, "center_scale@ln_f": 0.5})


def test_cost_names_the_columns_that_move_with_the_backward(tmp_path: Path):
    rows = [dict(row) | {"optimizer.lr": 0.01 if row["ln_backward"] == "exact" else 0.001} for row in COSTS]
    found = cost(study(tmp_path, rows))
    said = "optimizer.lr changes together with ln_backward, so their effects cannot be told apart"
    assert found.costs.rows["paired"].all()
    assert [note for note in found.costs.notes if "told apart" in note] == [said]
    assert found.differences is not None
    assert found.differences.rows["paired"].all()
    assert [note for note in found.differences.notes if "told apart" in note] == [said]
    for row in rows:  # now with attn_mode, whatever the backward
        row |= {"optimizer.lr": 0.001, "precision": "bf16" if row["attn_mode"] == "softmax" else "fp32"}
    found = cost(study(tmp_path, rows))
    assert [note for note in found.costs.notes if "told apart" in note] == []
    assert found.differences is not None
    assert [note for note in found.differences.notes if "told apart" in note] == [
        "precision changes together with attn_mode, so their effects cannot be told apart"
    ]


def test_costs_that_differ_by_the_rounding_of_their_losses_are_identical(tmp_path: Path):
    """The losses are near 4 and 9, so that a cost of 0.001 is known to 1e-15 and no better."""
    rows = [dict(row) for row in COSTS if row["ln_backward.sites"] == "all"]
    for row in rows:
        row["val_loss_nats"] = 4 + row["seed"] / 7 + 5 * (row["attn_mode"] == "softmax")
        row["val_loss_nats"] += 0.001 * row["seed"] * (row["ln_backward"] != "exact")
    found = cost(study(tmp_path, rows))
    assert found.costs.rows["agreement"].tolist() == ["", ""]
    assert found.differences is not None
    (row,) = found.differences.rows.to_dict("records")
    assert found.differences.seeds["difference"].abs().max() > 0
    assert (row["agreement"], row["difference"], row["n"]) == (stats.IDENTICAL, 0.0, 3)
    assert math.isnan(row["p"])
    assert math.isnan(row["p_adjusted"])


def test_cost_of_a_diverged_run_is_a_rate(tmp_path: Path):
    rows = [dict(row) for row in COSTS]
    rows[3] |= {"status": "diverged", "val_loss_nats": math.nan}  # softmax, center_scale, seed 1
    rows[9] |= {"status": "diverged", "val_loss_nats": math.nan}  # sigmoid, exact, seed 1
    found = cost(study(tmp_path, rows))
    row = found.costs.rows.set_index(["attn_mode", "a"]).loc[("softmax", "center_scale")]
    assert [row[name] for name in ("n", "diverged_a", "runs_a", "diverged_b")] == [2, 1, 3, 0]
    assert found.differences is not None
    row = found.differences.rows.set_index("ln_backward").loc["center_scale"]
    assert [row[name] for name in ("n", "diverged_a", "diverged_b", "runs_b")] == [2, 1, 1, 3]


def test_cost_by_another_factor_within_the_rest(tmp_path: Path):
    more = [dict(row) | {"method": "bp", "val_loss_nats": row["val_loss_nats"] * 2} for row in COSTS]
    found = cost(study(tmp_path, [*COSTS, *more]), by="method", reference="bp", where="ln_backward.sites == 'all'")
    assert found.differences is not None
    rows = found.differences.rows.set_index("attn_mode")
    assert rows[["a", "b"]].drop_duplicates().to_numpy().tolist() == [["fa", "bp"]]
    assert rows["difference"].to_dict() == pytest.approx({"softmax": -1.0, "sigmoid": -0.25})
    assert len(found.costs.rows) == 4


def test_one_mode_alone_has_costs_and_no_differences(tmp_path: Path):
    found = cost(study(tmp_path, COSTS), where="attn_mode == 'softmax'")
    assert (len(found.costs.rows), found.by, found.differences) == (2, None, None)


def test_cost_needs_an_exact_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="no run chosen has ln_backward=exact, only center_scale, center_scale@ln_f"):
        cost(study(tmp_path, COSTS), where="ln_backward != 'exact'")
    with pytest.raises(ConfigError, match="all 6 runs chosen have ln_backward=exact"):
        cost(study(tmp_path, COSTS), where="ln_backward == 'exact'")
