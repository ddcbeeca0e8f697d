"""What a merge remembers of the runs it read: used only where it holds, and never to be seen in the rows."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from folders import make_run, rewrite, rows_of, with_column
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lnjac import compaction, pile, runs, sweep
from lnjac.config import ConfigError
from lnjac.sources import index_file
from lnjac.sweep import companions, merge
from lnjac.tables import Column

SWAPS = {"swaps": [{"place": "all", "surrogate": "ste", "radial": 0.0, "part": "all"}]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "all.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep of five runs that merged itself."""
    for seed in range(5):
        make_run(tmp_path / "s" / str(seed), seed=seed, long=SWAPS if seed % 2 else None)
    merge([tmp_path / "s"], tmp_path / "s" / "all.parquet")
    return tmp_path / "s"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that are read, filled as they are."""
    names: list[str] = []
    real = sweep.read
    monkeypatch.setattr(sweep, "read", lambda source: (names.append(source.path.name), real(source))[1])
    return names


def forget(folder: Path) -> None:
    index_file(folder / "all.parquet").unlink()


def anew(sources: Sequence[Path], out: Path) -> dict[str, tuple[str, str]]:
    """The rows of a merge that remembers nothing: made of copies whose times differ, with no index near."""
    copies = [
        Path(shutil.copytree(path, out.parent / "copies" / path.name, copy_function=shutil.copy)) for path in sources
    ]
    for index in out.parent.rglob("*.index.json"):
        index.unlink()
    merge(copies, out.parent / "anew" / "all.parquet")
    return rows_of(out.parent / "anew" / "all.parquet")


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def altered(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20] + b"x" * 20)


def test_unchanged_runs_are_taken_from_the_sweeps_own_merge(folder: Path, out: Path, opened: list[str]):
    report = merge([folder], out)
    assert opened == []
    assert (report.found, report.merged, report.rows["swaps"]) == (5, 5, 2)
    assert rows_of(out) == rows_of(folder / "all.parquet") == anew([folder], out)


def test_the_very_same_runs_are_copied_byte_for_byte(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "combine", None)  # not a row is looked at
    report = merge([folder], out)
    assert (report.output, report.sources) == (str(out), [str(folder)])
    for name, path in companions(folder / "all.parquet").items():
        assert companions(out)[name].read_bytes() == path.read_bytes()
    assert merge([folder], out) == report  # unchanged, by its own index


@pytest.mark.parametrize("file", ["all.parquet", "all.swaps.parquet", "all.merge.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, altered, lambda path: path.write_bytes(b"")], ids=["removed", "altered", "empty"]
)
def test_a_damaged_merge_is_not_copied(folder: Path, out: Path, file: str, damage: Callable[[Path], Any]):
    expected = rows_of(folder / "all.parquet")
    damage(folder / file)
    assert merge([folder], out).merged == 5
    assert rows_of(out) == expected


def test_the_same_runs_in_an_order_that_gives_other_columns_are_not_copied(tmp_path: Path, out: Path):
    slope, gain = Column("attn_mode.slope", "float64", "", ""), Column("method.gain", "float64", "", "")
    one = make_run(tmp_path / "s" / "1", seed=1, config=[(slope, 0.5)])
    two = make_run(tmp_path / "s" / "2", seed=2, config=[(gain, 0.5)])
    merge([one, two], out)
    first = rows_of(out)
    merge([two, one], out)
    assert rows_of(out) != first
    assert rows_of(out) == anew([two, one], out)


def test_a_merge_that_dropped_a_duplicate_is_not_copied(folder: Path, out: Path):
    shutil.copytree(folder / "1", folder / "twin", copy_function=shutil.copy)
    merge([folder], folder / "all.parquet")
    assert merge([folder], out).duplicates["runs"] == 1


def test_a_moved_sweep_is_still_known(folder: Path, out: Path, opened: list[str]):
    folder.rename(folder.parent / "moved")
    merge([folder.parent / "moved"], out)
    assert opened == []


def test_only_new_runs_are_opened(folder: Path, out: Path, opened: list[str]):
    make_run(folder / "new", seed=9, attn_mode="relu", config=[(Column("attn_mode.slope", "float64", "", ""), 0.5)])
    report = merge([folder], folder / "all.parquet")
    assert opened == ["new"]
    assert report.merged == 6
    assert rows_of(folder / "all.parquet") == anew([folder], out)


def test_some_of_a_sweeps_runs(folder: Path, out: Path, opened: list[str]):
    """Companions that none of the chosen runs has, and columns, are as if the others had never been."""
    make_run(folder / "wide", seed=9, config=[(Column("method.gain", "int64", "", ""), 1)])
    merge([folder], folder / "all.parquet")
    opened.clear()
    chosen = [folder / "2", folder / "0"]
    merge([*chosen, folder / "nothing"][:2], out)
    assert sorted(opened) == ["0", "2"]  # a merge is sought in the folders searched and at the output alone
    opened.clear()
    for name in ("1", "3", "4", "wide"):
        shutil.move(folder / name, out.parent / name)
    merge([folder], folder / "some.parquet")
    assert opened == []
    assert rows_of(folder / "some.parquet") == rows_of(out) == anew([folder], out)
    assert list(companions(folder / "some.parquet")) == ["layers", "runs", "curves"]


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a table is altered": (lambda run: altered(run / "layers.parquet"), "cannot be read"),
    "a table in long form is altered": (lambda run: altered(run / "swaps.parquet"), "cannot be read"),
    "a table is removed": (lambda run: (run / "curve.parquet").unlink(), "is missing"),
    "the status is removed": (lambda run: (run / runs.STATUS).unlink(), "no readable status.json"),
    "it failed since": (lambda run: runs.RunFolder(run, {}).status("failed", error="boom"), "failed: boom"),
    "it runs again": (lambda run: runs.RunFolder(run, {}).status("running"), "running"),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("again", [True, False], ids=["by itself again", "elsewhere"])
def test_a_changed_run_is_read_and_judged_anew(folder: Path, out: Path, opened: list[str], change: str, again: bool):
    damage, reason = CHANGES[change]
    damage(folder / "1")
    report = merge([folder], folder / "all.parquet" if again else out)
    assert opened == ["1"]
    assert [Path(skip.path).name for skip in report.skipped] == ["1"]
    assert reason in report.skipped[0].reason
    assert report.merged == 4


def test_a_run_made_again_brings_its_new_rows(folder: Path, out: Path, opened: list[str]):
    make_run(folder / "1", seed=1, run={"val_loss_nats": 42.0}, long=SWAPS)
    merge([folder], out)
    assert opened == ["1"]
    assert 42.0 in sweep.load(companions(out)["runs"])["val_loss_nats"].tolist()
    assert rows_of(out) == anew([folder], out)


def test_a_removed_run_is_gone(folder: Path, out: Path, opened: list[str]):
    shutil.rmtree(folder / "1")
    assert merge([folder], out).merged == merge([folder], folder / "all.parquet").merged == 4
    assert opened == []
    assert rows_of(out) == rows_of(folder / "all.parquet") == anew([folder], out)


def test_times_alone_make_a_run_be_read_again(folder: Path, out: Path, opened: list[str]):
    touched(folder / "3" / "run.parquet")
    assert merge([folder], out).merged == 5
    assert opened == ["3"]


@pytest.mark.parametrize("table", ["layers", "runs", "curves", "swaps"])
@pytest.mark.parametrize("how", ["altered", "removed", "of another merge"])
def test_an_altered_merge_is_not_trusted(folder: Path, out: Path, opened: list[str], table: str, how: str):
    """Not even where it can be read: a table with other rows, rewritten with the same note, is found out."""
    expected, path = rows_of(folder / "all.parquet"), companions(folder / "all.parquet")[table]
    if how == "removed":
        path.unlink()
    elif how == "altered":
        altered(path)
    else:
        name = next(field.name for field in runs.read_table(path).schema if field.type == pa.float64())
        rewrite(path, lambda t: with_column(name, pa.array([0.5] * len(t)))(t))
    merge([folder], out)
    assert opened == list("01234")
    assert rows_of(out) == expected
    opened.clear()
    merge([folder], folder / "all.parquet")  # its own answer is not taken for granted either: the other's rows are
    assert rows_of(folder / "all.parquet") == expected


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"request": 1}', "\0" * 99])
def test_an_index_that_is_none_is_ignored(folder: Path, out: Path, opened: list[str], text: str):
    index_file(folder / "all.parquet").write_text(text)
    assert merge([folder], out).merged == 5
    assert len(opened) == 5


def test_another_versions_index_is_ignored(folder: Path, out: Path, opened: list[str]):
    path = index_file(folder / "all.parquet")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": -1}))
    merge([folder], out)
    assert len(opened) == 5


def test_what_was_checked_against_other_columns_is_checked_again(folder: Path, root: Path):
    """A column that this lnjac declares and the run lacks makes the run unfit, whatever an earlier lnjac remembers."""
    code = (
        "import sys; from pathlib import Path; from lnjac import tables; "
        "tables.LAYERS.append(tables.Column('new', 'float64', '', '')); from lnjac.sweep import merge; "
        "merge([Path(sys.argv[1])], Path(sys.argv[1]) / 'all.parquet')"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=root, capture_output=True, text=True)
    assert "layers.parquet lacks the column new" in done.stderr


def test_nothing_changed_leaves_the_files_as_they_are(folder: Path, out: Path, opened: list[str]):
    (folder / "late").mkdir()
    runs.RunFolder(folder / "late", {}).status("running")
    first = merge([folder], out)
    before = {path: path.stat().st_mtime_ns for path in out.parent.iterdir()}
    opened.clear()
    calls: list[tuple[int, int]] = []
    again = merge([folder], out, progress=lambda done, total: calls.append((done, total)))
    assert again == first
    assert again.skipped[0].reason == "running"
    assert {path: path.stat().st_mtime_ns for path in out.parent.iterdir()} == before
    assert (opened, calls) == ([], [(6, 6)])
    with pytest.raises(ConfigError, match="strict"):
        merge([folder], out, strict=True)
    assert merge([folder], out, rtol=0.5).merged == 5
    (folder / "late").rename(folder / "later")
    assert Path(merge([folder], out).skipped[0].path).name == "later"


@pytest.mark.parametrize("name", ["all.parquet", "all.runs.parquet", "all.swaps.parquet", "all.merge.json"])
def test_nothing_changed_but_the_output_is_written_again(folder: Path, out: Path, name: str):
    merge([folder], out)
    before = (out.parent / name).read_bytes()
    altered(out.parent / name)
    merge([folder], out)
    assert (out.parent / name).read_bytes() == before


def test_an_earlier_merge_that_changed_is_read_again(folder: Path, out: Path):
    merge([folder / "all.parquet"], out)
    make_run(folder / "new", seed=9)
    merge([folder], folder / "all.parquet")
    assert merge([folder / "all.parquet"], out).merged == 6


def test_copies_are_still_duplicates(folder: Path, out: Path, opened: list[str]):
    shutil.copytree(folder / "1", folder / "twin")
    report = merge([folder], out)
    assert (report.found, report.merged, report.duplicates["runs"]) == (6, 5, 1)
    assert len(opened) == 1


def test_a_contradiction_is_found_among_remembered_runs(folder: Path, out: Path, opened: list[str]):
    other = folder.parent / "t"
    make_run(other / "x", seed=1, layers={"r_mean": 7.0}, long=SWAPS)
    merge([other], other / "all.parquet")
    opened.clear()
    with pytest.raises(ConfigError, match="r_mean") as caught:
        merge([folder, other], out)
    assert opened == []
    assert str(folder / "1") in str(caught.value)
    assert str(other / "x") in str(caught.value)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs with duplicates, two diagnostics, columns of other names and types, long tables, and no layers."""
    root = tmp_path_factory.mktemp("pool")
    gain = [(Column("method.gain", dtype, "", ""), 1) for dtype in ("int64", "float64")]
    slope = [(Column("attn_mode.slope", "float64", "", ""), 0.5)]
    folders = [
        make_run(root / "a", seed=1, config=slope),
        make_run(root / "b", seed=1, config=slope, run={"device": "other"}),
        make_run(root / "c", seed=1, diag_id="d2", run={"started_at": "2022-01-01T00:00:00+00:00"}),
        make_run(root / "d", seed=2, config=gain[:1], long=SWAPS),
        make_run(root / "e", seed=3, config=gain[1:]),
        make_run(root / "f", seed=4, status="diverged", steps=(), run={"started_at": None}),
        make_run(root / "g", seed=5, steps=(100, 0)),
        make_run(root / "h", seed=6, long={"mechanism": []}),
    ]
    rewrite(folders[6] / "run.parquet", lambda t: t.append_column("nothing", pa.nulls(len(t))))
    rewrite(folders[7] / "layers.parquet", lambda t: t.append_column("day", pa.array([0] * len(t), pa.date32())))
    return folders


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_remembered_never_shows(pool: list[Path], tmp_path: Path, data: st.DataObject):
    """Merge one set of runs, then another into the same file: as if it had been merged alone, bit for bit."""
    first, second = (data.draw(st.lists(st.sampled_from(pool), min_size=1, unique=True)) for _ in range(2))
    out, alone = tmp_path / "all.parquet", tmp_path / "alone" / "all.parquet"
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    merge(first, out)
    report = merge(second, out)
    expected = merge(second, alone)
    assert rows_of(out) == rows_of(alone)
    assert (report.warnings, report.duplicates, report.rows) == (expected.warnings, expected.duplicates, expected.rows)
    known = compaction.Index.load(out)
    assert known is not None
    assert known.runs == compaction.Index.load(alone).runs  # type: ignore[union-attr]


@pytest.mark.parametrize("pieces", [[(300, 900), (0, 300)], [(0, 900), (1200, 1210), (900, 1200)], [(5, 1), (0, 5)]])
def test_rows_that_move_in_large_pieces_come_in_the_order_asked_for(pieces: list[tuple[int, int]]):
    order = np.concatenate([np.arange(a, b) if a < b else np.arange(a, b - 1, -1) for a, b in pieces])
    rows = pa.concat_tables([pa.table({"x": range(1000)}), pa.table({"x": range(1000, 1500)})])
    assert pile._ordered(rows, order)["x"].to_pylist() == order.tolist()
