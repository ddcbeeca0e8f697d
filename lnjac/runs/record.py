"""Record one run: open its folder, take its rows, write its tables and its status. Without torch and without a config."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.norms import formulas
from lnjac.runs import folder as runs
from lnjac.runs.handed import given
from lnjac.runs.identity import Identified, identify
from lnjac.runs.schema import CURVES, MEASURED_AT, RUNS
from lnjac.runs.state import FOREIGN, state

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

LAST_LOSSES = 10
"""Updates whose mean loss is a run's train_loss_nats."""

Rows = Sequence[Mapping[str, Any]]


def record(
    folder: str | Path | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    execution: Collection[str] | None = None,
    tables: Mapping[str, Sequence[Column]] | None = None,
) -> Record:
    """Open a run's folder, to be filled from any training loop.

        with lnjac.record("runs/a", config={"lr": 1e-3, "model": {"width": 64}}, seed=1) as run:
            for step in range(1, 101):
                ...
                run.scalars(step, train_loss=loss)
            run.layers(probe.rows(step), step)

    The tables are written when the context ends, the status last: `done`, or `diverged` if `run.diverged(step)` said so. An
    exception leaves the status `failed` with its traceback; Ctrl-C and SystemExit leave `interrupted`.

    In a script that Hydra starts with lnjac's sweeper, `record()` takes folder, config and execution from there.

    Args:
        folder: Made if it is not there. No other process may write to it meanwhile.
        config: What tells this run from others, as plain values, which may be nested: `model.width` is a column of its rows.
        seed: Runs with equal seeds are compared in pairs. config["seed"] unless given.
        execution: Dotted keys of `config` that are no part of the run's identity and columns, such as paths, device and
            workers; the name of a group stands for all below it. They are kept in the files' notes.
        tables: Columns of tables of your own, for `run.rows`; run_id, diag_id and step are put before them.

    Raises:
        ConfigError: With a line for each problem of `config` (see `lnjac.runs.identity.identify`); on entry, if the folder
            holds another run or another process writes to it.
    """
    folder, described = _described(folder, config, seed, execution)
    for table in tables or {}:
        if not table.isidentifier() or f"{table}.parquet" in runs.FILES.values():
            raise ConfigError(f"{table!r} cannot be a table's name: choose another word of letters, digits and _")
    note = {"config": described.config}
    if described.execution:
        note["execution"] = json.loads(json.dumps(described.execution, default=str))
    return Record(folder, described.identity, columns=described.columns, metadata=note, tables=tables)


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


