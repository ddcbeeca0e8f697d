"""What every test shares: one thread (small tensors gain nothing from more), the repository's root, the command."""

import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pages import without_vega
from support.paths import ROOT

from lnjac.cli import main as cli
from lnjac.config import compose
from lnjac.machine import cores


@pytest.hookimpl(trylast=True)  # of those that -m leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow ones first, in every process: none shall run a long one at the end, when the others have nothing left.

    `--dist worksteal` gives each process as long a piece of the list, and then the rest of another's. A file's slow ones stay
    in one process, which makes their fixtures once.
    """
    n = getattr(config, "workerinput", {}).get("workercount", 1)
    fast = [item for item in items if not item.get_closest_marker("slow")]
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            files.setdefault(item.path, []).append(item)
    pieces: list[list[pytest.Item]] = [[] for _ in range(n)]
    for file in sorted(files.values(), key=len, reverse=True):
        min(pieces, key=len).extend(file)
    for piece in pieces:
        cut = len(items) // n + 1 - len(piece)
        piece += fast[:cut]
        del fast[:cut]
    items[:] = [item for piece in pieces for item in piece]


def pytest_xdist_auto_num_workers() -> int:
    """One more process than cores, as many tests wait for others' processes."""
    return cores() + 1


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A script's background job ignores SIGINT, and so would the commands that tests start in order to interrupt them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    without_vega(monkeypatch)


@pytest.fixture
def add_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a yaml file into a copy of conf/ that `compose` then reads: (group, text, name), or as its first comment has it."""
    conf = tmp_path / "conf"

    def add(group: str, text: str, name: str = "") -> str:
        if not conf.exists():
            monkeypatch.setattr(compose, "CONF", shutil.copytree(compose.CONF, conf))
        name = name or re.findall(rf"^# conf/{group}/(\w+)\.yaml", text)[0]
        (conf / group).mkdir(exist_ok=True)  # conf/diagnostic has no member of ours
        (conf / group / f"{name}.yaml").write_text(text)
        return name

    return add


@pytest.fixture
def lnjac(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lnjac", *map(str, words)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code or 0, said.out, said.err

    return call
