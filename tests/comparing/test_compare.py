"""Comparisons of small tables whose numbers can be computed by hand: pairing, cells, what is missing, and what is said."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from support.folders import make_run
from support.tables import COSTS, NULLS, SITES, TWO_MODES, run, study

from lnjac.columns import SUM
from lnjac.comparing import compare as comparing
from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import compare
from lnjac.comparing.cost import cost
from lnjac.comparing.intervals import Inference
from lnjac.comparing.scaling import scaling
from lnjac.comparing.study import Study, read, word
from lnjac.errors import ConfigError
from lnjac.norms.formulas import COLUMNS
from lnjac.runs import folder as runs
from lnjac.runs import merge as sweep


def losses(folder: Path, by: str, rows: Sequence[dict[str, Any]], **options: Any) -> comparing.Comparison:
    return compare(study(folder, rows), by, metrics=["val_loss_nats"], table="runs", **options)


def noted(found: Any, start: str) -> str:
    """The one note that starts so."""
    (line,) = [note for note in found.notes if note.startswith(start)]
    return str(line)


# compare


def of_energies(folder: Path, energy: Mapping[str, Sequence[float]]) -> Study:
    """Two modes whose norms have the same shares seed by seed; `energy`: sum_B + sum_C of each norm, by mode."""
    made = study(folder, [run(seed, attn_mode=mode) for mode in energy for seed in (1, 2, 3)])
    rows = made.frame("layers").merge(made.frame("runs")[["run_id", "attn_mode", "seed"]], on="run_id")
    ln_f = rows["site"] == "ln_f"
    total = [energy[mode][SITES.index(site)] for mode, site in zip(rows["attn_mode"], rows["site"], strict=True)]
    share = np.where(ln_f, 0.04, 0.01) * (1 + 0.1 * rows["seed"])
    parts = []
    for call, (part, of) in enumerate(
        ((0.25, 0.4), (0.75, 1.2))
    ):  # of the norm's energy, and of its share, in this call
        radial = part * of * share * np.array(total)
        sums = dict.fromkeys((c.name for c in COLUMNS if c.pool == SUM), 0.0) | {
            "d": 8,
            "norm": "layernorm",
            "n_tokens": 10,
        }
        sums |= {"sum_B": radial, "sum_C": part * np.array(total) - radial, "call": call}
        parts.append(rows.assign(radial_share=of * share, **sums))
    note = {"table": "layers", "merged": True, "merge_id": "m"}
    table = pa.Table.from_pandas(pd.concat(parts), preserve_index=False).drop_columns(["attn_mode", "seed"])
    runs.write_table(made.path, table.replace_schema_metadata(), note)
    return made


def test_where_the_energy_lies_is_no_difference_between_levels(tmp_path: Path):
    made = of_energies(tmp_path, {"softmax": (1.0, 99.0), "sigmoid": (78.0, 22.0)})
    rows = compare(made, "attn_mode", metrics=["radial_share"]).rows
    assert rows["site"].tolist() == [*SITES]  # and nothing that pools them, whose shares would be 0.048 and 0.020
    assert rows["mean_a"].tolist() == pytest.approx(
        [0.012, 0.048]
    )  # the calls of one norm are pooled by their energies
    assert rows["difference"].tolist() == pytest.approx([0, 0], abs=1e-15)


def test_a_headline_names_the_last_norm_and_the_one_with_the_largest_difference(tmp_path: Path):
    rows = [run(seed, share=[0.1 + a, 0.2 - b], method=m) for m, a, b in _SHIFTS for seed in (1, 2, 3)]
    found = compare(study(tmp_path, rows), "method", metrics=["radial_share"])
    named = found.rows[found.headline()].groupby(["a", "b"], sort=False)["site"].agg(list).to_dict()
    assert named == {("dfa", "bp"): ["ln_f"], ("fa", "bp"): [*SITES], ("fa", "dfa"): [*SITES]}
    of_runs = losses(tmp_path, "method", rows)
    assert of_runs.headline().tolist() == [True] * 3


_SHIFTS = (("bp", 0.0, 0.0), ("dfa", 0.01, 0.02), ("fa", 0.05, 0.04))


def test_where_without_a_row_says_what_there_is(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds for no row; attn_mode is sigmoid, softmax"):
        losses(tmp_path, "attn_mode", TWO_MODES, where="attn_mode == 'Softmax'")
    with pytest.raises(ConfigError, match="in quotes: 'softmax'"):
        losses(tmp_path, "attn_mode", TWO_MODES, where="attn_mode == softmax")


def test_pairs_by_seed(tmp_path: Path):
    found = losses(tmp_path, "attn_mode", TWO_MODES)
    (row,) = found.rows.to_dict("records")
    assert (row["a"], row["b"], row["n"], row["paired"]) == ("softmax", "sigmoid", 3, True)
    assert row["difference"] == pytest.approx(1.0)  # of 1, 0.5, 1.5
    width = 4.302653 * 0.5 / math.sqrt(3)
    assert (row["low"], row["high"]) == pytest.approx((1 - width, 1 + width), rel=1e-6)
    assert row["effect"] == pytest.approx(2.0)
    assert row["mean_a"] - row["mean_b"] == pytest.approx(row["difference"])
    assert row["p"] == row["p_adjusted"]
    assert found.seeds()[["seed", "value_a", "value_b", "difference"]].to_numpy().tolist() == [
        [1, 3.0, 2.0, 1.0],
        [2, 3.5, 3.0, 0.5],
        [3, 5.0, 3.5, 1.5],
    ]
    assert found.notes == [  # attn_mode.bias is sigmoid's own, no second factor
        "paired by seed, 95% t interval",
        "p adjusted by Holm's method over the 1 p value of one metric in one cell (all pairs of levels); "
        "never over metrics or cells",
    ]


def test_order_of_rows_does_not_matter(tmp_path: Path):
    one = losses(tmp_path, "attn_mode", TWO_MODES)
    other = losses(tmp_path, "attn_mode", TWO_MODES[::-1])
    pd.testing.assert_frame_equal(one.rows, other.rows)


def test_norm_by_norm_at_the_last_step(tmp_path: Path):
    found = compare(study(tmp_path, TWO_MODES), "attn_mode", metrics=["radial_share"])
    rows = found.rows.set_index("site")
    assert list(rows.index) == [*SITES]
    assert rows["difference"].tolist() == pytest.approx([0.1, 0.2])
    assert len(found.seeds()) == 6
    assert compare(study(tmp_path, TWO_MODES), "attn_mode", metrics=["radial_share"], at=0).rows["mean_a"].eq(0).all()
    with pytest.raises(ConfigError, match="no norm was measured at step 7: choose one of 0, 100"):
        compare(study(tmp_path, TWO_MODES), "attn_mode", metrics=["radial_share"], at=7)


def test_measured_steps_are_levels_too(tmp_path: Path):
    found = compare(study(tmp_path, TWO_MODES), "step", metrics=["radial_share"], where="site == 'ln_f'")
    rows = found.rows[found.rows["site"] == "ln_f"].set_index("attn_mode")
    assert rows["difference"].to_dict() == pytest.approx({"softmax": 3.8333333 / 5, "sigmoid": 2.8333333 / 5})
    assert rows["n"].tolist() == [3, 3]


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


def three_modes(step: float = 0.1) -> list[dict[str, Any]]:
    """Runs of three modes and four seeds, whose differences at each norm have p values between 0.001 and 0.3."""
    rng = np.random.default_rng(1)
    modes = ("linear", "sigmoid", "softmax")
    return [
        run(seed, 2 + step * i + 0.1 * rng.normal(), [0.1 * i + 0.1 * rng.normal(), 0.2 * i + 0.1 * rng.normal()])
        | {"attn_mode": mode}
        for i, mode in enumerate(modes)
        for seed in (1, 2, 3, 4)
    ]


def test_a_family_is_one_metric_in_one_cell_over_all_norms_and_pairs(tmp_path: Path):
    rows = [row | {"method": method} for method in ("bp", "fa") for row in three_modes()]
    layers = {"sigma_mean": 1.0, "cos_center_vs_true": math.nan}
    found = compare(study(tmp_path, rows, **layers), "attn_mode", metrics=["radial_share", "cos_center_vs_true"])
    shares = found.rows[found.rows["metric"] == "radial_share"]
    for _, family in shares.groupby("method"):
        assert len(family) == 6
        assert family["family"].tolist() == [6] * 6
        order = np.argsort(family["p"])
        by_hand = np.minimum(1, np.maximum.accumulate(family["p"].to_numpy()[order] * [6, 5, 4, 3, 2, 1]))
        assert family["p_adjusted"].to_numpy()[order].tolist() == pytest.approx(by_hand.tolist())
        assert (family["p_adjusted"] > family["p"]).any()
    assert (found.rows.loc[found.rows["metric"] != "radial_share", "family"] == 0).all()  # no p: no part of a family
    assert noted(found, "p adjusted") == (
        "p adjusted by Holm's method over the 6 p values of one metric in one cell (all norms, all pairs of levels); "
        "never over metrics or cells"
    )


def test_pairs_that_share_runs_are_one_family_whatever_their_cells_are_called(tmp_path: Path):
    """One level ran in both precisions, the others in one each: each pair is in a cell of another name."""
    precisions = {"linear": ["fp32"], "sigmoid": ["fp32", "bf16"], "softmax": ["bf16"]}
    rows = [row | {"precision": name} for row in three_modes() for name in precisions[row["attn_mode"]]]
    found = losses(tmp_path, "attn_mode", [row | {"method": method} for row in rows for method in ("bp", "fa")]).rows
    pairs = found.groupby("method")[["a", "b"]].apply(lambda part: set(part.itertuples(index=False, name=None)))
    assert pairs["fa"] == pairs["bp"] == {("softmax", "sigmoid"), ("softmax", "linear"), ("sigmoid", "linear")}
    assert found["precision"].nunique(dropna=False) == 3
    assert found["family"].tolist() == [3] * 6


def test_a_norm_without_a_p_does_not_count_in_its_family(tmp_path: Path):
    rows = three_modes()
    for row in rows:
        if row["attn_mode"] == "linear":
            row["share"][0] = math.nan
    found = compare(study(tmp_path, rows), "attn_mode", metrics=["radial_share"]).rows
    assert found["p"].notna().sum() == 4
    assert found.loc[found["p"].notna(), "family"].tolist() == [4] * 4
    assert found["p_adjusted"].min() == pytest.approx(4 * found["p"].min())


def test_an_adjusted_p_depends_on_its_question_alone(tmp_path: Path):
    """Not on what else is asked: other metrics, other cells, another command."""
    rows = three_modes()
    found = compare(study(tmp_path, rows), "attn_mode", metrics=["radial_share"]).rows
    other = [dict(row) | {"method": "bp", "share": [0.1, row["seed"]]} for row in rows]
    more = compare(
        study(tmp_path, [*rows, *other], sigma_mean=1.0), "attn_mode", metrics=["sigma_mean", "radial_share"]
    )
    again = more.rows[(more.rows["method"] == "fa") & (more.rows["metric"] == "radial_share")]
    assert again["p_adjusted"].tolist() == found["p_adjusted"].tolist()
    backwards = dict(zip(("linear", "sigmoid", "softmax"), ("exact", "ste", "scale"), strict=True))
    of_modes = [
        dict(row) | {"ln_backward": backwards[row["attn_mode"]], "attn_mode": mode, "val_loss_nats": loss * (1 + k)}
        for k, mode in enumerate(("softmax", "sigmoid"))
        for row in rows
        for loss in [row["val_loss_nats"]]
    ]
    made = study(tmp_path, of_modes)
    costs = cost(made)
    compared = compare(made, "ln_backward", metrics=["val_loss_nats", "seed"], table="runs").rows
    compared = compared[compared["metric"] == "val_loss_nats"]
    assert costs.costs.rows["p_adjusted"].tolist() == compared["p_adjusted"].tolist()
    assert costs.costs.rows["family"].tolist() == [2] * 4
    one = cost(made, where="attn_mode == 'softmax'").costs.rows
    assert one["p_adjusted"].tolist() == costs.costs.rows.query("attn_mode == 'softmax'")["p_adjusted"].tolist()
    assert costs.differences is not None
    assert costs.differences.rows["family"].tolist() == [2] * 2
    assert noted(costs.differences, "p adjusted").endswith(
        "over the 2 p values of one metric in one cell (all backwards, all pairs of levels); never over metrics or cells"
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


def test_diverged_runs_are_counted_and_never_averaged(tmp_path: Path):
    rows = [dict(row) for row in TWO_MODES]
    rows[0] |= {"status": "diverged", "val_loss_nats": 1e9}
    found = losses(tmp_path, "attn_mode", rows)
    (row,) = found.rows.to_dict("records")
    assert (row["n"], row["difference"], row["missing"]) == (2, pytest.approx(1.0), 0)
    assert [row[name] for name in ("diverged_a", "runs_a", "diverged_b", "runs_b")] == [1, 3, 0, 3]
    assert noted(found, "1 runs diverged") == "1 runs diverged, left out of every mean: attn_mode=softmax 1 of 3"
    for row in rows[:3]:
        row["status"] = "diverged"
    (row,) = losses(tmp_path, "attn_mode", rows).rows.to_dict("records")
    assert (row["n"], row["diverged_a"]) == (0, 3)  # the line stays, without a number
    assert math.isnan(row["difference"])


@pytest.mark.filterwarnings("error")
def test_infinite_and_missing_values_are_counted_and_never_averaged(tmp_path: Path):
    rows = [dict(row) for row in TWO_MODES for _ in "a"]
    rows += [dict(row) | {"seed": row["seed"] + 3} for row in TWO_MODES]
    for i, value in ((0, math.inf), (3, math.inf), (1, -math.inf), (2, math.nan)):
        rows[i]["val_loss_nats"] = value
        rows[i]["share"] = [0.1 * i, value]
    rows[5] |= {"status": "diverged", "val_loss_nats": math.inf}  # which is said as it was
    found = losses(tmp_path, "attn_mode", rows)
    (row,) = found.rows.to_dict("records")
    assert (row["n"], row["difference"], row["missing"]) == (3, pytest.approx(1.0), 0)
    assert noted(found, "3 infinite") == (
        "3 infinite and 1 NaN or null values of val_loss_nats are left out: "
        "attn_mode=softmax 3 of 6, attn_mode=sigmoid 1 of 5"
    )
    found = compare(study(tmp_path, rows), "attn_mode", metrics=["radial_share"])
    of_site = found.rows.set_index("site")
    assert of_site["n"].to_dict()["ln_f"] == 3
    assert of_site["n"].to_dict()["blocks.0.ln_1"] == 5
    assert noted(found, "3 infinite").endswith("attn_mode=softmax 3 of 12, attn_mode=sigmoid 1 of 10")
    scaling(
        study(tmp_path, [row | {"steps": s} for row in rows[:3] for s in (10, 100)]), "steps", metrics=["radial_share"]
    )


def test_a_run_that_diverged_before_any_norm_was_measured_counts(tmp_path: Path):
    lost = {"share": [], "status": "diverged", "attn_mode": "sigmoid", "attn_mode.bias": -4.0}
    one = study(tmp_path, [*TWO_MODES, run(4), run(4) | lost, run(5, method="bp") | lost])
    rows = compare(one, "attn_mode", metrics=["radial_share"], where="method == 'fa'").rows
    assert rows[["n", "diverged_b", "runs_b", "missing"]].drop_duplicates().to_numpy().tolist() == [[3, 1, 4, 0]]
    assert rows["difference"].tolist() == pytest.approx([0.1, 0.2])


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


def test_where_chooses_runs_and_norms_before_anything_is_found_to_vary(tmp_path: Path):
    rows = [*TWO_MODES, *(run(seed, 9.0, method="bp") for seed in (1, 2, 3))]
    found = compare(
        study(tmp_path, rows),
        "attn_mode",
        metrics=["radial_share"],
        where="method == 'fa' and role == 'ln_f' and val_loss_nats < 5",
    )
    assert found.cells == []
    assert found.rows["site"].tolist() == ["ln_f"]
    assert found.rows["n"].tolist() == [2]


@pytest.mark.parametrize(
    ("by", "options", "said"),
    [
        ("atn_mode", {}, "did you mean attn_mode?"),
        ("seed", {}, "runs are not told apart by seed"),
        ("val_loss_nats", {}, "runs are not told apart by val_loss_nats"),
        ("step", {}, "runs are not told apart by step"),
        ("method", {}, "all 6 runs chosen have method=fa: nothing to compare"),
        ("attn_mode", {"at": 5}, "a run's row is of its last update"),
        ("attn_mode", {"where": "seed > 5"}, "holds for no row"),
        ("attn_mode", {"where": "sed > 5"}, "did you mean seed?"),
        ("attn_mode", {"reference": "relu"}, "no run chosen has attn_mode=relu, only sigmoid, softmax"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, by: str, options: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        losses(tmp_path, by, TWO_MODES, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "metric"), [("runs", "method"), ("runs", "val_los_nats"), ("layers", "role"), ("layers", "r_me")]
)
def test_metrics_must_be_columns_of_numbers(tmp_path: Path, table: str, metric: str):
    with pytest.raises(ConfigError, match="--metric"):
        compare(study(tmp_path, TWO_MODES), "attn_mode", metrics=[metric], table=table)


def test_intervals_by_resampling_are_reproducible(tmp_path: Path):
    how = [Inference("signflip", rng=np.random.default_rng(0)) for _ in "ab"]
    one, again = (losses(tmp_path, "attn_mode", TWO_MODES, how=each) for each in how)
    pd.testing.assert_frame_equal(one.rows, again.rows)
    assert one.rows["p"].iloc[0] >= 0.25  # three seeds: 2 of 8 sign flips at least


# cost


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
    assert np.abs(found.differences.a - found.differences.b).max() > 0
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


# scaling


def test_slope_of_each_seed_and_its_interval(tmp_path: Path):
    slopes = {1: -1.0, 2: -1.5, 3: -0.5}
    rows = [run(seed, 9 * (d / 64) ** k, model__n_embd=d) for d in (64, 128, 256) for seed, k in slopes.items()]
    found = scaling(study(tmp_path, rows), "model.n_embd", metrics=["val_loss_nats"], table="runs")
    (row,) = found.slopes.to_dict("records")
    width = 4.302653 * 0.5 / math.sqrt(3)
    assert (row["slope"], row["low"], row["high"], row["n"]) == pytest.approx((-1, -1 - width, -1 + width, 3), rel=1e-6)
    assert found.seeds.set_index("seed")["slope"].to_dict() == pytest.approx(slopes)
    assert found.points.set_index("model.n_embd")["mean"][64] == pytest.approx(9.0)


def test_a_slope_comes_with_whether_a_line_describes_the_points(tmp_path: Path):
    """log y = log x − 1 under fa, and (log x)² / 4 under bp, whose curvature is 1/2 and whose slope 1 is no seed's law."""
    widths, noise = [math.e**k for k in (1, 2, 3)], np.random.default_rng(0).normal(0, 0.01, (2, 3, 3))
    rows = [
        run(seed, math.exp(law(math.log(x)) + noise[i, seed - 1, j]), method=method, model__n_embd=x)
        for i, (method, law) in enumerate((("fa", lambda u: u - 1), ("bp", lambda u: u * u / 4)))
        for j, x in enumerate(widths)
        for seed in (1, 2, 3)
    ]
    found = scaling(study(tmp_path, rows), "model.n_embd", metrics=["val_loss_nats"], table="runs")
    of = found.slopes.set_index("method")
    assert of["bends"].to_dict() == {"fa": False, "bp": True}
    assert of["slope"].tolist() == pytest.approx([1, 1], abs=0.02)
    assert of["curvature"].tolist() == pytest.approx([0, 0.5], abs=0.03)
    assert (of.loc["bp", "curvature_low"], of.loc["bp", "curvature_high"]) == (pytest.approx(0.5, abs=0.1),) * 2
    assert of.loc["bp", "r2"] == pytest.approx(
        1 - (1 / 24) / (2 + 1 / 24), abs=0.01
    )  # by hand: points 0, 3/4, 2 from 1/4
    assert of.loc["fa", "r2"] > 0.999
    for method, rows_of in found.seeds.groupby("method"):
        assert stats.paired(rows_of["curvature"]).p == pytest.approx(of.loc[str(method), "p_line"])
        assert rows_of["r2"].mean() == pytest.approx(of.loc[str(method), "r2"])
    said = noted(found, "a line does not describe 1 of 2 rows")
    assert said.endswith(f"curvatures: bp val_loss_nats {of.loc['bp', 'curvature']:+.3g}")
    two = scaling(
        study(tmp_path, [row for row in rows if row["model.n_embd"] < 9]),
        "model.n_embd",
        metrics=["val_loss_nats"],
        table="runs",
    )
    assert two.slopes[["r2", "curvature", "p_line"]].isna().all(axis=None)
    assert not two.slopes["bends"].any()
    assert noted(two, "two points a line at most")


