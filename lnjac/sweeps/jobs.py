"""The jobs of a sweep: what each is, and how far it has come by its own folder's word."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lnjac.config.compose import Composed
from lnjac.escape import visible
from lnjac.interruption import held_back
from lnjac.runs import folder as runs
from lnjac.runs import state as states
from lnjac.sweeps.protocol import UNRECORDED, UNSTARTED, Planned, Start

log = logging.getLogger("lnjac.sweeps")

POLL_S = 1.0
"""Seconds between looks at the jobs of another command."""


@dataclass
class Job:
    """One job of the sweep: how it was asked for, which run it is, where that goes, and how far it has come."""

    name: str
    """Its words as its user typed them."""
    overrides: list[str]
    composed: Composed
    plan: Planned
    sweep: Path
    """The sweep's folder, in which the job's own is named by its identity."""
    start: Start = field(default_factory=Start)

    def __post_init__(self) -> None:
        self.folder = self.sweep / "-".join(self.plan.identity.values())
        self.look()
        self.status = runs.read_status(self.folder)
        """What the folder held before the sweep."""

    def look(self) -> states.State:
        """Bring the state up to date with the folder."""
        with (
            held_back() as due
        ):  # the first one imports pandas, of which Ctrl-C would leave a half that no merge can use
            self.state = states.state(self.folder, self.plan.identity)
            due(lambda: None)
        return self.state


def to_do(jobs: Sequence[Job], *, retry: str | None) -> list[Job]:
    """Return the jobs that are to run.

    Args:
        jobs: all of the sweep.
        retry: the word by which failed runs were told to stay as they are, if they were.
    """
    kept = (*runs.FINISHED, runs.RUNNING, *((runs.FAILED,) if retry else ()))
    return [job for job in jobs if job.state.name not in kept]


def say(jobs: Sequence[Job], todo: Sequence[Job], *, retry: str | None) -> None:
    """Log how many jobs there are of each kind, how those to do begin, and why a run is made again; `retry` as in `to_do`."""
    counts = Counter(job.state.name for job in jobs)
    seen = ", ".join(f"{n} {name}" for name, n in counts.items() if name != states.MISSING)
    log.info("%d jobs: %d to do%s%s", len(jobs), len(todo), f" ({seen})" if seen else "", _begun(todo))
    for job in jobs:
        if job.state.name == runs.RUNNING:
            log.warning("%s is being run by another command: left to it (%s)", job.name, job.folder)
        elif job.state.name in (runs.FAILED, states.BROKEN):
            again = "run again" if job in todo else f"left as it is ({retry})"
            log.warning("%s: %s: %s %s", job.folder.name, again, job.state.name, job.state.reason.split("\n")[0])
        elif job.state.finished and job.state.reason:
            log.warning("%s: %s", job.folder, job.state.reason)


def _begun(todo: Sequence[Job]) -> str:
    """Return how many of the jobs are analysed, continued and trained, if any begins from a finished run."""
    kinds = Counter(job.start.kind for job in todo)
    if kinds.keys() <= {"train"}:
        return ""
    shown = [kind for kind in ("analyse", "continue", "train") if kinds[kind] or kind != "continue"]
    return ": " + ", ".join(f"{kind} {kinds[kind]}" for kind in shown)


def settle(job: Job, reason: str, *, ended_well: bool = False) -> None:
    """Bring the job's state up to date; one that is not finished, has not failed and is not alive has died: it failed.

    Args:
        job: it has been launched.
        reason: why it failed, if it did.
        ended_well: whether its task function returned; one that left nothing in its folder has not recorded its run.
    """
    state = job.look()
    unchanged = state.name != runs.RUNNING and runs.read_status(job.folder) == job.status
    if ended_well and unchanged and not state.finished:
        if state.name == runs.FAILED:  # by an earlier attempt
            with suppress(OSError):
                (job.folder / runs.STATUS).unlink()
        job.state = states.State(UNRECORDED)
        return
    if not state.finished and state.name not in (runs.FAILED, runs.RUNNING, states.FOREIGN):
        try:
            states.fail(job.folder, job.plan.identity, reason)
        except runs.InUse:  # another command has begun it and not yet written its status
            job.state = states.State(runs.RUNNING)
            return
        except OSError as error:
            log.warning("%s: %s", job.folder, error)
        job.look()


def wait_for_others(jobs: Sequence[Job]) -> bool:
    """Wait until no other command runs any of these jobs; return whether there was one."""
    others = [job for job in jobs if job.state.name == runs.RUNNING]
    for n, job in enumerate(others):
        if job.look().name == runs.RUNNING:
            left = len(others) - n
            log.info("waiting for another command to end %d of these jobs, now %s (%s)", left, job.name, job.folder)
        while job.state.name == runs.RUNNING:
            time.sleep(POLL_S)
            job.look()
        if job.state.name == runs.INTERRUPTED:
            job.state = states.State(runs.INTERRUPTED, "the other command left it unfinished: run this one again")
    return bool(others)


def unfinished(jobs: Sequence[Job]) -> list[str]:
    """Return a line for each job that has failed, now or earlier."""
    return [
        visible(f"  {job.name}: {(job.state.reason or job.state.name).splitlines()[0]} ({job.folder})")
        for job in jobs
        if not job.state.finished and job.state.name not in (runs.RUNNING, UNRECORDED, UNSTARTED)
    ]
