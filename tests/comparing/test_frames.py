"""Data frames as sources: what lnjac.load returns gives what its file gives, also filtered and extended."""

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.folders import make_run, rewrite
from support.studies import write_study

import lnjac
from lnjac.columns import Column
from lnjac.comparing.tables import LAYERS_ALONE, open_tables
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import schema

Frames = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    levels = {"attn_mode": ["softmax", "sigmoid"], "ln_backward": ["exact", "ste"], "optimizer.lr": [0.1, 0.2]}
    return write_study(tmp_path_factory.mktemp("study"), levels, diverged=[1])


@pytest.fixture
def frames(merged: Path) -> Frames:
    names = ("layers", "runs", "curves")
    return {name: lnjac.load(merged if name == "layers" else merged.with_suffix(f".{name}.parquet")) for name in names}


def same(one: Any, other: Any) -> None:
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_frames_give_what_their_files_give(merged: Path, frames: Frames, tmp_path: Path) -> None:
    both = [frames["layers"], frames["runs"]]
    found = lnjac.compare(both, "attn_mode")
    expected = lnjac.compare(merged, "attn_mode")
    same(found.rows, expected.rows)
    assert found.notes == expected.notes
    same(lnjac.cost(frames["runs"]).costs.rows, lnjac.cost(merged).costs.rows)
    slopes = [lnjac.scaling(it, "optimizer.lr", metrics=["sigma_mean"]).slopes for it in (both, merged)]
    same(*slopes)
    page = lnjac.report([*frames.values()], output=tmp_path / "frames.html", by="attn_mode")
    assert page.sections == lnjac.report(merged, output=tmp_path / "files.html", by="attn_mode").sections
    (differs,) = lnjac.diff(frames["layers"], frames["layers"].assign(sigma_mean=1.0))
    assert set(differs.changed["column"]) == {"sigma_mean"}


def test_layers_alone_are_compared_with_a_word_on_diverged_runs(merged: Path, frames: Frames) -> None:
    found = lnjac.compare(frames["layers"], "attn_mode")
    assert LAYERS_ALONE in found.notes
    assert (found.rows["n"].min(), lnjac.compare(merged, "attn_mode").rows["n"].min()) == (3, 2)  # one diverged
    without = lnjac.load(merged)
    without.attrs.clear()
    same(lnjac.compare(without, "attn_mode").rows, found.rows)


def test_a_part_of_a_frame_is_compared(merged: Path, frames: Frames) -> None:
    few = frames["runs"].query("ln_backward == 'ste'")
    layers = frames["layers"].query("ln_backward == 'ste' and site == 'ln_f'").set_index("site")
    found = lnjac.compare([layers, few], "attn_mode")
    expected = lnjac.compare(merged, "attn_mode", where="ln_backward == 'ste' and site == 'ln_f'")
    same(found.rows, expected.rows)
    same(
        lnjac.compare([frames["layers"], few], "attn_mode").rows,
        lnjac.compare(merged, "attn_mode", where="ln_backward == 'ste'").rows,
    )


def test_added_columns_are_metrics_or_factors(frames: Frames) -> None:
    layers = frames["layers"].assign(own=np.log(frames["layers"]["sigma_mean"]))
    by_hand = np.log(frames["layers"]["sigma_mean"])
    found = lnjac.compare(layers, "attn_mode", metrics=["own"], at=100)
    means = by_hand[(layers["step"] == 100) & (layers["site"] == "ln_f")].groupby(
        [layers["attn_mode"], layers["ln_backward"], layers["optimizer.lr"]]
    )
    row = found.rows.query("site == 'ln_f' and ln_backward == 'exact' and `optimizer.lr` == 0.2").iloc[0]
    assert row["mean_a"] == pytest.approx(means.mean()[row["a"], "exact", 0.2])
    losses = frames["runs"].assign(gap=frames["runs"]["val_loss_nats"] - 1)
    gap = lnjac.compare(losses, "attn_mode", metrics=["gap"], table="runs").rows
    loss = lnjac.compare(losses, "attn_mode", metrics=["val_loss_nats"], table="runs").rows
    np.testing.assert_allclose(gap["difference"], loss["difference"])
    kind = layers["attn_mode"].map({"softmax": "rows", "sigmoid": "cells"}).astype("category")
    found = lnjac.compare(layers.assign(kind=kind), "kind", metrics=["sigma_mean"])
    assert set(found.rows["a"]) == {"rows"}
    assert set(found.rows["moving"]) == {"attn_mode"}