def test_slopes_that_are_the_same_in_every_seed_have_no_p(tmp_path: Path):
    rows = [run(seed, seed * d**0.5, [0.3], model__n_embd=d) for d in (64, 128, 256) for seed in (1, 2, 3)]
    made = study(tmp_path, rows)
    (row,) = scaling(made, "model.n_embd", metrics=["val_loss_nats"], table="runs").slopes.to_dict("records")
    assert (row["agreement"], row["slope"], row["curvature"]) == (stats.SAME, pytest.approx(0.5), 0.0)
    assert math.isnan(row["p"])
    assert not row["bends"]
    row = scaling(made, "model.n_embd", metrics=["radial_share"]).slopes.to_dict("records")[0]
    assert (row["agreement"], row["slope"], row["bends"]) == (stats.IDENTICAL, 0.0, False)


def test_a_line_that_lacks_a_point_of_another_seed_is_said(tmp_path: Path):
    rows = [run(seed, d**0.5 + seed, model__n_embd=d) for d in (64, 128, 256) for seed in (1, 2, 3)]
    found = scaling(study(tmp_path, rows[:-1]), "model.n_embd", metrics=["val_loss_nats"], table="runs")
    assert noted(found, "1 lines of a seed lack a point")


def test_a_missing_value_is_a_level_of_its_own(tmp_path: Path):
    found = losses(tmp_path, "method.scale", NULLS, reference="null")
    assert [(word(row.a), word(row.b)) for row in found.rows.itertuples()] == [("0.5", "null"), ("2", "null")] * 2
    assert found.rows["difference"].tolist() == pytest.approx([1.0, 1.5] * 2)
    assert noted(found, "method changes together with method.scale")
    with pytest.raises(ConfigError, match=r"no run chosen has method\.scale=None, only 0\.5, 2, null"):
        losses(tmp_path, "method.scale", NULLS, reference="None")
    with pytest.raises(ConfigError, match=r'levels without a logarithm \(0\.5, 2, null\).*--where "method\.scale > 0"'):
        scaling(study(tmp_path, NULLS), "method.scale", metrics=["val_loss_nats"], table="runs")


