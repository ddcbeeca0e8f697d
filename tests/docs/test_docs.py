"""The documents say what the code does: columns, and the code blocks of README and docs as they stand."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.commands import command
from support.pages import blocks
from torch import nn
from typer.testing import CliRunner

import lnjac
from lnjac.cli import main as cli
from lnjac.columns import Column
from lnjac.config import compose, identity, schema
from lnjac.diagnostics import catalogue
from lnjac.gpt import attention, methods, norms
from lnjac.norms import decompose as jacobian
from lnjac.norms import formulas
from lnjac.norms import layers as norm
from lnjac.runs import folder as runs
from lnjac.training import run as train


def test_relative_links_lead_somewhere(root: Path) -> None:
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("benchmarks/*.md")]
    made = re.findall(r'"([\w-]+\.html)"', (root / "docs" / "site.py").read_text())
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            found = "://" in link or (page.parent / link).exists() or link in made
            assert found, f"{page.name} links to {link}"


def test_column_names_are_unique() -> None:
    for declared in catalogue.columns().values():
        names = [column.name for column in declared]
        assert len(names) == len(set(names))


def assert_resumes(code: str, space: dict[str, Any]) -> None:
    """Stop the page's loop in its sixth update and run it again."""
    calls, loss = count(1), space["loss"]

    def stopped(*given: Any) -> Any:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return loss(*given)

    with pytest.raises(KeyboardInterrupt):
        exec(code, space | {"loss": stopped})
    exec(code, space)
    run = lnjac.load_run("runs/lr0.1-seed2")
    assert run.curve["step"].tolist() == list(range(1, 9))
    assert run.run["resumed_at"].tolist() == [4]
    assert run.config == {"lr": 0.1, "steps": 8, "seed": 2}
    assert lnjac.load_run("runs/own-columns").table("heads")["entropy"].tolist() == [1.2, 0.7]


