"""Slopes of log metric against log x, computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from support.tables import noted, run, study

from lnjac.comparing import intervals as stats
from lnjac.comparing.scaling import scaling
from lnjac.errors import ConfigError


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
