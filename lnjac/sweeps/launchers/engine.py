"""Base of the launchers: it numbers the jobs and reports each as it ends, and an engine runs them."""

import io
import logging
import os
import secrets
import sys
import time
from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)

Outcomes = Generator[tuple[int, JobReturn], None, None]


class Engine(Launcher):
    """A launcher whose jobs may die: one that does costs its own run alone. Hydra's own launchers then give up on all."""

    elsewhere = False
    """Whether jobs run on other machines, whose hardware cannot be checked from here."""

    stop_on_failure = False
    """Whether no job is begun after one has failed."""
    stop: Path | None = None
    """The file that appears when no further job is to begin: jobs elsewhere see it too, since they write beside it."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        load = self.hydra_context.config_loader.load_sweep_config
        return self.launch_composed([load(self.config, list(words)) for words in job_overrides], initial_job_idx)

    def launch_composed(self, configs: Sequence[DictConfig], first: int = 0) -> Sequence[JobReturn]:
        """Run jobs that are composed already; `first` is the number of the first one in the sweep.

        With `stop_on_failure`, a job that was not begun has the status UNKNOWN.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        for number, config in enumerate(configs, first):
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
        names = _names([list(filter_overrides(config.hydra.overrides.task)) for config in configs])
        returned: dict[int, JobReturn] = {}
        started = time.monotonic()
        if self.stop_on_failure and configs:
            self.stop = Path(configs[0].hydra.sweep.dir).absolute() / f".stop-{secrets.token_hex(8)}"
        try:
            with closing(self.map(configs)) as outcomes:
                for i, job in outcomes:
                    returned[i] = job
                    if job.status == JobStatus.UNKNOWN:
                        continue
                    done = sum(one.status != JobStatus.UNKNOWN for one in returned.values())
                    outcome, after_s = _outcome(job, configs[i]), time.monotonic() - started
                    log.info(
                        "[%d/%d] %s after %.0f s: #%d %s", done, len(configs), outcome, after_s, first + i, names[i]
                    )
                    if self.stop and job.status == JobStatus.FAILED:
                        self.stop.touch()
        finally:
            if self.stop:
                self.stop.unlink(missing_ok=True)
        return [returned[i] for i in range(len(configs))]

    @abstractmethod
    def map(self, configs: Sequence[DictConfig]) -> Outcomes:
        """Run the jobs; yield the index and outcome of each as it ends, in any order. Closing it stops what runs."""

    def prepare(self) -> None:
        """Begin what takes a while: called when a sweep makes sense, and its jobs are about to be checked."""


class Call:
    """One job, by its config, in whatever process it is called.

    It travels as its bytes by cloudpickle, which sends a function that another process cannot import, such as one of a
    script, by its code. With it go the paths from which the script imports its modules, and Hydra's state, which holds the
    resolvers that it has registered.
    """

    pickler: type[cloudpickle.Pickler] = cloudpickle.Pickler

    def __init__(self, engine: Engine) -> None:
        self.hydra_context, self.task_function = engine.hydra_context, engine.task_function
        self.cwd = Path.cwd()  # relative paths mean the same on every machine
        self.stop = engine.stop

    def __reduce__(self) -> Any:
        sent = io.BytesIO()
        self.pickler(sent).dump((vars(self), Singleton.get_state()))
        return _received, (type(self), sys.path, sent.getvalue())

    def __call__(self, config: DictConfig) -> JobReturn:
        from lnjac import console

        console.steady()  # a cluster's job has a standard output of its own
        os.chdir(self.cwd)
        if self.stop and self.stop.exists():
            return not_started(config)
        job = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if self.stop and job.status == JobStatus.FAILED:  # sooner than the launcher hears of it
            self.stop.touch()
        return job


def _received(cls: type[Call], path: list[str], sent: bytes) -> Call:
    sys.path.extend(folder for folder in path if folder not in sys.path)
    setup_globals()
    call = cls.__new__(cls)
    attributes, state = cloudpickle.loads(sent)
    vars(call).update(attributes)
    Singleton.set_state(state)
    return call


def extra(module: str, name: str) -> Any:
    """Import an optional dependency; the error without it names the extra to install."""
    try:
        return import_module(module)
    except ImportError:
        raise CompactHydraException(f"hydra/launcher={name} needs {module}: pip install 'lnjac[{name}]'") from None


# Folders


def require_folder(folder: Path, setting: str) -> None:
    """Make the folder.

    Raises:
        CompactHydraException: the folder, or a new file in it, cannot be made; `setting` chooses another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CompactHydraException(
            f"nothing can be written in the folder {folder} ({error.strerror}): set {setting} to another one"
        ) from None


# Outcomes


class Failure(Exception):
    """The reason why a job failed, in words alone."""


def lost(config: DictConfig, why: str) -> JobReturn:
    """Return the outcome of a job whose process ended without giving one."""
    job = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.FAILED)
    job.return_value = Failure(why)
    return job


def not_started(config: DictConfig) -> JobReturn:
    """Return the outcome of a job that was not begun."""
    job = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.UNKNOWN)
    job.return_value = Failure("it was not started")
    return job


def reason(job: JobReturn) -> str:
    """Return in one line why the job failed."""
    error = job._return_value
    said = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
    line = (said.splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":
        line = f"the GPU is out of memory: set hydra.launcher.jobs=1, or a smaller batch_size ({line})"
    return line


def count(n: int, noun: str) -> str:
    """Return the number with its noun: `1 job`, `2 jobs`."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _outcome(job: JobReturn, config: DictConfig) -> str:
    from lnjac.runs.folder import read_status

    if job.status != JobStatus.COMPLETED:
        return f"FAILED ({reason(job)})"
    status = read_status(Path(config.hydra.sweep.dir, config.hydra.sweep.subdir))
    loss = status.get("val_loss_nats")
    return str(status.get("status", "ended")) + ("" if loss is None else f", validation loss {loss:.4f},")


def _names(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Name each job by the overrides that not all jobs share."""
    shared = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    return [" ".join(word for word in words if word not in shared) for words in overrides]