def test_an_empty_where_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--where is empty"):
        losses(tmp_path, "attn_mode", TWO_MODES, where="")


def test_scaling_with_the_measured_step_of_one_run(tmp_path: Path):
    one = study(tmp_path, [run(seed) for seed in (1, 2, 3)])
    with pytest.raises(ConfigError, match="step has levels without a logarithm"):
        scaling(one, "step", metrics=["radial_share"])
    with pytest.raises(ConfigError, match="method has levels without a logarithm"):
        scaling(study(tmp_path, [run(1), run(1, method="bp")]), "method", metrics=["radial_share"])


def test_values_without_a_logarithm_have_no_slope_and_are_said(tmp_path: Path):
    rows = [run(seed, loss, model__n_embd=d) for d, loss in ((64, 1.0), (128, 2.0)) for seed in (1, 2, 3)]
    rows[0]["val_loss_nats"] = 0.0
    for row in rows:
        row["optimizer.lr"] = 0.1 / row["model.n_embd"]
    found = scaling(study(tmp_path, rows), "model.n_embd", metrics=["val_loss_nats"], table="runs")
    assert found.slopes["n"].tolist() == [2]
    assert noted(found, "optimizer.lr changes together with model.n_embd")
    assert noted(found, "1 lines of a seed")


# read