class Listener(Protocol):
    """Is told what is recorded while it comes in, as a tracker is."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None: ...

    def layers(self, step: int, rows: Rows) -> None: ...

    def end(self, status: str) -> None: ...


class Record:
    """One run being recorded, within its context. `found` is its status if the folder held it finished before."""

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, str],
        *,
        columns: Sequence[tuple[Column, Any]],
        metadata: Mapping[str, Any],
        tables: Mapping[str, Sequence[Column]] | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.path, self.identity, self.columns = Path(folder), dict(identity), columns
        self.metadata, self.listener = dict(metadata), listener
        own = {name: [*MEASURED_AT, *columns] for name, columns in (tables or {}).items()}
        layers = [*MEASURED_AT, *formulas.columns()]
        self.declared = {"layers": layers, "runs": RUNS, "curves": CURVES, **own}
        self.status, self.found = runs.RUNNING, ""
        self.tables: dict[str, list[dict[str, Any]]] = {"layers": [], "curves": []}
        self.described: dict[str, Any] = {"started_at": runs.now(), "resumed_at": 0, **runs.provenance()}
        self.seconds: dict[str, float] = {"wall_s": 0.0}
        self.coverage: dict[str, str] = {}  # the state of each norm, as a probe told it last
        self.began = time.perf_counter()

    def __enter__(self) -> Record:
        try:
            self.out = runs.RunFolder(self.path, self.identity)
        except runs.InUse as error:
            raise ConfigError(f"{error}: wait for it, or choose another folder") from None
        try:
            self._begin()
        except BaseException:
            self.out.release()
            raise
        return self

    def _begin(self) -> None:
        before = state(self.path, self.identity)
        if before.finished:
            self.found = self.status = before.name
            log.info("run %s is in %s already: %s", self.identity["run_id"], self.path, self.found)
            if before.reason:
                log.warning("%s: %s", self.path, before.reason)
            return
        if before.name == FOREIGN:
            raise ConfigError(f"{self.path} {before.reason}: choose another folder, or delete it")
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
        status = runs.DIVERGED if "diverged_step" in self.described else runs.DONE
        curve = self.tables["curves"]
        losses = [row["train_loss_nats"] for row in curve if row["train_loss_nats"] is not None][-LAST_LOSSES:]
        row = {
            **dict.fromkeys(column.name for column in RUNS),
            **self.identity,
            "status": status,
            "steps_done": max((row["step"] for row in curve), default=0),
            "train_loss_nats": sum(losses) / len(losses) if losses else None,
            "val_loss_nats": curve[-1]["val_loss_nats"] if curve and status == runs.DONE else None,
            **self.spent(),
            **self.described,
        }
        self.tables["runs"] = [row]
        for name, rows in self.tables.items():
            note = {**self.identity, **self.metadata}
            if name == "layers" and self.coverage:
                sites = sorted(self.coverage, key=self.coverage.__getitem__)
                note["coverage"] = {state: list(of) for state, of in groupby(sites, key=self.coverage.__getitem__)}
            self.out.write(name, self.declared[name], rows, self.columns, note)
        more = {"step": row["diverged_step"]} if status == runs.DIVERGED else {"val_loss_nats": row["val_loss_nats"]}
        self.out.status(status, **more)
        self.status = status

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
                if self.listener is not None and not self.found:
                    self.listener.end(self.status)
            finally:
                self.out.release()

    def rows(self, table: str, rows: Rows | pd.DataFrame, step: int) -> list[dict[str, Any]]:
        """Add rows of a table, measured after `step` updates; return them as they will be written.

        Raises:
            ConfigError: The table is not declared, a row's columns are not the table's, or the folder held the run before.
        """
        self._require_new()
        if table not in self.declared:
            raise ConfigError(
                f"{table} is not a declared table: give its columns in record(…, tables={{{table!r}: […]}})"
            )
        given = [{**self.identity, "step": step, **row} for row in _plain(rows)]
        names = {column.name for column in self.declared[table]}
        if wrong := sorted({name for row in given for name in set(row) ^ names}):
            raise ConfigError(
                f"rows of {table} and its declared columns differ in {', '.join(wrong)}: make them the same"
            )
        self.tables.setdefault(table, []).extend(given)
        return given

    def layers(self, rows: Rows | pd.DataFrame, step: int) -> None:
        """Add what was measured at each norm after `step` updates, as `probe.rows(step)` and `probe.measure(…)` give it."""
        added = self.rows("layers", rows, step)
        for site, found in getattr(rows, "attrs", {}).get("coverage", {}).items():
            self.coverage[site] = found
        if self.listener is not None:
            self.listener.layers(step, added)

    def scalars(
        self, step: int, *, train_loss: float | None = None, val_loss: float | None = None, lr: float | None = None
    ) -> None:
        """Add a point of the curves after `step` updates: losses in nats per token, None where one was not measured."""
        self._require_new()
        given = {"train_loss_nats": train_loss, "val_loss_nats": val_loss, "lr": lr}
        point = {name: None if value is None else float(value) for name, value in given.items()}
        curve = self.tables["curves"]
        if curve and curve[-1]["step"] == step:
            curve[-1] |= {name: value for name, value in point.items() if value is not None}
        else:
            curve.append({"run_id": self.identity["run_id"], "step": step, **point})
        if self.listener is not None:
            self.listener.scalars(step, point)

    def diverged(self, step: int) -> None:
        """Say that the loss turned non-finite after `step` updates: this will be the run's status."""
        self.described["diverged_step"] = step

    def describe(self, **columns: Any) -> None:
        """Set columns of the run's row in the table runs, such as n_params."""
        self.described |= columns

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

    def state(self) -> dict[str, Any]:
        """Return all that was recorded, as JSON values, for a checkpoint."""
        spent, started_at = self.spent(), self.described["started_at"]
        return {"rows": self.tables, "spent": spent, "started_at": started_at, "coverage": self.coverage}

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state` was taken, after `step` updates."""
        self.tables, self.seconds, self.coverage = state["rows"], dict(state["spent"]), dict(state["coverage"])
        self.described |= {"started_at": state["started_at"], "resumed_at": step}

    def _require_new(self) -> None:
        if self.found:
            raise ConfigError(
                f"{self.path} holds this run already ({self.found}): skip it where `run.found`, or delete it"
            )


def _plain(rows: Rows | pd.DataFrame) -> Rows:
    """Rows as dicts of plain values: a frame's missing ones are null, but in a column of floats, where NaN is a number."""
    if isinstance(rows, Sequence):
        return rows
    import pandas as pd

    columns = {}
    for name, values in rows.items():
        keep = pd.api.types.is_float_dtype(values) and not pd.api.types.is_extension_array_dtype(values)
        columns[str(name)] = [value if keep or not pd.isna(value) else None for value in values.tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
