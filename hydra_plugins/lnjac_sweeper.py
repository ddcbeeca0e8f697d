"""hydra/sweeper=lnjac: a grid sweep that checks every job before any starts, and merges what there is at its end.

Works with every launcher. This folder has no __init__.py: it is part of Hydra's plugin namespace, and Hydra imports this
module at every start, so its own imports stay light.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException  # Hydra shows its text alone, without a traceback
from omegaconf import OmegaConf

log = logging.getLogger(__name__)


@dataclass
class LnjacSweeperConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.lnjac_sweeper.LnjacSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="lnjac", node=LnjacSweeperConf, provider="lnjac")


class LnjacSweeper(BasicSweeper):
    """The cartesian product of all swept values, as Hydra's basic sweeper makes it."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        try:
            batches = self.split_arguments(overrides, self.max_batch_size)
        except HydraException as error:  # interval() and the like: there is no grid of them
            raise CompactHydraException(f"{error}: use choice(), range() or a list of values") from None
        jobs = [job for batch in batches for job in batch]
        if not jobs:
            raise CompactHydraException("the sweep has no jobs: does a glob() or range() in it match nothing?")
        self._check(jobs)

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returned: list[JobReturn] = []
        try:
            for batch in batches:
                returned += self.launcher.launch(batch, initial_job_idx=len(returned))
        finally:
            _merge(folder)
        if failed := [job for job in returned if job.status != JobStatus.COMPLETED]:
            lines = [f"  {' '.join(job.overrides or [])}: {_reason(job)}" for job in failed]
            raise CompactHydraException(f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(lines))
        return [returned]

    def _check(self, jobs: Sequence[Sequence[str]]) -> None:
        """Compose and admit every job; raises with all bad ones listed before anything is started."""
        from lnjac import config, train

        assert self.config is not None
        assert self.hydra_context is not None
        log.info("checking %d jobs", len(jobs))
        bad = []
        for job in jobs:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
            try:
                train.admit(config.build(composed))
            except config.ConfigError as error:
                bad.append(f"{' '.join(job)}\n  " + str(error).replace("\n", "\n  "))
        if bad:
            raise CompactHydraException(
                f"{len(bad)} of {len(jobs)} jobs cannot run; none was started:\n" + "\n".join(bad)
            )


def _reason(job: JobReturn) -> str:
    error = job._return_value
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _merge(folder: Path) -> None:
    from lnjac import sweep
    from lnjac.config import ConfigError

    try:
        log.info("\n".join(sweep.merge([folder], folder / "all.parquet").lines()))
    except ConfigError as error:
        log.warning("nothing merged: %s", error)
