"""The files of a merge: their names, and that they are replaced in one step, whenever the process is killed."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.folders import make_run, rows_of
from support.raising import raise_

from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import merged
from lnjac.runs.diff import diff
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions


@pytest.mark.parametrize(
    "name",
    [
        "all",
        "all.csv",
        "all.parquet.gz",
        "layers.parquet",
        "run.parquet",
        "all.runs.parquet",
        "all.curves.parquet",
    ],
)
def test_an_output_name_that_cannot_be_meant_is_refused(tmp_path: Path, name: str):
    make_run(tmp_path / "s" / "0")
    with pytest.raises(ConfigError, match="the output"):
        merge([tmp_path / "s"], tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path, out: Path):
    out.mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder"):
        merge([make_run(tmp_path / "0")], out)


def test_the_output_may_be_among_the_sources(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0", seed=1)], out)
    assert merge([out, make_run(tmp_path / "1", seed=2)], out).merged == 2
    assert load(companions(out)["runs"])["seed"].tolist() == [1, 2]


def test_a_failing_write_leaves_the_earlier_output_whole(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    merge([make_run(tmp_path / "0", seed=1)], out)
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    real = runs.write_table

    def full(path: Path, data: pa.Table, metadata: Mapping[str, Any]) -> None:
        if metadata["table"] == "curves":
            raise OSError("no space left on device")
        real(path, data, metadata)

    monkeypatch.setattr(runs, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        merge([tmp_path / "0", make_run(tmp_path / "1", seed=2)], out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A run with a table in long form, and one without."""
    swaps = [{"place": "all", "surrogate": "ste", "radial": 0.0, "part": "all"}]
    return make_run(tmp_path / "0", seed=1, long={"swaps": swaps}), make_run(tmp_path / "1", seed=2)


class Killed(BaseException):
    """The process's end, as far as the code can tell."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process be killed before its `step`-th change of the output's folder: nothing that follows is done."""
    n = 0

    def dying(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal n
            n += 1
            if n > step:
                raise Killed
            return real(*arguments, **more)

        return call

    for owner, name in ((Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


LOOKS: dict[str, Callable[[Path], Any]] = {
    "merge": lambda out: merge([out], out),
    "load": lambda out: load(companions(out)["runs"]),
    "read": lambda out: open_tables([out]),
    "diff": lambda out: diff(out, out),
}


@pytest.mark.parametrize(("look", "rich_first"), [("merge", True), ("load", False), ("read", True), ("diff", False)])
@pytest.mark.slow
def test_a_merge_is_one_step_whenever_it_is_killed(
    two: tuple[Path, Path], tmp_path: Path, out: Path, look: str, rich_first: bool, monkeypatch: pytest.MonkeyPatch
):
    """Before the step the old merge is there, and after it the new one, whoever looks at it first."""
    before, after = two if rich_first else two[::-1]
    merge([after], tmp_path / "new" / "all.parquet")
    merge([before], tmp_path / "old" / "all.parquet")
    new, old = (rows_of(tmp_path / name / "all.parquet") for name in ("new", "old"))
    seen, n_steps = [], 0
    while True:
        shutil.rmtree(out.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out.parent)
        with monkeypatch.context() as patched:
            killed_at(n_steps, patched)
            try:
                merge([after], out)
                break
            except Killed:
                pass
        LOOKS[look](out)
        seen.append(rows_of(out))
        assert seen[-1] in (old, new)
        n_steps += 1
    assert seen[0] == old
    assert seen[-1] == new
    assert n_steps >= 6  # so many moves there are
    merge([after], out)
    assert {path.name for path in out.parent.iterdir()} == {path.name for path in companions(out).values()} | {
        "all.merge.json"
    }


def test_what_killed_merges_left_is_removed_but_not_what_one_is_writing(tmp_path: Path, out: Path):
    left = out.parent / ".merge-abc"
    left.mkdir(parents=True)
    (left / "all.parquet").touch()
    run = make_run(tmp_path / "0")
    merge([run], out)
    assert not left.exists()
    code = "import sys; from lnjac.runs.merge import *; merge([Path(sys.argv[1])], Path(sys.argv[2]))"
    with merged.replacing(out) as layers:
        other = subprocess.Popen([sys.executable, "-c", f"from pathlib import Path; {code}", run, out])
        with pytest.raises(subprocess.TimeoutExpired):  # it waits
            other.wait(3)
        assert layers.parent.is_dir()
        for path in out.parent.glob("all.*"):
            shutil.copy(path, layers.parent)
    assert other.wait(60) == 0


def test_without_a_lock_for_folders_a_merge_is_made_and_leaves_what_it_cannot_judge(
    two: Any, out: Path, monkeypatch: Any
):
    monkeypatch.setattr(merged.fcntl, "flock", lambda *_: raise_(OSError(errno.ENOSYS, "no flock here")))
    (out.parent / ".merge-abc").mkdir(parents=True)
    merge([two[0]], out)
    merge([two[1]], out)
    assert load(companions(out)["runs"])["seed"].tolist() == [2]
    assert (out.parent / ".merge-abc").exists()


def test_the_same_merge_gives_the_same_bytes_and_readable_files(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2)
    merge([tmp_path / "s"], out)
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    merge([tmp_path / "s"], out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.parent.iterdir()} == {0o666 & ~umask}
