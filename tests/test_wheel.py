"""The wheel, outside any checkout: `lnjac-run` sweeps in an empty folder, and a user's own conf/ adds members."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.rare


@pytest.fixture(scope="module")
def scripts(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment in which the wheel is installed, and its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".*", "docs", "tests", "multirun", "outputs", "build"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (library,) = folder.glob("venv/lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-compile", wheel], check=True)
    (library / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its .pth files are not followed
    return python.parent


def test_a_sweep_in_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    line = [scripts / "lnjac-run", "-m", "attn_mode=softmax,sigmoid", "seed=1,2", "model=tiny", "steps=3", "sweep=A"]
    done = subprocess.run([*line, "eval.tokens=500"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")) == 4
    shown = subprocess.run([scripts / "lnjac", "compare", "multirun/A", "--by", "attn_mode"], cwd=tmp_path)
    assert shown.returncode == 0


def test_ones_own_members_beside_it(scripts: Path, tmp_path: Path) -> None:
    member = tmp_path / "conf" / "attn_mode" / "biased.yaml"
    member.parent.mkdir(parents=True)
    member.write_text("_target_: lnjac.gpt.attention.Sigmoid\nbias: -3.0\n")
    line = [
        scripts / "lnjac-run",
        "--config-dir",
        "conf",
        "attn_mode=biased",
        "model=tiny",
        "steps=1",
        "eval.tokens=500",
    ]
    done = subprocess.run([*line, "hydra.run.dir=out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = pd.read_parquet(tmp_path / "out" / "run.parquet").iloc[0]
    assert (run["attn_mode"], run["attn_mode.bias"]) == ("biased", -3.0)
