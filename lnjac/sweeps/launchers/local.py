"""hydra/launcher=local: worker processes on this machine, each with its share of the cores."""

import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection as connections
from multiprocessing import spawn
from types import FunctionType
from typing import Any

import cloudpickle
from hydra.core.utils import JobStatus, configure_log
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from lnjac.machine import cores
from lnjac.sweeps import protocol
from lnjac.sweeps.launchers.engine import Call, Engine, Failure, Outcomes, Todo, count, lost, reason

log = logging.getLogger(__name__)

READY = "ready"
"""The first word of a worker."""

GPU_PROCESSES = 8
"""Processes that share a GPU by default: more train no faster there (benchmarks/README.md), and each takes memory."""


class LocalLauncher(Engine):
    """Processes that outlive their jobs, so that torch starts once in each."""

    def __init__(self, jobs: int | None) -> None:
        if jobs is not None and not (isinstance(jobs, int) and jobs >= 1):
            raise CompactHydraException(f"hydra.launcher.jobs={jobs} must be at least 1, or null for one per core")
        self.jobs = jobs

    def prepare(self) -> None:
        """Let the server from which workers fork start and import, which takes seconds, while the jobs are checked.

        Forking this process itself could break its threads.
        """
        context = _processes()
        if cores() > 1 and self.jobs != 1 and context.get_start_method() == "forkserver":
            from multiprocessing import forkserver

            used = [name for name in ("torch",) if name in sys.modules]  # by the script
            wanted = getattr(protocol.script(self.task_function), "preload", used)
            context.set_forkserver_preload(["__main__", *wanted, __name__, f"{__package__}.frozen"])
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's affair
            forkserver.ensure_running()
            signal.signal(signal.SIGINT, before)

    def map(self, jobs: Sequence[Todo]) -> Outcomes:
        gpu = len(jobs) > 1 and self.jobs != 1 and _gpu(jobs)
        fit = max(1, cores() // max(map(_threads, jobs), default=1))
        processes = min(self.jobs or (min(fit, GPU_PROCESSES) if gpu else fit), len(jobs))
        threads = max(1, cores() // processes)
        counted = count(len(jobs), "job")
        if processes <= 1:
            log.info("%s, one after the other in this process", counted)
            return self._in_turn(jobs)
        where = ", on the GPU" if gpu else ""
        log.info("%s, in %d processes of %s%s", counted, processes, count(threads, "thread"), where)
        return self._side_by_side(jobs, processes, threads)

    def _in_turn(self, jobs: Sequence[Todo]) -> Outcomes:
        call = Call(self)
        for i, job in enumerate(jobs):
            returned = call(job.config())
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            yield i, returned

    def _side_by_side(self, jobs: Sequence[Todo], processes: int, threads: int) -> Outcomes:
        """Keep so many workers busy; one that dies loses its job and is replaced."""
        self.prepare()  # if that has not been done
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])  # as workers call it, in what they send back
        call, waiting = _Call(self), deque(range(len(jobs)))
        idle: list[_Worker] = []
        busy: list[_Worker] = []
        try:
            while waiting or busy:
                while waiting and len(busy) < processes:
                    worker = idle.pop() if idle else _Worker(call, threads)
                    busy.append(worker)
                    worker.start(job := waiting.popleft(), jobs[job].config())
                ready = connections.wait([worker.connection for worker in busy])
                for worker in [worker for worker in busy if worker.connection in ready]:
                    try:
                        returned = worker.connection.recv()
                        if returned == READY:
                            worker.ready = True
                            continue
                        idle.append(worker)
                    except (EOFError, OSError):
                        worker.process.join()
                        returned = lost(jobs[worker.job], _death(worker))
                    busy.remove(worker)
                    yield worker.job, returned
        finally:
            for worker in busy:
                worker.process.terminate()  # its run saves a checkpoint, with the status `interrupted`
            for worker in (*busy, *idle):
                worker.stop()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is not typed
    """Sends the script's functions and classes by name, where workers import the script: so its module is one there, too."""

    def reducer_override(self, value: Any) -> Any:
        named = isinstance(value, (FunctionType, type)) and value.__module__ == "__main__" and _is_imported()
        if named and _named(value.__module__, value.__qualname__) is value:
            return _named, (value.__module__, value.__qualname__)
        return super().reducer_override(value)


class _Call(Call):
    pickler = _Pickler


def _named(module: str, name: str) -> Any:
    """Return what a module calls so, without Hydra's decorator; None if there is no such thing."""
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return inspect.unwrap(found) if callable(found) else None


def _is_imported() -> bool:
    """Return whether workers import this process's main module: one that is typed in has no file."""
    return any(name.startswith("init_main_from") for name in spawn.get_preparation_data("worker"))


def _threads(job: Todo) -> int:
    """Return the CPU threads that a job's own config asks for."""
    asked = job.value("threads")
    return asked if isinstance(asked, int) and asked > 0 else 1


def _gpu(jobs: Sequence[Todo]) -> bool:
    """Return whether the jobs share a GPU: the script uses torch, which finds one, and no config turns it down."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available() and all(job.value("device") != "cpu" for job in jobs))


def _processes() -> Any:
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


class _Worker:
    """A process that runs one job at a time; `job` is the index of its present one, `ready` whether it has started."""

    def __init__(self, call: Call, threads: int) -> None:
        self.job, self.ready = -1, False
        self.connection, theirs = _processes().Pipe()
        self.process = _processes().Process(target=_work, args=(theirs, call, threads), daemon=True)
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


def _work(connection: Any, call: Call, threads: int) -> None:
    """Run jobs in a worker. Ctrl-C is its parent's affair; SIGTERM interrupts the run; it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(KeyboardInterrupt, EOFError, OSError):  # interrupted, or the parent has no more
        signal.signal(signal.SIGTERM, _interrupt)
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (its life): lines of several runs would mix; each has its log
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(threads)
        else:  # the script may import it later
            os.environ["OMP_NUM_THREADS"] = str(threads)
        connection.send(READY)
        while True:
            job = call(connection.recv())
            if job.status != JobStatus.COMPLETED:  # not every error can travel as it is
                job.return_value = Failure(reason(job))
            try:
                connection.send(job)
            except (TypeError, AttributeError, pickle.PicklingError):  # nor every value that a script returns
                job.return_value = None
                connection.send(job)


def _interrupt(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with(parent: Any) -> None:
    connections.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _death(worker: _Worker) -> str:
    code = worker.process.exitcode
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    if worker.ready:
        return f"its process ended with exit code {code}"
    return (
        f"its process could not import {sys.argv[0]} (exit code {code}): set hydra.launcher.jobs=1, or put all that "
        'the script does under `if __name__ == "__main__":`'
    )
