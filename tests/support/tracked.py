"""Runs that trackers are told of: some of our trainer, cut and resumed, and what their tables say should be drawn."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from support.small import corpus

import lnjac
from lnjac.config.schema import RunConfig
from lnjac.training import loop
from lnjac.training import run as train

WATCHED = ("diagnostics=trajectory", "eval.every=2")
DRAWN = ("radial_share", "r_mean", "cos_center_vs_true", "sigma_mean")

Points = dict[tuple[str, int], list[float]]
"""The values drawn, by curve and step."""


def expected(run: Path, drawn: Sequence[str] = DRAWN) -> Points:
    """Return what a tracker should show, from the run's tables."""
    opened, found = lnjac.load_run(run), {}
    for row in opened.curve.to_dict("records"):
        for name in ("train_loss_nats", "val_loss_nats", "lr"):
            found["curve/" + name, row["step"]] = row[name]
    for row in opened.layers.to_dict("records"):
        for name in drawn:
            found[f"{name}/{row['site']}", row["step"]] = row[name]
    return {key: [value] for key, value in found.items() if not pd.isna(value)}


def cut(folder: Path, config: RunConfig, saved: int | None) -> None:
    """Cut a run after five updates; its last checkpoint is after `saved` of them, if any."""
    with pytest.MonkeyPatch.context() as patch:
        update, save = loop.Training.update, train.save

        def until(self: loop.Training) -> float:
            if self.updates == 5:
                raise KeyboardInterrupt
            return update(self)

        patch.setattr(loop.Training, "update", until)
        patch.setattr(train, "save", lambda it, record: save(it, record) if it.updates == saved else None)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, folder, corpus())