def test_a_merged_table_is_read_with_its_doubts(tmp_path: Path):
    study(tmp_path, TWO_MODES)
    path = tmp_path / "all.parquet"
    said = {"warnings": ["mixed commits: a, b", "missing seeds: x"], "skipped": [{"path": "p", "reason": "running"}]}
    path.with_suffix(".merge.json").write_text(json.dumps(said))
    assert read([path]).doubts == ["mixed commits: a, b", "1 runs were found and not merged: p"]
    assert "mixed commits: a, b" in compare(read([path]), "attn_mode", metrics=["radial_share"]).notes
    assert read([path.with_suffix(".runs.parquet")]).path == path
    path.with_suffix(".merge.json").unlink()
    assert read([path]).doubts == ["all.merge.json is missing: mixed commits, data or schemas would go unsaid"]


def test_a_table_that_is_not_whole_is_refused(tmp_path: Path):
    study(tmp_path, TWO_MODES)
    path = tmp_path / "all.parquet"
    beside = path.with_suffix(".runs.parquet")
    runs.write_table(beside, runs.read_table(beside), {"table": "runs", "merged": True, "merge_id": "other"})
    with pytest.raises(ConfigError, match="not of one merge"):
        read([path])
    runs.write_table(beside, runs.read_table(beside), {"table": "runs", "merged": True, "schema_version": 0})
    with pytest.raises(ConfigError, match="schema version 0"):
        read([path])
    beside.unlink()
    with pytest.raises(ConfigError, match=r"all\.runs\.parquet is missing"):
        read([path])
    with pytest.raises(ConfigError, match="nope does not exist"):
        read([tmp_path / "nope"])


