"""hydra/sweeper=lnjac: a grid sweep that can be trusted, interrupted and resumed.

Every job is composed and checked before any starts; each gets the folder of its run's identity, so that the same sweep
again runs only what is missing; what there is gets merged at the end, whatever happened. Works with every launcher.
This folder has no __init__.py: it is part of Hydra's plugin namespace, and Hydra imports this module at every start, so
its own imports stay light.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import CompactHydraException, HydraException  # Hydra shows its text alone, without a traceback
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.lnjac_launchers import Engine, reason, require_folder

log = logging.getLogger(__name__)

TABLES_SHOWN = 8
REPORT = "report.html"


@dataclass
class Job:
    """One job of the sweep: how it was asked for, what it is, and where it goes.

    `config` is a lnjac.config.RunConfig and `state` a lnjac.plan.State: Hydra loads this module in a way that dataclasses
    cannot resolve names in quotes.
    """

    overrides: list[str]
    composed: DictConfig
    config: Any
    identity: dict[str, str]
    folder: Path
    state: Any

    @property
    def name(self) -> str:
        return " ".join(self.overrides)


class LnjacSweeper(BasicSweeper):
    """The cartesian product of all swept values, as Hydra's basic sweeper makes it."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = self._folder()
        try:
            jobs = self._distinct(self._admitted(self._grid(arguments), folder))
        except PermissionError as error:  # an earlier sweep's folder, of another user
            raise CompactHydraException(
                f"{error.filename} cannot be read ({error.strerror}): choose another sweep="
            ) from None
        todo = self._todo(jobs)
        if self.config.dry_run:
            self._estimate(todo, folder)
            return []
        for needed in (folder, *(job.folder for job in todo)):
            require_folder(needed, "sweep")
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returned: list[JobReturn] = []
        try:
            for start in range(0, len(todo), size := self.max_batch_size or max(1, len(todo))):
                returned += self._launch(todo[start : start + size], start)
        except KeyboardInterrupt:
            log.warning("interrupted: the same command with sweep=%s goes on from here", self.config.sweep)
            raise
        finally:
            merged = _merge(folder)
        _show(todo)
        if merged and self.config.report == "auto" and (todo or not (folder / REPORT).exists()):
            _report(folder)
        if failed := _unfinished(jobs):
            raise CompactHydraException(f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(failed))
        return [returned]

    # ---------------------------------------------------------------- before anything starts

    def _folder(self) -> Path:
        """The sweep's own folder; its name is checked, and what is said of the sweep as a whole has its type."""
        assert self.config is not None
        for switch in ("retry_failed", "dry_run"):
            if not isinstance(value := self.config[switch], bool):
                raise CompactHydraException(f"{switch}={value} must be true or false")
        if (report := self.config.report) not in ("auto", "off"):
            raise CompactHydraException(f"report={report} must be auto or off")
        folder = Path(self.config.hydra.sweep.dir)
        if too_long := [part for part in folder.parts if len(part.encode()) > 255]:
            raise CompactHydraException(
                f"sweep={too_long[0][:40]}… is too long for a folder's name: use 255 bytes at most"
            )
        return folder

    def _grid(self, arguments: Sequence[str]) -> list[list[str]]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        if whole := [o.get_key_element() for o in overrides if o.is_sweep_override() and _is_whole(o)]:
            raise CompactHydraException(
                f"{whole[0].lstrip('+')} is said of a whole sweep, so it cannot take several values: run one sweep for each"
            )
        try:
            batches = self.split_arguments(overrides, None)
        except HydraException as error:  # interval() and the like: there is no grid of them
            raise CompactHydraException(f"{error}: use choice(), range() or a list of values") from None
        if not (jobs := [job for batch in batches for job in batch]):
            raise CompactHydraException("the sweep has no jobs: does a glob() or range() in it match nothing?")
        return jobs

    def _admitted(self, grid: Sequence[list[str]], folder: Path) -> list[Job]:
        """Compose and check every job; raises with all bad ones listed before anything is started."""
        assert self.config is not None
        assert self.hydra_context is not None
        if isinstance(self.launcher, Engine) and not self.config.dry_run:
            self.launcher.prepare()
        from lnjac import config as configs
        from lnjac import plan, train

        log.info("checking %d jobs", len(grid))
        here = not getattr(self.launcher, "elsewhere", False)
        loader, master = self.hydra_context.config_loader, self.config
        composer = configs.Composer(loader, lambda words: loader.load_sweep_config(master, words))
        jobs, bad = [], []
        for overrides in grid:
            composed = self._composed(composer, overrides)
            try:
                config = configs.build(composed)
                sha256 = train.admit(config, here=here).sha256
            except configs.ConfigError as error:
                bad.append(f"{' '.join(overrides)}\n  " + str(error).replace("\n", "\n  "))
                continue
            identity = {"run_id": configs.run_id(config, sha256), "diag_id": configs.diag_id(config)}
            own = folder / "-".join(identity.values())
            jobs.append(Job(overrides, composed, config, identity, own, plan.state(own, identity)))
        if bad:
            raise CompactHydraException(
                f"{len(bad)} of {len(grid)} jobs cannot run; none was started:\n" + "\n".join(bad)
            )
        return jobs

    def _composed(self, composer: Any, words: list[str]) -> DictConfig:
        """The job's config, with what Hydra notes in it of how it was asked for."""
        assert self.config is not None
        overrides = composer.parse(words)
        config: DictConfig = composer.compose(overrides)
        ours = [override for override in overrides if not override.is_hydra_override()]
        config.hydra.overrides.task = [override.input_line for override in ours]
        names = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            overrides=ours, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
        )
        OmegaConf.copy_cache(from_config=self.config, to_config=config)
        return config

    def _distinct(self, jobs: Sequence[Job]) -> list[Job]:
        distinct = {job.folder: job for job in reversed(jobs)}
        if (n := len(jobs) - len(distinct)) > 0:
            log.info("%d of %d jobs are the same run as an earlier one: dropped", n, len(jobs))
        return list(reversed(distinct.values()))

    def _todo(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that are to run; says how many there are of each kind, and why a run is made again."""
        from lnjac import plan, runs

        assert self.config is not None
        kept = (*runs.FINISHED, runs.RUNNING, *(() if self.config.retry_failed else (runs.FAILED,)))
        todo = [job for job in jobs if job.state.name not in kept]
        count = Counter(job.state.name for job in jobs)
        seen = ", ".join(f"{n} {name}" for name, n in count.items() if name != plan.MISSING)
        log.info("%d jobs: %d to do%s", len(jobs), len(todo), f" ({seen})" if seen else "")
        for job in jobs:
            if job.state.name == runs.RUNNING:
                log.warning("%s is being run by another process: left to it (%s)", job.name, job.folder)
            elif job.state.name in (runs.FAILED, plan.BROKEN):
                again = "run again" if job in todo else "left as it is (retry_failed=false)"
                log.warning("%s: %s: %s %s", job.folder.name, again, job.state.name, job.state.reason.split("\n")[0])
            elif job.state.finished and job.state.reason:
                log.warning("%s: %s", job.folder, job.state.reason)
        return todo

    def _estimate(self, todo: Sequence[Job], folder: Path) -> None:
        from lnjac import plan

        for job in todo:
            log.info("to do (%s): %s", job.state.name, job.name)
        root = Path("multirun") if Path("multirun").is_dir() else folder
        seconds, covered = plan.seconds([job.config for job in todo], sorted(root.rglob("*.runs.parquet")))
        if todo and covered:
            some = "" if covered == len(todo) else f" for {covered} of them; no run of the others' shape is finished"
            log.info("about %s of computing%s", _duration(seconds), some)
        elif todo:
            log.info("no estimate of time: no run of their shape is finished")
        log.info("dry_run: nothing was started; the folder is %s", folder)

    # ---------------------------------------------------------------- running

    def _launch(self, jobs: Sequence[Job], first: int) -> list[JobReturn]:
        """Run a batch. Whatever ends a job's process or the launcher, each job is accounted for in its own status."""
        assert self.launcher is not None
        said: dict[Path, str] = {}
        returned: list[JobReturn] = []
        try:
            if isinstance(self.launcher, Engine):
                for job in jobs:
                    with open_dict(job.composed):
                        job.composed.hydra.sweep.subdir = job.folder.name
                returned = list(self.launcher.launch_composed([job.composed for job in jobs], first))
            else:
                grid = [[*job.overrides, f"hydra.sweep.subdir={job.folder.name}"] for job in jobs]
                returned = list(self.launcher.launch(grid, initial_job_idx=first))
            said = {
                job.folder: reason(back)
                for job, back in zip(jobs, returned, strict=True)
                if back.status != JobStatus.COMPLETED
            }
        except CompactHydraException:
            raise
        except Exception as error:  # the launcher itself gave up: its jobs are judged by what they left
            log.exception("the launcher failed")
            said = dict.fromkeys((job.folder for job in jobs), f"the launcher failed: {error}")
        for job in jobs:
            _settle(job, said.get(job.folder, "its process ended without a word"))
        return returned


def _is_whole(override: Override) -> bool:
    from lnjac.config import SWEEP

    return override.get_key_element().lstrip("+") in (*SWEEP, "experiment")


def _settle(job: Job, said: str) -> None:
    """Bring the job's state up to date; one that is not finished, has not failed and is not alive has died: it failed."""
    from lnjac import plan, runs

    job.state = plan.state(job.folder, job.identity)
    if not job.state.finished and job.state.name not in (runs.FAILED, runs.RUNNING, plan.FOREIGN):
        try:
            plan.fail(job.folder, job.identity, said)
        except (runs.InUse, OSError) as error:
            log.warning("%s: %s", job.folder, error)
        job.state = plan.state(job.folder, job.identity)


def _unfinished(jobs: Sequence[Job]) -> list[str]:
    """A line for each job that has failed, now or earlier."""
    from lnjac import runs

    return [
        f"  {job.name}: {job.state.reason.splitlines()[0] if job.state.reason else job.state.name} ({job.folder})"
        for job in jobs
        if not job.state.finished and job.state.name != runs.RUNNING
    ]


def _show(jobs: Sequence[Job]) -> None:
    """The norms' table of each run just made, unless there are too many to read."""
    from lnjac import runs
    from lnjac.summary import layer_table

    done = [job for job in jobs if job.state.finished]
    for job in done[:TABLES_SHOWN]:
        layers = runs.read_table(job.folder / runs.FILES["layers"]).to_pandas()
        last = layers[layers["step"] == layers["step"].max()]
        if len(last):
            log.info("\n%s\n%s", job.name, layer_table(last))
    if len(done) > TABLES_SHOWN:
        log.info("and %d more: `lnjac show FOLDER` prints a run's table", len(done) - TABLES_SHOWN)


def _report(folder: Path) -> None:
    """Write the report of the merged table, where what draws it is installed: no sweep fails for want of a report."""
    if not (find_spec("altair") and find_spec("vl_convert")):
        return
    from lnjac import design, report

    try:
        report.make(design.read([folder / "all.parquet"]), title=folder.name).write(folder / REPORT)
    except Exception as error:
        log.warning("no report: %s", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    log.info("%s shows this sweep in a browser", folder / REPORT)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _merge(folder: Path) -> bool:
    """Whether there was anything to merge."""
    from lnjac import sweep
    from lnjac.config import ConfigError

    try:
        log.info("\n".join(sweep.merge([folder], folder / "all.parquet").lines()))
    except (ConfigError, OSError) as error:
        log.warning("nothing merged: %s", error)
        return False
    return True
