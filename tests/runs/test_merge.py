"""A merge's order of rows, its independence of stages, its report and its warnings."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.folders import make_run, rows_of

from lnjac.columns import Column
from lnjac.runs import folder as runs
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions
from lnjac.runs.schema import SCHEMA_VERSION


def test_rows_come_by_start_of_run_then_step_then_as_in_the_run(tmp_path: Path, out: Path):
    for seed in (3, 1, 2):
        make_run(tmp_path / "s" / f"{9 - seed}", seed=seed, steps=(100, 0), sites=("z", "a", "m"))
    merge([tmp_path / "s"], out)
    frame = load(out)
    assert frame["seed"].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert frame["step"].tolist() == [0, 0, 0, 100, 100, 100] * 3
    assert frame["site"].tolist() == ["z", "a", "m"] * 6
    assert load(companions(out)["curves"])["step"].tolist() == [0, 50, 100] * 3


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs with duplicates (also begun in one second), two diagnostics, other columns and types, and no layers."""
    root = tmp_path_factory.mktemp("pool")
    gain = [(Column("method.gain", dtype, "", ""), 1) for dtype in ("int64", "float64")]
    return [
        make_run(root / "a", seed=1),
        make_run(root / "b", seed=1, run={"device": "other"}),
        make_run(root / "c", seed=1, run={"started_at": "2023-01-01T00:00:00+00:00"}),
        make_run(root / "d", seed=1, diag_id="d2", run={"started_at": "2022-01-01T00:00:00+00:00"}),
        make_run(root / "e", seed=2, config=gain[:1]),
        make_run(root / "f", seed=3, config=gain[1:]),
        make_run(root / "g", seed=4, status="diverged", steps=(), run={"started_at": None}),
        make_run(root / "h", seed=5, layers={"r_mean": math.nan}),
    ]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.slow
def test_merging_in_stages_gives_the_same_rows(pool: list[Path], tmp_path: Path, data: st.DataObject):
    order = data.draw(st.permutations(pool))
    cut, end = sorted(data.draw(st.sets(st.integers(1, len(pool)), min_size=2, max_size=2)))
    ab, abc, at_once, again, other = (
        tmp_path / f"{name}.parquet" for name in ("ab", "abc", "at_once", "again", "other")
    )
    merge(order[:cut], ab)
    merge([ab, *order[cut:end]], abc)
    merge(order[:end], at_once)
    assert rows_of(abc) == rows_of(at_once)
    merge([abc, at_once, ab], again)
    assert rows_of(again) == rows_of(at_once)
    merge(order[:end][::-1], other)  # another order of sources changes at most the order of config columns
    for name, path in companions(other).items():
        pd.testing.assert_frame_equal(load(path), load(companions(at_once)[name]), check_like=True)


def test_the_report_is_written_beside_the_output(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2, status="running")
    report = merge([tmp_path / "s"], out)
    written = json.loads(out.with_suffix(".merge.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["skipped"] == [{"path": str(tmp_path / "s" / "1"), "reason": "running"}]
    assert (written["found"], written["merged"], written["rows"]["runs"]) == (2, 1, 1)


def test_the_files_say_what_they_are(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0")], out)
    for name, path in companions(out).items():
        note = runs.read_metadata(path)
        assert (note["table"], note["merged"], note["schema_version"]) == (name, True, SCHEMA_VERSION)
        assert note["rows"] == {"layers": 6, "runs": 1, "curves": 3}


def warnings_of(out: Path, *folders: Path) -> str:
    return "\n".join(merge(folders, out).warnings)


def test_a_clean_merge_warns_of_nothing(tmp_path: Path, out: Path):
    assert warnings_of(out, make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)) == ""


def test_warnings_are_said(tmp_path: Path, out: Path):
    one = make_run(
        tmp_path / "0",
        seed=1,
        run={"commit": "aaa", "dirty": True, "data_sha256": "s1", "numerics_version": 1},
    )
    two = make_run(
        tmp_path / "1",
        seed=2,
        run={"commit": None, "dirty": None, "data_sha256": "s2", "numerics_version": 2},
    )
    text = warnings_of(out, one, two)
    assert "mixed commits: None (1 runs), aaa (1 runs)" in text
    assert "1 runs were made by code with uncommitted changes" in text
    assert "data=play is not one corpus, its data_sha256 are s1, s2" in text
    assert "mixed numerics versions: 1 (1 runs), 2 (1 runs)" in text


def test_missing_seeds_are_named(tmp_path: Path, out: Path):
    slope = Column("attn_mode.slope", "float64", "", "")
    for mode, value, seeds in (("softmax", None, (1, 3)), ("relu", 0.5, (1, 2, 3)), ("relu", 1.0, (2,))):
        for seed in seeds:
            make_run(
                tmp_path / "s" / f"{mode}{value}{seed}",
                seed=seed,
                attn_mode=mode,
                config=[(slope, value)],
                run_id=f"{mode}{value}{seed}",
            )
    found = [text for text in merge([tmp_path / "s"], out).warnings if "missing seeds" in text]
    assert found == [
        "missing seeds: attn_mode=relu attn_mode.slope=1.0 lacks 1, 3",
        "missing seeds: attn_mode=softmax attn_mode.slope=null lacks 2",
    ]


def test_progress_is_called_as_sources_have_been_read(tmp_path: Path, out: Path):
    for i in range(12):
        make_run(tmp_path / "s" / str(i), seed=i)
    calls: list[tuple[int, int]] = []
    merge([tmp_path / "s"], out, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(10, 12), (12, 12)]
