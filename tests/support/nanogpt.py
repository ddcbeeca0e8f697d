"""Run examples/nanogpt at a small size, as a user does."""

import subprocess
import sys
from pathlib import Path

from support.commands import background
from support.paths import ROOT

SCRIPT = ROOT / "examples" / "nanogpt" / "train.py"
SMALL = ("width=16", "layers=1", "heads=2", "context=16", "batch=2", "steps=40", "measure_every=20", "warmup=5")
WORDS = ("-m", "attention=softmax,sigmoid", "seed=1,2", *SMALL)


def started(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """Start the script in a folder."""
    return background([sys.executable, str(SCRIPT), *words], folder, stderr=subprocess.STDOUT, OMP_NUM_THREADS="1")


def swept(folder: Path, *words: str) -> tuple[Path, str]:
    """Run the sweep to its end; return its folder and what it printed."""
    process = started(folder, *WORDS, *words)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder / "multirun" / "nanogpt", said
