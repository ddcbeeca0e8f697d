"""What a script offers so that its runs can be swept: a function `plan` beside its task function."""

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from hydra.types import TaskFunction

    from lnjac.config.compose import Composed


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
    """Return the module of a script, the one that defines its task function.

    It may offer `preload`, names of modules that each worker process needs before its first job.
    """
    return sys.modules[task_function.__module__]


def planner(task_function: "TaskFunction") -> "Callable[[Composed], Planned]":
    """Return the script's `plan`, which is called with each job's composed config: `job.full()` is Hydra's form of it.

    `plan` starts nothing. It raises ConfigError, with a line for every problem, for a config that cannot run.

    Raises:
        ConfigError: the script has no `plan`.
    """
    from lnjac.errors import ConfigError

    module = script(task_function)
    if not callable(plan := getattr(module, "plan", None)):
        raise ConfigError(
            f"{module.__name__} has no function plan(job), by which this sweeper checks its jobs: "
            "add one, or choose hydra/sweeper=basic"
        )
    return cast("Callable[[Composed], Planned]", plan)
