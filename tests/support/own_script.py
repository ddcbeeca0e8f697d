"""A Hydra app of somebody else's, swept by lnjac: its script, its conf/, and how it is run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from support.commands import background

TRAIN = """
import os
import time

import hydra
from omegaconf import OmegaConf

import lnjac
from losses import falling

OmegaConf.register_new_resolver("twice", lambda x: 2 * x)
execution = ("paths", "how", "pause")


def check(cfg):
    return [f"lr={cfg.lr} must be positive: try lr=1e-3"] if cfg.lr <= 0 else []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    if cfg.how == "nothing":
        return
    if cfg.how == "raise before":
        raise RuntimeError("too early")
    with lnjac.record() as run:
        for step in range(1, 1 if run.found else cfg.model.steps + 1):
            time.sleep(cfg.pause)
            run.scalars(step, train_loss=falling(step, cfg.lr))
            if cfg.how == "exit" and cfg.seed == 1:
                os._exit(3)
    if cfg.how == "raise after":
        raise RuntimeError("too late")
    return open(os.devnull)  # what cannot be sent from one process to another


if __name__ == "__main__":
    main()
"""

LOSSES = """
def falling(step, lr):
    return lr / step
"""

CONFIG = """
defaults:
  - model: small
  - override hydra/sweeper: lnjac
  - override hydra/launcher: local
  - _self_

seed: 1
lr: 1e-3
double: ${twice:${model.steps}}
how: record
pause: 0
paths:
  out: ${hydra:runtime.output_dir}/checkpoints
  job: ${hydra:job.num}
"""

REPORT_OFF = "hydra.sweeper.report=off"


def app(folder: Path) -> Path:
    """Write the app into folder/code; return the folder, from which it is run."""
    code = folder / "code"
    (code / "conf" / "model").mkdir(parents=True)
    (code / "train.py").write_text(TRAIN)
    (code / "losses.py").write_text(LOSSES)
    (code / "conf" / "config.yaml").write_text(CONFIG)
    (code / "conf" / "model" / "small.yaml").write_text("steps: 3\n")
    (code / "conf" / "model" / "large.yaml").write_text("steps: 5\nwidth: ???\n")
    return folder


def line(*words: str) -> list[str]:
    return [sys.executable, "code/train.py", *words]


def train(folder: Path, *words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run `python code/train.py WORDS`, to its end."""
    return subprocess.run(line(*words), cwd=folder, capture_output=True, text=True, timeout=120, **more)


def sweep(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a sweep of the app, named A."""
    return train(folder, "-m", "hydra.sweeper.sweep=A", REPORT_OFF, *words)


def started(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """Start a sweep of the app, named A."""
    return background(line("-m", "hydra.sweeper.sweep=A", REPORT_OFF, *words), folder, PYTHONUNBUFFERED="1")
