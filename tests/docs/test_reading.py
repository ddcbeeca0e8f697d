"""docs/reading.md: its code runs as it stands on a sweep like its own, and prints what has the form of its outputs."""

import importlib.util
import re
from itertools import product
from pathlib import Path

import pytest
from support.paths import ROOT
from support.small import SMALL, corpus

from lnjac.config.compose import compose
from lnjac.runs import folder as runs
from lnjac.runs import merge as sweep
from lnjac.training import run as train

PAIR = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.DOTALL)
NUMBER = r"-?\d+(\.\d+)?(e[+-]?\d+)?|NaN|null|NULL"
OPTIONAL = ("polars", "duckdb")
ALIASES = {"polars": r"\bpl\.", "duckdb": r"\bduckdb\."}


def form(output: str) -> set[str]:
    """The different lines of an output, without its numbers, rules and widths."""
    without_rules = re.sub(r"[─═┌┐└┘├┤┬┴┼╞╡╪│┆]", " ", output)
    without_numbers = re.sub(rf"(?<![\w.])({NUMBER})(?![\w.])", "#", without_rules)
    lines = (" ".join(line.split()) for line in without_numbers.splitlines())
    return {re.sub(r"(# )+#", "#", line) for line in lines if line}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document's sweep, of runs that last no time."""
    root = tmp_path_factory.mktemp("reading")
    folder = root / "multirun" / "reading"
    for mode, backward, seed in product(("softmax", "sigmoid"), ("exact", "center_scale"), (1, 2)):
        words = [f"attn_mode={mode}", f"ln_backward={backward}", f"seed={seed}", "diagnostics=trajectory", "steps=2"]
        assert train.run(compose(*SMALL, *words), folder / f"{mode}-{backward}-{seed}", corpus()) == runs.DONE
    sweep.merge([folder], folder / "all.parquet")
    return root


@pytest.mark.parametrize("without", [(), OPTIONAL])
def test_the_code_runs_and_prints_what_is_shown(
    without: tuple[str, ...], swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole, and pandas' part alone."""
    if missing := [name for name in OPTIONAL if name not in without and importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    monkeypatch.chdir(swept)
    pairs = [
        (code, output)
        for code, output in PAIR.findall((ROOT / "docs" / "reading.md").read_text())
        if not any(re.search(ALIASES[name], code) for name in without)
    ]
    assert len(pairs) == (3 if without else 7)
    space: dict[str, object] = {}
    for code, output in pairs:
        exec(code, space)
        printed = capsys.readouterr().out
        assert form(printed) == form(output), printed
