"""Show a run's curves and layer scalars in another tool while the run trains (conf/tracker, docs/tracking.md).

The run's tables hold the same and more, and nothing is read back from a tracker.
"""

import copy
import fnmatch
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lnjac.escape import markdown
from lnjac.norms.formulas import COLUMNS

log = logging.getLogger(__name__)

MEASURED = [column.name for column in COLUMNS if column.dtype == "float64"]
"""The columns of layers that can be drawn as curves."""

EVENTS = "events.out.tfevents"
"""The beginning of the names by which TensorBoard finds its files."""

NONE = {"_target_": "lnjac.training.trackers.Untracked", "name": "none"}
"""The config of a run that is not tracked."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as its tracker sees it. `id`: run_id-diag_id; `config`: its config columns, None where one has no value.

    The run starts anew (`after` = 0: whatever was tracked of it in an earlier attempt is void), or it goes on from a
    checkpoint after so many updates (what was tracked of later ones is void).
    """

    id: str
    folder: Path
    config: Mapping[str, Any]
    after: int

    @property
    def title(self) -> str:
        """A short name that tells runs apart; `config` has the rest."""
        config = self.config
        members = [str(config[group]) for group in ("attn_mode", "method", "ln_backward")]
        return "-".join([*members, f"seed{config['seed']}"])


class Tracker(Protocol):
    """A dataclass of settings, as its yaml file has them, with these methods; each run gets a copy of its own.

    Whatever they raise is logged once and ends the tracking, not the run.
    """

    name: str

    def start(self, run: TrackedRun) -> None:
        """Open, for a run that begins or goes on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show train_loss_nats, val_loss_nats and lr after update number `step`, as far as they are known."""

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the measurement at this step: a row of layers for each norm."""

    def end(self, status: str) -> None:
        """Close, with the run's status: done, diverged, failed or interrupted."""


class Guarded:
    """A tracker that cannot harm its run: its first error is logged and ends the tracking."""

    def __init__(self, tracker: Tracker) -> None:
        self.settings = tracker
        self.running: Tracker | None = None

    def start(self, run: TrackedRun) -> None:
        self.running = copy.copy(self.settings)
        self._tell(lambda tracker: tracker.start(run))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self._tell(lambda tracker: tracker.scalars(step, known))

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._tell(lambda tracker: tracker.layers(step, rows))

    def end(self, status: str) -> None:
        self._tell(lambda tracker: tracker.end(status))
        self.running = None

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        if self.running is None:
            return
        try:
            tell(self.running)
        except Exception as error:
            log.warning(
                "tracker=%s failed, the run goes on without it: %s: %s",
                self.settings.name,
                type(error).__name__,
                error,
            )
            self.running = None


@dataclass
class Untracked(Tracker):
    """No tracker."""

    name: str


@dataclass
class TensorBoard:
    """Event files in RUN/tensorboard/TITLE: `curve/NAME`, `COLUMN/SITE` for these columns of layers, and the config.

    They are written without a buffer or a thread of their own: what a killed process had said is there, an error is seen.
    """

    name: str
    columns: list[str]

    def problems(self, config: Any) -> Iterator[str]:
        if importlib.util.find_spec("tensorboard") is None:
            yield "tracker=tensorboard needs the package tensorboard: pip install 'lnjac[track]'"
        for pattern in self.columns:
            if not fnmatch.filter(MEASURED, pattern):
                yield f"tracker.columns={pattern} matches no number of a layer row: docs/columns.md names them"

    def start(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / "tensorboard" / run.title
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob(f"{EVENTS}.*"))
        if run.after == 0:
            while before:
                before.pop().unlink()
        self.shown = sorted({name for pattern in self.columns for name in fnmatch.filter(MEASURED, pattern)})
        # files are read in the order of their names
        self.records = RecordWriter((folder / f"{EVENTS}.{len(before):04d}").open("xb", buffering=0))
        self._write(0, file_version="brain.Event:2")  # of the files in which a start voids what was said of later steps
        if before:
            self._write(run.after + 1, session_log=SessionLog(status=SessionLog.START))
        else:
            known = {name: value for name, value in run.config.items() if value is not None}
            self._write(0, summary=hparams_pb(known, trial_id=run.id))
            self._write(0, summary=_text("config", _table(run)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._draw(step, {f"curve/{name}": value for name, value in values.items()})

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._draw(step, {f"{name}/{_place(row)}": row[name] for row in rows for name in self.shown})

    def end(self, status: str) -> None:
        self.records.close()

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=x) for tag, x in values.items() if not math.isnan(x)]
        self._write(step, summary=Summary(value=points))

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())


def _place(row: Mapping[str, Any]) -> str:
    """Return the site, with the call's number where that is not the first."""
    return f"{row['site']}[{row['call']}]" if row["call"] else str(row["site"])


def _table(run: TrackedRun) -> str:
    """Return the config in Markdown."""
    rows = {"run": run.id, **run.config}
    lines = [f"| {markdown(name)} | {markdown(str(value))} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _text(tag: str, text: str) -> Any:
    """Return a summary that TensorBoard shows as text."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.util.tensor_util import make_tensor_proto

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(text))])
