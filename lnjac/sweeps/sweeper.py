"""hydra/sweeper=lnjac: a grid sweep that can be trusted, interrupted and resumed.

Every job is composed and checked before any starts; each gets the folder of its run's identity, so that the same sweep
again runs only what is missing; what there is gets merged at the end, whatever happened. Works with every launcher.
Hydra imports this module at every start, so its own imports stay light.
"""

import logging
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import FloatRange, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import CompactHydraException, HydraException  # Hydra shows its text alone, without a traceback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lnjac.sweeps.launchers import Engine, reason, require_folder

log = logging.getLogger(__name__)

TABLES_SHOWN = 8
REPORT = "report.html"
EXAMPLE = "pilot"
POLL_S = 1.0
"""Seconds between looks at the jobs of another command."""


@dataclass
class Job:
    """One job of the sweep: how it was asked for, what it is, and where it goes.

    `config` is a lnjac.config.schema.RunConfig and `state` a lnjac.runs.state.State.
    """

    overrides: list[str]
    composed: DictConfig
    config: Any
    identity: dict[str, str]
    folder: Path
    state: Any

    @property
    def name(self) -> str:
        return _words(self.overrides)


class Sweeper(BasicSweeper):
    """The cartesian product of all swept values, as Hydra's basic sweeper makes it."""

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None = None) -> None:
        # Hydra executes its own plugins' modules anew whenever it looks for plugins: the name in BasicSweeper's `super()`
        # then means another class than the one that is the base here.
        self.max_batch_size, self.params = max_batch_size, params or {}
        self.hydra_context = self.config = self.launcher = None

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
            waited = self._wait_for_others(jobs)
        except KeyboardInterrupt:
            log.warning("interrupted: the same command with sweep=%s goes on from here", self.config.sweep)
            raise
        finally:
            merged = _merge(folder)
        _show(todo)
        if merged and self.config.report == "auto" and (todo or waited or not (folder / REPORT).exists()):
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
        if problem := _name_problem(self.config.sweep):
            raise CompactHydraException(problem)
        if not str(self.config.hydra.sweep.dir).strip():
            raise CompactHydraException(f"hydra.sweep.dir is empty: give a folder, such as multirun/{EXAMPLE}")
        folder = Path(self.config.hydra.sweep.dir)
        if too_long := [part for part in folder.parts if len(part.encode()) > 255]:
            raise CompactHydraException(
                f"sweep={too_long[0][:40]}… is too long for a folder's name: use 255 bytes at most"
            )
        return folder

    def _parse_config(self) -> list[str]:
        from lnjac.config.compose import as_typed

        words: list[str] = super()._parse_config()
        return as_typed(words)

    def _grid(self, arguments: Sequence[str]) -> list[list[str]]:
        assert self.hydra_context is not None
        from lnjac.config.compose import spelled

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(spelled([*self._parse_config(), *arguments]))
        if whole := [o.get_key_element() for o in overrides if o.is_sweep_override() and _is_whole(o)]:
            raise CompactHydraException(
                f"{whole[0].lstrip('+')} is said of a whole sweep, so it cannot take several values: run one sweep for each"
            )
        for override in overrides:
            if isinstance(swept := override.value(), RangeSweep) and isinstance(swept.range(), FloatRange):
                # with the decimals that were typed: Hydra counts in binary, and 0.1 + 0.1 + 0.1 would not be 0.3
                for name in ("start", "stop", "step"):
                    setattr(swept, name, Decimal(str(getattr(swept, name))))
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
        from lnjac import errors
        from lnjac.config import compose, schema
        from lnjac.config import identity as config_identity
        from lnjac.escape import visible
        from lnjac.runs import state as plan
        from lnjac.training import run as train

        log.info("checking %d jobs", len(grid))
        here = not getattr(self.launcher, "elsewhere", False)
        loader, master = self.hydra_context.config_loader, self.config
        composer = compose.Composer(loader, lambda words: loader.load_sweep_config(master, words))
        jobs, bad, unknown = [], [], _Unknown()
        for overrides in grid:
            choices: Mapping[str, str] = {}
            said = ""
            try:
                composed = self._composed(composer, overrides)
                choices = composed.hydra.runtime.choices
                config = schema.build(composed)
                sha256 = train.admit(config, here=here).sha256
            except (errors.ConfigError, HydraException, OmegaConfBaseException) as error:
                said = str(error) if isinstance(error, errors.ConfigError) else _in_one_line(error)
            unknown.add(choices, said)
            if said:
                bad.append("\n  ".join([_words(overrides), *map(visible, said.split("\n"))]))
                continue
            identity = {"run_id": config_identity.run_id(config, sha256), "diag_id": config_identity.diag_id(config)}
            own = folder / "-".join(identity.values())
            jobs.append(Job(overrides, composed, config, identity, own, plan.state(own, identity)))
        if bad:
            given = self.config.hydra.overrides
            typed = [word for word in (*given.hydra, *given.task) if not word.startswith("hydra.mode=")]
            raise CompactHydraException(
                "\n".join(
                    [f"{len(bad)} of {len(grid)} jobs cannot run; none was started:", *bad, *unknown.advice(typed)]
                )
            )
        return jobs

    def _composed(self, composer: Any, words: list[str]) -> DictConfig:
        """The job's config, with what Hydra notes in it of how it was asked for."""
        assert self.config is not None
        overrides = composer.parse(words)
        config: DictConfig = composer.compose(overrides)
        ours = [override for override in overrides if not override.is_hydra_override()]
        config.hydra.overrides.task = [str(override.input_line).removeprefix("++") for override in ours]
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
        from lnjac.runs import folder as runs
        from lnjac.runs import state as plan

        assert self.config is not None
        kept = (*runs.FINISHED, runs.RUNNING, *(() if self.config.retry_failed else (runs.FAILED,)))
        todo = [job for job in jobs if job.state.name not in kept]
        count = Counter(job.state.name for job in jobs)
        seen = ", ".join(f"{n} {name}" for name, n in count.items() if name != plan.MISSING)
        log.info("%d jobs: %d to do%s", len(jobs), len(todo), f" ({seen})" if seen else "")
        for job in jobs:
            if job.state.name == runs.RUNNING:
                log.warning("%s is being run by another command: left to it (%s)", job.name, job.folder)
            elif job.state.name in (runs.FAILED, plan.BROKEN):
                again = "run again" if job in todo else "left as it is (retry_failed=false)"
                log.warning("%s: %s: %s %s", job.folder.name, again, job.state.name, job.state.reason.split("\n")[0])
            elif job.state.finished and job.state.reason:
                log.warning("%s: %s", job.folder, job.state.reason)
        return todo

    def _estimate(self, todo: Sequence[Job], folder: Path) -> None:

        for job in todo:
            log.info("to do (%s): %s", job.state.name, job.name)
        root = Path("multirun") if Path("multirun").is_dir() else folder
        from lnjac.sweeps import estimate

        seconds, covered = estimate.seconds([job.config for job in todo], sorted(root.rglob("*.runs.parquet")))
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

    def _wait_for_others(self, jobs: Sequence[Job]) -> bool:
        """Wait until no other command runs any of these jobs, and bring their states up to date; whether there was one."""
        from lnjac.runs import folder as runs
        from lnjac.runs import state as plan

        others = [job for job in jobs if job.state.name == runs.RUNNING]
        for n, job in enumerate(others):
            job.state = plan.state(job.folder, job.identity)
            if job.state.name == runs.RUNNING:
                left = len(others) - n
                log.info("waiting for another command to end %d of these jobs, now %s (%s)", left, job.name, job.folder)
            while job.state.name == runs.RUNNING:
                time.sleep(POLL_S)
                job.state = plan.state(job.folder, job.identity)
            if job.state.name == runs.INTERRUPTED:
                job.state = plan.State(runs.INTERRUPTED, "the other command left it unfinished: run this one again")
        return bool(others)


