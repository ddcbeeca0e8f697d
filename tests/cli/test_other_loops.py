"""The commands on recorded runs of a model that is not ours: what applies is shown, and what does not is named."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.folders import make_run, noise
from typer.testing import CliRunner

import lnjac
from lnjac.cli import main as cli
from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.norms import formulas
from lnjac.runs import folder as runs
from lnjac.runs.record import Record

pytestmark = pytest.mark.slow

RUNNER = CliRunner()
SITES = ("encoder.layers.9.norm_a", "encoder.layers.10.norm_a", "out_norm")
FLOATS = [column.name for column in formulas.columns() if column.dtype == "float64"]
PLAIN = {column.name: None for column in formulas.columns()} | {"call": 0, "d": 16, "n_tokens": 32, "norm": "layernorm"}


def call(*words: object) -> str:
    """What the command prints; it must succeed."""
    done = RUNNER.invoke(cli.app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def norms(run: Record, act: str, seed: int, step: int) -> None:
    rows = [PLAIN | {"site": site} | {name: noise(act, seed, step, site, name) for name in FLOATS} for site in SITES]
    run.layers([row | {"undeclared": step} for row in rows], step)


def recorded(folder: Path, fill: Callable[[Record, str, int], None], **more: Any) -> Path:
    """Merge six runs, three seeds of each activation."""
    for act in ("relu", "tanh"):
        for seed in (1, 2, 3):
            with lnjac.record(
                folder / "runs" / f"{act}{seed}", config={"act": act, "width": 8}, seed=seed, **more
            ) as run:
                fill(run, act, seed)
    lnjac.merge(folder / "runs", folder / "all.parquet")
    return folder / "all.parquet"


def with_norms(run: Record, act: str, seed: int) -> None:
    for step in (1, 2):
        run.scalars(step, train_loss=1 + noise(act, seed, step), grad_norm=0.5)
        norms(run, act, seed, step)
    run.scalars(2, val_loss=1 + noise(act, seed))
    run.describe(accuracy=noise(seed))


def scalars_alone(run: Record, act: str, seed: int) -> None:
    for step in (1, 2):
        run.scalars(step, train_loss=1 + noise(act, seed, step))


def only_evaluated(run: Record, act: str, seed: int) -> None:
    run.scalars(2, val_loss=1 + noise(act, seed))


OWN = {"runs": [Column("accuracy", "float64", "", "share of right answers")]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("whole"), with_norms, tables=OWN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("plain"), scalars_alone)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("evaluated"), only_evaluated)


def test_compare_pairs_by_seed_in_the_models_own_order(whole: Path) -> None:
    lines = call("compare", whole, "--by", "act", "--metric", "radial_share").splitlines()
    rows = lines[lines.index("radial_share") + 2 :]  # below the answer in words, the title and the heads
    assert [line.split()[0] for line in rows[:3]] == list(SITES)
    found = lnjac.compare(whole, "act", metrics=["accuracy"], table="runs")
    assert found.rows["difference"].tolist() == [0.0]
    assert found.rows["n"].tolist() == [3]


def test_compare_of_runs_without_norms_leads_to_their_losses(plain: Path) -> None:
    done = RUNNER.invoke(cli.app, ["compare", str(plain), "--by", "act"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == "no norm of these runs was measured: compare their losses by --runs"
    assert "train_loss_nats\n" in call("compare", plain, "--by", "act", "--runs", "--metric", "train_loss_nats")


@pytest.mark.parametrize("options", [(), ("--runs",)])
def test_different_ends_are_said(options: tuple[str, ...], tmp_path: Path) -> None:
    def fill(run: Record, act: str, seed: int) -> None:
        for step in range(1, 3 if act == "relu" else 5):
            run.scalars(step, train_loss=1.0 + noise(act, seed, step))
            norms(run, act, seed, step)

    said = call("compare", recorded(tmp_path, fill), "--by", "act", *options)
    assert "- runs of one comparison ended at different steps: act=relu 3 at 2, act=tanh 3 at 4" in said


def test_a_level_that_is_the_number_of_steps_tells_it(tmp_path: Path) -> None:
    for steps in (2, 4):
        for seed in (1, 2):
            with lnjac.record(tmp_path / f"{steps}-{seed}", config={"max_iters": steps}, seed=seed) as run:
                for step in range(1, steps + 1):
                    run.scalars(step, train_loss=noise(seed, step))
    assert "different steps" not in call("compare", tmp_path, "--by", "max_iters", "--runs")


def test_a_diverged_run_is_counted_and_left_out(tmp_path: Path) -> None:
    def fill(run: Record, act: str, seed: int) -> None:
        with_norms(run, act, seed)
        if (act, seed) == ("tanh", 2):
            run.scalars(3, train_loss=math.nan)

    merged = recorded(tmp_path, fill)
    assert "1 runs diverged, left out of every mean: act=tanh 1 of 3" in call(
        "compare", merged, "--by", "act", "--runs"
    )
    assert "diverged at step 3" in call("show", tmp_path / "runs" / "tanh2")


def test_cost_says_which_column_it_needs(whole: Path) -> None:
    done = RUNNER.invoke(cli.app, ["cost", str(whole)])
    assert isinstance(done.exception, ConfigError)
    assert "these runs have no ln_backward" in str(done.exception)
    assert "`lnjac compare --runs`" in str(done.exception)


def test_cost_of_a_backward_that_a_loop_recorded(tmp_path: Path) -> None:
    for backward in ("exact", "center_scale"):
        for seed in (1, 2):
            config = {"ln_backward": backward}
            with lnjac.record(tmp_path / f"{backward}{seed}", config=config, seed=seed) as run:
                run.scalars(1, val_loss=1.0 + (backward != "exact"))
    assert lnjac.cost(tmp_path).costs.rows["difference"].tolist() == [1.0]


def test_scaling_by_a_key_of_the_config(tmp_path: Path) -> None:
    for width in (2, 4, 8):
        for seed in (1, 2):
            with lnjac.record(tmp_path / f"{width}-{seed}", config={"model": {"width": width}}, seed=seed) as run:
                run.scalars(1, val_loss=1 / width)
    said = call("scaling", tmp_path, "--x", "model.width", "--runs", "--metric", "val_loss_nats")
    assert re.search(r"0\.5 +0\.25 +0\.125 +-1 ", said), said


def test_diff_of_tables_without_rows(plain: Path, whole: Path) -> None:
    assert call("diff", plain, plain) == "the same science\n"
    for one, other in ((plain, whole), (whole, plain)):
        done = RUNNER.invoke(cli.app, ["diff", str(one), str(other)])
        assert done.exit_code == 1
        assert "layers: 36 rows only in" in done.stdout


def test_show_names_what_was_recorded(whole: Path, plain: Path, evaluated: Path) -> None:
    head = call("show", whole.parent / "runs" / "relu1").splitlines()[0]
    parts = head.split(" | ")
    assert [parts[0], parts[1], parts[3]] == ["act=relu width=8 seed=1", "done", f"accuracy={noise(1)}"]
    assert re.fullmatch(r"val loss 1\.\d+ nats/token", parts[2])
    said = call("show", plain.parent / "runs" / "relu1")
    assert re.search(r"\| done \| val loss -, train loss 1\.\d+ nats/token\nno norms were measured", said)
    assert re.search(r"\| done \| val loss 1\.\d+ nats/token\n", call("show", evaluated.parent / "runs" / "relu1"))


def test_plot_lists_what_these_runs_can_show(whole: Path, plain: Path, evaluated: Path) -> None:
    pytest.importorskip("altair", reason="needs the extra [report]")
    shown = dict(line.split(None, 1) for line in call("plot", whole).splitlines())
    assert shown["cost"] == "not shown: these runs have no column ln_backward"
    assert shown["scaling-width"] == "not shown: these runs have no column model.n_embd"
    assert not shown["depth"].startswith("not shown")
    for merged in (plain, evaluated):
        lines = call("plot", merged)
        assert re.search(r"heatmap +not shown: no norm of these runs was measured\n", lines)
        assert "run.py" not in lines


def test_a_report_shows_what_applies(
    whole: Path, plain: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("altair", reason="needs the extra [report]")
    monkeypatch.setattr("lnjac.reporting.page._bundle", lambda: "window.vegaEmbed = null;")
    page = tmp_path / "page.html"
    sections = {}
    for name, merged in {"whole": whole, "plain": plain, "evaluated": evaluated}.items():
        made = lnjac.report(merged, output=page)
        sections[name] = set(made.sections)
        assert "run.py" not in made.html
        terms = re.findall(r"<dt>(.*?)</dt>", made.html)
        assert {"act", "seed", "lnjac_version"} <= {*terms}
        assert not {"unigram_nats", "device", "data_sha256"} & {*terms}
    assert sections == {
        "whole": {"Comparison", "Layers", "Learning"},
        "plain": {"Comparison", "Learning"},
        "evaluated": {"Comparison"},
    }


def test_load_run_opens_another_loops_run(whole: Path) -> None:
    run = lnjac.load_run(whole.parent / "runs" / "relu1")
    assert run.config == {"act": "relu", "width": 8, "seed": 1}
    assert not run.ours
    assert (len(run.layers), len(run.run), len(run.curve)) == (6, 1, 2)
    assert run.curve["grad_norm"].tolist() == [0.5, 0.5]
    for missing in (run.model, run.diagnostic_batch):
        with pytest.raises(
            ConfigError, match=r"a loop of your own, of which lnjac keeps no .*: load it as your"
        ) as caught:
            missing()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"has no table swaps, but .*: record\(…, tables=…\) adds tables"):
        run.table("swaps")


def test_runs_of_ours_and_of_another_loop_are_merged_apart(whole: Path, tmp_path: Path) -> None:
    ours = make_run(tmp_path / "ours")
    lnjac.merge(ours, tmp_path / "ours.parquet")
    out = tmp_path / "mixed.parquet"
    for one, other in ((ours, whole.parent / "runs"), (tmp_path / "ours.parquet", whole)):
        with pytest.raises(
            ConfigError, match=r"1 runs are of lnjac's own trainer, such as .*, and 6 of another loop, such as"
        ):
            lnjac.merge([one, other], out)
    assert not out.exists()


def test_the_code_is_that_of_the_script(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path | None] = []

    def provenance(folder: Path | None = None) -> dict[str, Any]:
        asked.append(folder)
        return {"commit": "abc", "dirty": False, "python_version": "3"}

    monkeypatch.setattr(runs, "provenance", provenance)
    monkeypatch.setattr("__main__.__file__", str(tmp_path / "train.py"), raising=False)
    with lnjac.record(tmp_path / "a", config={}, seed=1):
        pass
    assert asked[-1] == tmp_path
    (row,) = pd.read_parquet(tmp_path / "a" / "run.parquet").to_dict("records")
    assert (row["commit"], row["lnjac_version"]) == ("abc", lnjac.__version__)
