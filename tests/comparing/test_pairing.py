"""Which runs are compared with which: cells, twins, columns that move with a level, and what is missing."""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.tables import NULLS, TWO_MODES, losses, noted, run, study

from lnjac.comparing.compare import compare
from lnjac.comparing.scaling import scaling
from lnjac.errors import ConfigError
from lnjac.text import word


def test_other_columns_that_vary_make_cells(tmp_path: Path):
    more = [run(row["seed"], row["val_loss_nats"] ** 2, **{**_config(row), "method": "bp"}) for row in TWO_MODES]
    found = losses(tmp_path, "attn_mode", [*TWO_MODES, *more])
    assert found.cells == ["method"]
    assert found.rows.set_index("method")["difference"].to_dict() == pytest.approx({"fa": 1.0, "bp": 7.0})
    assert noted(found, "within") == "within each of 2 cells of method, which also vary"
    assert found.rows["p_adjusted"].tolist() == found.rows["p"].tolist()  # each cell asks a question of its own
    assert noted(found, "p adjusted").startswith(
        "p adjusted by Holm's method over the 1 p value of one metric in one cell"
    )


def _config(row: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".", "__"): row[name] for name in ("attn_mode", "attn_mode.bias")}


def test_a_column_that_changes_along_is_named_and_seeds_stay_paired(tmp_path: Path):
    rows = [dict(row) | {"optimizer.lr": 0.01 if row["attn_mode"] == "sigmoid" else 0.001} for row in TWO_MODES]
    found = losses(tmp_path, "attn_mode", rows)
    (row,) = found.rows.to_dict("records")
    assert (row["paired"], row["n"], row["difference"]) == (True, 3, pytest.approx(1.0))
    assert row["effect"] == pytest.approx(2.0)
    assert [note for note in found.notes if not note.startswith("p adjusted")] == [
        "paired by seed, 95% t interval",
        "optimizer.lr changes together with attn_mode, so their effects cannot be told apart",
    ]


def test_each_pair_is_judged_by_its_own_two_levels(tmp_path: Path):
    """fa shares its precision with neither of the others, which share one: the same rows as without fa."""
    rows = [
        run(seed, loss + seed / 8, method=method, precision=precision, optimizer__lr=0.001)
        for method, precision, loss in (("bp", "fp32", 2.0), ("dfa", "fp32", 3.0), ("fa", "bf16", 4.0))
        for seed in (1, 2, 3)
    ]
    rows[3]["val_loss_nats"] += 0.5
    found = losses(tmp_path, "method", rows)
    assert found.rows["paired"].all()
    assert found.cells == []
    assert noted(found, "precision") == (
        "precision changes together with method, so their effects cannot be told apart: fa − bp; fa − dfa"
    )
    alone = losses(tmp_path, "method", rows[:6])
    assert [note.split(" by ")[0] for note in alone.notes] == ["paired", "p adjusted"]
    columns = ["difference", "low", "high", "p", "effect"]
    pd.testing.assert_frame_equal(found.rows[columns].iloc[:1], alone.rows[columns])


