"""One run from the command line: values that are refused, signals, folders, encodings and readers that go away."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import TINY, assert_ends_well_without_a_reader, command
from support.paths import ROOT

import lnjac
from lnjac.runs import folder as runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad",
    [
        "attn_mode=softmx",
        "attn_mod=softmax",
        "seed=abc",
        "model.n_embd=130",
        "method=dfa method.policy.head=random",
        "attn_mode=nan",
        "attn_mode._target_=lnjac.gpt.attention.Relu",
        "optimizer.lr=inf",
    ],
)
def test_a_bad_value_exits_without_traceback(tmp_path: Path, bad: str) -> None:
    done = command(*bad.split(), cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    assert bad.split("=")[0].split(".")[0] in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "every"),
    [(signal.SIGINT, "300"), pytest.param(signal.SIGTERM, "300", marks=pytest.mark.rare), (signal.SIGTERM, "null")],
)
def test_a_run_told_to_stop_keeps_a_checkpoint_and_no_half_written_file(
    tmp_path: Path, number: int, every: str
) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    words = ["model=tiny", "steps=100", "batch_size=64", "eval.tokens=500", "threads=1", "hydra.run.dir=out"]
    words.append(f"checkpoint.every={every}")
    line = [sys.executable, str(ROOT / "run.py"), *words]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while runs.read_status(tmp_path / "out").get("status") != "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        while "step" not in (log := tmp_path / "out" / "run.log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -number
    status = runs.read_status(tmp_path / "out")
    assert status["status"] == runs.INTERRUPTED
    left = {path.name for path in (tmp_path / "out").iterdir()}
    saved = every != "null"
    assert left == {".hydra", "run.log", runs.STATUS, runs.LOCK, runs.JOURNAL, *([runs.CHECKPOINT] if saved else [])}
    promised = "to resume from the checkpoint" if saved else "to start from the beginning"
    assert re.search(rf"interrupted: .*the same command with hydra.run.dir=\S*out {promised}\n", log.read_text())
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("goes on from the checkpoint after update" in log.read_text()) == saved
    assert lnjac.load_run(tmp_path / "out").run["steps_done"][0] == 100


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (("file", "File exists"), ("file/out", "Not a directory"), ("/proc", "No such file")):
        done = command(*TINY, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"nothing can be written in the folder {folder} ({why}")
        assert line.endswith("set hydra.run.dir to another one")


@pytest.mark.slow
def test_a_run_loses_no_table_to_its_outputs_encoding(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = command(*TINY, "hydra.run.dir=out", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sigma_mu  cos_c/t" in done.stdout
    assert "ln_f  " in done.stdout
    assert "σ_μ  cos_c/t" in (tmp_path / "out" / "run.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert_ends_well_without_a_reader(*TINY, "hydra.run.dir=out", cwd=tmp_path)
    assert len(lnjac.load_run(tmp_path / "out").layers) == 5


@pytest.mark.slow
def test_one_run_is_not_told_what_is_said_of_sweeps(tmp_path: Path) -> None:
    done = command(*TINY, "sweep=A", cwd=tmp_path)
    assert done.returncode != 0
    assert "add -m" in done.stderr
    dry = command(*TINY, "dry_run=true", "hydra.run.dir=out", cwd=tmp_path)
    assert dry.returncode == 0
    assert "dry_run: the config is sound; nothing was started" in dry.stdout
    assert not (tmp_path / "out" / runs.STATUS).exists()
