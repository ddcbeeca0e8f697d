"""TensorBoard, as event files in the run's folder."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lnjac.escape import markdown
from lnjac.trackers.base import TrackedRun
from lnjac.trackers.curves import Curves, known

EVENTS = "events.out.tfevents"
"""The beginning of the names by which TensorBoard finds its files."""


@dataclass
class TensorBoard(Curves):
    """Event files in RUN/tensorboard/TITLE, with the config as text and as hyperparameters.

    They are written without a buffer or a thread of their own: events of a killed process are there, and an error is seen.
    """

    name: str = "tensorboard"

    def packages(self) -> list[str]:
        return ["tensorboard"]

    def start(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / "tensorboard" / run.title
        folder.mkdir(parents=True, exist_ok=True)
        before = sorted(folder.glob(f"{EVENTS}.*"))
        number = int(before[-1].suffix[1:]) + 1 if before else 0  # files are read in the order of their names
        self.records = RecordWriter((folder / f"{EVENTS}.{number:04d}").open("xb", buffering=0))
        self._write(0, file_version="brain.Event:2")  # in such files a start voids all events of its step and later
        self._write(0, session_log=SessionLog(status=SessionLog.START))  # for a TensorBoard that has read those before
        for file in before:
            file.unlink()
        self._write(0, summary=hparams_pb(known(run.config), trial_id=run.id))
        self._write(0, summary=_text("config", _table(run)))

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
        self._write(step, summary=Summary(value=points))

    def end(self, status: str) -> None:
        self.records.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())


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
