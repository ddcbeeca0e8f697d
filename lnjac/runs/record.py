"""Record one run: open its folder, take its rows, write its tables and its status. Without torch and without a config."""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.files import digest
from lnjac.norms import formulas
from lnjac.runs import folder as runs
from lnjac.runs.schema import CURVES, MEASURED_AT, RUNS
from lnjac.runs.state import FOREIGN, state
from lnjac.trackers.base import Guarded, TrackedRun, Tracker

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

LAST_LOSSES = 10
"""Updates whose mean loss is a run's train_loss_nats."""

SCALARS = CURVES[2:]
"""The columns of curves that are measured."""

Rows = Sequence[Mapping[str, Any]]


def record(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    seed: int,
    tables: Mapping[str, Sequence[Column]] | None = None,
    tracker: Tracker | None = None,
) -> Record:
    """Open a run's folder, to be filled from any training loop.

        with lnjac.record("runs/a", config={"lr": 1e-3, "model": {"width": 64}}, seed=1) as run:
            for step in range(1, 101):
                ...
                run.scalars(step, train_loss=loss)
            run.layers(probe.rows(step), step)

    The tables are written when the context ends, the status last: `done`, or `diverged` if `run.diverged(step)` said so. An
    exception leaves the status `failed` with its traceback; Ctrl-C and SystemExit leave `interrupted`.

    Args:
        folder: Made if it is not there. No other process may write to it meanwhile.
        config: What tells this run from others, as plain values, which may be nested: `model.width` is a column of its rows.
        seed: Runs with equal seeds are compared in pairs.
        tables: Columns of tables of your own, for `run.rows`; run_id, diag_id and step are put before them.
        tracker: Shows the run while it trains, as `lnjac.trackers.WandB()` does. It is no part of the run's identity, and
            its first error is logged and ends the tracking, not the run.

    Raises:
        ConfigError: A value of `config` is not plain or has the name of another column; on entry, if the folder holds
            another run or another process writes to it.
    """
    plain = {"seed": seed, **config}
    if plain["seed"] != seed:
        raise ConfigError(f"seed={seed}, but config has seed={plain['seed']}: give one of them")
    columns = list(_columns(plain))
    taken = Counter(column.name for column, _ in columns) + Counter(
        {column.name for column in (*MEASURED_AT, *formulas.columns(), *RUNS)}
    )
    if clash := [column.name for column, _ in columns if taken[column.name] > 1]:
        raise ConfigError(f"the config has {', '.join(clash)}, as another column is called too: rename this key")
    for table in tables or {}:
        if not table.isidentifier() or f"{table}.parquet" in runs.FILES.values():
            raise ConfigError(f"{table!r} cannot be a table's name: choose another word of letters, digits and _")
    if tracker is not None and (problems := [*getattr(tracker, "problems", lambda config: ())(plain)]):
        raise ConfigError("\n".join(problems))
    identity = {"run_id": digest(plain), "diag_id": digest({})}
    return Record(folder, identity, columns=columns, metadata={"config": plain}, tables=tables, tracker=tracker)


def _columns(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[Column, Any]]:
    """Yield a typed column for each plain value, by its dotted name; a list is joined by `+`."""
    for key, value in plain.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _columns(value, f"{name}.")
            continue
        if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
            value = "+".join(map(str, value))
        dtype = {bool: "bool", int: "int64", float: "float64", str: "string", type(None): "string"}.get(type(value))
        if dtype is None or (dtype == "int64" and abs(value) >= 2**63):
            raise ConfigError(
                f"config value {name}={value!r} is not plain: give text, a number, a bool, None or a list"
            )
        yield Column(name, dtype, "", f"config value {name}"), value


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
        tracker: Tracker | None = None,
    ) -> None:
        self.path, self.identity, self.columns = Path(folder), dict(identity), columns
        self.metadata, self.tracker = dict(metadata), Guarded(tracker)
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
                self.tracker.end(self.status)
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
        self.tracker.layers(step, added)

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
        self.tracker.scalars(step, point)

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
        self._tell_again()

    def _tell_again(self) -> None:
        """Tell the tracker all that is recorded so far, in the order of steps."""
        curve = {row["step"]: {column.name: row[column.name] for column in SCALARS} for row in self.tables["curves"]}
        layers = {step: list(rows) for step, rows in groupby(self.tables["layers"], key=lambda row: row["step"])}
        for step in sorted({*curve, *layers}):
            if step in layers:
                self.tracker.layers(step, layers[step])
            if step in curve:
                self.tracker.scalars(step, curve[step])

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