def assert_commands_run(lines: str) -> None:
    """Run the page's commands on the runs that its code recorded, and on runs of a third seed."""
    for lr in (0.1, 0.2):
        for seed in (3, 4):
            with lnjac.record(f"runs/{lr}-{seed}", config={"lr": lr}, seed=seed) as run:
                run.scalars(1, train_loss=lr)
    for line in lines.splitlines():
        done = CliRunner().invoke(cli.app, line.split()[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_own_model_code_runs_on_a_transformer_encoder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    five_lines, imports, checked, adapted, raw = blocks(root / "docs" / "own-model.md", "python")
    loop, resumed, columns, accumulated, ranks, replaced, fed_back = blocks(root / "docs" / "own-loop.md", "python")
    assert len(five_lines.strip().splitlines()) == 5
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    monkeypatch.chdir(tmp_path)
    save_file(model.state_dict(), "checkpoint.safetensors")
    space = {"model": model, "x": torch.randn(3, 5, 16), "y": torch.randint(16, (3, 5))}
    exec(imports + five_lines + checked + adapted + loop + raw, space)
    whole = space["probe"].measure([(space["x"], space["y"])], space["loss"]).set_index("site")
    exec(accumulated + ranks + replaced, space)
    assert space["table"]["radial_share"].tolist() == pytest.approx(whole["radial_share"].tolist(), rel=1e-4)
    space["table"] = whole.reset_index()
    recorded = pd.read_parquet("runs/lr0.1-seed1/layers.parquet")
    assert set(recorded["step"]) == {2, 4}
    assert set(recorded["model.width"]) == {16}
    table = space["table"]
    assert isinstance(table, pd.DataFrame)
    assert table["site"].tolist() == ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm"]
    assert table["jacobian_residual"].max() < 1e-5
    assert "layers.0.norm1 0 (3, 5, 16)" in capsys.readouterr().out
    exec(columns, space)
    assert_resumes(resumed, space)
    assert_commands_run(blocks(root / "docs" / "own-loop.md", "sh")[0])
    capsys.readouterr()
    exec(fed_back, space)
    cosines = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(cosines) == 3
    assert all(0 < cosine < 0.99 for cosine in cosines)


# How-to: each example is put where the page says, and a run is made with it.

SHORT = ("model=tiny", "steps=2", "eval.tokens=100", "batch_size=2")


def example(page: Path, word: str, language: str = "python") -> str:
    (found,) = [block for block in blocks(page, language) if word in block]
    return found


def run_with(folder: Path, *overrides: str) -> dict[str, object]:
    """The row of `runs` of a short run."""
    settings = compose.compose(*SHORT, f"data.dir={folder}/play", *overrides)
    assert schema.check(settings) == []
    assert train.run(settings, folder / "run") == "done"
    (row,) = runs.read_table(folder / "run" / "run.parquet").to_pylist()
    return row


def defined(monkeypatch: pytest.MonkeyPatch, module: object, code: str, name: str) -> None:
    """The code as if it stood in the module."""
    space = vars(module).copy()
    exec(compile(code, str(name), "exec", dont_inherit=True), space)
    monkeypatch.setattr(module, name, space[name], raising=False)


def test_how_to_add_a_metric(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = root / "docs" / "extending.md"
    monkeypatch.setattr(formulas, "METRICS", {})
    exec(example(page, "@metric"), {**vars(jacobian)})
    ratio = eval(example(page, 'Column("mean_to_radial"'), {"Column": Column})
    monkeypatch.setattr(formulas, "COLUMNS", [*formulas.COLUMNS, ratio])
    settings = compose.compose(*SHORT, f"data.dir={tmp_path}/play", "diagnostics.distributions=true")
    assert train.run(settings, tmp_path / "run") == "done"
    layers = runs.read_table(tmp_path / "run" / "layers.parquet").to_pandas()
    np.testing.assert_allclose(layers["mean_to_radial"], layers["sum_A"] / layers["sum_B"], rtol=1e-12)
    spread = runs.read_table(tmp_path / "run" / "distributions.parquet").to_pandas()
    ends = spread[(spread["quantity"] == "log2_sigma") & (spread["statistic"] == "quantile")]
    low, high = (ends[ends["at"] == at].set_index("site")["value"] for at in (0.0, 1.0))
    for row in layers.itertuples():
        assert low[row.site] < row.log2_sigma < high[row.site]


def test_how_to_add_a_surrogate(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_member: Callable[..., str]
) -> None:
    page = root / "docs" / "extending.md"
    defined(monkeypatch, norm, example(page, "class Mixture"), "Mixture")
    member = add_member("ln_backward", example(page, "lnjac.norms.layers.Mixture", "yaml"))
    row = run_with(tmp_path, f"ln_backward={member}")
    assert (row["ln_backward"], row["ln_backward.share"]) == ("mixture", 0.1)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 8, dtype=torch.float64)
    mixed = norm.Mixture("mixture", ["all"], 0.3).surrogate(x, 1e-5, rms=False)
    (found,) = torch.autograd.grad(mixed, x, g)
    z, rstd = jacobian.normalise(x.detach(), 1e-5)
    torch.testing.assert_close(found, 0.3 * g + 0.7 * jacobian.pull_back(g, z, rstd))


def test_how_to_add_a_method(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_member: Callable[..., str]
) -> None:
    page = root / "docs" / "extending.md"
    defined(monkeypatch, methods, example(page, "class NoisyTranspose"), "NoisyTranspose")
    member = add_member("method", example(page, "lnjac.gpt.methods.NoisyTranspose", "yaml"))
    row = run_with(tmp_path, f"method={member}")
    assert (row["method"], row["method.q"]) == ("noisy", 1.28)


def test_how_to_add_an_attention_mode(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_member: Callable[..., str]
) -> None:
    defined(monkeypatch, attention, example(root / "docs" / "extending.md", "class Squared"), "Squared")
    member = add_member("attn_mode", example(root / "docs" / "extending.md", "lnjac.gpt.attention.Squared", "yaml"))
    row = run_with(tmp_path, f"attn_mode={member}")
    assert (row["attn_mode"], row["attn_mode.gain"]) == ("squared", 1.0)


@pytest.mark.parametrize(
    ("group", "cls", "file", "own"),
    [
        ("model/norm", norms.DyT, "dyt", {"model.norm.alpha": 0.5}),
        ("model/placement", norms.PeriLN, "peri", {}),
    ],
)
def test_how_to_add_a_norm_and_a_placement(
    group: str,
    cls: type,
    file: str,
    own: dict[str, float],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    add_member: Callable[..., str],
) -> None:
    """The examples are the ones that lnjac has, to the letter, and make the same run when they are put in their places."""
    page, key = root / "docs" / "extending.md", group.replace("/", ".")
    code, text = example(page, f"class {cls.__name__}"), example(page, f"lnjac.gpt.norms.{cls.__name__}", "yaml")
    assert code.strip() == inspect.getsource(cls).strip()
    shipped = root / "conf" / group / f"{file}.yaml"
    assert yaml.safe_load(text) == yaml.safe_load(shipped.read_text())
    before = run_with(tmp_path / "shipped", f"{key}={file}")
    monkeypatch.delattr(norms, cls.__name__)
    defined(monkeypatch, norms, code, cls.__name__)
    row = run_with(tmp_path / "example", f"{key}={add_member(group, text)}")
    assert row[key] == file
    assert {name: row[name] for name in own} == own
    assert all(row[name] == before[name] for name in ("run_id", "val_loss_nats", "n_params"))


@pytest.mark.filterwarnings("error")
def test_how_to_add_a_diagnostic(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_member: Callable[..., str]
) -> None:
    page = root / "docs" / "extending.md"
    (tmp_path / "relative.py").write_text(example(page, "class Relative"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "relative", raising=False)
    member = add_member("diagnostic", example(page, "_target_: relative.Relative", "yaml"))
    named = (f"diagnostics.more=[{member}]", "diagnostics.batches=2")
    row = run_with(tmp_path, *named, "method=bp", "precision=fp64")
    run = lnjac.load_run(tmp_path / "run", trust=True)
    assert run.config.diagnostics.more == {member: sys.modules["relative"].Relative("weight")}
    model = run.model()
    ratios: dict[str, list[float]] = {}
    for idx, targets in zip(*run.diagnostic_batch(), strict=True):
        parameters = {name: p for name, p in model.named_parameters() if "weight" in name}
        grads = torch.autograd.grad(model(idx, targets)[1], list(parameters.values()))
        for (name, p), grad in zip(parameters.items(), grads, strict=True):
            ratios.setdefault(name, []).append(float(grad.square().sum().sqrt() / p.detach().square().sum().sqrt()))
    rows = pd.read_parquet(tmp_path / "run" / "relative.parquet")
    assert set(map(len, ratios.values())) == {2}
    assert rows["name"].tolist() == list(ratios)
    np.testing.assert_allclose(rows["ratio"], [np.mean(found) for found in ratios.values()], rtol=1e-9)
    assert rows[["run_id", "diag_id", "step"]].drop_duplicates().values.tolist() == [[row["run_id"], row["diag_id"], 2]]
    bare = compose.compose(*SHORT, f"data.dir={tmp_path}/play", "diagnostics.batches=2", "method=bp", "precision=fp64")
    assert identity.run_id(bare, bare.data.load().sha256) == row["run_id"]
    assert identity.diag_id(bare) != row["diag_id"]
    lnjac.merge(tmp_path / "run", tmp_path / "all.parquet")
    merged = lnjac.load(tmp_path / "all.relative.parquet")
    pd.testing.assert_frame_equal(merged[list(rows)], rows)


def test_how_to_ask_a_question(root: Path) -> None:
    text = example(root / "docs" / "extending.md", "+experiment=affine", "yaml")
    assert text.startswith("# @package _global_\n# Claim: ")
    swept = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    assert swept == {"model.affine": "true,false", "seed": "1,2,3,4,5,6"}
    for value in swept["model.affine"].split(","):
        assert schema.check(compose.compose("data=shakespeare_char", f"model.affine={value}")) == []


@pytest.mark.slow
def test_the_notebook_reads_a_sweep(root: Path, tmp_path: Path) -> None:
    """docs/notebook.py as a script on a tiny sweep, and as the notebook that jupytext makes of it."""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed: pip install -e '.[dev]'")
    options = ["model=tiny", "steps=2", "eval.tokens=100", "batch_size=2", "diagnostics=trajectory", "sweep=NAME"]
    swept = ["attn_mode=softmax,sigmoid", "ln_backward=exact,center_scale", "seed=1,2"]
    assert command("-m", *options, *swept, "report=off", cwd=tmp_path).returncode == 0
    script = root / "docs" / "notebook.py"
    done = subprocess.run(
        [sys.executable, script, "multirun/NAME"], cwd=tmp_path, capture_output=True, text=True, env=_here(root)
    )
    assert done.returncode == 0, done.stderr
    assert "8 runs, 120 layer rows; status: {'done': 8}" in done.stdout
    assert "paired by seed, 95% t interval" in done.stdout
    layers = pd.read_parquet(tmp_path / "multirun" / "NAME" / "all.parquet")
    last = layers[(layers["step"] == 2) & (layers["ln_backward"] == "exact") & (layers["site"] == "ln_f")]
    of_modes = last.groupby("attn_mode")["radial_share"].mean()  # a seed counts as much as another
    lines = [line.split() for line in done.stdout.split("count")[-1].splitlines() if "ln_f" in line]
    assert [float(line[-3]) for line in lines] == pytest.approx(of_modes.loc[["softmax", "sigmoid"]].tolist(), abs=6e-5)
    cells = jupytext.read(script)["cells"]
    assert [cell["cell_type"] for cell in cells].count("markdown") == 7
    assert "load_run" in cells[-3]["source"]


@pytest.mark.slow
def test_the_page_on_notebooks_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for code in blocks(root / "docs" / "notebook.md", "python"):
        exec(code, space)
    assert set(space["found"].rows["n"]) == {3}
    assert len(space["norms"]) == 6 * 4


@pytest.mark.rare
def test_the_notebook_reads_any_sweep(root: Path, tmp_path: Path) -> None:
    options = ["model=tiny", "steps=2", "eval.tokens=100", "batch_size=2", "sweep=OTHER", "method=bp,fa", "seed=1"]
    assert command("-m", *options, "report=off", cwd=tmp_path).returncode == 0
    script = root / "docs" / "notebook.py"
    words = [sys.executable, script, "multirun/OTHER"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=_here(root))
    assert done.returncode == 0, done.stderr
    assert "one backward alone" in done.stdout


def _here(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}
