"""What the import contracts (`make lint`) cannot see: what is loaded at run time, and what each folder does without."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support.commands import TINY

import lnjac

READING = (
    "lnjac", "lnjac.cli.main", "lnjac.comparing.compare", "lnjac.reporting.report", "lnjac.runs.diff", "lnjac.runs.merge",
    "lnjac.runs.folder", "lnjac.runs.schema", "lnjac.config.schema", "lnjac.text",
)  # fmt: skip


@pytest.mark.parametrize("module", READING)
def test_reading_starts_without_torch(root: Path, module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


MEASURES_AND_WRITES = """
import sys
for absent in ("hydra", "omegaconf", "typer", "rich", "scipy", "statsmodels", "safetensors",
               "lnjac.config", "lnjac.gpt", "lnjac.data", "lnjac.diagnostics", "lnjac.training"):
    sys.modules[absent] = None
import lnjac
import torch

norm, folder = torch.nn.LayerNorm(8), sys.argv[1]
table = lnjac.probe(norm).measure([torch.randn(4, 8)], lambda model, x: (model(x)[:, :3].pow(3).mean(), 4))
assert table["jacobian_residual"].max() < 1e-5
with lnjac.record(folder + "/run", config={"width": 8}, seed=1) as run:
    run.layers(table, 0)
lnjac.merge([folder], folder + "/all.parquet")
again = lnjac.load(folder + "/all.parquet")
assert again["radial_share"].tolist() == table["radial_share"].tolist()
assert again["width"].tolist() == [8]
"""


@pytest.mark.slow
def test_probe_and_record_need_neither_hydra_nor_config(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURES_AND_WRITES, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_sweeps_process_imports_no_compiler_wraps_steps_once_and_makes_configs_in_turn(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from lnjac.cli.run import main
from lnjac.sweeps.sweeper import Sweeper
finished, full = [], Sweeper._full
def counted(sweeper, job):
    finished.append(len(list(Path("multirun/A").glob("*/run.parquet"))))
    return full(sweeper, job)
Sweeper._full = counted
main()
assert finished == [0, 1, 2, 3], finished  # when each job's whole config is made
import sys, torch
assert "torch._dynamo" not in sys.modules
for step in (torch.optim.AdamW.step, torch.optim.SGD.step):
    n = 0
    while step := getattr(step, "__wrapped__", None): n += 1
    assert n == 2, n  # by no_grad, and by the optimizer's hooks
"""
    words = ["-m", *TINY, "optimizer=adamw,sgd", "optimizer.lr=1e-3", "seed=1,2", "sweep=A", "hydra.launcher.jobs=1"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")) == 4


def test_importing_lnjac_is_quick_and_imports_next_to_nothing(root: Path) -> None:
    code = """
import sys, time
start = time.perf_counter()
import lnjac
took, heavy = time.perf_counter() - start, {"torch", "pandas", "pyarrow", "numpy", "hydra"} & set(sys.modules)
sys.exit(f"{took} s, {heavy}" if heavy or took > 0.3 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_with_a_docstring() -> None:
    assert set(lnjac.__all__) == {*lnjac._HOME, "__version__"}
    for name in lnjac._HOME:
        assert getattr(lnjac, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lnjac.nothing  # noqa: B018
