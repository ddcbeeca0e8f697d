"""Weights & Biases, online or as files that `wandb sync` sends later."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lnjac.trackers.base import TrackedRun
from lnjac.trackers.curves import Curves, known

MODES = ("offline", "online")


@dataclass
class WandB(Curves):
    """A run of Weights & Biases with the run's identity as its id.

    Attributes:
        project: The project of W&B that the run belongs to.
        entity: The user or team that owns the project; None for the default of the account.
        mode: `offline` writes RUN/wandb alone, which `wandb sync RUN/wandb/offline-run-*` sends; `online` sends at once.
    """

    name: str = "wandb"
    project: str = "lnjac"
    entity: str | None = None
    mode: str = "offline"

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if self.mode not in MODES:
            yield f"tracker.mode={self.mode} must be {' or '.join(MODES)}"

    def packages(self) -> list[str]:
        return ["wandb"]

    def start(self, run: TrackedRun) -> None:
        import wandb

        folder = run.folder.resolve()
        for before in folder.glob("wandb/offline-run-*"):  # the new one is told all that is in it
            shutil.rmtree(before)
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode="online" if self.mode == "online" else "offline",
            id=run.id,
            name=run.title,
            config=known(run.config),
            dir=folder,
            resume="allow",
            reinit="create_new",  # beside a run of the user's own in this process
            settings=wandb.Settings(silent=True, console="off"),
        )

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.run.step:  # W&B has the earlier points, of an attempt that this one resumes
            self.run.log(dict(values), step=step)

    def end(self, status: str) -> None:
        self.run.summary["status"] = status
        self.run.finish(exit_code=int(status not in ("done", "diverged")))