def seeds_of(path: Path) -> list[int]:
    return sorted(read([path]).frame("runs")["seed"])


def test_a_folder_means_the_runs_that_it_holds_now(tmp_path: Path):
    """Whatever their times: copied in with old ones, deleted, or replaced by a run of the same name."""
    folder = tmp_path / "sweep"
    for seed in (1, 2):
        make_run(folder / str(seed), seed=seed)
    old = make_run(tmp_path / "3", seed=3)
    sweep.merge([folder], folder / "all.parquet")
    assert seeds_of(folder) == [1, 2]
    for path in (old, *old.iterdir()):
        os.utime(path, (1, 1))
    shutil.copytree(old, folder / "3")  # with its times, as `cp -a` does
    assert (folder / "3" / runs.STATUS).stat().st_mtime == 1
    assert seeds_of(folder) == [1, 2, 3]
    shutil.rmtree(folder / "1")
    assert seeds_of(folder) == [2, 3]
    shutil.rmtree(folder / "2")
    shutil.copytree(old, folder / "2")
    assert seeds_of(folder) == [3]
    assert seeds_of(folder / "all.parquet") == [1, 2]  # a file is itself


def test_a_folder_without_runs_is_its_one_merged_table(tmp_path: Path):
    for seed in (1, 2):
        make_run(tmp_path / "runs" / str(seed), seed=seed)
    home = tmp_path / "home"
    sweep.merge([tmp_path / "runs"], home / "sweep" / "all.parquet")
    found = read([home])
    assert found.path == home / "sweep" / "all.parquet"
    assert found.doubts == [f"{home} holds no run folders: its merged table {found.path} is read"]
    both = read([home, make_run(tmp_path / "3", seed=3)])
    assert sorted(both.frame("runs")["seed"]) == [1, 2, 3]
    assert both.doubts[0] == found.doubts[0]
    report = sweep.merge([home], tmp_path / "all.parquet")
    assert (report.merged, report.warnings) == (2, found.doubts)
    sweep.merge([tmp_path / "3"], home / "other.parquet")
    with pytest.raises(
        ConfigError, match=r"no run folders and 2 merged tables: name one of .*other.parquet, .*all.parquet"
    ):
        read([home])
    shutil.copytree(tmp_path / "3", home / "3")
    assert seeds_of(home) == [3]


