"""Engines that run a sweep's jobs: processes on this machine, Slurm, Ray. A job that dies costs only its own run.

Hydra's own launcher plugins give up on all jobs when the process of one is killed, so these map jobs themselves, on the
standard library, submitit and Ray. Hydra imports this module at every start, so its own imports stay light.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from importlib import import_module
from multiprocessing import connection as connections
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hydra import version
from hydra.core.utils import (
    JobReturn,
    JobRuntime,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from lnjac.machine import cores

log = logging.getLogger(__name__)

Outcomes = Generator[tuple[int, JobReturn], None, None]


class Engine(Launcher):
    """Base of the launchers: composes the jobs and reports each as it ends; `map` runs them."""

    elsewhere = False
    """Whether jobs run on other machines, whose hardware cannot be checked from here."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        load = self.hydra_context.config_loader.load_sweep_config
        configs = [load(self.config, list(overrides)) for overrides in job_overrides]
        return self.launch_composed(configs, initial_job_idx)

    def launch_composed(self, configs: Sequence[DictConfig], first: int) -> Sequence[JobReturn]:
        """Run jobs that are composed already; `first` is the number of the first one in the sweep."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        for number, config in enumerate(configs, first):
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
        names = _names([list(filter_overrides(config.hydra.overrides.task)) for config in configs])
        returned: dict[int, JobReturn] = {}
        started = time.monotonic()
        with closing(self.map(configs)) as outcomes:
            for i, job in outcomes:
                returned[i] = job
                log.info(
                    "[%d/%d] %s after %.0f s: #%d %s",
                    len(returned),
                    len(configs),
                    _outcome(job, _folder(configs[i])),
                    time.monotonic() - started,
                    first + i,
                    names[i],
                )
        return [returned[i] for i in range(len(configs))]

    @abstractmethod
    def map(self, configs: Sequence[DictConfig]) -> Outcomes:
        """Run the jobs; yields the index and outcome of each as it ends, in any order. Closing it stops what runs."""

    def prepare(self) -> None:
        """Begin what takes a while: called when a sweep makes sense, and its jobs are about to be checked."""

    def call(self) -> "Call":
        return Call(self.hydra_context, self.task_function)


class RequireFolder(Callback):
    """Hydra's callback that ends a single run in one line if its folder cannot be made."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            require_folder(Path(config.hydra.run.dir), "hydra.run.dir")
        except CompactHydraException as error:  # Hydra would make a warning of it
            sys.exit(str(error))


def require_folder(folder: Path, setting: str) -> None:
    """Make the folder. Raises CompactHydraException where that, or a new file in it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CompactHydraException(
            f"nothing can be written in the folder {folder} ({error.strerror}): set {setting} to another one"
        ) from None


class Call:
    """One job, by its config, in whatever process this is called. submitit asks it what to run after a timeout."""

    def __init__(self, hydra_context: HydraContext, task_function: TaskFunction) -> None:
        self.hydra_context, self.task_function = hydra_context, task_function
        self.cwd = Path.cwd()  # what relative paths are relative to, on whatever machine

    def __call__(self, config: DictConfig) -> JobReturn:
        """Run one job."""
        from lnjac import console

        console.steady()  # a cluster's job has a standard output of its own
        os.chdir(self.cwd)
        setup_globals()  # what Hydra keeps of its own in a process
        version.setbase(config.hydra.runtime.version_base)
        JobRuntime.instance().set("name", config.hydra.job.name)
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def checkpoint(self, config: DictConfig) -> Any:
        """What submitit resubmits: the same job, which finds its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, config)


# Processes on this machine


def _folder(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)


GPU_PROCESSES = 8
"""Processes that share a GPU by default: more train no faster there (benchmarks/README.md), and each takes memory."""


