"""A run found twice is merged once if both agree, and is an error that names the difference if not."""

import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.folders import SITES, make_run, rewrite, with_column

from lnjac.errors import ConfigError
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions


def test_one_corpus_read_by_two_names_is_one_run(tmp_path: Path, out: Path):
    make_run(tmp_path / "a")
    twin = make_run(tmp_path / "b")
    for file in ("layers.parquet", "run.parquet"):
        rewrite(twin / file, lambda t: with_column("data", pa.array(["nanogpt"] * len(t)))(t))
    report = merge([tmp_path / "a", tmp_path / "b"], out)
    assert (report.merged, report.duplicates["runs"]) == (1, 1)


def test_an_equal_run_is_dropped_and_counted(tmp_path: Path, out: Path):
    late = make_run(tmp_path / "a", run={"started_at": "2024-05-02T00:00:00+00:00", "wall_s": 9.0, "commit": "late"})
    early = make_run(tmp_path / "b", run={"started_at": "2024-05-01T00:00:00+00:00", "wall_s": 1.0, "commit": "early"})
    for sources in ([late, early], [early, late]):
        report = merge(sources, out)
        assert report.duplicates == {"layers": 6, "runs": 1, "curves": 3}
        assert report.found == report.merged + len(report.skipped) + report.duplicates["runs"] == 2
        assert load(companions(out)["runs"])["commit"].tolist() == ["early"]
        assert any(line.startswith("duplicates: 6 rows of layers, 1 rows of runs") for line in report.lines())


def test_runs_begun_in_the_same_second_give_one_result_whatever_the_order(tmp_path: Path, out: Path):
    pair = [make_run(tmp_path / name, run={"device": name}) for name in ("b", "a")]
    for sources in (pair, pair[::-1]):
        merge(sources, out)
        assert load(companions(out)["runs"])["device"].tolist() == ["a"]


def test_another_diagnostic_of_the_same_run_is_no_duplicate_but_its_curve_is(tmp_path: Path, out: Path):
    report = merge([make_run(tmp_path / "a", diag_id="d1"), make_run(tmp_path / "b", diag_id="d2")], out)
    assert report.duplicates == {"layers": 0, "runs": 0, "curves": 3}
    assert (report.merged, report.rows) == (2, {"layers": 12, "runs": 2, "curves": 3})


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        (1.0, 1.0 + 1e-8, True),
        (1.0, 1.0 + 1e-4, False),
        (1e-30, 1.1e-30, False),  # relative, however small
        (math.nan, math.nan, True),
        (None, None, True),
        (None, math.nan, False),
        (math.nan, 1.0, False),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
    ],
)
def test_science_agrees_within_the_tolerance(
    tmp_path: Path, out: Path, one: float | None, other: float | None, agree: bool
):
    folders = [make_run(tmp_path / str(i), layers={"r_radial": value}) for i, value in enumerate((one, other))]
    if agree:
        assert merge(folders, out).duplicates["layers"] == 6
    else:
        with pytest.raises(ConfigError, match="r_radial"):
            merge(folders, out)


def test_a_contradiction_names_sources_key_column_and_both_values(tmp_path: Path, out: Path):
    one = make_run(tmp_path / "one", layers={"r_mean": 0.25, "r_radial": 0.5})
    other = make_run(tmp_path / "other", layers={"r_mean": 0.25, "r_radial": 0.75})
    with pytest.raises(ConfigError) as caught:
        merge([one, other], out)
    text = str(caught.value)
    for part in (
        str(one),
        str(other),
        "run_id=softmax-1, diag_id=d, step=0, site=blocks.0.ln_1, call=0",
        "r_radial is 0.5 ",
        "0.75",
    ):
        assert part in text
    assert "r_mean" not in text
    assert "\n" not in text
    assert not out.exists()
    assert merge([one, other], out, rtol=1.0).duplicates["layers"] == 6