def test_a_third_level_does_not_keep_two_apart(tmp_path: Path):
    """dfa at both rates makes the rate a cell's column; bp and fa have one each, and are compared as without dfa."""
    rows = [
        run(seed, loss + seed * lr, method=method, optimizer__lr=lr)
        for method, lr, loss in (("bp", 0.01, 2.0), ("fa", 0.001, 4.0), ("dfa", 0.01, 3.0), ("dfa", 0.001, 7.0))
        for seed in (1, 2, 3)
    ]
    found = losses(tmp_path, "method", rows)
    assert found.cells == ["optimizer.lr"]
    of_rows = found.rows.set_index(["a", "b"])
    assert of_rows["moving"].to_dict() == {("dfa", "bp"): "", ("fa", "dfa"): "", ("fa", "bp"): "optimizer.lr"}
    assert of_rows["difference"].to_dict() == pytest.approx(
        {("dfa", "bp"): 1.0, ("fa", "dfa"): -3.0, ("fa", "bp"): 2 - 2 * 0.009}
    )
    assert of_rows["optimizer.lr"].fillna(-1).to_dict() == {("dfa", "bp"): 0.01, ("fa", "dfa"): 0.001, ("fa", "bp"): -1}
    assert noted(found, "optimizer.lr changes") == (
        "optimizer.lr changes together with method, so their effects cannot be told apart: fa − bp"
    )
    assert [note for note in found.notes if note.startswith("not compared")] == [
        "not compared: optimizer.lr=0.001 has no method=bp; optimizer.lr=0.01 has no method=fa"
    ]
    alone = losses(tmp_path, "method", rows, where="method != 'dfa'").rows.iloc[0]
    pd.testing.assert_series_equal(
        alone[["difference", "low", "high", "p"]],
        of_rows.loc[("fa", "bp")][["difference", "low", "high", "p"]],
        check_names=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_two_levels_are_compared_as_if_there_were_no_others(tmp_path: Path, number: int):
    """Law, on designs with holes: each pair's rows and the columns that move are those of a table of its runs alone."""
    rng = np.random.default_rng(number)
    settings = list(product((0.001, 0.01), ("fp32", "bf16"), (64, 128)))
    rows = [
        run(seed, float(rng.normal()), method=method, optimizer__lr=lr, precision=precision, model__n_embd=width)
        for method in ("bp", "dfa", "fa")
        for lr, precision, width in rng.permutation(np.array(settings, object))[: rng.integers(1, 5)]
        for seed in rng.permutation(4)[:3].tolist()
    ]
    found = losses(tmp_path, "method", rows)
    for two in combinations(("bp", "dfa", "fa"), 2):
        alone = losses(tmp_path, "method", rows, where=f"method in {list(two)}")
        kept = found.rows[found.rows["a"].isin(two) & found.rows["b"].isin(two)]
        numbers = ["mean_a", "mean_b", "difference", "low", "high", "p", "effect", "n", "paired", "missing"]
        one, other = (rows[numbers].sort_values(["mean_a", "mean_b"], ignore_index=True) for rows in (kept, alone.rows))
        pd.testing.assert_frame_equal(one, other)
        said = [note.partition(": ") for note in found.notes if "told apart" in note and len(kept)]
        mine = [
            head for head, _, where in said if not where or f" {two[1]} − {two[0]} " in f" {where.replace(';', ' ')} "
        ]
        assert mine == [note.partition(": ")[0] for note in alone.notes if "told apart" in note]


def test_a_column_that_moves_in_one_cell_is_named_for_that_cell(tmp_path: Path):
    more = [dict(row) | {"method": "bp", "val_loss_nats": 2 * row["val_loss_nats"]} for row in TWO_MODES]
    for row in more[:3]:
        row |= {"optimizer": "sgd", "optimizer.lr": 0.1}
    found = losses(tmp_path, "attn_mode", [*TWO_MODES, *more])
    assert found.rows["paired"].all()
    assert noted(found, "optimizer") == (  # and not optimizer.lr, a setting of its member
        "optimizer changes together with attn_mode, so their effects cannot be told apart: "
        "softmax − sigmoid at method=bp"
    )


def test_seeds_at_another_setting_are_paired_where_they_have_a_twin(tmp_path: Path):
    rows = [dict(row) | {"precision": "bf16" if row["seed"] == 3 else "fp32"} for row in TWO_MODES]
    found = losses(tmp_path, "attn_mode", [*rows, dict(rows[2]) | {"precision": "fp32", "val_loss_nats": 9.0}])
    rows = found.rows.set_index("precision")[["n", "missing"]]
    assert rows.T.to_dict("list") == {"fp32": [2, 1], "bf16": [1, 0]}
    assert not [note for note in found.notes if "told apart" in note]


def test_settings_of_a_member_are_part_of_its_level(tmp_path: Path):
    rows = [run(seed, loss, optimizer__lr=lr) for lr, loss in ((0.001, 2.0), (0.01, 3.0)) for seed in (1, 2, 3)]
    rows += [run(seed, 4.0, optimizer="sgd", optimizer__lr=0.1) for seed in (1, 2, 3)]
    found = losses(tmp_path, "optimizer", rows)
    assert found.rows[["a", "b", "difference"]].to_numpy().tolist() == [
        ["adamw[lr=0.01]", "adamw[lr=0.001]", 1.0],
        ["sgd[lr=0.1]", "adamw[lr=0.001]", 2.0],
        ["sgd[lr=0.1]", "adamw[lr=0.01]", 1.0],
    ]
    assert losses(tmp_path, "optimizer", rows, reference="sgd[lr=0.1]").rows["difference"].tolist() == [-2.0, -1.0]
    with pytest.raises(ConfigError, match=r"optimizer=adam, only adamw\[lr=0\.001\], adamw\[lr=0\.01\], sgd"):
        losses(tmp_path, "optimizer", rows, reference="adam")


def test_no_common_seed_is_unpaired_and_said_so(tmp_path: Path):
    rows = [dict(row) | {"seed": row["seed"] + 10 * (row["attn_mode"] == "sigmoid")} for row in TWO_MODES]
    found = losses(tmp_path, "attn_mode", rows)
    assert not found.rows["paired"].any()
    assert noted(found, "unpaired") == "unpaired (Welch) in 1 of 1 rows: no seed is at both levels"


def test_missing_seeds_are_counted_and_named(tmp_path: Path):
    found = losses(tmp_path, "attn_mode", TWO_MODES[:-1])
    (row,) = found.rows.to_dict("records")
    assert (row["n"], row["missing"], row["difference"]) == (2, 1, pytest.approx(0.75))
    assert row["mean_a"] == pytest.approx(3.25)  # of the seeds compared
    assert noted(found, "missing pairs") == "missing pairs: attn_mode=sigmoid lacks seed 3"
    assert noted(found, "1 of 1 rows have fewer than 3 seeds")


def test_a_level_that_a_cell_lacks_is_said(tmp_path: Path):
    found = losses(tmp_path, "attn_mode", [*TWO_MODES, run(1, method="bp")])
    assert len(found.rows) == 1
    assert noted(found, "not compared") == "not compared: method=bp has no attn_mode=sigmoid"


def test_corpora_of_one_name_are_never_paired_with_each_other(tmp_path: Path):
    other = [dict(row) | {"data_sha256": "bb"} for row in TWO_MODES]
    assert losses(tmp_path, "attn_mode", [*TWO_MODES, *other]).cells == ["data_sha256"]


def test_one_run_with_two_diagnostics_is_one_run_and_two_of_its_layers(tmp_path: Path):
    again = [dict(row) | {"diag_id": "e", "diagnostics": "often", "run_id": f"r{i}"} for i, row in enumerate(TWO_MODES)]
    assert losses(tmp_path, "attn_mode", [*TWO_MODES, *again]).rows["n"].tolist() == [3]
    found = compare(study(tmp_path, [*TWO_MODES, *again]), "attn_mode", metrics=["radial_share"])
    assert found.cells == ["diagnostics"]
    assert found.rows["n"].tolist() == [3] * 4


def test_two_runs_of_one_config_and_seed_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"several runs have one config and seed \(r0, r6\)"):
        losses(tmp_path, "attn_mode", [*TWO_MODES, TWO_MODES[0]])


def test_a_missing_value_is_a_level_of_its_own(tmp_path: Path):
    found = losses(tmp_path, "method.scale", NULLS, reference="null")
    assert [(word(row.a), word(row.b)) for row in found.rows.itertuples()] == [("0.5", "null"), ("2", "null")] * 2
    assert found.rows["difference"].tolist() == pytest.approx([1.0, 1.5] * 2)
    assert noted(found, "method changes together with method.scale")
    with pytest.raises(ConfigError, match=r"no run chosen has method\.scale=None, only 0\.5, 2, null"):
        losses(tmp_path, "method.scale", NULLS, reference="None")
    with pytest.raises(ConfigError, match=r'levels without a logarithm \(0\.5, 2, null\).*--where "method\.scale > 0"'):
        scaling(study(tmp_path, NULLS), "method.scale", metrics=["val_loss_nats"], table="runs")