class LocalLauncher(Engine):
    """Worker processes, each with its share of the cores; they outlive their jobs, so that torch starts once in each."""

    def __init__(self, jobs: int | None) -> None:
        if jobs is not None and not (isinstance(jobs, int) and jobs >= 1):
            raise CompactHydraException(f"hydra.launcher.jobs={jobs} must be at least 1, or null for one per core")
        self.jobs = jobs

    def prepare(self) -> None:
        if cores() > 1 and self.jobs != 1:
            _warm_up()

    def map(self, configs: Sequence[DictConfig]) -> Outcomes:
        gpu = _gpu(configs)
        fit = max(1, cores() // max((c.threads or 1 for c in configs), default=1))
        processes = min(self.jobs or (min(fit, GPU_PROCESSES) if gpu else fit), len(configs))
        threads = max(1, cores() // processes)
        said, where = _count(len(configs), "job"), ", on the GPU" if gpu else ""
        if processes == 1:
            log.info("%s, one after the other in this process%s", said, where)
            yield from self._in_turn(configs)
            return
        log.info("%s, in %d processes of %s%s", said, processes, _count(threads, "thread"), where)
        _warm_up()  # if it has not begun
        yield from _Pool(self.call(), processes, threads).map(configs)

    def _in_turn(self, configs: Sequence[DictConfig]) -> Outcomes:
        call = self.call()
        for i, config in enumerate(configs):
            returned = call(config)
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            yield i, returned


def _gpu(configs: Sequence[DictConfig]) -> bool:
    import torch

    return torch.cuda.is_available() and all(config.device != "cpu" for config in configs)


def _processes() -> Any:
    """Workers fork from a server that has imported torch and nothing more: forking this process could break its threads."""
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def _warm_up() -> None:
    """Let that server start and import while the jobs are being checked."""
    context = _processes()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        preload = ["__main__", "lnjac.training.run", "torch._dynamo", __name__]  # the compiler, which optimizers import
        context.set_forkserver_preload(preload)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's affair
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, before)


class _Worker:
    """A process that runs one job at a time; `job` is the index of its present one."""

    def __init__(self, context: Any, call: Call, threads: int) -> None:
        self.job = -1
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, call, threads), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, job: int, config: DictConfig) -> None:
        self.job = job
        with suppress(OSError):  # it died since its last job: seen when its answer is read
            self.connection.send(config)

    def stop(self) -> None:
        self.connection.close()
        self.process.join(60)
        self.process.kill()


class _Pool:
    """So many workers; one that dies loses its job and is replaced."""

    def __init__(self, call: Call, processes: int, threads: int) -> None:
        self.context, self.call, self.processes, self.threads = _processes(), call, processes, threads

    def map(self, configs: Sequence[DictConfig]) -> Outcomes:
        waiting = deque(range(len(configs)))
        idle: list[_Worker] = []
        busy: list[_Worker] = []
        try:
            while waiting or busy:
                while waiting and len(busy) < self.processes:
                    worker = idle.pop() if idle else _Worker(self.context, self.call, self.threads)
                    busy.append(worker)
                    worker.start(job := waiting.popleft(), configs[job])
                ready = connections.wait([worker.connection for worker in busy])
                for worker in [worker for worker in busy if worker.connection in ready]:
                    busy.remove(worker)
                    try:
                        returned = worker.connection.recv()
                        idle.append(worker)
                    except (EOFError, OSError):
                        worker.process.join()
                        returned = lost(configs[worker.job], _death(worker.process.exitcode))
                    yield worker.job, returned
        finally:
            for worker in busy:
                worker.process.terminate()  # it saves a checkpoint and says `interrupted`
            for worker in (*busy, *idle):
                worker.stop()


def _work(connection: Any, call: Call, threads: int) -> None:
    """A worker's life. Ctrl-C is its parent's affair; SIGTERM interrupts the run; it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(KeyboardInterrupt, EOFError, OSError):  # interrupted, or the parent has no more
        signal.signal(signal.SIGTERM, _interrupt)
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (its life): lines of several runs would mix; each has its log
        import torch

        torch.set_num_threads(threads)
        while True:
            job = call(connection.recv())
            if job.status != JobStatus.COMPLETED:  # not every error can travel as it is
                job.return_value = Failure(reason(job))
            connection.send(job)


def _interrupt(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with(parent: Any) -> None:
    connections.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


# Clusters


POLL_S = 2.0
"""Seconds between looks at a cluster's jobs."""


