"""Tell `lnjac.record()`, in each job's own process, which run that is: Hydra's callback of hydra/sweeper=lnjac."""

import logging
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig

from lnjac.escape import visible_lines
from lnjac.sweeps import own_script, protocol, settings
from lnjac.sweeps.launchers.engine import reason, require_folder

log = logging.getLogger("lnjac.sweeps")


class HandOver(Callback):
    """Hands each job its folder and config, and ends a single run in one line if it cannot be made.

    Hydra would make a warning of any other exception of a callback than SystemExit.
    """

    execution: tuple[str, ...] | None = None
    """Keys that the script names, as its sweeper knows them: a job's process on a cluster may not import the script."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        given = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
        for name, what in (("sweep", "names the folder"), ("zip", "gives values")):
            if meant := [said for said in given if said.startswith(f"{settings.key(config, name)}=")]:
                sys.exit(f"{meant[0]} {what} of a sweep, but this command makes a single run: add -m")
        try:
            require_folder(Path(config.hydra.run.dir), "hydra.run.dir")
        except CompactHydraException as error:
            sys.exit(str(error))

    def on_job_start(self, config: DictConfig, *, task_function: TaskFunction, **_: Any) -> None:
        from lnjac.config.compose import resolved, task_config
        from lnjac.errors import ConfigError
        from lnjac.runs import folder as runs
        from lnjac.runs import handed

        if protocol.plans(task_function):
            return
        execution = self.execution
        if execution is None:
            execution = own_script.keys_of_execution(task_function, config)
        own = task_config(config)
        if config.hydra.mode == RunMode.RUN:
            try:
                own_script.identified(own, protocol.script(task_function), execution)
            except ConfigError as error:
                sys.exit(visible_lines(str(error)))
            if config.hydra.sweeper.dry_run:
                log.info("dry_run: the config is sound; nothing was started")
                sys.exit(0)
        values = resolved(own, execution)[0]  # without problems: they were looked for before
        steering = settings.short_keys(config)
        words = [word for word in config.hydra.overrides.task if word.partition("=")[0].lstrip("+") not in steering]
        command = (f"{config.hydra.job.name}.py", *words)
        given = handed.Handed(Path(config.hydra.runtime.output_dir), values, execution, command)
        handed.hand(given)
        self.finished = runs.read_status(given.folder).get("status") in runs.FINISHED

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Call a run failed whose script raised an error after recording it."""
        from lnjac.runs import folder as runs
        from lnjac.runs import handed
        from lnjac.runs import state as states

        given = handed.given()
        handed.hand(None)
        if given is None or self.finished or job_return.status != JobStatus.FAILED:
            return
        status = runs.read_status(given.folder)
        if status.get("status") in runs.FINISHED:
            identity = {name: status[name] for name in ("run_id", "diag_id")}
            states.fail(given.folder, identity, f"after it was recorded: {reason(job_return)}")
