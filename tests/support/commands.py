"""Run run.py as a user does, in a folder of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import ROOT


def command(*words: str, cwd: Path, **more: Any) -> "subprocess.CompletedProcess[str]":
    """`python run.py WORDS`, in a folder of its own with the project's data linked in."""
    if not (cwd / "data").exists():
        (cwd / "data").symlink_to(ROOT / "data")
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words], cwd=cwd, capture_output=True, text=True, timeout=300, **more
    )


TINY = ("model=tiny", "steps=4", "eval.tokens=500", "batch_size=4", "threads=1", "report=off")


def assert_ends_well_without_a_reader(*words: str, cwd: Path) -> None:
    """Run run.py with nobody at the other end of its standard output."""
    line = [sys.executable, str(ROOT / "run.py"), *words]
    process = subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait() == 0
