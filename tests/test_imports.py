"""What the import contracts (`make lint`) cannot see: what is loaded at run time, and what each folder does without."""

import subprocess
import sys
from pathlib import Path

import pytest

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
for absent in ("hydra", "omegaconf", "typer", "rich", "scipy", "statsmodels", "lnjac.config", "lnjac.gpt", "lnjac.training"):
    sys.modules[absent] = None
import torch
from pathlib import Path
from lnjac.norms.analyse import analyse
from lnjac.runs import folder
from lnjac.columns import Column

norm = torch.nn.LayerNorm(8)
(row,) = analyse(norm, [torch.randn(4, 8)], lambda model, x: (model(x)[:, :3].pow(3).mean(), 4))
assert row["jacobian_residual"] < 1e-5
values = {name: value for name, value in row.items() if isinstance(value, float)}
columns = [Column(name, "float64", "", "") for name in values]
file = Path(sys.argv[1])
folder.write_table(file, folder.table(columns, [], [values]), {"table": "layers"})
(again,) = folder.read_table(file).to_pylist()
assert again["radial_share"] == row["radial_share"]
"""


@pytest.mark.slow
def test_norms_and_runs_need_neither_hydra_nor_config(root: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", MEASURES_AND_WRITES, str(tmp_path / "layers.parquet")]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_with_a_docstring() -> None:
    assert set(lnjac.__all__) == {*lnjac._HOME, "__version__"}
    for name in lnjac._HOME:
        assert getattr(lnjac, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lnjac.nothing  # noqa: B018
