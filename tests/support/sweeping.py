"""Start sweeps, wait for them, find their processes, and read what they merged."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from support.commands import TINY, background, command
from support.paths import ROOT

from lnjac.cli.run import task
from lnjac.columns import VOLATILE
from lnjac.config.compose import CONF, as_typed
from lnjac.runs import configs
from lnjac.runs import folder as runs
from lnjac.runs.merged import companions
from lnjac.runs.schema import FROZEN, with_role


def sweeper_of(*words: str) -> Any:
    """A sweeper set up as Hydra does for these words, but for its launcher, whose package may not be installed."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        config = context.config_loader.load_configuration("config", as_typed(words), RunMode.MULTIRUN)
    sweeper = instantiate(config.hydra.sweeper)
    sweeper.hydra_context, sweeper.task_function, sweeper.config, sweeper.launcher = context, task, config, None
    return sweeper


def folders(sweep_folder: Path) -> dict[int, Path]:
    """The runs' folders by seed."""
    found = [path.parent for path in sweep_folder.glob(f"*/{runs.FILES['runs']}")]
    return {runs.read_table(path / runs.FILES["runs"])["seed"][0].as_py(): path for path in found}


def science(merged: Path) -> list[pd.DataFrame]:
    """The merged tables without what may differ between two makings of one run, in one order."""
    tables = []
    for path in companions(merged).values():
        frame = pd.read_parquet(path)
        volatile = with_role(VOLATILE, {**FROZEN["runs"], **configs.KNOWN})
        frame = frame.drop(columns=[name for name in volatile if name in frame])
        keys = [name for name in ("run_id", "diag_id", "step", "site") if name in frame]
        tables.append(frame.sort_values(keys).reset_index(drop=True))
    return tables


TWO_JOBS = (*TINY, "seed=1,2", "sweep=A")


def one_job_fails(tmp_path: Path, *engine: str) -> None:
    """One job cannot write: the rest run and are merged, the exit code tells, and the next command retries."""
    words = ("-m", *TWO_JOBS, *engine)
    assert command(*words, cwd=tmp_path).returncode == 0
    one = folders(tmp_path / "multirun" / "A")[1]
    shutil.rmtree(one)
    (one / "layers.parquet").mkdir(parents=True)  # os.replace cannot put a file over a folder
    done = command(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert "1 of 2 jobs failed" in done.stderr
    assert "IsADirectoryError" in done.stderr
    assert set(pd.read_parquet(tmp_path / "multirun/A/all.parquet")["seed"]) == {2}
    assert "Traceback" in (one / "run.log").read_text()
    status = runs.read_status(one)
    assert status["status"] == "failed"
    assert "os.replace" in status["traceback"]
    kept = command(*words, "retry_failed=false", cwd=tmp_path)
    assert kept.returncode != 0
    assert "2 jobs: 0 to do (1 failed, 1 done)" in kept.stdout
    (one / "layers.parquet").rmdir()
    assert command(*words, cwd=tmp_path).returncode == 0
    assert set(pd.read_parquet(tmp_path / "multirun/A/all.parquet")["seed"]) == {1, 2}


def started(tmp_path: Path, *words: str) -> "subprocess.Popen[str]":
    if not (tmp_path / "data").exists():
        (tmp_path / "data").symlink_to(ROOT / "data")
    return background([sys.executable, str(ROOT / "run.py"), "-m", *words], tmp_path)


def workers(folder: Path) -> list[int]:
    """The processes that make a run of this sweep: those that hold a run's lock open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or not ours
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            if any(link.startswith(f"{folder}/") and link.endswith(runs.LOCK) for link in links):
                found.append(int(process.name))
    return found


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