def test_descriptions_travel_in_attrs(tmp_path: Path) -> None:
    spread = Column("spread", "float64", "m", "mean over tokens", pool="mean weighted by n_tokens")
    for seed in (1, 2):
        folder = make_run(tmp_path / "runs" / str(seed), seed=seed)
        edit = lambda table: table.append_column("spread", table["sigma_mean"])  # noqa: E731
        rewrite(folder / runs.file_of("layers"), edit, columns=schema.describe([spread]))
    path = tmp_path / "all.parquet"
    report = lnjac.merge(tmp_path / "runs", path)
    known = open_tables(path).described("layers")
    assert known["spread"] == spread
    frame = lnjac.load(path)
    assert open_tables(frame[frame["seed"] > 0].sort_values("seed")).described("layers") == known
    frame.to_parquet(tmp_path / "mine.parquet")
    assert open_tables(pd.read_parquet(tmp_path / "mine.parquet")).described("layers") == known
    assert open_tables(report).path == path
    whole = [frame, lnjac.load(path.with_suffix(".runs.parquet")), lnjac.load(path.with_suffix(".curves.parquet"))]
    assert not any(lnjac.diff(report, whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: pd.DataFrame({"a": [1]}), "with the columns a, … is no table of lnjac: give one that lnjac.load"),
        (lambda it: it["layers"].drop(columns="call"), "the DataFrame of layers lacks the column call"),
        (lambda it: it["layers"].drop(columns="seed"), "the DataFrame of layers has no column seed"),
        (lambda it: it["layers"].assign(step="x"), "the DataFrame of layers has step as"),
        (lambda it: it["layers"].assign(z=[[1]] * len(it["layers"])), "has lists or records in the column z"),
        (
            lambda it: it["layers"].assign(z=[1, "a"] * (len(it["layers"]) // 2)),
            "the DataFrame of layers cannot be read",
        ),
        (lambda it: it["layers"].drop(columns="sigma_mean"), "no column for --metric is called sigma_mean"),
        (
            lambda it: pd.concat([it["layers"], it["layers"].head(2)]),
            "has 2 rows whose run_id, diag_id, step, site, call",
        ),
        (
            lambda it: [it["layers"], it["layers"]],
            "two DataFrames of layers were given: put them together by pandas.concat",
        ),
        (lambda it: [it["layers"], "all.parquet"], "paths and DataFrames were given together"),
        (lambda it: it["curves"], "a DataFrame of curves was given alone: give that of runs too"),
        (lambda it: it["runs"], 'no DataFrame of layers was given: .* or compare runs by table="runs"'),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    change: Callable[[Frames], Any], said: str, frames: Frames
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        lnjac.compare(change(frames), "attn_mode", metrics=["sigma_mean"])
    assert "\n" not in str(refused.value)


def test_what_layers_alone_cannot_answer_is_refused(frames: Frames, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="val_loss_nats is a column of runs, but only layers were given"):
        lnjac.cost(frames["layers"])
    with pytest.raises(ConfigError, match=r"the runs lack commit, .*: give the whole DataFrame of runs too"):
        lnjac.report(frames["layers"], output=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_results_are_shown_as_tables(merged: Path) -> None:
    found = lnjac.compare(merged, "attn_mode", metrics=["sigma_mean"], where="ln_backward != '<b>'")
    shown = found._repr_html_()
    assert shown.count("<table") == 1
    assert all(f"<th>{name}</th>" in shown for name in ("site", "difference", "low", "high", "n"))
    assert "<th>agreement</th>" not in shown  # empty in all rows
    assert all(html.escape(note) in shown for note in found.notes)
    costs = lnjac.cost(merged)
    assert costs._repr_html_().count("<table") == 2
    assert "<th>slope</th>" in lnjac.scaling(merged, "optimizer.lr", metrics=["sigma_mean"])._repr_html_()
    assert "&lt;i&gt;" in replace(found, notes=["<i>"])._repr_html_()