def test_a_contradiction_names_its_size_and_in_what_the_runs_differ(tmp_path: Path, out: Path):
    made = {"threads": 1, "commit": "aaa", "device": "cpu", "torch_version": "2.13", "wall_s": 1.0}
    one = make_run(tmp_path / "one", run=made, layers={"r_mean": 1.0, "r_radial": 1.0})
    other = made | {"threads": 2, "commit": None, "wall_s": 2.0}
    two = make_run(tmp_path / "two", run=other, layers={"r_mean": 1.0 + 2e-6, "r_radial": 1.0 - 3e-6})
    with pytest.raises(ConfigError) as caught:
        merge([one, two], out)
    said = str(caught.value)
    values = "r_radial is 1.0 in the one and 0.999997 in the other"
    assert (
        f"{values}, a relative difference of 3e-06 where rtol allows 1e-06 (11 more values differ, none by more)"
        in said
    )
    apart = "the two runs differ in commit (aaa and None), threads (1 and 2)"
    assert said.endswith(f"{apart}: drop one of them, or raise rtol")
    same = make_run(tmp_path / "same", run=made, layers={"r_mean": 1.5, "r_radial": 1.0})
    with pytest.raises(
        ConfigError, match=r"difference of 0\.33 .*agree in .*commit, .*torch_version, .*device, threads"
    ):
        merge([one, same], out)
    fewer = make_run(tmp_path / "fewer", run=other, layers={"r_mean": 1.0, "r_radial": 1.0}, steps=(0,))
    with pytest.raises(ConfigError, match=f"not the same rows of layers; {re.escape(apart)}"):
        merge([one, fewer], out)
    text = make_run(tmp_path / "text", run=made, layers={"r_mean": 1.0, "r_radial": 1.0, "norm": "rmsnorm"})
    with pytest.raises(ConfigError, match=r"norm is .* and rmsnorm in the other") as caught:
        merge([one, text], out)
    assert "relative" not in str(caught.value)
    assert "rtol" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("run", {"val_loss_nats": 3.0}),
        ("run", {"steps_done": 99}),
        ("run", {"data_sha256": "other"}),
        ("curves", {"lr": 3.0}),
        ("layers", {"norm": "rmsnorm"}),
        ("layers", {"n_zero": 1}),
    ],
)
def test_any_science_column_of_any_table_can_contradict(tmp_path: Path, out: Path, table: str, change: dict[str, Any]):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{table: change})]
    with pytest.raises(ConfigError, match=next(iter(change))):
        merge(folders, out)


def test_what_may_differ_may_differ(tmp_path: Path, out: Path):
    free = {
        "train_s": 1.0,
        "tokens_per_s": 1.0,
        "device": "x",
        "threads": 1,
        "dirty": True,
        "commit": None,
        "torch_version": "0",
    }
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", run=free, layers={"jacobian_residual": 1e-3}),
    ]
    assert merge(folders, out).duplicates["runs"] == 1


@pytest.mark.parametrize("year", [2023, 2025])  # the part began before or after the whole: is kept or is dropped
@pytest.mark.parametrize("fewer", [{"steps": (100,)}, {"sites": SITES[:2]}, {"steps": ()}, {"steps": (0, 50)}])
def test_the_same_run_with_other_rows_is_a_contradiction(tmp_path: Path, out: Path, fewer: dict[str, Any], year: int):
    whole = make_run(tmp_path / "whole")
    part = make_run(tmp_path / "part", run={"started_at": f"{year}-01-01T00:00:00+00:00"}, **fewer)
    with pytest.raises(ConfigError, match="not the same rows of layers") as caught:
        merge([whole, part], out)
    assert str(whole) in str(caught.value)
    assert str(part) in str(caught.value)


def test_a_row_twice_in_one_file_is_counted(tmp_path: Path, out: Path):
    folder = make_run(tmp_path / "0")
    rewrite(folder / "curve.parquet", lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    assert merge([folder], out).duplicates == {"layers": 0, "runs": 0, "curves": 1}
