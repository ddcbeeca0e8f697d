"""What a script may offer so that its runs can be swept: names in the module of its task function.

- `check(cfg) -> list[str]` returns a line for every problem of a config, as the task function would get it.
- `execution` names the keys of the config that are no part of a run's identity.
- `preload` names modules that each worker process needs before its first job.
- `plan(composed, here) -> Planned` takes the place of the first two, for a script that identifies its runs itself. It is
  called with a job's composed config, and whether the job will run on this machine, whose hardware must then allow it. It
  starts nothing, and raises ConfigError, with a line for every problem, for a config that cannot run.
- `composer(loader, load)` returns the Composer of a script whose words are not all read as Hydra reads them.
"""

import sys
from collections.abc import Mapping
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
    """

    identity: Mapping[str, str]
    columns: Mapping[str, Any]


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
