"""Begin a run where a finished one ended, from the weights and the state that its folder keeps, and with its rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lnjac.config import identity as config_identity
from lnjac.config.schema import RunConfig
from lnjac.diagnostics.catalogue import chosen
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import state as states
from lnjac.runs.record import Record
from lnjac.runs.schema import MEASURED_AT
from lnjac.training import checkpoint
from lnjac.training.loop import Training, evaluates, measure
from lnjac.training.saved_run import Run

Entry = dict[str, Any]
"""Rows of one table and step, as a journal holds them."""

MAKING = ("commit", "lnjac_version", "torch_version", "device", "products", "threads")
"""Columns of `runs` that must agree for two makings of one run to agree to the last bit."""


@dataclass(frozen=True)
class Finished:
    """A finished run's folder, as its status tells it. `steps` is None in one from before a status told it."""

    folder: Path
    run_id: str
    diag_id: str
    diverged: bool
    steps: int | None
    files: frozenset[str]

    @property
    def has_state(self) -> bool:
        """Whether it keeps the optimizer's state and the generators, beside the weights."""
        return runs.CHECKPOINT in self.files


class Start(NamedTuple):
    """What a run begins from: a finished run that had made `step` updates, or None.

    `problem` says why none of the finished runs of its config will do; it is empty if there are none.
    """

    source: Finished | None
    step: int = 0
    problem: str = ""

    def left(self, steps: int) -> int:
        """Return the updates that are left to a run of so many steps in all."""
        return 0 if self.source and self.source.diverged else steps - self.step


class Known(NamedTuple):
    """Finished runs by run_id, and the numbers of updates that those which did not diverge made, the largest first."""

    runs: Mapping[str, list[Finished]] = {}
    steps: Sequence[int] = ()

    def related(self, run_id: str, steps: int) -> bool:
        """Return whether a run of this identity, with so many steps, may begin from one of these."""
        return run_id in self.runs or any(0 < fewer < steps for fewer in self.steps)


def finished(root: Path) -> Known:
    """Return the finished runs in a folder or below it."""
    found: dict[str, list[Finished]] = {}
    for file in sorted(root.rglob(runs.STATUS)):
        status = runs.read_status(file.parent)
        if status.get("status") in runs.FINISHED and isinstance(files := status.get("sha256"), dict):
            diverged = status["status"] == runs.DIVERGED
            steps = status.get("step" if diverged else "steps_done")
            one = Finished(
                file.parent, str(status.get("run_id")), str(status.get("diag_id")), diverged, steps, frozenset(files)
            )
            found.setdefault(one.run_id, []).append(one)
    done = {one.steps for several in found.values() for one in several if one.steps and not one.diverged}
    return Known(found, sorted(done, reverse=True))


def choose(config: RunConfig, data_sha256: str, known: Known) -> Start:
    """Return the finished run that a run begins from: of those that will do the one that leaves the least to be done.

    Runs of the same config and of other diagnostics come first, then ones that differ from it in fewer `steps` alone, the
    longest first. Among equals one that keeps the optimizer's state comes first, then the first folder by name.
    """
    run_id, diag_id = config_identity.run_id(config, data_sha256), config_identity.diag_id(config)
    of_steps = {config.steps: run_id} | {
        steps: config_identity.run_id(replace(config, steps=steps), data_sha256)
        for steps in known.steps
        if steps < config.steps
    }
    problems = []
    for steps, of in of_steps.items():
        continues = of != run_id
        candidates = [
            one
            for one in known.runs.get(of, ())
            if (one.run_id, one.diag_id) != (run_id, diag_id) and one.steps != 0 and not (continues and one.diverged)
        ]
        for one in sorted(candidates, key=lambda one: (not one.has_state, one.diag_id != diag_id, one.folder)):
            step = one.steps if one.steps is not None else steps
            if not (problem := next(_problems(config, one, step, continues=continues), "")):
                return Start(one, step)
            problems.append(problem)
    return Start(None, problem=next(iter(problems), ""))


def _problems(config: RunConfig, one: Finished, step: int, *, continues: bool) -> Iterator[str]:
    """Yield the reasons why a run cannot begin where a finished one ended, each with its remedy."""
    same, due = one.diag_id == config_identity.diag_id(config), config.diagnostics.at(config.steps)
    if not one.has_state:
        remedy = "runs made with keep_state=true keep it"
        if continues:
            yield f"finished runs of steps={step} cannot be continued without the optimizer's state: {remedy}"
        if runs.MODEL not in one.files:
            yield "the finished runs hold no weights: runs made with save_model=true keep them"
        if config.keep_state:
            yield f"keep_state=true asks for the optimizer's state, which the finished runs do not hold: {remedy}"
        needing = sorted({diagnostic.table for diagnostic in chosen(config.diagnostics) if diagnostic.needs_optimizer})
        if needing and not one.diverged:
            yield f"{', '.join(needing)} need the optimizer's state, which the finished runs do not hold: {remedy}"
    if continues and not same_rates(config, step):
        yield (
            f"finished runs of steps={step} had other learning rates, as their schedule depends on steps: "
            "runs with optimizer.decay=constant can be continued"
        )
    if not same and (between := [at for at in due if 0 < at < step]):
        yield (
            f"diagnostics.schedule={config.diagnostics.schedule.value} measures at step {between[0]}, before the end of the "
            f"finished runs (step {step}), which only training passes through: diagnostics.schedule=final trains nothing"
        )
    needed = runs.CHECKPOINT if one.has_state else runs.MODEL
    found = states.state(one.folder, {"run_id": one.run_id, "diag_id": one.diag_id})
    damage = states.lost(one.folder / needed, runs.read_status(one.folder)) if found.finished else found.reason
    if damage:
        yield f"{one.folder} is damaged: {damage}"


