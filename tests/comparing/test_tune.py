"""Tuning before comparing: who chooses, who is compared, and what is never chosen. Computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from support.tables import noted, run, study

from lnjac.comparing.compare import LOSS, Differences, compare
from lnjac.comparing.cost import cost
from lnjac.comparing.tune import tuned
from lnjac.errors import ConfigError
from lnjac.reporting.verdict import of_differences

RATES = (0.001, 0.003, 0.01)
BEST = {"softmax": 0.001, "sigmoid": 0.003}
SIX = (1, 2, 3, 4, 5, 6)


def rows(seeds: tuple[int, ...] = SIX, **more: Any) -> list[dict[str, Any]]:
    """Losses of 2 at the best rate and 3 at the others, plus a tenth of the seed under softmax."""
    return [
        run(
            seed,
            (2.0 if rate == BEST[mode] else 3.0) + seed / 10 * (mode == "softmax"),
            attn_mode=mode,
            optimizer__lr=rate,
            **more,
        )
        for mode in BEST
        for rate in RATES
        for seed in seeds
    ]


def at(found: list[dict[str, Any]], mode: str, rate: float, seed: int) -> dict[str, Any]:
    (one,) = [r for r in found if (r["attn_mode"], r["optimizer.lr"], r["seed"]) == (mode, rate, seed)]
    return one


def compared(folder: Path, of: list[dict[str, Any]], **more: Any) -> Differences:
    return compare(study(folder, of), "attn_mode", metrics=[LOSS], table="runs", **({"tune": ["optimizer.lr"]} | more))


def test_each_level_is_compared_at_its_best_on_the_other_seeds(tmp_path: Path) -> None:
    found = compared(tmp_path, rows())
    (row,) = found.rows.to_dict("records")
    assert (row["mean_a"], row["mean_b"], row["n"]) == (pytest.approx(2.5), 2.0, 3)
    assert sorted(found.seeds["seed"]) == [4, 5, 6]
    assert row["moving"] == ""  # the rate differs by design
    assert found.choices is not None
    assert (found.choices.tuning, found.choices.compared) == ([1, 2, 3], [4, 5, 6])
    chosen = found.choices.rows.set_index("attn_mode")
    assert chosen["optimizer.lr"].to_dict() == BEST
    assert chosen[LOSS].to_dict() == pytest.approx({"softmax": 2.2, "sigmoid": 2.0})
    assert chosen["edge"].to_dict() == {"softmax": "optimizer.lr lowest", "sigmoid": ""}
    said = (
        "optimizer.lr chosen by the mean val_loss_nats of seeds 1, 2, 3 (the lower half), compared on seeds 4, 5, 6: "
    )
    assert noted(found, said).endswith("attn_mode=softmax optimizer.lr=0.001; attn_mode=sigmoid optimizer.lr=0.003")
    assert noted(found, "warning: the best").endswith(": attn_mode=softmax optimizer.lr=0.001 is the lowest")
    assert of_differences(found)[-1] == (
        "Compared at each level's best optimizer.lr, chosen on 3 other seeds: 0.001 under softmax and 0.003 under "
        "sigmoid; 1 of these is at the edge of the values that were run."
    )


def test_the_seeds_that_choose_are_in_no_mean(tmp_path: Path) -> None:
    """A value that is best on the compared seeds alone is not chosen, and the compared losses decide nothing."""
    lucky = rows()
    for seed in (4, 5, 6):
        at(lucky, "sigmoid", 0.01, seed)["val_loss_nats"] = 0.0
    found = compared(tmp_path, lucky)
    assert found.choices is not None
    assert found.choices.rows["optimizer.lr"].tolist() == [0.001, 0.003]
    assert found.rows["mean_b"].tolist() == [2.0]


@pytest.mark.parametrize("broken", [{"status": "diverged"}, {"val_loss_nats": math.nan}])
def test_a_value_at_which_a_tuning_seed_diverged_is_never_chosen(tmp_path: Path, broken: dict[str, Any]) -> None:
    some = rows()
    at(some, "sigmoid", 0.003, 2).update(broken)
    found = compared(tmp_path, some)
    assert found.choices is not None
    assert found.choices.rows["optimizer.lr"].tolist() == [0.001, 0.001]
    assert noted(found, "never chosen").endswith(": attn_mode=sigmoid optimizer.lr=0.003 (seed 2)")


def test_what_was_not_run_is_named(tmp_path: Path) -> None:
    some = rows()
    for mode, rate, seed in (("sigmoid", 0.01, 3), ("sigmoid", 0.003, 5)):
        some.remove(at(some, mode, rate, seed))
    found = compared(tmp_path, some)
    assert noted(found, "not chosen").endswith(": attn_mode=sigmoid optimizer.lr=0.01 lacks seed 3")
    assert noted(found, "chosen values that were not run").endswith(
        ": attn_mode=sigmoid optimizer.lr=0.003 lacks seed 5"
    )
    assert noted(found, "missing pairs").endswith(": attn_mode=sigmoid lacks seed 5")
    assert found.rows["n"].tolist() == [2]
    none = [row for row in some if not (row["attn_mode"] == "sigmoid" and row["seed"] == 1)]
    relu = [dict(row) | {"attn_mode": "relu"} for row in rows() if row["attn_mode"] == "sigmoid"]
    found = compared(tmp_path, none + relu)
    assert noted(found, "left out") == "left out, as no value can be chosen: attn_mode=sigmoid"
    assert found.rows[["a", "b"]].to_numpy().tolist() == [["softmax", "relu"]]


def test_several_keys_and_cells(tmp_path: Path) -> None:
    some = [
        dict(row) | {"optimizer.decay": decay, "model.n_embd": width, "val_loss_nats": row["val_loss_nats"] + add}
        for row in rows()
        for width in (64, 128)
        for decay, add in (("none", 0.0), ("cosine", -0.5 if width == 128 else 0.5))
    ]
    found = compared(tmp_path, some, tune=["optimizer.lr", "optimizer.decay"])
    assert found.choices is not None
    chosen = found.choices.rows.set_index(["attn_mode", "model.n_embd"])
    assert chosen["optimizer.decay"].to_dict() == {
        (mode, width): "cosine" if width == 128 else "none" for mode in BEST for width in (64, 128)
    }
    assert found.rows["model.n_embd"].tolist() == [64, 128]
    assert found.rows["mean_b"].tolist() == [2.0, 1.5]


def test_norms_are_compared_at_the_chosen_values(tmp_path: Path) -> None:
    found = compare(study(tmp_path, rows()), "attn_mode", metrics=["radial_share"], tune=["optimizer.lr"])
    assert found.rows["mean_b"].tolist() == pytest.approx([0.2, 0.4])
    assert found.rows["n"].tolist() == [3, 3]


def test_costs_of_tuned_backwards(tmp_path: Path) -> None:
    exact = rows(method="fa")
    other = [
        dict(row) | {"ln_backward": "center_scale", "val_loss_nats": row["val_loss_nats"] + 1.0 + (row["seed"] > 3)}
        for row in exact
    ]
    for row in other:  # whose best rate is another one
        row["optimizer.lr"] = {0.001: 0.003, 0.003: 0.001}.get(row["optimizer.lr"], row["optimizer.lr"])
    found = cost(study(tmp_path, exact + other), tune=["optimizer.lr"])
    assert found.costs.rows["difference"].tolist() == [2.0, 2.0]
    assert found.costs.rows["moving"].tolist() == ["", ""]
    assert found.differences is not None
    assert found.differences.rows["difference"].tolist() == [0.0]
    assert found.costs.choices is not None
    assert len(found.costs.choices.rows) == 4


def test_where_chooses_runs_before_they_are_tuned(tmp_path: Path) -> None:
    found = compared(tmp_path, rows(), where="optimizer.lr > 0.001")
    assert found.choices is not None
    assert found.choices.rows["optimizer.lr"].tolist() == [0.003, 0.003]
    with pytest.raises(ConfigError, match=r"--where names site, of norms, but --tune chooses runs"):
        compared(tmp_path, rows(), where="site == 'ln_f'")


@pytest.mark.parametrize(("seeds", "tune", "said"), [
    ((1, 2), ["optimizer.lr"], "--tune needs at least 3 seeds, of which one chooses and two are compared: the runs chosen "
        "have seed 1, 2"),
    (SIX, ["optimizer.l"], "--tune: runs are not told apart by optimizer.l: did you mean optimizer.lr?"),
    (SIX, ["attn_mode"], "--tune attn_mode is compared: tune another column"),
    (SIX, ["model.n_embd"], "all 36 runs chosen have model.n_embd=64: there is nothing to tune"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_one_line(tmp_path: Path, seeds: tuple[int, ...], tune: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        compared(tmp_path, rows(seeds), tune=tune)
    assert str(error.value) == said


def test_a_value_for_each_level_alone_is_nothing_to_tune(tmp_path: Path) -> None:
    some = [row for row in rows() if row["optimizer.lr"] == BEST[row["attn_mode"]]]
    with pytest.raises(ConfigError, match=r"^each level was run at one optimizer.lr: there is nothing to tune$"):
        compared(tmp_path, some)


def test_the_split_is_repeatable(tmp_path: Path) -> None:
    tables = study(tmp_path, rows())
    one, other = (tuned(tables, ["optimizer.lr"], by=["attn_mode"]) for _ in range(2))
    assert one.kept == other.kept
    assert one.choices is not None
    assert "optimizer.lr" not in one.columns("runs")
    assert len(one.frame("runs")) == 6
