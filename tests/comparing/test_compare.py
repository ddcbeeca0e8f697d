"""Differences of small tables whose numbers can be computed by hand: intervals, families, headlines, refusals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from support.tables import SITES, TWO_MODES, losses, noted, run, study

from lnjac.columns import SUM
from lnjac.comparing.compare import compare
from lnjac.comparing.cost import cost
from lnjac.comparing.intervals import Inference
from lnjac.comparing.scaling import scaling
from lnjac.comparing.tables import MergedTables
from lnjac.errors import ConfigError
from lnjac.norms.formulas import COLUMNS
from lnjac.runs import folder as runs


def of_energies(folder: Path, energy: Mapping[str, Sequence[float]]) -> MergedTables:
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
    assert found.seeds[["seed", "value_a", "value_b", "difference"]].to_numpy().tolist() == [
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
    assert len(found.seeds) == 6
    assert compare(study(tmp_path, TWO_MODES), "attn_mode", metrics=["radial_share"], at=0).rows["mean_a"].eq(0).all()
    with pytest.raises(ConfigError, match="no norm was measured at step 7: choose one of 0, 100"):
        compare(study(tmp_path, TWO_MODES), "attn_mode", metrics=["radial_share"], at=7)


def test_measured_steps_are_levels_too(tmp_path: Path):
    found = compare(study(tmp_path, TWO_MODES), "step", metrics=["radial_share"], where="site == 'ln_f'")
    rows = found.rows[found.rows["site"] == "ln_f"].set_index("attn_mode")
    assert rows["difference"].to_dict() == pytest.approx({"softmax": 3.8333333 / 5, "sigmoid": 2.8333333 / 5})
    assert rows["n"].tolist() == [3, 3]


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


def test_an_empty_where_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--where is empty"):
        losses(tmp_path, "attn_mode", TWO_MODES, where="")


def test_each_of_many_levels_is_compared_with_the_first(tmp_path: Path):
    """Pairs grow with the square: 100 levels have 4,950, of which no reader reads one."""
    made = study(tmp_path, [run(seed, **{"optimizer.lr": level / 100}) for level in range(1, 32) for seed in (1, 2)])
    found = compare(made, "optimizer.lr", metrics=["val_loss_nats"], table="runs")
    assert len(found.rows) == 30
    assert set(found.rows["b"]) == {0.01}
    assert found.notes[0].startswith(
        "31 levels of optimizer.lr make too many pairs: each is compared with the first, 0.01"
    )
    other = compare(made, "optimizer.lr", metrics=["val_loss_nats"], table="runs", reference="0.02")
    assert set(other.rows["b"]) == {0.02}
    assert not any("too many pairs" in note for note in other.notes)
    few = compare(made, "optimizer.lr", metrics=["val_loss_nats"], table="runs", where="optimizer.lr < 0.305")
    assert len(few.rows) == 30 * 29 / 2
