"""A script of somebody else's under the sweeper: planned by its config alone, handed its runs, and held to what it left."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support.own_script import app, started, sweep, train
from support.sweeping import folders, wait_for, workers

from lnjac.runs import folder as runs

pytestmark = pytest.mark.slow

TWO = ("seed=1,2", "hydra.launcher.jobs=2")
IN_TURN = ("seed=1,2", "hydra.launcher.jobs=1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return app(tmp_path)


def statuses(folder: Path) -> list[str]:
    """The status of each run of the sweep A, in order; of a folder without one, nothing."""
    return sorted(runs.read_status(path.parent).get("status", "") for path in folder.glob("multirun/A/*/.hydra"))


def test_a_single_run_is_handed_its_folder_and_config(folder: Path) -> None:
    done = train(folder, "hydra.run.dir=out", "lr=0.5")
    assert done.returncode == 0, done.stderr
    row = pd.read_parquet(folder / "out/run.parquet").iloc[0]
    assert (row["lr"], row["seed"], row["model.steps"], row["double"]) == (0.5, 1, 3, 6)
    assert not {"paths.out", "how", "pause"} & set(row.index)
    dry = train(folder, "hydra.sweeper.dry_run=true")
    assert (dry.returncode, "the config is sound" in dry.stdout) == (0, True)
    for words, said in (
        (["lr=0"], "lr=0 must be positive: try lr=1e-3\n"),
        (["model=large"], "model.width is missing: give model.width=VALUE\n"),
        (["hydra.sweeper.sweep=A"], "hydra.sweeper.sweep=A names the folder of a sweep, but this command makes a "
            "single run: add -m\n"),
    ):  # fmt: skip
        bad = train(folder, *words)
        assert (bad.returncode, bad.stderr) == (1, said)


@pytest.mark.parametrize(
    "launcher", [("hydra.launcher.jobs=2",), pytest.param(("hydra/launcher=basic",), marks=pytest.mark.rare)]
)
def test_a_sweep_makes_each_run_once_and_merges(folder: Path, launcher: tuple[str, ...]) -> None:
    done = sweep(folder, "lr=1e-3,3e-3", "seed=1,2", *launcher)
    assert done.returncode == 0, done.stderr
    merged = pd.read_parquet(folder / "multirun/A/all.runs.parquet")
    assert sorted(zip(merged["lr"], merged["seed"], strict=True)) == [(1e-3, 1), (1e-3, 2), (3e-3, 1), (3e-3, 2)]
    for path in folders(folder / "multirun/A").values():
        identity = runs.read_status(path)
        assert path.name == f"{identity['run_id']}-{identity['diag_id']}"
    configs = pd.read_parquet(folder / "multirun/A/all.configs.parquet")
    assert {tuple(json.loads(words)) for words in configs["command"]} == {
        ("train.py", f"lr={lr}", f"seed={seed}") for lr in ("0.001", "0.003") for seed in (1, 2)
    }
    line = [sys.executable, "-m", "lnjac", "command", "multirun/A/all.parquet", configs["run_id"][0]]
    told = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert re.match(r"python train.py lr=0.00[13] seed=[12]\n# run_id ", told)
    again = sweep(folder, "lr=1e-3,3e-3", "seed=1,2,3", "how=raise before", "paths.job=9", *launcher)
    assert "6 jobs: 2 to do (4 done)" in again.stdout  # how and paths are no part of a run
    assert "2 of 6 jobs failed" in again.stderr
    dry = sweep(folder, "lr=1e-3,3e-3", "seed=1,2,3,4", "hydra.sweeper.dry_run=true", *launcher)
    assert "8 jobs: 4 to do (4 done, 2 failed)" in dry.stdout
    assert re.search("about 0 min . s of computing", dry.stdout)


def test_all_bad_jobs_are_listed_before_any_starts(folder: Path) -> None:
    done = sweep(folder, "lr=0,1,-1", "seed=1,2")
    assert done.returncode == 1
    assert "4 of 6 jobs cannot run; none was started:\nlr=0 seed=1\n  lr=0 must be positive: try lr=1e-3" in done.stderr
    assert "lr=-1 seed=2\n  lr=-1 must be positive" in done.stderr
    none = sweep(folder, "seed='a',b")
    assert "seed=b\n  seed='b' is no whole number" in none.stderr
    alike = sweep(folder, "model=large", "seed=1,2")
    assert "2 of 2 jobs cannot run; none was started:\neach of them\n  model.width is missing: give" in alike.stderr
    assert not (folder / "multirun").exists()
    refused = sweep(folder, "hydra.sweeper.retry_failed=perhaps")
    assert "hydra.sweeper.retry_failed=perhaps must be true or false" in refused.stderr
    assert "Traceback" not in done.stderr + none.stderr + alike.stderr + refused.stderr


@pytest.mark.rare
def test_a_script_that_records_nothing_is_run_again_with_a_word(folder: Path) -> None:
    assert "2 of 2 jobs failed" in sweep(folder, *IN_TURN, "how=raise before").stderr
    assert statuses(folder) == ["failed", "failed"]
    for _ in range(2):
        done = sweep(folder, *IN_TURN, "how=nothing")
        assert done.returncode == 0, done.stderr
        assert "2 jobs: 2 to do" in done.stdout
        assert "2 of 2 jobs recorded nothing in their folders, so the same command will run them again" in done.stdout
        assert statuses(folder) == ["", ""]
    assert sweep(folder, *IN_TURN).returncode == 0
    assert statuses(folder) == ["done", "done"]


@pytest.mark.rare
@pytest.mark.parametrize("launcher", [TWO, ("seed=1,2", "hydra/launcher=basic")])
def test_a_script_that_raises_after_recording_has_failed(folder: Path, launcher: tuple[str, ...]) -> None:
    done = sweep(folder, *launcher, "how=raise after")
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: too late (multirun/A/") == 2
    assert statuses(folder) == ["failed", "failed"]
    again = sweep(folder, *IN_TURN)
    assert again.returncode == 0, again.stderr
    assert "2 jobs: 2 to do (2 failed)" in again.stdout
    assert "run again: failed after it was recorded: RuntimeError: too late" in again.stdout


@pytest.mark.rare
def test_a_job_that_ends_its_process_costs_only_its_own_run(folder: Path) -> None:
    done = sweep(folder, *TWO, "how=exit")
    assert done.returncode == 1
    assert "seed=1 how=exit: its process ended with exit code 3" in done.stderr
    assert statuses(folder) == ["done", "failed"]
    assert "2 jobs: 1 to do (1 failed, 1 done)" in sweep(folder, *IN_TURN).stdout
    assert statuses(folder) == ["done", "done"]


def test_a_killed_sweep_continues(folder: Path) -> None:
    words = ("seed=1,2,3", "pause=0.1", "hydra.launcher.jobs=1")
    process = started(folder, *words)
    wait_for(lambda: workers(folder))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not workers(folder))
    done = sweep(folder, *words)
    assert done.returncode == 0, done.stderr
    assert statuses(folder) == ["done"] * 3


@pytest.mark.rare
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_sweep_told_to_stop_names_the_command_and_shows_no_traceback(
    folder: Path, number: int, processes: int
) -> None:
    words = ("seed=1,2,3,4", "pause=0.3", f"hydra.launcher.jobs={processes}")
    process = started(folder, *words)
    wait_for(lambda: "done" in statuses(folder))
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    assert "interrupted: to resume, run the same command with hydra.sweeper.sweep=A" in out
    assert "Traceback" not in out + err
    assert len(pd.read_parquet(folder / "multirun/A/all.runs.parquet")) < 4
    assert sweep(folder, *words, "pause=0", "hydra.launcher.jobs=1").returncode == 0


@pytest.mark.rare
def test_two_sweeps_of_one_folder_at_once(folder: Path) -> None:
    words = (*IN_TURN, "pause=0.3")
    first = started(folder, *words)
    wait_for(lambda: workers(folder))
    second = started(folder, *words)
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert statuses(folder) == ["done", "done"]


@pytest.mark.rare
@pytest.mark.parametrize(("config_path", "said"), [
    ("'conf'", "could not import code/train.py (exit code 1)"),  # Hydra itself gives up
    ("os.path.abspath('code/conf')", "starts its sweep when it is imported"),
])  # fmt: skip
def test_a_script_that_sweeps_when_imported_is_told(folder: Path, config_path: str, said: str) -> None:
    text = (folder / "code/train.py").read_text().replace('if __name__ == "__main__":\n    main()', "main()")
    (folder / "code/train.py").write_text(text.replace('config_path="conf"', f"config_path={config_path}"))
    done = sweep(folder, *TWO)
    assert done.returncode == 1
    assert said in done.stderr
    assert "under `if __name__ ==" in done.stderr


@pytest.mark.rare
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_ends_at_its_first_failed_run_if_told_so(folder: Path, processes: int) -> None:
    words = ("seed=1,2,3,4,5,6", f"hydra.launcher.jobs={processes}", "hydra.sweeper.stop_on_failure=true", "pause=0.1")
    done = sweep(folder, *words, "how=raise before" if processes == 1 else "how=exit")
    assert done.returncode == 1
    assert "1 of 6 jobs failed:" in done.stderr
    n = 6 - processes  # the one beside it may end
    assert f"{n} were not started: run the same command with hydra.sweeper.sweep=A to go on" in done.stderr
    assert statuses(folder) == (["failed"] if processes == 1 else ["done", "failed"])
    assert not list(folder.glob("multirun/A/.stop*"))
    again = sweep(folder, *words, "how=record")
    assert again.returncode == 0, again.stderr
    assert statuses(folder) == ["done"] * 6


@pytest.mark.rare
def test_hydras_own_launchers_cannot_be_stopped(folder: Path) -> None:
    refused = sweep(folder, "seed=1,2", "hydra.sweeper.stop_on_failure=true", "hydra/launcher=basic")
    assert (refused.returncode, (folder / "multirun").exists()) == (1, False)
    assert refused.stderr.startswith("hydra.sweeper.stop_on_failure=true needs one of lnjac's launchers: choose hydra/")


def test_an_app_with_short_words_of_its_own(folder: Path) -> None:
    config = folder / "code/conf/config.yaml"
    words = "sweep: B\ndry_run: false\nhydra: {sweeper: {sweep: '${sweep}', dry_run: '${dry_run}', report: off}}\n"
    config.write_text(config.read_text() + words)
    assert train(folder, "-m", *IN_TURN).returncode == 0
    dry = train(folder, "-m", "seed=1,2,3", "dry_run=true")
    assert "3 jobs: 1 to do (2 done)" in dry.stdout  # neither word is part of a run
    assert "the folder is multirun/B" in dry.stdout
    for refused in (("-m", "sweep=.."), ("-m", "sweep=a,b"), ("sweep=C",)):
        assert train(folder, *refused).stderr.startswith("sweep")
