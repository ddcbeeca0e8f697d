"""Run run.py as a user does, in a folder of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from support import paths

RUN = str(paths.ROOT / "run.py")


def command(*words: str, cwd: Path, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """`python run.py WORDS`, in a folder of its own with the project's data linked in.

    Another environment needs another process. Else a fork of one that has imported everything serves, which makes a sweep's
    jobs itself unless a launcher is named: the processes of the default one would import everything once more.
    """
    if "-m" in words and not any("launcher" in word for word in words):
        words = (*words, "hydra.launcher.jobs=1")
    if not (cwd / "data").exists():
        (cwd / "data").symlink_to(paths.ROOT / "data")
    if env is not None:
        return subprocess.run([sys.executable, RUN, *words], cwd=cwd, env=env, capture_output=True, text=True)
    server = _server()
    assert server.stdin
    assert server.stdout
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        print(json.dumps([words, str(cwd), dict(os.environ), out.name, err.name]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


@cache
def _server() -> "subprocess.Popen[str]":
    line = [sys.executable, str(Path(__file__).with_name("forked.py")), RUN]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


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
    line = [sys.executable, RUN, *words]
    process = subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait() == 0
