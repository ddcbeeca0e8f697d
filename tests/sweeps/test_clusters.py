"""Sweeps on a real Slurm (`make test-slurm`) and a real Ray (`make test-ray`); skipped where there is none.

Their command lines are all in LINES, and are composed everywhere: elsewhere nothing else would notice that one has rotted.
"""

import importlib
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
from hydra.test_utils.launcher_common_tests import LauncherTestSuite
from support import nanogpt, own_script
from support.commands import command
from support.paths import ROOT
from support.sweeping import TWO_JOBS, one_job_fails, science, started, sweeper_of, wait_for, workers


def on_slurm(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.usefixtures("slurm")(test))


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.usefixtures("ray")(test))


LOCAL = ("hydra/launcher=local",)
SLURM = (
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1.5",
)
RAY = ("hydra/launcher=ray", "hydra.launcher.init.address=127.0.0.1:6399")
LONG = ("model=tiny", "eval.tokens=500", "threads=1", "sweep=A", "report=off")
ONE, TWO = (*LONG, "steps=1000", "seed=1"), (*LONG, "steps=2000", "seed=1,2")
SAVED = (*TWO, "checkpoint.every=0.5")
OWN_SCRIPT = ("seed=1,2", "how=exit")
LINES = {
    "a job raises on Slurm": (*TWO_JOBS, *SLURM),
    "a job raises on Ray": (*TWO_JOBS, *RAY),
    "one on Slurm": (*ONE, *SLURM),
    "two on Slurm": (*TWO, *SLURM),
    "endless on Slurm": (*LONG, "steps=100000", "seed=1", *SLURM),
    "saved on Ray": (*SAVED, *RAY),
    "without retries on Ray": (*TWO, *RAY, "hydra.launcher.max_retries=0"),
    "with retries on Ray": (*TWO, *RAY),
    "one undisturbed": (*ONE, *LOCAL),
    "two undisturbed": (*TWO, *LOCAL),
    "saved undisturbed": (*SAVED, *LOCAL),
}


@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_the_command_line_makes_sense(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)  # the corpus
    sweeper = sweeper_of(*words)
    folder = sweeper._folder()
    jobs = sweeper._admitted(sweeper._grid(sweeper.config.hydra.overrides.task), folder)
    assert folder == Path("multirun/A")
    assert len(jobs) == 1 + ("seed=1,2" in words)


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip where no Slurm answers. Asked by tests, never while collecting: an installed Slurm that is down takes seconds."""
    remedy = "run the test in a Slurm cluster, or make test-slurm, which starts a Slurm of one node by ../shared/slurm"
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed: pip install -e '.[slurm]', as make test-slurm does")
    if shutil.which("sinfo") is None:
        pytest.skip(f"this machine has no Slurm (the command sinfo is not found): {remedy}")
    try:
        subprocess.run(["sinfo"], check=True, capture_output=True, timeout=5)
    except subprocess.SubprocessError as error:
        pytest.skip(f"no Slurm answers ({error}): {remedy}")


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of this machine, started as a user would."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install -e '.[ray]', as make test-ray does")
    command_line = Path(sys.executable).with_name("ray")
    folder = tmp_path_factory.mktemp("r")
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["start", "--head", "--num-cpus=2", "--include-dashboard=false", "--port=6399", f"--temp-dir={folder}"]
    subprocess.run([command_line, *words], check=True, capture_output=True, env=env)
    yield
    importlib.import_module("ray").shutdown()  # this process's own part in it, of Hydra's suite
    subprocess.run([command_line, "stop", "--force"], check=True, capture_output=True)


def logged(text: str, folder: Path) -> Callable[[], list[Path]]:
    """The runs whose log says so, as a condition to wait for."""
    return lambda: [path.parent for path in folder.glob("*/run.log") if text in path.read_text()]


def submitted(out: Path) -> list[str]:
    """The Slurm ids of a sweep's jobs, in order; its folder also holds a folder for each array of several, and scripts."""
    found = {path.name for path in (out / ".slurm").iterdir() if re.fullmatch(r"\d+(_\d+)?", path.name)}
    return sorted(found - {name.partition("_")[0] for name in found if "_" in name})


