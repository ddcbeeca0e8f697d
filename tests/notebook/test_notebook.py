"""The how-to's notebook in a real kernel: bars, tables, and an interrupted cell that goes on."""

from pathlib import Path
from typing import Any

import pytest
from support.pages import blocks

nbformat = pytest.importorskip("nbformat", reason="needs the extra [notebook]: make test-track installs it")
nbclient = pytest.importorskip("nbclient", reason="needs the extra [notebook]: make test-track installs it")
pytest.importorskip("ipykernel", reason="needs the extra [notebook]: make test-track installs it")
pytestmark = pytest.mark.slow


def executed(folder: Path, *cells: str, **options: Any) -> list[list[Any]]:
    """Return the outputs of each cell, run in the folder by a kernel of its own."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}, **options)
    client.execute()
    return [cell.outputs for cell in notebook.cells]


def html(outputs: list[Any]) -> str:
    (shown,) = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    return str(shown)


def test_the_documented_notebook_runs(root: Path, tmp_path: Path) -> None:
    trained, compared, framed = executed(tmp_path, *blocks(root / "docs" / "notebook.md", "python"))
    text = "".join(output.text for output in trained if output.output_type == "stream")
    assert "training: " in text
    assert "\r" in text
    assert "<table" in html(compared)
    assert "paired by seed" in html(compared)
    assert "log_share" in html(framed)


INTERRUPTED = """
import os, signal, threading
import lnjac

config = lnjac.compose("model=tiny", "steps=100000", "data.dir=data/play", "checkpoint.every=0", "eval.tokens=100")
threading.Timer(5, os.kill, (os.getpid(), signal.SIGINT)).start()
lnjac.run(config, "run")
"""
RESUMED = """
import json
from pathlib import Path

from lnjac.training import loop

assert json.loads(Path("run/status.json").read_text())["status"] == "interrupted"
first = []

def update(training):
    first.append(training.updates)
    raise RuntimeError("seen")

loop.Training.update = update
try:
    lnjac.run(config, "run")
except RuntimeError:
    print(first)
"""


def test_an_interrupted_cell_goes_on(tmp_path: Path) -> None:
    outputs, resumed = executed(tmp_path, INTERRUPTED, RESUMED, allow_errors=True)
    (error,) = [output.ename for output in outputs if output.output_type == "error"]
    assert error == "KeyboardInterrupt"
    (printed,) = [output.text for output in resumed if output.output_type == "stream" and output.name == "stdout"]
    (first,) = map(int, printed.strip("[]\n").split(","))
    assert first > 0


RECORDED = """
import torch
import lnjac
from torch import nn

model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = lnjac.probe(model)
with lnjac.record("mine", config={"lr": 0.1}, seed=1) as run:
    for step in range(1, 4):
        optimizer.zero_grad()
        with probe.watch(step) as seen:
            loss = nn.functional.cross_entropy(model(torch.randn(5, 8)), torch.zeros(5, dtype=torch.long))
            seen.tokens(5, loss)
            loss.backward()
        run.layers(probe.rows(step), step)
        run.scalars(step, train_loss=loss.item())
        optimizer.step()
probe.rows(3)[["site", "radial_share"]]
"""


def test_a_loop_of_ones_own_is_recorded(tmp_path: Path) -> None:
    (outputs,) = executed(tmp_path, RECORDED)
    assert "radial_share" in html(outputs)
    assert (tmp_path / "mine" / "layers.parquet").exists()