def _words(overrides: Sequence[str]) -> str:
    """A job's words as a user types them."""
    from lnjac.escape import visible

    return visible(" ".join(word.removeprefix("++") for word in overrides))


def _in_one_line(error: Exception) -> str:
    """Say in one line why Hydra cannot compose a job, without its search path."""
    said = str(error) or str(error.__cause__)
    return " ".join(said.split("Config search path:")[0].split())


def _name_problem(name: Any) -> str | None:
    """Say what is wrong with a sweep's name, with the remedy; None if it names a folder under multirun/."""
    remedy = f"give it a name, such as sweep={EXAMPLE}"
    if not isinstance(name, str):
        return f"sweep={name} is no text but a {type(name).__name__}: write it in quotes, sweep: '{name}'"
    if not (parts := Path(name).parts) or not name.strip():
        return f"sweep={name!r} names no folder: {remedy}, or leave sweep out"
    if Path(name).is_absolute():
        return f"sweep={name} is absolute, and a sweep's folder lies in multirun/: {remedy}, or give hydra.sweep.dir={name}"
    if ".." in parts or not all(part.strip() for part in parts):
        return f"sweep={name} has a part that names no folder in multirun/, '..' or blank: {remedy}"
    return None


class _Unknown:
    """Which typed keys the members of each group lack, over the jobs of a sweep."""

    def __init__(self) -> None:
        self.lacked: dict[str, dict[str, set[str]]] = {}

    def add(self, choices: Mapping[str, str], said: str) -> None:
        """Take in a job's members and the problems that its config has."""
        keys = re.findall(r"^(\S+) is not a setting", said, re.MULTILINE)
        for group, member in choices.items():
            lacked = self.lacked.setdefault(group, {}).setdefault(member, set())
            lacked.update(key for key in keys if key.startswith(f"{group}."))

    def advice(self, words: Sequence[str]) -> Iterator[str]:
        """Yield commands that fill one sweep together, each of which gives a key only to members that have it.

        `words` are those of the command that was typed.
        """
        typed = {word: word.partition("=")[0].lstrip("+") for word in words}
        apart: dict[str, dict[frozenset[str], list[str]]] = {}
        for group, lacked in self.lacked.items():
            alike: dict[frozenset[str], list[str]] = {}
            for member, keys in lacked.items():
                given = frozenset(typed_key for typed_key in typed.values() if _within(typed_key, keys))
                alike.setdefault(given, []).append(member)
            if len(alike) > 1:
                apart[group] = alike
        if not apart:
            return
        some = sorted({key for alike in apart.values() for keys in alike for key in keys})
        yield f"only some of the members have {', '.join(some)}: fill one sweep by several commands, each with what it has:"
        name = [] if "sweep" in typed.values() else ["sweep=NAME"]
        for parts in product(*(alike.items() for alike in apart.values())):
            lacking = {key for keys, _ in parts for key in keys}
            kept = [word for word, key in typed.items() if key not in apart and key not in lacking]
            chosen = [f"{group}={','.join(members)}" for group, (_, members) in zip(apart, parts, strict=True)]
            yield "  python run.py -m " + " ".join(
                shlex.quote(word.removeprefix("++")) for word in (*kept, *chosen, *name)
            )