def test_a_folder_named_twice_is_its_runs_and_not_its_table(tmp_path: Path):
    make_run(tmp_path / "s" / "1", seed=1)
    sweep.merge([make_run(tmp_path / "2", seed=2)], tmp_path / "s" / "all.parquet")
    assert sorted(read([tmp_path / "s", tmp_path / "s"]).frame("runs")["seed"]) == [1]
    assert sorted(read([tmp_path / "s" / "1", tmp_path / "s"]).frame("runs")["seed"]) == [1]


def test_costs_are_read_from_the_table_of_runs_alone(tmp_path: Path):
    study(tmp_path, [run(seed, ln_backward=way) for seed in (1, 2, 3) for way in ("exact", "ste")])
    path = tmp_path / "all.parquet"
    expected = cost(read([path]), by=None).costs.rows
    for file in ("all.parquet", "all.curves.parquet", "all.merge.json"):
        (tmp_path / file).unlink(missing_ok=True)
    alone = read([tmp_path / "all.runs.parquet"])
    pd.testing.assert_frame_equal(cost(alone, by=None).costs.rows, expected)
    with pytest.raises(ConfigError, match=r"all\.parquet, the layers of this merge, is missing: bring it here too"):
        compare(alone, "ln_backward", metrics=["radial_share"])


