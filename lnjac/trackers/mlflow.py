"""MLflow, in the store that its URI names: a file, unless it is a server."""

import os
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lnjac.trackers.base import TrackedRun
from lnjac.trackers.curves import Curves, known

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TAG = "lnjac.run"
"""The tag by which a run is found again."""

STATUS = {"done": "FINISHED", "diverged": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

MOST_METRICS, MOST_PARAMS = 1000, 100
"""How many MLflow takes in one call."""

WAIT_S = 1.0
"""Seconds between two calls, each of which a store of one file takes a commit for."""


@dataclass
class MLflow(Curves):
    """A run of MLflow with the run's config as its parameters.

    Attributes:
        experiment: The experiment of MLflow that the run belongs to; it is made if it is missing.
        uri: The store, such as `sqlite:///mlflow.db`, or a server; None for MLflow's own choice, which is MLFLOW_TRACKING_URI
            or else mlflow.db in the working directory.
    """

    name: str = "mlflow"
    experiment: str = "lnjac"
    uri: str | None = None

    def packages(self) -> list[str]:
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return ["mlflow", *(["sqlalchemy", "alembic"] if not uri or uri.startswith("sqlite:") else [])]

    def start(self, run: TrackedRun) -> None:
        self.client = self._client()
        experiment = self._experiment()
        earlier = self.client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{run.id}'")
        self.told: dict[str, int] = {}
        self.waiting: list[Metric] = []
        self.sent = time.monotonic()
        self.again = bool(earlier)
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=run.title, tags={TAG: run.id}).info.run_id
        self._params(known(run.config))

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        for key, value in ((_key(name), value) for name, value in values.items()):
            if step > self._last(key):
                self.waiting.append(Metric(key, value, now_ms, step))
                self.told[key] = step
        if time.monotonic() - self.sent > WAIT_S:
            self._send()

    def end(self, status: str) -> None:
        self._send()
        self.client.set_tag(self.id, "lnjac.status", status)
        self.client.set_terminated(self.id, STATUS[status])

    def _client(self) -> "MlflowClient":
        """Return a client of the store. Only one process at a time may make the tables of a new file."""
        from mlflow import MlflowClient, get_tracking_uri

        uri = self.uri or get_tracking_uri()
        file = Path(uri.removeprefix("sqlite:///"))
        with FileLock(file.with_name(f".{file.name}.lock")) if uri.startswith("sqlite:///") else nullcontext():
            return MlflowClient(tracking_uri=uri)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.create_experiment(self.experiment))
        except MlflowException:  # it is there, made by an earlier run or by another process meanwhile
            if (found := self.client.get_experiment_by_name(self.experiment)) is None:
                raise
            return str(found.experiment_id)

    def _params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_key(name), str(value)) for name, value in config.items()]
        for at in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.id, params=params[at : at + MOST_PARAMS])

    def _last(self, key: str) -> int:
        """Return the last step of a curve that MLflow has, of this attempt or of one that it resumes; -1 if none."""
        if key not in self.told:
            points = self.client.get_metric_history(self.id, key) if self.again else []
            self.told[key] = max((point.step for point in points), default=-1)
        return self.told[key]

    def _send(self) -> None:
        while self.waiting:
            self.client.log_batch(self.id, metrics=self.waiting[:MOST_METRICS])
            del self.waiting[:MOST_METRICS]
        self.sent = time.monotonic()


def _key(name: str) -> str:
    """Return a name with `_` for each character that MLflow refuses in the name of a metric or a parameter."""
    return re.sub(r"[^\w\-. :/]", "_", name)
