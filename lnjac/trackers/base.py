"""What a tracker is told of a run, and the guard that keeps a failing tracker from harming its run."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

NONE = {"_target_": "lnjac.trackers.Untracked", "name": "none"}
"""The config of a run that is not tracked."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as its tracker sees it. `id`: run_id-diag_id; `config`: its config columns, None where one has no value."""

    id: str
    folder: Path
    config: Mapping[str, Any]

    @property
    def title(self) -> str:
        """A short name that tells runs apart; `config` has the rest."""
        groups = [str(self.config[name]) for name in ("attn_mode", "method", "ln_backward") if name in self.config]
        return "-".join([*(groups or [self.folder.name]), f"seed{self.config['seed']}"])


class Tracker(Protocol):
    """A dataclass of settings, as its yaml file has them, with these methods; each run gets a copy of its own.

    A run is always told from its beginning: one that is resumed is told again what was recorded before. Whatever a
    method raises is logged once and ends the tracking, not the run.
    """

    name: str

    def start(self, run: TrackedRun) -> None:
        """Open, for a run that begins or is resumed."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show train_loss_nats, val_loss_nats and lr after update number `step`, as far as they are known."""

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the measurement at this step: a row of layers for each norm."""

    def end(self, status: str) -> None:
        """Close, with the run's status: done, diverged, failed or interrupted."""


@dataclass
class Untracked(Tracker):
    """No tracker."""

    name: str


class Guarded:
    """A tracker, or none, that cannot harm its run: its first error is logged and ends the tracking."""

    def __init__(self, tracker: Tracker | None) -> None:
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
                self.running.name,
                type(error).__name__,
                error,
            )
            self.running = None
