"""Merging the tables in long form, which only runs have whose diagnostics asked for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import make_run, rewrite, rows_of

from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions
from lnjac.runs.schema import CORE, FROZEN

SWAPS = [
    {"place": place, "surrogate": "ste", "radial": radial, "part": "all"} for place in "ab" for radial in (0.0, 1.0)
]
TENSORS = [{"kind": "model", "name": "all", "call": 0}, {"kind": "parameter", "name": "head.weight", "call": 0}]
BOTH = {"swaps": SWAPS, "tensors": TENSORS}


def test_a_table_is_written_where_any_run_has_rows_of_it(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2, long=BOTH)
    make_run(tmp_path / "s" / "2", seed=3, long={"swaps": SWAPS[:2], "mechanism": []})
    report = merge([tmp_path / "s"], out)
    assert list(companions(out)) == [*CORE, "swaps", "tensors"]
    assert report.rows == {"layers": 18, "runs": 3, "curves": 9, "swaps": 6, "tensors": 2}
    assert {name: len(load(path)) for name, path in companions(out).items()} == report.rows
    swaps = runs.read_table(companions(out)["swaps"])
    assert swaps.schema.remove_metadata() == runs.schema(FROZEN["swaps"].values())
    assert swaps["run_id"].to_pylist() == ["softmax-2"] * 4 + ["softmax-3"] * 2
    assert swaps.slice(0, 4).to_pylist() == runs.read_table(tmp_path / "s" / "1" / "swaps.parquet").to_pylist()
    assert "2 rows of tensors" in report.lines()[0]


def test_what_an_earlier_merge_had_and_this_one_has_not_is_removed(tmp_path: Path, out: Path):
    rich, poor = make_run(tmp_path / "0", seed=1, long=BOTH), make_run(tmp_path / "1", seed=2)
    merge([rich, poor], out)
    merge([poor], out)
    assert {path.name for path in out.parent.iterdir()} == {
        "all.parquet",
        "all.runs.parquet",
        "all.curves.parquet",
        "all.merge.json",
    }


def test_merging_in_stages_gives_the_same_rows(tmp_path: Path, out: Path):
    folders = [
        make_run(tmp_path / "0", seed=1, long=BOTH),
        make_run(tmp_path / "1", seed=2),
        make_run(tmp_path / "2", seed=3, long={"swaps": SWAPS}),
    ]
    merge(folders, out)
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    merge(folders[:2], first)
    assert list(companions(second)) == list(CORE)
    merge([first, folders[2]], second)
    assert rows_of(second) == rows_of(out)


@pytest.mark.parametrize("name", ["old.swaps.parquet", "old.tensors.parquet"])
def test_a_table_in_long_form_names_its_merge(tmp_path: Path, out: Path, name: str):
    old = tmp_path / "old.parquet"
    merge([make_run(tmp_path / "0", long=BOTH)], old)
    merge([tmp_path / name], out)
    assert rows_of(out) == rows_of(old)
    assert merge(sorted(tmp_path.glob("*.parquet")), out).found == 1


@pytest.mark.parametrize("table", [name for name in FROZEN if name not in CORE])
def test_an_output_named_like_a_companion_is_refused(tmp_path: Path, table: str):
    with pytest.raises(ConfigError, match="means something else"):
        merge([make_run(tmp_path / "0")], tmp_path / f"all.{table}.parquet")
    with pytest.raises(ConfigError, match="means something else"):
        merge([tmp_path / "0"], tmp_path / f"{table}.parquet")


def forget(folder: Path, file: str) -> None:
    """Take a file out of the folder's status: it is an earlier run's."""
    status = json.loads((folder / runs.STATUS).read_text())
    del status["sha256"][file]
    (folder / runs.STATUS).write_text(json.dumps(status))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "swaps.parquet is missing"),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "swaps.parquet cannot be read"),
    "another table": (
        lambda path: path.write_bytes((path.parent / "tensors.parquet").read_bytes()),
        "does not hold the",
    ),
    "altered": (
        lambda path: runs.write_table(path, runs.read_table(path).slice(1), {"table": "swaps"}),
        "is not the file that",
    ),
    "a column lost": (lambda path: rewrite(path, lambda t: t.drop_columns(["part"])), "lacks the column part"),
    "another run's": (
        lambda path: rewrite(path, lambda t: t.set_column(1, "diag_id", [["other"] * len(t)])),
        "its swaps hold rows of a run that it does not have",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_run_whose_status_lists_a_table_must_have_it_whole(tmp_path: Path, out: Path, kind: str):
    make_run(tmp_path / "s" / "good", seed=1, long=BOTH)
    bad = make_run(tmp_path / "s" / "bad", seed=2, long=BOTH)
    damage, reason = DAMAGE[kind]
    damage(bad / "swaps.parquet")
    report = merge([tmp_path / "s"], out)
    assert [skip.path for skip in report.skipped] == [str(bad)]
    assert reason in report.skipped[0].reason
    assert report.rows["swaps"] == 4


def test_a_file_that_the_status_does_not_list_is_an_earlier_runs(tmp_path: Path, out: Path):
    forget(make_run(tmp_path / "0", long=BOTH), "swaps.parquet")
    assert list(merge([tmp_path / "0"], out).rows) == [*CORE, "tensors"]


MERGE_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "cannot be read"),
    "fewer rows": (lambda path: rewrite(path, lambda t: t.slice(1)), "not of one merge"),
    "a run's": (lambda path: rewrite(path, lambda t: t, merged=False), "does not hold the swaps of an earlier merge"),
    "of another merge": (lambda path: rewrite(path, lambda t: t, merge_id="x"), "not of one merge"),
}


@pytest.mark.parametrize("kind", list(MERGE_DAMAGE))
def test_a_table_of_an_earlier_merge_is_checked_like_the_others(tmp_path: Path, out: Path, kind: str):
    old = tmp_path / "old.parquet"
    merge([make_run(tmp_path / "0", seed=1, long=BOTH)], old)
    damage, reason = MERGE_DAMAGE[kind]
    damage(companions(old)["swaps"])
    (skip,) = merge([old, make_run(tmp_path / "1", seed=2)], out).skipped
    assert skip.path == str(old)
    assert reason in skip.reason


def test_a_strangers_file_beside_a_merge_is_not_part_of_it(tmp_path: Path, out: Path):
    old, other = tmp_path / "old.parquet", tmp_path / "other.parquet"
    merge([make_run(tmp_path / "0", seed=1)], old)
    merge([make_run(tmp_path / "1", seed=2, long=BOTH)], other)
    companions(other)["swaps"].rename(tmp_path / "old.swaps.parquet")
    assert list(merge([old], out).rows) == list(CORE)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ([*SWAPS[:3], SWAPS[3] | {"grad_cos": 2.0}], "grad_cos is .* in the one and 2.0 in the other"),
        (SWAPS[:3], "not the same rows of swaps"),
        ([], "not the same rows of swaps"),
    ],
)
def test_the_same_run_must_agree_in_long_form_too(tmp_path: Path, out: Path, other: list[dict[str, Any]], reason: str):
    folders = [make_run(tmp_path / "a", long={"swaps": SWAPS}), make_run(tmp_path / "b", long={"swaps": other})]
    for sources in (folders, folders[::-1]):
        with pytest.raises(ConfigError, match=reason if sources is folders else "swaps"):
            merge(sources, out)


def test_equal_rows_in_long_form_are_dropped_and_counted(tmp_path: Path, out: Path):
    report = merge([make_run(tmp_path / name, long=BOTH) for name in "ab"], out)
    assert report.duplicates == {"layers": 6, "runs": 1, "curves": 3, "swaps": 4, "tensors": 2}
    assert set(report.rows) < set(FROZEN)
