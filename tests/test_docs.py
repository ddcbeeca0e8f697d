"""The documents say what the code does: columns, and the code blocks of docs/own-model.md as they stand."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lnjac import tables


def test_columns_md_is_generated(root: Path) -> None:
    assert (root / "docs" / "columns.md").read_text() == tables.markdown()


def test_relative_links_lead_somewhere(root: Path) -> None:
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("benchmarks/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_column_names_are_unique() -> None:
    for declared in tables.TABLES.values():
        names = [column.name for column in declared]
        assert len(names) == len(set(names))


def test_own_model_code_runs_on_a_transformer_encoder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    five_lines, imports, raw = re.findall(
        r"```python\n(.*?)```", (root / "docs" / "own-model.md").read_text(), re.DOTALL
    )
    assert len(five_lines.strip().splitlines()) == 5
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    monkeypatch.chdir(tmp_path)
    save_file(model.state_dict(), "checkpoint.safetensors")
    space = {"model": model, "x": torch.randn(3, 5, 16), "y": torch.randint(16, (3, 5))}
    exec(imports + five_lines + raw, space)
    table = space["table"]
    assert isinstance(table, pd.DataFrame)
    assert table["site"].tolist() == ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm"]
    assert table["jacobian_residual"].max() < 1e-5
    assert "layers.0.norm1 0 (3, 5, 16)" in capsys.readouterr().out
