"""Record one run: open its folder, take its rows, write its tables and its status. Without torch and without a config."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.norms import formulas
from lnjac.runs import folder as runs
from lnjac.runs.configs import CONFIGS
from lnjac.runs.handed import given
from lnjac.runs.identity import Identified, identify
from lnjac.runs.journal import Damaged, Journal, read
from lnjac.runs.rows import Rows, Taken, column_problems, plain, whole
from lnjac.runs.schema import CORE, CURVES, MEASURED_AT, RUNS
from lnjac.runs.state import FOREIGN, state
from lnjac.trackers.base import Guarded, TrackedRun, Tracker

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

LAST_LOSSES = 10
"""Updates whose mean loss is a run's train_loss_nats."""


def _declared(table: str) -> list[Column]:
    """Return the columns that lnjac declares for a table; metrics may have been added since this module was imported."""
    layers = [*MEASURED_AT, *formulas.columns()]
    return {"layers": layers, "runs": RUNS, "curves": CURVES}.get(table, [*MEASURED_AT])


def record(
    folder: str | Path | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    execution: Collection[str] | None = None,
    tables: Mapping[str, Sequence[Column]] | None = None,
    resume: int | None = None,
    tracker: Tracker | None = None,
) -> Record:
    """Open a run's folder, to be filled from any training loop.

        with lnjac.record("runs/a", config={"lr": 1e-3, "model": {"width": 64}}, seed=1) as run:
            for step in range(1, 101):
                ...
                run.scalars(step, train_loss=loss)
            run.layers(probe.rows(step), step)

    Rows are safe when the call that brings them returns, whatever then ends the process. The tables are written when the
    context ends, the status last: `done`, or `diverged` if the loss is not finite at the end or `run.diverged(step)` said so.
    An exception leaves the status `failed` with its traceback; Ctrl-C and SystemExit leave `interrupted`.

    In a script that Hydra starts with lnjac's sweeper, `record()` takes folder, config and execution from there.

    Args:
        folder: Made if it is not there. No other process may write to it meanwhile.
        config: What tells this run from others, as plain values, which may be nested: `model.width` is a column of its rows.
        seed: Runs with equal seeds are compared in pairs. config["seed"] unless given.
        execution: Dotted keys of `config` that are no part of the run's identity and columns, such as paths, device and
            workers; the name of a group stands for all below it. They are kept in the files' notes.
        tables: Columns of your own by table: further ones of layers, curves and runs, or those of a new table for `run.rows`,
            before which run_id, diag_id and step are put.
        resume: Updates done at the checkpoint that the loop goes on from: rows up to and including this step are kept, later
            ones dropped. Unless given, a run that was cut off starts anew.
        tracker: Shows the run while it trains, as `lnjac.trackers.WandB()` does. It is no part of the run's identity, and
            its first error is logged and ends the tracking, not the run.

    Raises:
        ConfigError: With a line for each problem of `config` (see `lnjac.runs.identity.identify`) and `tables`; on entry, if
            the folder holds another run, another process writes to it, or it does not hold the rows to resume.
    """
    folder, described = _described(folder, config, seed, execution)
    problems = []
    for table, columns in (tables or {}).items():
        if table not in CORE and (
            not table.isidentifier() or f"{table}.parquet" in runs.FILES.values() or table == CONFIGS
        ):
            problems.append(f"{table!r} cannot be a table's name: choose another word of letters, digits and _")
        of_config = [column.name for column, _ in described.columns] if table in ("layers", "runs") else []
        known = [column.name for column in _declared(table)]
        problems += column_problems(table, columns, [*known, *of_config])
    if tracker is not None:
        of_tracker = getattr(tracker, "problems", None)
        problems += of_tracker({column.name: value for column, value in described.columns}) if of_tracker else []
    if problems:
        raise ConfigError("\n".join(problems))
    note: dict[str, Any] = {"config": described.config}
    if (handed := given()) and handed.command:
        note["command"] = list(handed.command)
    if described.execution:
        note["execution"] = json.loads(json.dumps(described.execution, default=str))
    made = Record(
        folder,
        described.identity,
        columns=described.columns,
        metadata=note,
        tables=tables,
        tracker=tracker,
        resume=resume,
        extensible=True,
    )
    made.describe(**_environment())
    return made


