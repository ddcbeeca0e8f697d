"""Base of the launchers: it numbers the jobs and reports each as it ends, and an engine runs them."""

import io
import logging
import os
import secrets
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

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
from omegaconf import DictConfig, OmegaConf, open_dict

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
        load, jobs = self.hydra_context.config_loader.load_sweep_config, []
        for number, words in enumerate(job_overrides, initial_job_idx):
            config = numbered(load(self.config, list(words)), number)
            place = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)
            own = list(config.hydra.overrides.task)
            jobs.append(Todo(number, own, place, partial(OmegaConf.select, config), partial(_same, config)))
        with closing(self.launched(jobs)) as outcomes:
            returned = dict(outcomes)
        return [returned[i] for i in range(len(jobs))]

    def launched(self, jobs: "Sequence[Todo]") -> Outcomes:
        """Run the jobs; log, and yield the index and outcome of each, as it ends. Closing it stops what runs.

        With `stop_on_failure`, a job that was not begun has the status UNKNOWN.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        names = _names([list(filter_overrides(job.words)) for job in jobs])
        ended, started = 0, time.monotonic()
        if self.stop_on_failure and jobs:
            self.stop = jobs[0].folder.absolute().parent / f".stop-{secrets.token_hex(8)}"
        try:
            with closing(self.map(jobs)) as outcomes:
                for i, returned in outcomes:
                    if returned.status != JobStatus.UNKNOWN:
                        ended += 1
                        outcome, after_s = _outcome(returned, jobs[i].folder), time.monotonic() - started
                        log.info(
                            "[%d/%d] %s after %.0f s: #%d %s",
                            *(ended, len(jobs), outcome, after_s, jobs[i].number, names[i]),
                        )
                        if self.stop and returned.status == JobStatus.FAILED:
                            self.stop.touch()
                    yield i, returned
        finally:
            if self.stop:
                self.stop.unlink(missing_ok=True)

    @abstractmethod
    def map(self, jobs: "Sequence[Todo]") -> Outcomes:
        """Run the jobs; yield the index and outcome of each as it ends, in any order. Closing it stops what runs."""

    def prepare(self) -> None:
        """Begin what takes a while: called when a sweep makes sense, and its jobs are about to be checked."""


class Todo(NamedTuple):
    """A job that is to run. Its whole config takes 0.15 MB, so it is made when the job begins.

    Attributes:
        number: in the sweep.
        words: its overrides as their user typed them, without Hydra's own.
        folder: where it writes.
        value: gives what its config has by one of the script's keys; None if it has no such key.
        full: makes its whole config.
    """

    number: int
    words: Sequence[str]
    folder: Path
    value: Callable[[str], Any]
    full: Callable[[], DictConfig]

    def config(self) -> DictConfig:
        """Make the config with which the job is called."""
        return numbered(self.full(), self.number)


def numbered(config: DictConfig, number: int) -> DictConfig:
    """Return the config, which now has the job's number."""
    with open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(number), number
    return config


def _same(config: DictConfig) -> DictConfig:
    return config


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


def lost(job: Todo, why: str) -> JobReturn:
    """Return the outcome of a job whose process ended without giving one."""
    returned = JobReturn(overrides=list(job.words), status=JobStatus.FAILED)
    returned.return_value = Failure(why)
    return returned


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


def _outcome(returned: JobReturn, folder: Path) -> str:
    from lnjac.runs.folder import read_status

    if returned.status != JobStatus.COMPLETED:
        return f"FAILED ({reason(returned)})"
    status = read_status(folder)
    loss = status.get("val_loss_nats")
    return str(status.get("status", "ended")) + ("" if loss is None else f", validation loss {loss:.4f},")


def _names(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Name each job by the overrides that not all jobs share."""
    shared = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    return [" ".join(word for word in words if word not in shared) for words in overrides]
