"""examples/nanogpt: its runs are swept, merged, compared and reported, by public names alone."""

import ast
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from support.nanogpt import SCRIPT, WORDS, started, swept
from support.pages import blocks
from support.paths import ROOT
from support.sweeping import science, wait_for

import lnjac
from lnjac.runs.folder import read_status


def test_it_uses_public_names_alone() -> None:
    tree = ast.parse(SCRIPT.read_text())
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [name for name in imported if name.startswith("lnjac")] == ["lnjac"]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lnjac"
    }
    assert used == {"probe", "record"}
    assert used <= set(lnjac.__all__)


def test_its_page_says_what_its_tables_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = blocks(ROOT / "docs" / "nanogpt.md", "python")
    exec(code, {})
    said = capsys.readouterr().out
    quoted = (ROOT / "docs" / "nanogpt.md").read_text().replace("\n> ", " ").split()
    assert " ".join(str(lnjac.verdict(ROOT / "studies" / "nanogpt")).split()) in " ".join(quoted)
    for site in ("blocks.0.ln_1", "blocks.1.ln_2", "ln_f"):
        assert site in said


@pytest.mark.rare
def test_killed_and_run_again_it_ends_with_the_same_tables_a_comparison_and_a_report(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, said = swept(tmp_path / "whole")
    assert "[4/4]" in said
    process = started(tmp_path / "killed", *WORDS, "hydra.sweeper.report=off")
    folder = tmp_path / "killed" / "multirun" / "nanogpt"
    wait_for(lambda: any(read_status(path.parent).get("status") == "done" for path in folder.glob("*/status.json")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(folder.glob("*/run.parquet"))) < 4
    _, said = swept(tmp_path / "killed", "hydra.sweeper.report=off")
    assert "done" in next(line for line in said.splitlines() if "4 jobs:" in line)
    for one, repaired in zip(science(whole / "all.parquet"), science(folder / "all.parquet"), strict=True):
        pd.testing.assert_frame_equal(one, repaired, check_exact=True)
    layers = lnjac.load(whole)
    assert set(layers["site"]) == {"blocks.0.ln_1", "blocks.0.ln_2", "ln_f"}
    assert sorted(set(layers["step"])) == [0, 20, 40]
    assert layers["forward_residual"].max() < 1e-6
    assert layers["jacobian_residual"].max() < 1e-5
    runs = pd.read_parquet(whole / "all.runs.parquet")
    assert sorted(zip(runs["attention"], runs["seed"], strict=True)) == [
        (of, n) for of in ("sigmoid", "softmax") for n in (1, 2)
    ]
    found = lnjac.compare(whole, by="attention", metrics=["val_loss_nats"], table="runs").rows
    losses = runs.pivot(index="seed", columns="attention", values="val_loss_nats")
    assert found["difference"].tolist() == pytest.approx([(losses["softmax"] - losses["sigmoid"]).mean()])
    assert found["n"].tolist() == [2]
    page = (whole / "report.html").read_text()
    assert "The validation loss" in page
    assert "blocks.0.ln_1" in page


@pytest.mark.slow
def test_a_bad_value_stops_the_sweep_before_it_starts(tmp_path: Path) -> None:
    process = started(tmp_path, "-m", "attention=softmax,sofmax", "width=30", "seed=1,2")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "4 of 4 jobs cannot run; none was started" in said
    assert "attention=sofmax: choose softmax or sigmoid" in said
    assert "width=30 is no multiple of heads=4: choose another width" in said
    assert "Traceback" not in said
    assert not (tmp_path / "multirun").exists()