def _environment() -> dict[str, Any]:
    """Return the script's commit and the versions that make its numbers; nothing is imported to know them."""
    from lnjac import __version__

    script, torch = getattr(sys.modules["__main__"], "__file__", None), sys.modules.get("torch")
    return {
        **runs.provenance(Path(script).resolve().parent if script else Path.cwd()),
        "lnjac_version": __version__,
        "torch_version": str(torch.__version__) if torch else None,
    }


def _described(
    folder: str | Path | None, config: Mapping[str, Any] | None, seed: int | None, execution: Collection[str] | None
) -> tuple[Path, Identified]:
    """Return the run's folder and identity, from the arguments of `record` and from what its process was handed."""
    handed = given()
    if handed is None:
        missing = [name for name, value in (("folder", folder), ("config", config)) if value is None]
        if folder is None or config is None:
            raise ConfigError(
                f"record() was given no {' and no '.join(missing)}, and nothing started this process with one: give "
                "record(folder, config=…), or start the script by Hydra with `override hydra/sweeper: lnjac` in its config"
            )
        return Path(folder), identify(config, seed=seed, execution=execution or ())
    keys = handed.execution if execution is None else execution
    found = identify(handed.config if config is None else config, seed=seed, execution=keys)
    if folder is None and found.identity != identify(handed.config, execution=handed.execution).identity:
        raise ConfigError(
            "record() was given another config, seed or execution than this run was started with, so its folder would "
            "not be this run's: leave them out, or give a folder too"
        )
    return Path(handed.folder if folder is None else folder), found


