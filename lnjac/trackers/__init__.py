"""Trackers: show a run's curves in another tool while it trains (conf/tracker, docs/tracking.md).

The run's tables hold the same and more, and nothing is read back from a tracker.
"""

from lnjac.trackers.base import Guarded, TrackedRun, Tracker, Untracked
from lnjac.trackers.mlflow import MLflow
from lnjac.trackers.tensorboard import TensorBoard
from lnjac.trackers.wandb import WandB

__all__ = ["Guarded", "MLflow", "TensorBoard", "TrackedRun", "Tracker", "Untracked", "WandB"]
