"""Plan the runs of a script that has no plan of its own: check each job's config, and identify its run by that config."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf, open_dict

from lnjac.sweeps import protocol, settings

if TYPE_CHECKING:
    from hydra.types import TaskFunction

    from lnjac.config.compose import Composed
    from lnjac.runs.identity import Identified
    from lnjac.sweeps.protocol import Planned


def planner(task_function: "TaskFunction", master: DictConfig) -> "Callable[[Composed, bool], Planned]":
    """Return the plan of a script that has none.

    Args:
        task_function: The script's, beside which `check` and `execution` are looked up.
        master: The sweep's config. What `${now:…}` gives there, it gives in all jobs.
    """
    module, execution = protocol.script(task_function), keys_of_execution(task_function, master)

    def plan(composed: "Composed", here: bool) -> "Planned":
        from lnjac.config.compose import task_config

        config = composed.full()
        OmegaConf.copy_cache(from_config=master, to_config=config)
        with _as_in_its_job(config):
            own = task_config(config)
            found = identified(own, module, execution)
            OmegaConf.copy_cache(from_config=own, to_config=master)
        return protocol.Planned(found.identity, {column.name: value for column, value in found.columns})

    return plan


def identified(config: DictConfig, module: ModuleType, execution: tuple[str, ...]) -> "Identified":
    """Check a config, without Hydra's part, and identify its run. Raises ConfigError with a line for every problem."""
    from lnjac.config.compose import resolved
    from lnjac.errors import ConfigError
    from lnjac.runs.identity import identify

    values, problems = resolved(config, execution)
    if problems := problems or checked(module, config):
        raise ConfigError("\n".join(problems))
    return identify(values, execution=execution)


def keys_of_execution(task_function: "TaskFunction", config: DictConfig) -> tuple[str, ...]:
    """Return the keys that are no part of a run's identity: those that the script names, and those that steer the sweep."""
    return tuple(dict.fromkeys([*protocol.execution(task_function), *settings.short_keys(config)]))


def checked(module: ModuleType, config: DictConfig) -> list[str]:
    """Return a line for every problem that the script's own `check` finds."""
    from lnjac.errors import ConfigError

    if (check := getattr(module, "check", None)) is None:
        return []
    try:
        lines = check(config)
    except ConfigError as error:
        return str(error).split("\n")
    except Exception as error:
        return [f"check(cfg) raised {type(error).__name__}: {error}"]
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return [
            f"check(cfg) returned {lines!r}: let it return a list with a line for each problem, [] if there is none"
        ]
    return lines


@contextmanager
def _as_in_its_job(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:…}` give what it will give in the job, but for its folder, which its identity will name."""
    from hydra.core.hydra_config import HydraConfig

    with open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir).absolute() / "RUN")
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