class Record:
    """One run being recorded, within its context. `found` is its status if the folder held it finished before.

    If `extensible`, layers, curves and runs take columns that nobody declared, which are never pooled.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, str],
        *,
        columns: Sequence[tuple[Column, Any]],
        metadata: Mapping[str, Any],
        tables: Mapping[str, Sequence[Column]] | None = None,
        tracker: Tracker | None = None,
        resume: int | None = None,
        extensible: bool = False,
    ) -> None:
        self.path, self.identity, self.columns = Path(folder), dict(identity), columns
        self.metadata, self.tracker, self.resumed = dict(metadata), Guarded(tracker), resume
        config, own = [column.name for column, _ in columns], tables or {}
        self.tables = {
            name: Taken(
                name,
                [*_declared(name), *own.get(name, ())],
                config if name in ("layers", "runs") else (),
                extensible=extensible and name in CORE,
            )
            for name in dict.fromkeys([*CORE, *own])
        }
        self.points: dict[int, dict[str, Any]] = {}  # the rows of curves by step
        self.status, self.found = runs.RUNNING, ""
        self.described: dict[str, Any] = {"started_at": runs.now(), "resumed_at": 0, **runs.provenance()}
        self.seconds: dict[str, float] = {"wall_s": 0.0}
        self.coverage: dict[str, str] = {}  # the state of each norm, as a probe told it last
        self.began = time.perf_counter()

    def __enter__(self) -> Record:
        try:
            self.out = runs.RunFolder(self.path, self.identity)
        except runs.InUse as error:
            raise ConfigError(f"{error}: wait for it, or choose another folder") from None
        self.journal = Journal(self.path / runs.JOURNAL, {**self.identity, "started_at": self.described["started_at"]})
        try:
            self._begin()
            if not self.found:
                config = {column.name: value for column, value in self.columns}
                self.tracker.start(TrackedRun("-".join(self.identity.values()), self.path, config))
                self._tell_again()
        except BaseException:
            self.out.release()
            raise
        return self

    def _begin(self) -> None:
        before = state(self.path, self.identity)
        if before.finished:
            self.found = self.status = before.name
            self.journal.remove()  # left by a process that was killed at its end
            log.info("run %s is in %s already: %s", self.identity["run_id"], self.path, self.found)
            if before.reason:
                log.warning("%s: %s", self.path, before.reason)
            return
        if before.name == FOREIGN:
            raise ConfigError(f"{self.path} {before.reason}: choose another folder, or delete it")
        if self.resumed is not None:
            if before.name not in (runs.RUNNING, runs.INTERRUPTED, runs.FAILED):
                raise ConfigError(
                    f"resume={self.resumed}, but {self.path} holds no start of this run ({before.reason or before.name}): "
                    "leave out resume= to start anew"
                )
            self.resume(self.resumed)
        self.out.status(runs.RUNNING)
        if before.reason:
            log.info("run again: %s", before.reason.splitlines()[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None and not self.found:
                self._finish()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._end(error)

    def _finish(self) -> None:
        """Write every table, and the status last."""
        curve = self.tables["curves"].rows = [self.points[step] for step in sorted(self.points)]
        if not self.has_diverged and (step := _diverged_at(curve)) is not None:
            log.warning("the loss is not finite from step %d on: the run's status is diverged", step)
            self.diverged(step)
        status = runs.DIVERGED if self.has_diverged else runs.DONE
        if status == runs.DONE:
            _say_if_not_evaluated(curve)
        losses = [loss for row in curve if (loss := row["train_loss_nats"]) is not None and math.isfinite(loss)]
        row = {
            **dict.fromkeys(self.tables["runs"].declared),
            **self.identity,
            "status": status,
            "steps_done": max((row["step"] for row in (*curve, *self.tables["layers"].rows)), default=0),
            "train_loss_nats": sum(losses[-LAST_LOSSES:]) / len(losses[-LAST_LOSSES:]) if losses else None,
            "val_loss_nats": curve[-1]["val_loss_nats"] if curve and status == runs.DONE else None,
            **self.spent(),
            **self.described,
        }
        self.tables["runs"].rows = self.tables["runs"].typed([row])
        for name, table in self.tables.items():
            if name not in CORE and not table.rows:
                continue
            note = {**self.identity, **self.metadata}
            if name == "layers" and self.coverage:
                sites = sorted(self.coverage, key=self.coverage.__getitem__)
                note["coverage"] = {state: list(of) for state, of in groupby(sites, key=self.coverage.__getitem__)}
            self.out.write(name, table.columns, table.written(), self.columns, note)
        self.out.pack()
        more = {"step": row["diverged_step"]} if status == runs.DIVERGED else {"val_loss_nats": row["val_loss_nats"]}
        self.out.status(status, steps_done=row["steps_done"], **more)
        self.status = status
        self.journal.remove()

    def _end(self, error: BaseException | None) -> None:
        """Say in the status why a run has no rows, if it has none, and let go of the folder."""
        try:
            if self.status in runs.FINISHED or error is None:
                return
            if isinstance(error, Exception):
                self.status, text = runs.FAILED, "".join(traceback.format_exception(error))
                self.out.status(self.status, error=f"{type(error).__name__}: {error}", traceback=text)
            else:
                self.status = runs.INTERRUPTED
                self.out.status(self.status)
        finally:
            try:
                self.tracker.end(self.status)
            finally:
                self.journal.close()
                self.out.release()

    def rows(self, table: str, rows: Rows | pd.DataFrame, step: int) -> list[dict[str, Any]]:
        """Add rows of a table, measured after `step` updates; return them as they will be written.

        Raises:
            ConfigError: The table is not declared, a row's columns are not the table's, a value is of another type, or the
                folder held the run before.
        """
        self._require_new()
        return self._add(table, plain(rows), whole(step), {})

    def layers(self, rows: Rows | pd.DataFrame, step: int) -> None:
        """Add what was measured at each norm after `step` updates, as `probe.rows(step)` and `probe.measure(…)` give it.

        Columns of your own may stand beside: those that `record(…, tables={"layers": […]})` declares, with their unit and
        pooling, and others, which are never pooled.
        """
        self._require_new()
        step = whole(step)
        added = self._add("layers", plain(rows), step, getattr(rows, "attrs", {}).get("coverage", {}))
        self.tracker.layers(step, added)

    def _add(self, name: str, rows: Rows, step: int, coverage: Mapping[str, str]) -> list[dict[str, Any]]:
        added = self._take(name, rows, step, coverage)
        names = list(dict.fromkeys(key for row in rows for key in row))
        values = [[row.get(key) for key in names] for row in added]
        self._note({"step": step, "table": name, "names": names, "values": values, "coverage": dict(coverage)})
        return added

    def _take(self, name: str, rows: Rows, step: int, coverage: Mapping[str, str]) -> list[dict[str, Any]]:
        if name not in self.tables or name in ("runs", "curves"):
            raise ConfigError(
                f"{name} is not a declared table: give its columns in record(…, tables={{{name!r}: […]}})"
            )
        table = self.tables[name]
        added = table.complete({**self.identity, "step": step, **row} for row in rows)
        table.rows += added
        self.coverage |= coverage
        return added

    def scalars(
        self,
        step: int,
        *,
        train_loss: float | None = None,
        val_loss: float | None = None,
        lr: float | None = None,
        **more: float | None,
    ) -> None:
        """Add a point of the curves after `step` updates: losses in nats per token, None where one was not measured.

        Further numbers by name, such as grad_norm, are columns of curves too.
        """
        self._require_new()
        step = whole(step)
        point = self._draw(step, {"train_loss_nats": train_loss, "val_loss_nats": val_loss, "lr": lr, **more})
        self._note({"step": step, "point": {name: value for name, value in point.items() if value is not None}})
        self.tracker.scalars(step, point)

    def _draw(self, step: int, values: Mapping[str, float | None]) -> dict[str, Any]:
        """Add the values of one step to those that it has, and return them typed."""
        (point,) = self.tables["curves"].typed([values])
        if step not in self.points:
            blank = dict.fromkeys(self.tables["curves"].declared)
            self.points[step] = blank | {"run_id": self.identity["run_id"], "step": step}
        self.points[step] |= {name: value for name, value in point.items() if value is not None}
        return point

    def diverged(self, step: int) -> None:
        """Say that the loss turned non-finite after `step` updates: this will be the run's status."""
        self.described["diverged_step"] = step

    @property
    def has_diverged(self) -> bool:
        """Whether `diverged` was called."""
        return "diverged_step" in self.described

    def describe(self, **columns: Any) -> None:
        """Set columns of the run's row in the table runs, such as n_params, or ones of your own.

        A resumed run must set them again.

        Raises:
            ConfigError: A column is called as a key of the config is, or a value is of another type.
        """
        (typed,) = self.tables["runs"].typed([columns])
        self.described |= typed

    def save(self, file: str, write: Callable[[Path], object]) -> None:
        """Let `write(path)` make another file of the folder, whose SHA-256 the status will hold."""
        self.out.save(file, write)

    @contextmanager
    def timing(self, column: str) -> Iterator[None]:
        """Add the wall seconds spent in the context to a column of the run's row, such as train_s."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[column] = self.seconds.get(column, 0.0) + time.perf_counter() - start

    def spent(self) -> dict[str, float]:
        """Wall seconds so far by column, without what lay between an interruption and its continuation."""
        return self.seconds | {"wall_s": self.seconds["wall_s"] + time.perf_counter() - self.began}

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Write a call to the journal, with the seconds spent until then."""
        self.journal.add({**entry, "spent": {name: round(value, 3) for name, value in self.spent().items()}})

    @property
    def calls(self) -> int:
        """The calls that brought the rows recorded so far, for a checkpoint: `resume` then knows whether all are there."""
        return self.journal.lines

    def resume(self, step: int, calls: int | None = None) -> None:
        """Take the rows up to and including this step from the journal of an earlier start, and drop the later ones.

        Args:
            step: Updates done at the checkpoint that the training goes on from.
            calls: The number of calls that brought these rows, if the checkpoint knows it.

        Raises:
            ConfigError: The journal is damaged, another run's, or does not hold these rows. The record stays as it is.
        """
        path, anew = self.journal.path, "start the run anew (without resume=)"
        try:
            header, every = read(path)
        except FileNotFoundError:
            header, every = {}, []
        except Damaged as error:
            raise ConfigError(f"{path} cannot be resumed: {error}; {anew}") from None
        if every and any(header.get(key) != value for key, value in self.identity.items()):
            raise ConfigError(f"{path} cannot be resumed: it is another run's; {anew}")
        kept = [entry for entry in every if entry["step"] <= step]
        if calls is not None and len(kept) != calls:
            raise ConfigError(f"{path} holds {len(kept)} of the {calls} calls up to step {step}: {anew}")
        self._replay(kept, path)
        if kept:
            self.described["started_at"], self.seconds = header["started_at"], dict(kept[-1]["spent"])
            self.journal.keep(header, kept)
        self.described["resumed_at"] = step
        self._tell_again()
        last = f", the last of step {kept[-1]['step']}" if kept else ""
        log.info(
            "goes on from the checkpoint after update %d: %d calls kept%s, %d dropped",
            step,
            len(kept),
            last,
            len(every) - len(kept),
        )

    def take_over(
        self, entries: Sequence[Mapping[str, Any]], step: int, spent: Mapping[str, float], path: Path
    ) -> None:
        """Take rows of another run's folder, as if they had been recorded here; what is recorded next is added to them.

        Args:
            entries: As a journal holds them.
            step: Updates done at the state that the training begins from.
            spent: Wall seconds that the rows and the state took, by column.
            path: The folder, for messages.

        Raises:
            ConfigError: The rows do not fit this run's tables. The record stays as it is.
        """
        self._replay(entries, path)
        self.seconds |= spent
        self.described["resumed_at"] = step
        self.journal.keep(self.journal.header, ({**entry, "spent": self.spent()} for entry in entries))
        self._tell_again()

    def _replay(self, entries: Iterable[Mapping[str, Any]], path: Path) -> None:
        """Take the rows of a journal; none if one does not fit the tables any more."""
        try:
            for entry in entries:
                if "point" in entry:
                    self._draw(entry["step"], entry["point"])
                else:
                    rows = [dict(zip(entry["names"], values, strict=True)) for values in entry["values"]]
                    self._take(entry["table"], rows, entry["step"], entry["coverage"])
        except ConfigError as error:
            for table in self.tables.values():
                table.rows.clear()
            self.points.clear()
            self.coverage.clear()
            raise ConfigError(f"{path} does not fit this run's tables any more: {error}") from None

    def _tell_again(self) -> None:
        """Tell the tracker all that is recorded so far, in the order of steps."""
        rows = sorted(self.tables["layers"].rows, key=lambda row: row["step"])
        layers = {step: list(of) for step, of in groupby(rows, key=lambda row: row["step"])}
        for step in sorted({*self.points, *layers}):
            if step in layers:
                self.tracker.layers(step, layers[step])
            if step in self.points:
                point = self.points[step]
                self.tracker.scalars(step, {name: point[name] for name in point if name not in ("run_id", "step")})

    def _require_new(self) -> None:
        if self.found:
            raise ConfigError(
                f"{self.path} holds this run already ({self.found}): skip it where `run.found`, or delete it"
            )


def _diverged_at(curve: Rows) -> int | None:
    """Return the step from which on no loss of the curve is finite, if there is one."""
    found = []
    for name in ("train_loss_nats", "val_loss_nats"):
        losses = [(row["step"], row[name]) for row in curve if row[name] is not None]
        tail = [step for step, _ in takewhile(lambda each: not math.isfinite(each[1]), reversed(losses))]
        found += tail[-1:]
    return min(found, default=None)


def _say_if_not_evaluated(curve: Rows) -> None:
    evaluated = [row["step"] for row in curve if row["val_loss_nats"] is not None]
    if evaluated and evaluated[-1] != (last := curve[-1]["step"]):
        log.warning(
            "val_loss was last given at step %d, but the run ends at step %d: its val_loss_nats is null; "
            "call run.scalars(%d, val_loss=…)",
            evaluated[-1],
            last,
            last,
        )