def compare_with(undisturbed: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert command("-m", *LINES[undisturbed], cwd=whole).returncode == 0
    for one, other in zip(*(science(path / "multirun/A/all.parquet") for path in (whole, tmp_path)), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@on_slurm
def test_slurm_starts_nothing_after_a_failed_run_if_told_so(tmp_path: Path) -> None:
    folder = own_script.app(tmp_path)
    words = ("seed=1,2,3,4,5,6,7,8", "hydra.sweeper.stop_on_failure=true", *SLURM)
    stopped = own_script.sweep(folder, *words, "how=raise before")
    assert stopped.returncode == 1
    assert re.search(r"^[1-7] were not started: run the same command", stopped.stderr, re.MULTILINE)
    assert own_script.sweep(folder, *words).returncode == 0


@on_slurm
def test_slurm_a_job_that_raises(tmp_path: Path) -> None:
    one_job_fails(tmp_path, *SLURM)


@on_slurm
def test_slurm_a_job_that_is_cancelled(tmp_path: Path) -> None:
    process = started(tmp_path, *LINES["two on Slurm"])
    out = tmp_path / "multirun/A"
    wait_for(logged("step 200/2000", out), 120)
    subprocess.run(["scancel", submitted(out)[0]], check=True)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "1 of 2 jobs failed" in err
    assert re.search(r"ended as CANCELLED", err)
    assert len(pd.read_parquet(out / "all.runs.parquet")) == 1
    again = command("-m", *LINES["two on Slurm"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    compare_with("two undisturbed", tmp_path)


@on_slurm
def test_slurm_a_job_with_notice_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """The notice is the signal that Slurm sends ahead of a time limit or a preemption, here in the middle of the run.

    Left to its clock, Slurm sends it up to a minute early, so that a job of a minute is requeued again and again; and each
    requeued job waits two minutes.
    """
    process = started(tmp_path, *LINES["one on Slurm"])
    out = tmp_path / "multirun/A"
    wait_for(logged("step 100/1000", out), 120)
    (job,) = submitted(out)
    (script,) = (out / ".slurm" / job).glob("*_submission.sh")
    assert "#SBATCH --signal=USR2@60" in script.read_text()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    said, err = process.communicate(timeout=280)
    assert process.returncode == 0, said + err
    log = next(out.glob("*/run.log")).read_text()
    assert "goes on from the checkpoint after update" in log
    assert 100 <= pd.read_parquet(out / "all.runs.parquet")["resumed_at"][0] < 1000
    compare_with("one undisturbed", tmp_path)


@on_slurm
def test_slurm_ctrl_c_cancels_the_jobs(tmp_path: Path) -> None:
    process = started(tmp_path, *LINES["endless on Slurm"])
    out = tmp_path / "multirun/A"
    wait_for(lambda: list(out.glob("*/run.log")), 120)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "interrupted" in err
    (job,) = submitted(out)
    wait_for(lambda: not subprocess.check_output(["squeue", "-h", "-t", "PD,R,CG", "-j", job]), 60)


@on_ray
def test_ray_a_job_that_raises(tmp_path: Path) -> None:
    one_job_fails(tmp_path, *RAY)


def killed_once(tmp_path: Path, line: str) -> "subprocess.Popen[str]":
    """A sweep, one of whose Ray workers is killed in the middle of its run."""
    process = started(tmp_path, *LINES[line])
    wait_for(logged("step 200/2000", tmp_path / "multirun/A"), 120)
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    return process


@on_ray
def test_ray_a_worker_that_dies_is_replaced_and_its_run_goes_on(tmp_path: Path) -> None:
    process = killed_once(tmp_path, "saved on Ray")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert set(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")["resumed_at"] > 0) == {True, False}
    compare_with("saved undisturbed", tmp_path)


@on_ray
def test_ray_a_worker_that_dies_for_good_costs_its_own_run(tmp_path: Path) -> None:
    process = killed_once(tmp_path, "without retries on Ray")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "1 of 2 jobs failed" in err
    assert len(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")) == 1
    assert command("-m", *LINES["with retries on Ray"], cwd=tmp_path).returncode == 0


def own_script_under(engine: tuple[str, ...], tmp_path: Path, said: str) -> None:
    """Somebody else's script, run from another folder than its own: one job ends its process, and is made again."""
    folder = own_script.app(tmp_path / "app")
    done = own_script.sweep(folder, *OWN_SCRIPT, *engine)
    assert done.returncode == 1, done.stdout
    assert "1 of 2 jobs failed:\n  seed=1 how=exit: " in done.stderr
    assert said in done.stderr
    again = own_script.sweep(folder, *OWN_SCRIPT, "how=record", *engine)
    assert again.returncode == 0, again.stderr
    assert "2 jobs: 1 to do (1 failed, 1 done)" in again.stdout
    merged = pd.read_parquet(folder / "multirun/A/all.runs.parquet")
    assert sorted(zip(merged["seed"], merged["double"], strict=True)) == [(1, 6), (2, 6)]  # its own resolver


@on_slurm
def test_slurm_runs_ones_own_script(tmp_path: Path) -> None:
    own_script_under(SLURM, tmp_path, "ended as FAILED")


@on_ray
def test_ray_runs_ones_own_script(tmp_path: Path) -> None:
    own_script_under((*RAY, "hydra.launcher.max_retries=0"), tmp_path, "Ray: ")


def example_under(engine: tuple[str, ...], tmp_path: Path) -> None:
    """examples/nanogpt makes the same tables as on the local engine."""
    tables = []
    for name, words in (("here", ()), ("there", engine)):
        (tmp_path / name).mkdir()
        folder, _ = nanogpt.swept(tmp_path / name, *words)
        assert (folder / "report.html").exists()
        tables.append(science(folder / "all.parquet"))
    for here, there in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(here, there, check_exact=True)


@on_slurm
def test_slurm_runs_the_example(tmp_path: Path) -> None:
    example_under(SLURM, tmp_path)


@on_ray
def test_ray_runs_the_example(tmp_path: Path) -> None:
    example_under(RAY, tmp_path)


# Hydra's own conformance suite for launchers


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
@pytest.mark.filterwarnings("ignore:Future Hydra versions")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("slurm", [*SLURM[1:]])])
class TestSlurm(LauncherTestSuite): ...


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore:Future Hydra versions")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("ray", [*RAY[1:]])])
class TestRay(LauncherTestSuite): ...