class SlurmLauncher(Engine):
    """Job arrays through submitit, one for each set of resources; a job out of time is requeued."""

    elsewhere = True

    def __init__(self, **_: Any) -> None:  # each job's own config is read
        self.submitit: Any = extra("submitit", "slurm")

    def map(self, configs: Sequence[DictConfig]) -> Outcomes:
        # sent by value, as the task function of a script is
        extra("cloudpickle", "slurm").register_pickle_by_value(sys.modules[__name__])
        arrays: dict[str, list[int]] = {}
        for i, config in enumerate(configs):  # the resources may depend on the job: hydra.launcher.mem_gb=${...}
            arrays.setdefault(OmegaConf.to_yaml(config.hydra.launcher, resolve=True), []).append(i)
        jobs: dict[int, Any] = {}
        try:
            for members in arrays.values():
                executor = self._executor(configs[members[0]])
                submitted = self._submitted(executor, [configs[i] for i in members])
                jobs |= dict(zip(members, submitted, strict=True))
            log.info(
                "%s on Slurm: %s", _count(len(jobs), "job"), ", ".join(job.job_id for job in list(jobs.values())[:20])
            )
            while jobs:
                for i in [i for i, job in jobs.items() if job.done()]:
                    yield i, self._outcome(jobs.pop(i), configs[i])
                time.sleep(POLL_S)
        finally:
            for job in jobs.values():
                job.cancel(check=False)

    def _submitted(self, executor: Any, configs: Sequence[DictConfig]) -> Any:
        try:
            return executor.map_array(self.call(), configs)
        except Exception as error:  # sbatch's own word, which submitit wraps in one of several of its errors
            said = " ".join(str(error).split())
            raise CompactHydraException(f"Slurm does not take the jobs: {said[-300:]}") from None

    def _executor(self, config: DictConfig) -> Any:
        asked: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        try:
            executor = self.submitit.AutoExecutor(
                folder=Path(config.hydra.sweep.dir) / ".slurm" / "%j",
                cluster="slurm",
                slurm_max_num_timeout=asked["max_num_timeout"],
            )
        except RuntimeError as error:
            raise CompactHydraException(
                f"no Slurm here ({error}): run it where sbatch is, or leave out slurm"
            ) from None
        own = {name: asked[name] for name in ("timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node")}
        names = ("partition", "account", "array_parallelism", "setup", "signal_delay_s")
        slurm = {f"slurm_{name}": asked[name] for name in names}
        given = {**own, **slurm, "slurm_additional_parameters": asked["additional"], "name": config.hydra.job.name}
        executor.update_parameters(**{name: value for name, value in given.items() if value is not None})
        return executor

    def _outcome(self, job: Any, config: DictConfig) -> JobReturn:
        try:
            returned: JobReturn = job.result()
        except Exception as error:  # submitit's, for a job that ended without a result
            said = " ".join(str(error).split())
            return lost(config, f"Slurm job {job.job_id} ended as {job.state}: {said[:300]}")
        return returned


class RayLauncher(Engine):
    """One Ray task for each job; Ray retries a task whose worker died, and the run goes on from its checkpoint."""

    elsewhere = True

    def __init__(self, init: Any, num_cpus: float, num_gpus: float, max_retries: int) -> None:
        self.ray: Any = extra("ray", "ray")
        self.init = dict(init)
        self.options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": max_retries}

    def map(self, configs: Sequence[DictConfig]) -> Outcomes:
        ray = self.ray
        import_module("ray.cloudpickle").register_pickle_by_value(sys.modules[__name__])
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level=logging.WARNING, **self.init)
            except Exception as error:
                said = " ".join(str(error).split())
                raise CompactHydraException(
                    f"no Ray cluster ({said}): start one with `ray start --head`, or give hydra.launcher.init={{}}"
                ) from None
        task = ray.remote(**self.options)(_ray_job)
        call = ray.put(self.call())
        tasks = {task.remote(call, config): i for i, config in enumerate(configs)}
        log.info("%s on Ray", _count(len(tasks), "job"))
        try:
            while tasks:
                for done in ray.wait(list(tasks), num_returns=1)[0]:
                    i = tasks.pop(done)
                    try:
                        yield i, ray.get(done)
                    except ray.exceptions.RayError as error:
                        yield i, lost(configs[i], f"Ray: {' '.join(str(error).split())[:300]}")
        finally:
            for ref in tasks:
                ray.cancel(ref, force=True)


def _ray_job(call: Call, config: DictConfig) -> JobReturn:
    return call(config)


def extra(module: str, name: str) -> Any:
    """An optional dependency; the error without it names the extra to install."""
    try:
        return import_module(module)
    except ImportError:
        raise CompactHydraException(
            f"hydra/launcher={name} needs {module}: pip install --constraint constraints.txt -e '.[{name}]'"
        ) from None


# Words


class Failure(Exception):
    """Why a job failed, in words alone."""


def lost(config: DictConfig, why: str) -> JobReturn:
    """The outcome of a job whose process ended without giving one."""
    job = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.FAILED)
    job.return_value = Failure(why)
    return job


def _outcome(job: JobReturn, folder: Path) -> str:
    from lnjac.runs.folder import read_status

    if job.status != JobStatus.COMPLETED:
        return f"FAILED ({reason(job)})"
    loss = read_status(folder).get("val_loss_nats")
    return f"{job._return_value}" + ("" if loss is None else f", validation loss {loss:.4f},")


def reason(job: JobReturn) -> str:
    """Why the job failed, in one line."""
    error = job._return_value
    said = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
    line = (said.splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":
        line = f"the GPU is out of memory: set hydra.launcher.jobs=1, or a smaller batch_size ({line})"
    return line


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _names(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Each job by the overrides that not all jobs share."""
    shared = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    return [" ".join(word for word in words if word not in shared) for words in overrides]