def same_rates(config: RunConfig, steps: int) -> bool:
    """Return whether a run of so many steps had the learning rates that the first updates of this one have."""
    rate = config.optimizer.lr_at
    return all(rate(update, steps) == rate(update, config.steps) for update in range(steps))


def differing(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return a line for each column of MAKING in which a finished run's row differs from `here`; both may lack some."""
    known = [name for name in MAKING if name in here and made.get(name) is not None]
    return [f"{name} {made[name]}, here {here[name]}" for name in known if made[name] != here[name]]


class Taken(NamedTuple):
    """What was taken over from a finished run: its tensors with their note, and its row of `runs`."""

    tensors: Mapping[str, Tensor]
    note: Mapping[str, Any]
    made: Mapping[str, Any]


def take_over(record: Record, config: RunConfig, start: Start) -> Taken:
    """Put a finished run's rows into a new record, but for those that it has only because it ended there; return the rest.

    Raises:
        ConfigError: A file of the finished run is damaged, or its rows are not such as this lnjac makes. The record stays
            as it was.
    """
    source, step = start.source, start.step
    assert source is not None
    run, same = Run(source.folder), _same_diagnostics(source, record)
    tensors, note = _state(run, source, step)
    (made,) = run.read("runs")[0].to_pylist()
    spent = {name: made.get(name) or 0.0 for name in ("train_s", "eval_s", "diagnostics_s", "wall_s")}
    if not same:  # its measurements are not taken over
        spent |= {"wall_s": spent["wall_s"] - spent["diagnostics_s"], "diagnostics_s": 0.0}
    entries = [*_points(run, config), *(_rows(run, record, config) if same else ())]
    record.take_over(sorted(entries, key=lambda entry: entry["step"]), step, spent, source.folder)
    return Taken(tensors, note, made)


def go_on(training: Training, record: Record, start: Start, taken: Taken) -> None:
    """Put a new training where a finished run ended; measure what is due until then and has no rows yet."""
    source = start.source
    assert source is not None
    same = _same_diagnostics(source, record)
    if not same:
        measure(training, record)  # at step 0, of the model as its seed makes it
    checkpoint.restore(training, taken.tensors, taken.note)
    if source.diverged:
        record.diverged(start.step)
    elif not same:
        measure(training, record)


def _same_diagnostics(source: Finished, record: Record) -> bool:
    return source.diag_id == record.identity["diag_id"]


def _state(run: Run, source: Finished, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors that a finished run kept, and their note. Raises ConfigError."""
    if not source.has_state:
        return checkpoint.read_weights(run.verified(runs.MODEL), step)
    file = run.verified(runs.CHECKPOINT)
    try:
        tensors, note = checkpoint.read(file, {"run_id": source.run_id, "diag_id": source.diag_id})
    except checkpoint.Unusable as error:
        raise ConfigError(f"{file}: {error}") from None
    if note["updates"] != step:
        raise ConfigError(f"{file} is the state after update {note['updates']}, not {step}")
    return tensors, note


def _points(run: Run, config: RunConfig) -> Iterator[Entry]:
    """Yield the points of a finished run's curves, without a validation loss that it has only because it ended there."""
    for row in run.read("curves")[0].to_pylist():
        point = {name: row[name] for name in ("train_loss_nats", "val_loss_nats", "lr") if row[name] is not None}
        if not evaluates(config, row["step"]):
            point.pop("val_loss_nats", None)
        yield {"step": row["step"], "point": point}


def _rows(run: Run, record: Record, config: RunConfig) -> Iterator[Entry]:
    """Yield the other rows of a finished run, without those that it has only because it ended there."""
    due = {0, *config.diagnostics.at(config.steps)}  # at step 0 is also what was measured before training
    keys = {column.name for column in MEASURED_AT}
    for name, table in record.tables.items():
        if name in ("runs", "curves") or runs.file_of(name) not in run.status["sha256"]:
            continue
        data, note = run.read(name)
        names = [column for column in table.declared if column in data.column_names and column not in keys]
        coverage = {site: state for state, sites in note.get("coverage", {}).items() for site in sites}
        for at, rows in groupby(data.to_pylist(), key=lambda row: row["step"]):
            if at in due:
                values = [[row[column] for column in names] for row in rows]
                yield {"step": at, "table": name, "names": names, "values": values, "coverage": coverage}
