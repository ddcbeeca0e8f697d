"""Sources as merged tables: folders, files, several of them, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from support.folders import make_run
from support.tables import TWO_MODES, run, study

from lnjac.comparing.compare import compare
from lnjac.comparing.cost import cost
from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import merge as sweep


def test_a_merged_table_is_read_with_its_warnings(tmp_path: Path):
    study(tmp_path, TWO_MODES)
    path = tmp_path / "all.parquet"
    said = {"warnings": ["mixed commits: a, b", "missing seeds: x"], "skipped": [{"path": "p", "reason": "running"}]}
    path.with_suffix(".merge.json").write_text(json.dumps(said))
    assert open_tables(path).warnings == ["mixed commits: a, b", "1 runs were found and not merged: p"]
    assert "mixed commits: a, b" in compare(open_tables(path), "attn_mode", metrics=["radial_share"]).notes
    assert open_tables([path.with_suffix(".runs.parquet")]).path == path
    path.with_suffix(".merge.json").unlink()
    assert open_tables(path).warnings == ["all.merge.json is missing: mixed commits, data or schemas would go unsaid"]


def test_a_table_that_is_not_whole_is_refused(tmp_path: Path):
    study(tmp_path, TWO_MODES)
    path = tmp_path / "all.parquet"
    beside = path.with_suffix(".runs.parquet")
    runs.write_table(beside, runs.read_table(beside), {"table": "runs", "merged": True, "merge_id": "other"})
    with pytest.raises(ConfigError, match="not of one merge"):
        open_tables(path)
    runs.write_table(beside, runs.read_table(beside), {"table": "runs", "merged": True, "schema_version": 0})
    with pytest.raises(ConfigError, match="schema version 0"):
        open_tables(path)
    beside.unlink()
    with pytest.raises(ConfigError, match=r"all\.runs\.parquet is missing"):
        open_tables(path)
    with pytest.raises(ConfigError, match="nope does not exist"):
        open_tables([tmp_path / "nope"])


def seeds_of(path: Path) -> list[int]:
    return sorted(open_tables(path).frame("runs")["seed"])


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
    found = open_tables([home])
    assert found.path == home / "sweep" / "all.parquet"
    assert found.warnings == [f"{home} holds no run folders: its merged table {found.path} is read"]
    both = open_tables([home, make_run(tmp_path / "3", seed=3)])
    assert sorted(both.frame("runs")["seed"]) == [1, 2, 3]
    assert both.warnings[0] == found.warnings[0]
    report = sweep.merge([home], tmp_path / "all.parquet")
    assert (report.merged, report.warnings) == (2, found.warnings)
    sweep.merge([tmp_path / "3"], home / "other.parquet")
    with pytest.raises(
        ConfigError, match=r"no run folders and 2 merged tables: name one of .*other.parquet, .*all.parquet"
    ):
        open_tables([home])
    shutil.copytree(tmp_path / "3", home / "3")
    assert seeds_of(home) == [3]


def test_a_folder_named_twice_is_its_runs_and_not_its_table(tmp_path: Path):
    make_run(tmp_path / "s" / "1", seed=1)
    sweep.merge([make_run(tmp_path / "2", seed=2)], tmp_path / "s" / "all.parquet")
    assert sorted(open_tables([tmp_path / "s", tmp_path / "s"]).frame("runs")["seed"]) == [1]
    assert sorted(open_tables([tmp_path / "s" / "1", tmp_path / "s"]).frame("runs")["seed"]) == [1]


def test_costs_are_read_from_the_table_of_runs_alone(tmp_path: Path):
    study(tmp_path, [run(seed, ln_backward=way) for seed in (1, 2, 3) for way in ("exact", "ste")])
    path = tmp_path / "all.parquet"
    expected = cost(open_tables(path), by=None).costs.rows
    for file in ("all.parquet", "all.curves.parquet", "all.merge.json"):
        (tmp_path / file).unlink(missing_ok=True)
    alone = open_tables([tmp_path / "all.runs.parquet"])
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