def _within(key: str, keys: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{other}.") for other in keys)


def _is_whole(override: Override) -> bool:
    from lnjac.config.schema import SWEEP

    return override.get_key_element().lstrip("+") in (*SWEEP, "experiment")


def _settle(job: Job, said: str) -> None:
    """Bring the job's state up to date; one that is not finished, has not failed and is not alive has died: it failed."""
    from lnjac.runs import folder as runs
    from lnjac.runs import state as plan

    job.state = plan.state(job.folder, job.identity)
    if not job.state.finished and job.state.name not in (runs.FAILED, runs.RUNNING, plan.FOREIGN):
        try:
            plan.fail(job.folder, job.identity, said)
        except runs.InUse:  # another command has begun it and not yet written its status
            job.state = plan.State(runs.RUNNING)
            return
        except OSError as error:
            log.warning("%s: %s", job.folder, error)
        job.state = plan.state(job.folder, job.identity)


def _unfinished(jobs: Sequence[Job]) -> list[str]:
    """A line for each job that has failed, now or earlier."""
    from lnjac.escape import visible
    from lnjac.runs import folder as runs

    return [
        visible(f"  {job.name}: {(job.state.reason or job.state.name).splitlines()[0]} ({job.folder})")
        for job in jobs
        if not job.state.finished and job.state.name != runs.RUNNING
    ]


def _show(jobs: Sequence[Job]) -> None:
    """The norms' table of each run just made, unless there are too many to read."""
    from lnjac.runs import folder as runs
    from lnjac.text import layer_table

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
    from lnjac.comparing.tables import open_tables
    from lnjac.reporting import report

    try:
        report.make(open_tables(folder / "all.parquet"), title=folder.name).write(folder / REPORT)
    except Exception as error:
        log.warning("no report: %s", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    log.info("%s shows this sweep in a browser", folder / REPORT)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _merge(folder: Path) -> bool:
    """Whether there was anything to merge."""
    from lnjac.errors import ConfigError
    from lnjac.runs import merge as sweep

    try:
        log.info("\n".join(sweep.merge([folder], folder / "all.parquet").lines()))
    except (ConfigError, OSError) as error:
        log.warning("nothing merged: %s", error)
        return False
    return True
