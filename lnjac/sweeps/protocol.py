"""What a script may offer so that its runs can be swept: names in the module of its task function.

- `check(cfg) -> list[str]` returns a line for every problem of a config, as the task function would get it.
- `execution` names the keys of the config that are no part of a run's identity.
- `preload` names modules that each worker process needs before its first job.
- `plan(composed, here) -> Planned` takes the place of the first two, for a script that identifies its runs itself. It is
  called with a job's composed config, and whether the job will run on this machine, whose hardware must then allow it. It
  starts nothing, and raises ConfigError, with a line for every problem, for a config that cannot run.
- `starts(jobs, config, folder, here) -> Starts` tells how the jobs that are to be made begin: a job may begin from what a
  finished run left. It is called with the jobs (lnjac.sweeps.jobs.Job), the sweep's config and folder, and as `plan` is.
- `composer(loader, load)` returns the Composer of a script whose words are not all read as Hydra reads them.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hydra.types import TaskFunction


UNRECORDED = "unrecorded"
"""State of a job whose script ended well, but wrote no run into its folder."""

UNSTARTED = "not started"
"""State of a job that was not begun, as another one had failed."""


class Planned(NamedTuple):
    """One run of the script, as it is known before it starts.

    Attributes:
        identity: equal for two configs only if their runs are the same run. Its values, joined by `-`, name the run's
            folder, and `status.json` in there holds them, so that a finished run is recognised.
        columns: the config as columns of the run's tables, by which finished runs of the same shape are found.
        data_sha256: that of the corpus, which the script's own `starts` asks for.
    """

    identity: Mapping[str, str]
    columns: Mapping[str, Any]
    data_sha256: str = ""


class Start(NamedTuple):
    """How one job begins.

    Attributes:
        values: by key, given to the job's config so that it begins so.
        source: the finished run's folder that it begins from; None if it is made from the start.
        done: updates that were made there.
        left: updates that are left to it, where it begins from a finished run.
    """

    values: Mapping[str, Any] = {}
    source: Path | None = None
    done: int = 0
    left: int = 0

    @property
    def kind(self) -> str:
        """One word for it: train, continue or analyse."""
        if self.source is None:
            return "train"
        return "continue" if self.left else "analyse"


class Starts(NamedTuple):
    """How each job begins, and a line for each thing that its user should know of that."""

    jobs: list[Start]
    notes: list[str]


def script(task_function: "TaskFunction") -> ModuleType:
    """Return the module of a script, the one that defines its task function."""
    return sys.modules[task_function.__module__]


def plans(task_function: "TaskFunction") -> bool:
    """Return whether the script identifies its runs itself."""
    return callable(getattr(script(task_function), "plan", None))


def execution(task_function: "TaskFunction") -> tuple[str, ...]:
    """Return the keys that the script's `execution` names."""
    named = getattr(script(task_function), "execution", ())
    return (named,) if isinstance(named, str) else tuple(named)
