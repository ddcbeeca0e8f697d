"""Files and rows of a run's folder are whole or absent, and its provenance is of the package's own files."""

import subprocess
from pathlib import Path

import pytest

from lnjac.files import write_atomically
from lnjac.runs import folder as runs
from lnjac.runs.schema import RUNS


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_is_never_silently_cut() -> None:
    with pytest.raises(KeyError, match="unheard"):
        runs.table(RUNS, (), [{**{column.name: None for column in RUNS}, "unheard": 1}])


def test_only_the_packages_own_files_make_its_code_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True)

    code, note = tmp_path / "package" / "runs" / "folder.py", tmp_path / "note.md"
    code.parent.mkdir(parents=True)
    code.touch()
    note.touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(runs, "__file__", str(code))
    note.write_text("changed")
    assert runs.provenance.__wrapped__()["dirty"] is False
    code.write_text("changed")
    assert runs.provenance.__wrapped__()["dirty"] is True
