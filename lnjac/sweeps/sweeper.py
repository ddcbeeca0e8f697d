"""hydra/sweeper=lnjac: a grid sweep that can be trusted, interrupted and resumed.

Every job is composed and checked before any starts; each gets the folder of its run's identity, so that the same sweep
again runs only what is missing; what there is gets merged at the end, whatever happened. Works with every launcher.
Hydra imports this module at every start, so its own imports stay light.
"""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import CompactHydraException, HydraException  # Hydra shows its text alone, without a traceback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lnjac.sweeps import grid, own_script, protocol, settings
from lnjac.sweeps.handing import HandOver
from lnjac.sweeps.launchers.engine import Engine, Todo, reason, require_folder
from lnjac.sweeps.protocol import UNRECORDED, UNSTARTED

if TYPE_CHECKING:
    from lnjac.config.compose import Composer
    from lnjac.sweeps.jobs import Job

log = logging.getLogger(__name__)

TABLES_SHOWN = 8
REPORT = "report.html"
NO_RESULT = "its process ended without a result"


class Interrupted(SystemExit, KeyboardInterrupt):
    """The interruption of a sweep, which Python ends with the shell's exit code for its signal, and no traceback."""

    def __init__(self, *number: int) -> None:
        super().__init__(128 + (number[0] if number else signal.SIGINT))
        self.args = number