def test_a_metric_that_is_none_is_hinted_at_from_the_table_at_hand(tmp_path: Path):
    """Never a column of the other table, a key, or a setting of the config: none of them can be compared there."""
    rows = [run(seed, attn_mode=mode) for seed in (1, 2) for mode in ("softmax", "sigmoid")]
    found = study(tmp_path, rows, my_own=0.5, steps=100)
    with pytest.raises(ConfigError, match=r"called radial_shar: did you mean radial_share\?"):
        compare(found, "attn_mode", metrics=["radial_shar"])
    with pytest.raises(ConfigError, match=r"--metric val_loss_nats is a column of runs, .* --runs or --layers"):
        compare(found, "attn_mode", metrics=["val_loss_nats"])
    with pytest.raises(ConfigError, match=r"--metric radial_share is a column of layers"):
        cost(found, by=None, metric="radial_share")
    with pytest.raises(ConfigError, match=r"called step_: there are radial_share, my_own, …$"):
        compare(found, "attn_mode", metrics=["step_"])
    with pytest.raises(ConfigError, match=r"called steps_: there are numerics_version, val_loss_nats, ") as caught:
        compare(found, "attn_mode", metrics=["steps_"], table="runs")
    assert "steps," not in str(caught.value)  # the layers have it too
    with pytest.raises(ConfigError, match=r"called val: did you mean val_loss_nats\?"):
        compare(found, "attn_mode", metrics=["val"], table="runs")
