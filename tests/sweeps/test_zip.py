"""Values that move together: crossed with all else, checked before anything starts, for any script."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.errors import CompactHydraException
from support.own_script import app, sweep, train
from support.sweeping import sweeper_of

PAIRS = "zip=[{model.n_embd:64,optimizer.lr:3e-3},{model.n_embd:128,optimizer.lr:1e-3}]"


def jobs(*words: str) -> list[list[str]]:
    """The words of each job, as their user typed them."""
    sweeper = sweeper_of(*words)
    composer = sweeper._composer()
    return [[composer.typed(word) for word in job] for job in sweeper._grid(sweeper.config.hydra.overrides.task)]


def test_zipped_values_are_one_factor_of_the_product() -> None:
    assert jobs(PAIRS, "seed=1,2", "steps=3") == [
        [f"seed={seed}", "steps=3", *pair]
        for seed in (1, 2)
        for pair in (["model.n_embd=64", "optimizer.lr=0.003"], ["model.n_embd=128", "optimizer.lr=0.001"])
    ]
    assert jobs("seed=1,2") == [["seed=1"], ["seed=2"]]


def test_zipped_values_of_any_kind_are_the_values_that_were_given() -> None:
    words = "zip=[{attn_mode:sigmoid,ln_backward.sites:[ln_1,'1e3'],eval.every:null,data.dir:'12, 3'}]"
    (job,) = jobs("seed=1", words)
    assert job[1:] == ["attn_mode=sigmoid", "ln_backward.sites=[ln_1,'1e3']", "eval.every=null", "data.dir='12, 3'"]


def test_an_experiment_may_zip_beside_its_params(add_experiment: Any) -> None:
    add_experiment(
        "zip: [{model.n_embd: 32, steps: 10}, {model.n_embd: 64, steps: 20}]\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n"
    )
    assert [job[-2:] for job in jobs("+experiment=mine")] == [
        ["model.n_embd=32", "steps=10"],
        ["model.n_embd=64", "steps=20"],
    ] * 2
    (one, other) = jobs("+experiment=mine", "zip=[{steps:5}]")
    assert (one[-2:], other[-2:]) == (["+experiment=mine", "steps=5"],) * 2


def test_a_typed_zip_that_an_experiments_own_would_silence_is_refused(add_experiment: Any) -> None:
    add_experiment("hydra: {mode: MULTIRUN, sweeper: {zip: [{steps: 10}, {steps: 20}], params: {seed: '1,2'}}}\n")
    assert [job[-1] for job in jobs("+experiment=mine")] == ["steps=10", "steps=20"] * 2
    for words, said in (
        (
            ("zip=[{steps:5}]",),
            r"zip=\[\{steps:5\}\] has no effect, since hydra.sweeper.zip is set too.*: write hydra.sweeper.zip",
        ),
        (
            ("hydra.sweeper.dry_run=true", "dry_run=false"),
            "dry_run=false has no effect, since hydra.sweeper.dry_run is set",
        ),
    ):
        with pytest.raises(CompactHydraException, match=said):
            sweeper_of("+experiment=mine", *words)._folder()
    sweeper_of("+experiment=mine", "hydra.sweeper.zip=[{steps:5}]", "steps=3")._folder()


@pytest.fixture
def add_experiment(add_member: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def add(text: str) -> None:
        from support import sweeping

        from lnjac.config import compose

        add_member("experiment", f"# @package _global_\n{text}", "mine")
        monkeypatch.setattr(sweeping, "CONF", compose.CONF)

    return add


@pytest.mark.parametrize(("words", "said"), [
    (["zip=3"], "zip=3 is no list of mappings: write zip=[{A:1,B:2},{A:3,B:4}], with an entry for each pair of values"),
    (["zip=[]"], "zip=[] is no list of mappings"),
    (["zip=[{}]"], "zip=[{}] is no list of mappings"),
    (["zip=[{a:1,b:2},{a:3}]"], "entry 2 of zip gives a, the first gives a, b: give the same keys in each"),
    (["zip=[{seed:1}]", "seed=2"], "seed is given among the zipped values and by itself: give it in one place"),
    ([PAIRS, "optimizer.lr=1,2"], "optimizer.lr is given among the zipped values and by itself"),
    (["zip=[{sweep:a},{sweep:b}]"], "sweep belongs to the sweep as a whole and cannot take several values"),
    (["zip=[{a:1}],[{a:2}]"], "zip belongs to the sweep as a whole and cannot take several values"),
])  # fmt: skip
def test_what_cannot_be_zipped_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(CompactHydraException) as error:
        jobs(*words)
    assert str(error.value).startswith(said)


@pytest.mark.slow
def test_a_script_of_ones_own_zips(tmp_path: Path) -> None:
    folder = app(tmp_path)
    words = ("hydra.sweeper.zip=[{model.steps:2,lr:0.5},{model.steps:4,lr:0.25}]", "seed=1,2", "hydra.launcher.jobs=1")
    done = sweep(folder, *words)
    assert done.returncode == 0, done.stderr
    found = pd.read_parquet(folder / "multirun/A/all.runs.parquet")
    assert sorted(zip(found["model.steps"], found["lr"], found["seed"], strict=True)) == [
        (2, 0.5, 1), (2, 0.5, 2), (4, 0.25, 1), (4, 0.25, 2),
    ]  # fmt: skip
    assert "4 jobs: 0 to do (4 done)" in sweep(folder, *words).stdout
    refused = sweep(folder, "hydra.sweeper.zip=[{model.steps:2,lr:-1},{model.steps:4,lr:1}]", "seed=1")
    assert "1 of 2 jobs cannot run; none was started" in refused.stderr
    assert "lr=-1 must be positive" in refused.stderr
    single = train(folder, "hydra.sweeper.zip=[{lr:1}]")
    assert single.stderr.startswith(
        "hydra.sweeper.zip=[{lr:1}] gives values of a sweep, but this command makes a single"
    )
