"""Which runs and merged tables a merge finds in folders, and how those that the file system withholds are named."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import make_run
from support.raising import raise_

from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import merged
from lnjac.runs import read as reader
from lnjac.runs import state as plan
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions


def test_runs_sweeps_and_merged_files_mix(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "old", seed=1)], tmp_path / "old.parquet")
    make_run(tmp_path / "sweep" / "0", seed=2)
    make_run(tmp_path / "sweep" / "deeper" / "1", seed=3)
    one = make_run(tmp_path / "one", seed=4)
    report = merge([tmp_path / "old.parquet", tmp_path / "sweep", one], out)
    assert (report.found, report.merged, report.skipped) == (4, 4, [])
    assert load(companions(out)["runs"])["seed"].tolist() == [1, 2, 3, 4]
    assert report.rows == {"layers": 4 * 6, "runs": 4, "curves": 4 * 3}
    assert {name: len(load(path)) for name, path in companions(out).items()} == report.rows


def test_hidden_folders_are_not_searched(tmp_path: Path, out: Path):
    make_run(tmp_path / "sweep" / "0")
    make_run(tmp_path / "sweep" / ".hydra" / "1", seed=2)
    assert merge([tmp_path / "sweep"], out).found == 1


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "seed=1,attn_mode=x",
        "größe-√σ-模型",
        "x" * 200 + "/" + "y" * 150,
        "seed=1/attn_mode=relu",
        "a'b\"c#d%20",
    ],
)
def test_any_folder_name_will_do(tmp_path: Path, out: Path, name: str):
    make_run(tmp_path / name / "0", seed=5)
    merge([tmp_path], out)
    frame = load(companions(out)["runs"])
    assert frame["seed"].tolist() == [5]
    assert frame["attn_mode"].tolist() == ["softmax"]  # from the file, not from the path


def test_one_folder_under_two_names_is_read_once(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "sweep" / "0")
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    names = ["sweep", "./sweep/0", "sweep/../sweep", "link", str(tmp_path / "sweep")]
    report = merge([Path(name) for name in names], out)
    assert (report.found, report.merged, report.duplicates["runs"]) == (1, 1, 0)


def test_a_merged_file_counts_only_when_named(tmp_path: Path, out: Path):
    make_run(tmp_path / "sweep" / "0", seed=1)
    inside = tmp_path / "sweep" / "all.parquet"
    merge([make_run(tmp_path / "else", seed=2)], inside)
    assert merge([tmp_path / "sweep"], out).found == 1
    assert merge([tmp_path / "sweep", inside], out).found == 2


def test_a_shell_pattern_that_names_all_files_of_a_merge_names_one(tmp_path: Path, out: Path):
    first = tmp_path / "first.v1.parquet"
    merge([make_run(tmp_path / "0")], first)
    report = merge(sorted(tmp_path.glob("*.parquet")), out)
    assert (report.found, report.merged, report.duplicates["runs"]) == (1, 1, 0)


def test_a_link_to_itself_is_skipped_by_name(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    (tmp_path / "s" / "loop").symlink_to("loop")
    report = merge([tmp_path / "s"], out)
    assert (report.merged, report.found) == (1, 2)
    assert report.skipped == [reader.Skip(str(tmp_path / "s" / "loop"), "too many levels of symbolic links")]
    assert open_tables(tmp_path / "s").warnings == [f"1 runs were found and not merged: {tmp_path / 's' / 'loop'}"]
    with pytest.raises(ConfigError, match=r"strict(?s:.*)loop: too many levels"):
        merge([tmp_path / "s"], out, strict=True)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"no runs in .*\n.*loop: too many levels"):
        merge([tmp_path / "t"], out)


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Take the permission to read a file or folder away, from root too."""
    paths: set[str] = set()

    def guarded(real: Any) -> Any:
        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            if str(path) in paths:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **more)

        return call

    monkeypatch.setattr(os, "scandir", guarded(os.scandir))
    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    return lambda path: paths.add(str(path))


def test_what_may_not_be_read_is_skipped_by_name(tmp_path: Path, out: Path, denied: Callable[[Path], None]):
    make_run(tmp_path / "s" / "0", seed=1)
    secret = make_run(tmp_path / "s" / "secret", seed=2)
    denied(secret / runs.STATUS)
    (tmp_path / "s" / "closed").mkdir()
    denied(tmp_path / "s" / "closed")
    report = merge([tmp_path / "s"], out)
    assert report.merged == 1
    assert [(Path(path).name, reason) for path, reason in report.skipped] == [
        ("closed", "permission denied"),
        ("secret", "status.json: permission denied"),
    ]
    identity = {"run_id": "softmax-2", "diag_id": "d"}
    assert plan.state(secret, identity) == plan.State(plan.BROKEN, "status.json: permission denied")


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_left_where_flock_is_not_offered_is_said_and_not_taken_for_a_living_run(
    tmp_path: Path, monkeypatch: Any
):
    folder = make_run(tmp_path / "0", status="running")
    identity = {"run_id": "softmax-1", "diag_id": "d"}
    held = runs.claimed(folder)
    assert plan.state(folder, identity) == plan.State(runs.RUNNING)
    held.release()
    shutil.copytree(folder, other := tmp_path / "2")  # what a killed process leaves: its lock's file, empty
    assert plan.state(other, identity) == plan.State(runs.INTERRUPTED)
    monkeypatch.setattr(merged.fcntl, "flock", lambda *_: raise_(OSError(errno.ENOSYS, "Function not implemented")))
    found = plan.state(other, identity)
    assert found.name == plan.BROKEN
    assert found.reason.endswith(f"if no run writes there, delete {other / runs.LOCK}")
    with pytest.raises(runs.InUse, match="offers no flock"):
        runs.RunFolder(other, identity)
    (other / runs.LOCK).unlink()
    assert plan.state(other, identity) == plan.State(runs.INTERRUPTED)
    out = runs.RunFolder(other, identity)
    out.release()


def test_a_folder_that_may_hold_runs_is_not_taken_for_its_merged_table(tmp_path: Path, denied: Callable[[Path], None]):
    merge([make_run(tmp_path / "0")], tmp_path / "s" / "all.parquet")
    (tmp_path / "s" / "closed").mkdir()
    denied(tmp_path / "s" / "closed")
    with pytest.raises(ConfigError, match=r"no runs in .*\n.*closed: permission denied"):
        open_tables([tmp_path / "s"])


@pytest.mark.parametrize("name", ["layers.parquet", "run.parquet", "status.json"])
def test_one_file_of_a_run_is_refused_with_the_remedy(tmp_path: Path, out: Path, name: str):
    folder = make_run(tmp_path / "0")
    with pytest.raises(ConfigError, match="name its folder"):
        merge([folder / name], out)


def test_nothing_found_says_what_to_name(tmp_path: Path, out: Path):
    with pytest.raises(ConfigError, match=r"no runs in .*name run folders"):
        merge([tmp_path], out)
    with pytest.raises(ConfigError, match="does not exist"):
        merge([tmp_path / "nope"], out)
