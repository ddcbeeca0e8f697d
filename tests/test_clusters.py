"""Sweeps on a real Slurm (`make test-slurm`) and a real Ray (`make test-ray`); skipped where there is none."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from test_run import command
from test_sweeper import one_job_fails, science, started, wait_for, workers

pytestmark = pytest.mark.slow


def _answers(*words: str) -> bool:
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


slurm = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None or not _answers("sinfo"), reason="needs a Slurm: make test-slurm"
)  # fmt: skip
ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: make test-ray")

SLURM = (
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1.5",
)
LONG = ("model=tiny", "eval.tokens=500", "threads=1", "sweep=A", "report=off")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A Ray of this machine, started as a user would."""
    command_line = Path(sys.executable).with_name("ray")
    folder = tmp_path_factory.mktemp("r")
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["start", "--head", "--num-cpus=2", "--include-dashboard=false", "--port=6399", f"--temp-dir={folder}"]
    subprocess.run([command_line, *words], check=True, capture_output=True, env=env)
    yield ("hydra/launcher=ray", "hydra.launcher.init.address=127.0.0.1:6399")
    subprocess.run([command_line, "stop", "--force"], check=True, capture_output=True)


def logged(text: str, folder: Path) -> Callable[[], list[Path]]:
    """The runs whose log says so, as a condition to wait for."""
    return lambda: [path.parent for path in folder.glob("*/run.log") if text in path.read_text()]


def compare_with_an_undisturbed_sweep(tmp_path: Path, *words: str) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert command("-m", *words, cwd=whole).returncode == 0
    for one, other in zip(*(science(path / "multirun/A/all.parquet") for path in (whole, tmp_path)), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@slurm
def test_slurm_a_job_that_raises(tmp_path: Path) -> None:
    one_job_fails(tmp_path, *SLURM)


@slurm
def test_slurm_a_job_that_is_cancelled(tmp_path: Path) -> None:
    words = (*LONG, "steps=2000", "seed=1,2", *SLURM)
    process = started(tmp_path, *words)
    out = tmp_path / "multirun/A"
    wait_for(logged("step 200/2000", out), 120)
    ids = [path.name for path in (out / ".slurm").iterdir() if "_0" in path.name]
    subprocess.run(["scancel", ids[0]], check=True)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "1 of 2 jobs failed" in err
    assert re.search(r"ended as CANCELLED", err)
    assert len(pd.read_parquet(out / "all.runs.parquet")) == 1
    again = command("-m", *words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    compare_with_an_undisturbed_sweep(tmp_path, *LONG, "steps=2000", "seed=1,2", "hydra/launcher=local")


@slurm
def test_slurm_a_job_out_of_time_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """Slurm sends its notice early, and lets a requeued job wait two minutes: this takes about four."""
    assert command(*LONG[:-1], "steps=500", "hydra.run.dir=pace", cwd=tmp_path).returncode == 0
    pace = pd.read_parquet(tmp_path / "pace" / "run.parquet")["train_s"][0] / 500
    run = (*LONG, f"steps={45 / pace:.0f}", "seed=1")
    process = started(tmp_path, *run, *SLURM, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=20")
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, out + err
    log = next((tmp_path / "multirun/A").glob("*/run.log")).read_text()
    assert "goes on from the checkpoint after update" in log
    assert pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")["resumed_at"][0] > 0
    compare_with_an_undisturbed_sweep(tmp_path, *run, "hydra/launcher=local")


@slurm
def test_slurm_ctrl_c_cancels_the_jobs(tmp_path: Path) -> None:
    process = started(tmp_path, *LONG, "steps=100000", "seed=1", *SLURM)
    out = tmp_path / "multirun/A"
    wait_for(lambda: list(out.glob("*/run.log")), 120)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "interrupted" in err
    jobs = ",".join(path.name for path in (out / ".slurm").iterdir())
    wait_for(
        lambda: not subprocess.run(["squeue", "-h", "-j", jobs], capture_output=True, text=True).stdout.strip(), 60
    )


@ray
def test_ray_a_job_that_raises(tmp_path: Path, cluster: tuple[str, ...]) -> None:
    one_job_fails(tmp_path, *cluster)


def killed_once(tmp_path: Path, *words: str) -> "subprocess.Popen[str]":
    """A sweep, one of whose Ray workers is killed in the middle of its run."""
    process = started(tmp_path, *words)
    wait_for(logged("step 200/2000", tmp_path / "multirun/A"), 120)
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    return process


@ray
def test_ray_a_worker_that_dies_is_replaced_and_its_run_goes_on(tmp_path: Path, cluster: tuple[str, ...]) -> None:
    words = (*LONG, "steps=2000", "seed=1,2", "checkpoint.every=0.5")
    process = killed_once(tmp_path, *words, *cluster)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert set(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")["resumed_at"] > 0) == {True, False}
    compare_with_an_undisturbed_sweep(tmp_path, *words, "hydra/launcher=local")


@ray
def test_ray_a_worker_that_dies_for_good_costs_its_own_run(tmp_path: Path, cluster: tuple[str, ...]) -> None:
    words = (*LONG, "steps=2000", "seed=1,2", *cluster)
    process = killed_once(tmp_path, *words, "hydra.launcher.max_retries=0")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "1 of 2 jobs failed" in err
    assert len(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")) == 1
    assert command("-m", *words, cwd=tmp_path).returncode == 0
