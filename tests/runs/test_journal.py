"""Rows that came in before a run was cut off: on the disk whatever ended the process, and kept up to the step resumed at."""

import logging
import math
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import lnjac
from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.norms import formulas
from lnjac.runs import folder as runs
from lnjac.runs import journal
from lnjac.runs.journal import Damaged, Journal
from lnjac.runs.record import Record

MINE = [Column("place", "string", "", "where"), Column("value", "float64", "", "how much")]
NORM = {column.name: None for column in formulas.columns()} | {"site": "ln", "call": 0, "r_mean": math.nan}
CONFIG = {"lr": 0.1}


def record(folder: Path, **more: Any) -> Record:
    return lnjac.record(folder, **{"config": CONFIG, "seed": 1, "tables": {"mine": MINE}, **more})


def steps(run: Record, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.scalars(step, train_loss=1 / step, accuracy=step / 100)
        if step % 2 == 0:
            run.layers([{**NORM, "r_radial": step / 3, "mine": step}], step)
            run.rows("mine", [{"place": "ä\n", "value": math.inf}], step)


def cut(folder: Path, last: int, error: type[BaseException] = KeyboardInterrupt, first: int = 1, **more: Any) -> None:
    """Record up to a step, where the process is told to stop."""
    with suppress(error), record(folder, **more) as run:
        steps(run, first, last)
        raise error


def tables(folder: Path) -> dict[str, str]:
    return {
        name: repr(runs.read_table(folder / runs.file_of(name)).to_pylist()) for name in ("layers", "curves", "mine")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    with record(folder) as run:
        steps(run, 1, 9)
    assert not (folder / runs.JOURNAL).exists()
    return tables(folder)


KILLED = """
import sys, time, lnjac
with lnjac.record(sys.argv[1], config={"lr": 0.1}, seed=1) as run:
    for step in range(1, 10**9):
        run.scalars(step, train_loss=1 / step)
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_row_of_a_call_that_returned(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 500:
                process.send_signal(signal.SIGKILL)
                break
        returned = max([500, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    assert process.returncode == -signal.SIGKILL
    assert runs.read_status(tmp_path / "a")["status"] == "running"
    with record(tmp_path / "a", resume=returned) as run:
        pass
    rows = runs.read_table(run.path / "curve.parquet").to_pylist()
    assert [(row["step"], row["train_loss_nats"]) for row in rows] == [(s, 1 / s) for s in range(1, returned + 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(
    error: type[BaseException], whole: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cut(tmp_path, 5, error)
    cut(tmp_path, 8, error, first=4, resume=3)
    assert "goes on from the checkpoint after update 3: 5 calls kept, the last of step 3, 4 dropped" in caplog.text
    with record(tmp_path, resume=6) as run:
        steps(run, 7, 9)
    assert tables(tmp_path) == whole
    (row,) = runs.read_table(tmp_path / "run.parquet").to_pylist()
    assert (row["resumed_at"], row["status"]) == (6, "done")
    assert not (tmp_path / runs.JOURNAL).exists()


def test_time_and_start_are_those_of_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "now", lambda: "first")
    with suppress(KeyboardInterrupt), record(tmp_path) as run:
        run.seconds |= {"wall_s": 100.0, "eval_s": 7.0}
        run.scalars(1, train_loss=1.0)
        raise KeyboardInterrupt
    monkeypatch.setattr(runs, "now", lambda: "second")
    with record(tmp_path, resume=1) as run:
        run.scalars(2, train_loss=1.0)
    (row,) = runs.read_table(tmp_path / "run.parquet").to_pylist()
    assert (row["started_at"], row["eval_s"]) == ("first", 7.0)
    assert 100 < row["wall_s"] < 110


def test_without_resume_a_run_that_was_cut_off_starts_anew(whole: dict[str, str], tmp_path: Path) -> None:
    cut(tmp_path, 7)
    with record(tmp_path) as run:
        steps(run, 1, 9)
    assert tables(tmp_path) == whole


def test_a_run_cut_off_before_its_first_row_is_resumed_without_rows(whole: dict[str, str], tmp_path: Path) -> None:
    cut(tmp_path, 0)
    with record(tmp_path, resume=0) as run:
        steps(run, 1, 9)
    assert tables(tmp_path) == whole


def test_rows_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    cut(tmp_path, 3)
    before = (tmp_path / runs.JOURNAL).read_bytes()
    for more in ({}, {"resume": 2}):
        with pytest.raises(
            ConfigError, match=r"holds another run: its run_id is .*: choose another folder, or delete it"
        ):
            record(tmp_path, seed=2, **more).__enter__()
    assert (tmp_path / runs.JOURNAL).read_bytes() == before


def test_there_must_be_rows_to_resume(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"resume=4, but .* holds no start of this run \(missing\): leave out resume="
    ):
        record(tmp_path / "none", resume=4).__enter__()
    with record(tmp_path / "done") as run:
        steps(run, 1, 4)
    with record(tmp_path / "done", resume=4) as run:
        assert run.found == "done"
    (tmp_path / "done" / "curve.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no start of this run \(curve.parquet .*\): leave out resume="):
        record(tmp_path / "done", resume=4).__enter__()


def test_any_altered_byte_is_found_and_a_cut_line_left_out(tmp_path: Path) -> None:
    cut(tmp_path, 3)
    path = tmp_path / runs.JOURNAL
    content = path.read_bytes()
    _, entries = journal.read(path)
    assert [entry["step"] for entry in entries] == [1, 2, 2, 2, 3]
    last = content[:-1].rfind(b"\n") + 1
    for at in range(len(content)):
        path.write_bytes(content[:at])
        assert journal.read(path)[1] == entries[: max(0, content[:at].count(b"\n") - 1)]
    for at in range(0, len(content) - 1, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(Damaged, match=r"line \d was altered"):
            journal.read(path)
    path.write_bytes(content[: last + 9] + b"X" + content[last + 10 :])
    with pytest.raises(ConfigError, match=r"rows.journal cannot be resumed: line 6 was altered .*; start the run anew"):
        record(tmp_path, resume=2).__enter__()
    assert runs.read_status(tmp_path)["status"] == "interrupted"
    with record(tmp_path) as run:
        steps(run, 1, 1)
    assert runs.read_status(tmp_path)["status"] == "done"


def test_what_the_disk_refuses_is_written_when_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        """A disk that takes one line and half of the next, and then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 30

        def write(self, text: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = self.file.write(text[: self.room])
            self.room -= taken
            return int(taken)

    kept = Journal(tmp_path / "x", {"run_id": "a"})
    kept.add({"step": 1})
    file = kept.file
    kept.file = Full(file)  # type: ignore[assignment]
    for step in (2, 3, 4):
        kept.add({"step": step})
    assert caplog.text.count("x cannot be written (no space left on device): rows are in memory alone") == 1
    assert [entry["step"] for entry in journal.read(tmp_path / "x")[1]] == [1, 2]
    kept.file = file
    kept.add({"step": 5})
    kept.close()
    assert [entry["step"] for entry in journal.read(tmp_path / "x")[1]] == [1, 2, 3, 4, 5]


def test_a_journal_of_a_later_form_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FORMAT", 2)
    cut(tmp_path, 3)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"it has format 2, this lnjac reads 1; start the run anew"):
        record(tmp_path, resume=2).__enter__()


def test_rows_that_no_longer_fit_are_not_resumed(tmp_path: Path) -> None:
    cut(tmp_path, 4)
    with pytest.raises(ConfigError, match="does not fit this run's tables any more: mine is not a declared table"):
        record(tmp_path, tables={}, resume=4).__enter__()