class Sweeper(HydraSweeper):
    """The cartesian product of all swept values.

    Args:
        sweep: the sweep's name, the end of its folder's path.
        retry_failed: run those again that failed before.
        dry_run: print what there is to do, and start nothing.
        report: `auto` writes a report at the end, where the package that draws it is installed; or `off`.
        params: values to sweep by key, beside those of the command line.
        stop_on_failure: start no further run after one has failed.
        zip: values that move together, a mapping for each place; the product is taken with them.
    """

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(
        self,
        sweep: Any,
        retry_failed: Any,
        dry_run: Any,
        report: Any,
        params: Mapping[str, Any] | None = None,
        stop_on_failure: Any = False,
        zip: Any = None,
    ) -> None:
        self.name, self.retry_failed, self.stop_on_failure, self.dry_run = sweep, retry_failed, stop_on_failure, dry_run
        self.report = "off" if report is False else report  # as yaml reads off
        self.params = params or {}
        self.zip = OmegaConf.to_container(zip, resolve=True) if OmegaConf.is_config(zip) else zip

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        if task_function.__module__ == "__mp_main__":  # a worker process imports the script, to find its task function
            raise CompactHydraException(
                f"{sys.argv[0]} starts its sweep when it is imported, as each worker process must: "
                'put the call of its main function under `if __name__ == "__main__":`'
            )
        for callback in hydra_context.callbacks.callbacks:
            if isinstance(callback, HandOver) and not protocol.plans(task_function):
                callback.execution = own_script.keys_of_execution(task_function, config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        with _interruptible():
            return self._sweep(arguments)

    def _sweep(self, arguments: list[str]) -> Any:
        from lnjac.sweeps import jobs as of_jobs

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = self._folder()
        try:
            jobs = self._distinct(self._admitted(self._grid(arguments), folder))
        except PermissionError as error:  # an earlier sweep's folder, of another user
            raise CompactHydraException(
                f"{error.filename} cannot be read ({error.strerror}): choose another name by {self.key('sweep')}=NAME"
            ) from None
        retry = None if self.retry_failed else f"{self.key('retry_failed')}=false"
        todo = of_jobs.to_do(jobs, retry=retry)
        notes = self._find_starts(todo, folder)
        of_jobs.say(jobs, todo, retry=retry)
        for note in notes:
            log.info(note)
        if self.dry_run:
            self._estimate(todo, folder)
            return []
        for needed in (folder, *(job.folder for job in todo)):
            require_folder(needed, self.key("sweep"))
        OmegaConf.save(self.config, folder / "multirun.yaml")
        merged = False
        try:
            returned = self._launch(todo) if todo else []
            waited = of_jobs.wait_for_others(jobs)
        except KeyboardInterrupt:
            log.warning("interrupted: to resume, run the same command with %s", self._same(folder))
            raise
        finally:
            if not all(job.state.name == UNRECORDED for job in jobs):
                merged = _merge(folder)
        _show(todo)
        if merged:
            _say(folder)
        if merged and self.report == "auto" and (todo or waited or not (folder / REPORT).exists()):
            _report(folder)
        if n := sum(job.state.name == UNRECORDED for job in jobs):
            log.warning(
                "%d of %d jobs recorded nothing in their folders, so the same command will run them again: "
                "let the script write each run by `with lnjac.record() as run:`",
                n,
                len(jobs),
            )
        if failed := of_jobs.unfinished(jobs):
            lines = [f"{len(failed)} of {len(jobs)} jobs failed:", *failed]
            if n := sum(job.state.name == UNSTARTED for job in jobs):
                lines.append(f"{n} were not started: run the same command with {self._same(folder)} to go on")
            raise CompactHydraException("\n".join(lines))
        return [returned]

    def key(self, name: str) -> str:
        """Return the key by which the app's user gives a setting."""
        return settings.key(self.config, name)

    def _same(self, folder: Path) -> str:
        """Return the word that names the folder of this sweep again."""
        named = str(folder).endswith(str(self.name))
        return f"{self.key('sweep')}={self.name}" if named else f"hydra.sweep.dir={folder}"

    # ---------------------------------------------------------------- before anything starts

    def _folder(self) -> Path:
        """Return the sweep's own folder, its name and the sweep's other settings checked."""
        settings.require_heard(self.config)
        for name in ("retry_failed", "stop_on_failure", "dry_run"):
            if not isinstance(value := getattr(self, name), bool):
                raise CompactHydraException(f"{self.key(name)}={value} must be true or false")
        if self.stop_on_failure and not isinstance(self.launcher, Engine):
            raise CompactHydraException(
                f"{self.key('stop_on_failure')}=true needs one of lnjac's launchers: choose hydra/launcher=local, "
                "slurm or ray"
            )
        if self.report not in ("auto", "off"):
            raise CompactHydraException(f"{self.key('report')}={self.report} must be auto or off")
        _require_name(self.name, self.key("sweep"))
        if not str(self.config.hydra.sweep.dir).strip():
            raise CompactHydraException("hydra.sweep.dir is empty: give a folder, such as multirun/pilot")
        return Path(self.config.hydra.sweep.dir)

    def _composer(self) -> "Composer":
        """Return what composes the jobs' configs, by the rules of the script."""
        from lnjac.config.compose import Composer, searched

        loader, master = self.hydra_context.config_loader, self.config
        of_script = getattr(protocol.script(self.task_function), "composer", Composer)
        composer: Composer = of_script(loader, lambda words: loader.load_sweep_config(master, words))
        composer.repository = searched(loader, master)
        return composer

    def _grid(self, arguments: Sequence[str]) -> list[list[str]]:
        composer = self._composer()
        params = composer.as_typed([f"{key}={value}" for key, value in self.params.items()])
        whole, key = {*composer.whole, *settings.short_keys(self.config)}, self.key("zip")
        one_zip = [
            o.input_line for o in composer.read(arguments) if o.key_or_group == key and not o.is_sweep_override()
        ]
        own = [word for word in arguments if word not in one_zip]
        return grid.grid([*params, *own], composer, whole, grid.require_zipped(self.zip, key))

    def _admitted(self, words: Sequence[list[str]], folder: Path) -> "list[Job]":
        """Compose and check every job; raise CompactHydraException, with all bad ones listed, before any is started."""
        from lnjac.errors import ConfigError
        from lnjac.escape import visible
        from lnjac.sweeps.jobs import Job

        composer = self._composer()
        plan = getattr(protocol.script(self.task_function), "plan", None) or own_script.planner(
            self.task_function, self.config
        )
        if isinstance(self.launcher, Engine) and not self.dry_run:
            self.launcher.prepare()
        log.info("checking %d jobs", len(words))
        here = not getattr(self.launcher, "elsewhere", False)
        jobs: list[Job] = []
        bad: list[tuple[str, str]] = []
        checked: list[grid.Checked] = []
        for overrides in words:
            composed, problems, name = None, "", composer.in_words(overrides)
            try:
                composed = composer.compose(overrides)
                jobs.append(Job(name, overrides, composed, plan(composed, here), folder))
            except ConfigError as error:
                problems = str(error)
            except (HydraException, OmegaConfBaseException) as error:
                problems = _in_one_line(error)
            if problems:
                bad.append((name, "\n  ".join(["", *map(visible, problems.split("\n"))])))
            if composed is not None:
                checked.append(grid.Checked(composed.choices, problems))
        if bad:
            given = self.config.hydra.overrides
            typed = [word for word in (*given.hydra, *given.task) if not word.startswith("hydra.mode=")]
            head = f"{len(bad)} of {len(words)} jobs cannot run; none was started:"
            alike = len(bad) == len(words) > 1 and len({said for _, said in bad}) == 1
            listed = [f"each of them{bad[0][1]}"] if alike else [f"{name}{said}" for name, said in bad]
            advice = grid.advice(typed, checked, composer, self.key("sweep"))
            raise CompactHydraException("\n".join([head, *listed, *advice]))
        return jobs

    def _todo(self, job: "Job", number: int) -> Todo:
        """Return what the launcher is to know of a job."""
        composed = job.composed
        return Todo(number, composed.words, job.folder, composed.value, partial(self._full, job))

    def _full(self, job: "Job") -> DictConfig:
        """Return the job's config as Hydra composes it, with its folder."""
        config = job.composed.full()
        OmegaConf.copy_cache(from_config=self.config, to_config=config)
        with open_dict(config):
            config.hydra.sweep.subdir = job.folder.name
            for key, value in job.start.values.items():
                OmegaConf.update(config, key, value)
        return config

    def _given(self, job: "Job") -> list[str]:
        """Return the words that a job gets beside its own."""
        from lnjac.config.command import text

        values = [f"{key}={text(value)}" for key, value in job.start.values.items()]
        return [f"hydra.sweep.subdir={job.folder.name}", *values]

    def _find_starts(self, todo: "Sequence[Job]", folder: Path) -> list[str]:
        """Ask the script how each job begins; return what its user should know of that."""
        from lnjac.errors import ConfigError

        if not todo or (of_script := getattr(protocol.script(self.task_function), "starts", None)) is None:
            return []
        try:
            found: protocol.Starts = of_script(
                todo, self.config, folder, not getattr(self.launcher, "elsewhere", False)
            )
        except ConfigError as error:
            raise CompactHydraException(str(error)) from None
        for job, start in zip(todo, found.jobs, strict=True):
            job.start = start
        return found.notes

    def _distinct(self, jobs: "Sequence[Job]") -> "list[Job]":
        distinct = {job.folder: job for job in reversed(jobs)}
        if (n := len(jobs) - len(distinct)) > 0:
            log.info("%d of %d jobs are the same run as an earlier one: dropped", n, len(jobs))
        return list(reversed(distinct.values()))

    def _estimate(self, todo: "Sequence[Job]", folder: Path) -> None:
        from lnjac.sweeps import estimate

        for job in todo:
            start = job.start
            begun = f": {start.kind} {start.source.name} after update {start.done}" if start.source else ""
            log.info("to do (%s): %s%s", job.state.name, job.name, begun)
        root = Path("multirun") if Path("multirun").is_dir() else folder
        seconds, covered = estimate.seconds(
            [(job.plan.columns, job.start.done) for job in todo], sorted(root.rglob("*.runs.parquet"))
        )
        if todo and covered:
            some = "" if covered == len(todo) else f" for {covered} of them; no run of the others' shape is finished"
            log.info("about %s of computing%s", estimate.in_words(seconds), some)
        elif todo:
            log.info("no estimate of time: no run of their shape is finished")
        log.info("dry_run: nothing was started; the folder is %s", folder)

    # ---------------------------------------------------------------- running

    def _launch(self, jobs: "Sequence[Job]") -> list[JobReturn]:
        """Run the jobs. Whatever ends a job's process or the launcher, each is accounted for in its own status."""
        from lnjac.sweeps.jobs import settle

        returned: dict[int, JobReturn] = {}
        why = NO_RESULT
        try:
            if isinstance(self.launcher, Engine):
                self.launcher.stop_on_failure = self.stop_on_failure
                todo = [self._todo(job, number) for number, job in enumerate(jobs)]
                with closing(self.launcher.launched(todo)) as outcomes:
                    for i, back in outcomes:
                        back.cfg = back.hydra_cfg = None  # large, and the job's folder has them
                        returned[i] = back
                        _settle(jobs[i], back)
            else:
                words = [[*job.overrides, *self._given(job)] for job in jobs]
                for i, back in enumerate(self.launcher.launch(words, initial_job_idx=0)):
                    returned[i] = back
                    _settle(jobs[i], back)
        except CompactHydraException:
            raise
        except Exception as error:  # the launcher itself gave up: its other jobs are judged by what they left
            log.exception("the launcher failed")
            why = f"the launcher failed: {error}"
        for i, job in enumerate(jobs):
            if i not in returned:
                settle(job, why)
        return [returned[i] for i in sorted(returned)]


def _settle(job: "Job", returned: JobReturn) -> None:
    """Bring the state of a job that has ended up to date."""
    from lnjac.runs.state import State
    from lnjac.sweeps.jobs import settle

    if returned.status == JobStatus.UNKNOWN:
        job.state = State(UNSTARTED)
        return
    failed = returned.status == JobStatus.FAILED
    settle(job, reason(returned) if failed else NO_RESULT, ended_well=not failed)


def _in_one_line(error: Exception) -> str:
    """Return in one line why Hydra cannot compose a job, without its search path."""
    said = str(error) or str(error.__cause__)
    return " ".join(said.split("Config search path:")[0].split())


@contextmanager
def _interruptible() -> Iterator[None]:
    """End on Ctrl-C without a traceback, and on SIGTERM likewise, unless the script has a handler for it."""
    free = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if free:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(*stop.args) from None
    finally:
        if free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


def _require_name(name: Any, key: str) -> None:
    """Raise CompactHydraException unless the sweep's name is the path of a folder in multirun/."""
    if not isinstance(name, str):
        raise CompactHydraException(f"{key}={name} is a {type(name).__name__}: write it in quotes, {key}: '{name}'")
    parts = Path(name).parts
    odd = any(part in ("..", "/") or not part.strip() or len(part.encode()) > 255 for part in parts)
    if odd or not parts:
        raise CompactHydraException(
            f"{key}={name!r} names no folder in multirun/, by parts of at most 255 bytes and without '..': "
            f"give it a name, such as {key}=pilot, or choose any folder by hydra.sweep.dir=FOLDER"
        )


# ---------------------------------------------------------------- after the jobs


def _merge(folder: Path) -> bool:
    """Merge the sweep's runs; return whether there was anything to merge."""
    from lnjac.errors import ConfigError
    from lnjac.runs.merge import merge

    try:
        log.info("\n".join(merge([folder], folder / "all.parquet").lines()))
    except (ConfigError, OSError) as error:
        log.warning("nothing merged: %s", error)
        return False
    return True


def _show(jobs: "Sequence[Job]") -> None:
    """Print the norms' table of each run just made, unless there are too many to read."""
    from lnjac.runs import folder as runs
    from lnjac.text import layer_table

    done = [job for job in jobs if job.state.finished and (job.folder / runs.FILES["layers"]).exists()]
    for job in done[:TABLES_SHOWN]:
        layers = runs.read_table(job.folder / runs.FILES["layers"]).to_pandas()
        last = layers[layers["step"] == layers["step"].max()]
        if len(last):
            log.info("\n%s\n%s", job.name, layer_table(last))
    if len(done) > TABLES_SHOWN:
        log.info("and %d more: `lnjac show FOLDER` prints a run's table", len(done) - TABLES_SHOWN)


def _say(folder: Path) -> None:
    """Print what the merged table answers. No sweep fails for want of an answer."""
    from lnjac.escape import visible
    from lnjac.reporting.verdict import verdict

    try:
        log.info("\n%s", "\n".join(map(visible, verdict(folder / "all.parquet").sentences)))
    except Exception as error:
        log.warning("no verdict: %s", f"{type(error).__name__}: {error}".splitlines()[0])


def _report(folder: Path) -> None:
    """Write the report of the merged table. No sweep fails for want of a report."""
    from lnjac.errors import ConfigError
    from lnjac.reporting.marks import require_extra
    from lnjac.reporting.report import report

    try:
        require_extra()
    except ConfigError as error:
        log.info("no report: %s", error)
        return
    try:
        report(folder / "all.parquet", output=folder / REPORT, title=folder.name)
    except Exception as error:
        log.warning("no report: %s", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    log.info("%s shows this sweep in a browser", folder / REPORT)
