"""hydra/launcher=ray: one Ray task for each job; Ray retries a task whose worker died."""

import logging
from collections.abc import Sequence
from typing import Any

from hydra.errors import CompactHydraException

from lnjac.sweeps.launchers.engine import Call, Engine, Outcomes, Todo, count, extra, lost

log = logging.getLogger(__name__)


class RayLauncher(Engine):
    """Tasks on a Ray cluster. A run whose task is retried resumes from its checkpoint."""

    elsewhere = True

    def __init__(self, init: Any, **options: Any) -> None:
        self.ray: Any = extra("ray", "ray")
        self.init, self.options = dict(init), options

    def map(self, jobs: Sequence[Todo]) -> Outcomes:
        ray = self.ray
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level=logging.WARNING, **self.init)
            except Exception as error:
                said = " ".join(str(error).split())
                raise CompactHydraException(
                    f"no Ray cluster ({said}): start one with `ray start --head`, or set hydra.launcher.init={{}}"
                ) from None
        run = ray.remote(**self.options)(lambda call, config: call(config))
        call = ray.put(Call(self))
        tasks = {run.remote(call, job.config()): i for i, job in enumerate(jobs)}
        log.info("%s on Ray", count(len(tasks), "job"))
        try:
            while tasks:
                for done in ray.wait(list(tasks), num_returns=1)[0]:
                    i = tasks.pop(done)
                    try:
                        yield i, ray.get(done)
                    except ray.exceptions.RayError as error:
                        yield i, lost(jobs[i], f"Ray: {' '.join(str(error).split())[:300]}")
        finally:
            for ref in tasks:
                ray.cancel(ref, force=True)
