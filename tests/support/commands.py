"""Run run.py as a user does, in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
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


def background(line: Sequence[str], cwd: Path, *, stderr: int = subprocess.PIPE, **env: str) -> "subprocess.Popen[str]":
    """Start a command in a session of its own, so that it can be killed with its children."""
    return subprocess.Popen(
        line,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, **env},
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
