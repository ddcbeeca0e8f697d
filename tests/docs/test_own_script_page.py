"""docs/own-script.md, carried out as it stands: its files are written, its commands run."""

import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support.pages import blocks


@pytest.mark.rare
def test_the_page_about_ones_own_script(root: Path, tmp_path: Path) -> None:
    page = root / "docs" / "own-script.md"
    config, small = blocks(page, "yaml")
    (script,) = blocks(page, "python")
    swept, refused = blocks(page, "sh")
    (said,) = blocks(page, "text")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "conf" / "config.yaml").write_text(config)
    (tmp_path / "conf" / "model" / "small.yaml").write_text(small)
    (tmp_path / "conf" / "model" / "wide.yaml").write_text(small.replace("16", "64"))

    def run(line: str) -> "subprocess.CompletedProcess[str]":
        program, *words = shlex.split(line, comments=True)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        return subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)

    for line in swept.splitlines():
        done = run(line)
        assert done.returncode == 0, done.stderr
    assert {"site", "16", "64"} <= set(done.stdout.split("\n1 ")[0].split())
    merged = pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")
    assert sorted(zip(merged["model.width"], merged["seed"], strict=True)) == [
        (width, seed) for width in (16, 64) for seed in (1, 2, 3)
    ]
    bad = run(refused)
    assert bad.returncode == 1
    assert bad.stderr.startswith(said)
