"""hydra/launcher=slurm: job arrays through submitit; a job that runs out of time is requeued."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from lnjac.sweeps.launchers.engine import Call, Engine, Outcomes, Todo, count, extra, lost

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between looks at the jobs."""

SHARED = ("timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node")
"""Options that submitit knows for every scheduler; it wants the prefix `slurm_` before all others."""


class SlurmLauncher(Engine):
    """One job array for each set of resources, which each job's own config gives."""

    elsewhere = True

    def __init__(self, **_: Any) -> None:
        self.submitit: Any = extra("submitit", "slurm")

    def map(self, jobs: Sequence[Todo]) -> Outcomes:
        configs = [job.config() for job in jobs]
        arrays: dict[str, list[int]] = {}
        for i, config in enumerate(configs):  # the resources may depend on the job: hydra.launcher.mem_gb=${...}
            arrays.setdefault(OmegaConf.to_yaml(config.hydra.launcher, resolve=True), []).append(i)
        waiting: dict[int, Any] = {}
        try:
            for members in arrays.values():
                submitted = self._submitted([configs[i] for i in members])
                waiting |= dict(zip(members, submitted, strict=True))
            configs.clear()  # Slurm has them
            ids = ", ".join(job.job_id for job in list(waiting.values())[:20])
            log.info("%s on Slurm: %s", count(len(waiting), "job"), ids)
            while waiting:
                for i in [i for i, job in waiting.items() if job.done()]:
                    yield i, self._outcome(waiting.pop(i), jobs[i])
                time.sleep(POLL_S)
        finally:
            for job in waiting.values():
                job.cancel(check=False)

    def _submitted(self, configs: Sequence[DictConfig]) -> Any:
        asked: Any = OmegaConf.to_container(configs[0].hydra.launcher, resolve=True)
        del asked["_target_"]
        folder, requeues = Path(configs[0].hydra.sweep.dir) / ".slurm" / "%j", asked.pop("max_num_timeout")
        options = {name if name in SHARED else f"slurm_{name}": value for name, value in asked.items()}
        try:
            executor = self.submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=requeues)
        except RuntimeError as error:
            raise CompactHydraException(
                f"no Slurm here ({error}): start the sweep on a machine that has sbatch, or leave out hydra/launcher=slurm"
            ) from None
        try:
            executor.update_parameters(
                name=configs[0].hydra.job.name,
                **{name: value for name, value in options.items() if value is not None},
            )
            return executor.map_array(_Call(self), configs)
        except Exception as error:  # sbatch's own word, which submitit wraps in one of several of its errors
            raise CompactHydraException(f"Slurm refuses the jobs: {_line(error)[-300:]}") from None

    def _outcome(self, submitted: Any, job: Todo) -> JobReturn:
        try:
            returned: JobReturn = submitted.result()
        except Exception as error:  # submitit's, for a job that ended without a result
            return lost(job, f"Slurm job {submitted.job_id} ended as {submitted.state}: {_line(error)[:300]}")
        return returned


class _Call(Call):
    """A job that submitit asks what to submit when Slurm gives notice of its end."""

    def checkpoint(self, config: DictConfig) -> Any:
        """Return the same job, which resumes from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, config)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
