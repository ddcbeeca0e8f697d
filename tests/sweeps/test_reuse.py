"""Sweeps and single runs that begin from finished runs: what their plan says, and that nothing is computed twice."""

from pathlib import Path

import pandas as pd
import pytest
from hydra.errors import CompactHydraException
from support.commands import TINY, command
from support.sweeping import science, sweeper_of

from lnjac.cli.starts import searched
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.sweeps import jobs as of_jobs

STEPS = 4
SIX = (*TINY, "attn_mode=softmax,sigmoid", "seed=1,2,3")


def plan(folder: Path, *words: str) -> tuple[list[str], list[str]]:
    """How each job of these words would begin in a sweep's folder, and what is said of it."""
    sweeper = sweeper_of(*words)
    jobs = sweeper._admitted(sweeper._grid(list(words)), folder)
    notes = sweeper._find_starts(jobs, folder)
    return [job.start.kind for job in jobs], notes


@pytest.mark.slow
def test_another_diagnostic_of_a_sweep_trains_nothing(tmp_path: Path) -> None:
    words = ("-m", *SIX, "sweep=A")
    assert command(*words, cwd=tmp_path).returncode == 0
    full = (*words, "diagnostics=full", "diagnostics.swap=false")
    dry = command(*full, "dry_run=true", cwd=tmp_path)
    assert "6 jobs: 6 to do: analyse 6, train 0\n" in dry.stdout
    assert dry.stdout.count(f"after update {STEPS}") == 6
    done = command(*full, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 jobs: 6 to do: analyse 6, train 0\n" in done.stdout
    merged = pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")
    assert sorted(merged["diagnostics"]) == ["final"] * 6 + ["full"] * 6
    assert set(merged.loc[merged["diagnostics"] == "full", "resumed_at"]) == {STEPS}
    (finals, fulls) = (frame.set_index("run_id")["val_loss_nats"] for _, frame in merged.groupby("diagnostics"))
    assert fulls.to_dict() == finals.to_dict()
    more = command(*full, "seed=1,2,3,4", "attn_mode=softmax", "diagnostics.batches=2", "dry_run=true", cwd=tmp_path)
    assert "4 jobs: 4 to do: analyse 3, train 1\n" in more.stdout


@pytest.mark.slow
def test_a_sweep_continues_its_finished_runs(tmp_path: Path) -> None:
    """With one of Hydra's own launchers, whose jobs are told by words."""
    words = ("-m", *TINY, "keep_state=true", "hydra/launcher=basic")
    assert command(*words, "sweep=A", cwd=tmp_path).returncode == 0
    done = command(*words, "steps=4,6", "sweep=A", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 1 to do (1 done): analyse 0, continue 1, train 0\n" in done.stdout
    assert command(*words, "steps=4,6", "sweep=B", cwd=tmp_path).returncode == 0
    for one, two in zip(*(science(tmp_path / f"multirun/{name}/all.parquet") for name in "AB"), strict=True):
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    merged = pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")
    assert dict(zip(merged["steps"], merged["resumed_at"], strict=True)) == {4: 0, 6: 4}


@pytest.mark.slow
def test_a_single_run_begins_from_one_in_outputs(tmp_path: Path) -> None:
    assert command(*TINY, cwd=tmp_path).returncode == 0
    (source,) = (path.parent for path in tmp_path.glob(f"outputs/*/*/{runs.STATUS}"))
    begun = f"outputs/{source.relative_to(tmp_path / 'outputs')} after update {STEPS}"
    dry = command(*TINY, "diagnostics=alignment", "dry_run=true", cwd=tmp_path)
    assert f"dry_run: the config is sound; it would analyse {begun}; nothing was started" in dry.stdout
    done = command(*TINY, "diagnostics=alignment", cwd=tmp_path)
    assert f"begins from {begun}: nothing is trained" in done.stdout
    swap = command(*TINY, "diagnostics=swap", "dry_run=true", cwd=tmp_path)
    assert "keep_state=true keep it: it would be trained from the start; nothing was started" in swap.stdout
    named = command(*TINY, "diagnostics=attention", "hydra.run.dir=other", f"reuse={source}", cwd=tmp_path)
    assert f"begins from {source} after update {STEPS}" in named.stdout
    wrong = command(*TINY, "reuse=nowhere", cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.endswith("\nreuse=nowhere is no folder: give one that holds finished runs, or auto, or off\n")


@pytest.mark.slow
def test_a_plan_tells_what_cannot_be_reused_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*TINY, "seed=1,2", "sweep=A")
    assert command("-m", *words, cwd=tmp_path).returncode == 0
    monkeypatch.chdir(tmp_path)
    sweep = Path("multirun/A")
    assert plan(sweep, *words, "diagnostics=swap") == (["train", "train"], [
        "2 of these are trained from the start: swaps need the optimizer's state, which the finished runs do not hold: "
        "runs made with keep_state=true keep it"
    ])  # fmt: skip
    assert plan(sweep, *words, "diagnostics=alignment", "reuse=off") == (["train", "train"], [])
    assert plan(sweep, *words, "diagnostics=alignment") == (["analyse", "analyse"], [])
    folder = next(iter(sorted(sweep.glob(f"*/{runs.MODEL}")))).parent
    (folder / runs.MODEL).write_bytes(b"")
    kinds, notes = plan(sweep, *words, "diagnostics=alignment", "threads=2")
    assert sorted(kinds) == ["analyse", "train"]
    assert notes == [
        f"1 of these is trained from the start: {folder} is damaged: {runs.MODEL} was altered: its SHA-256 differs from "
        f"{runs.STATUS}'s",
        "1 of these is begun from runs made with threads 1, here 2: digits may differ from those of runs made here",
    ]
    with pytest.raises(CompactHydraException, match="reuse=nowhere is no folder"):
        plan(sweep, *words, "reuse=nowhere")


@pytest.mark.parametrize(("words", "said"), [
    (["steps=2,3,4", "seed=1,2"],
     ["4 of these would train beginnings of others again: steps=4 diagnostics.schedule=list 'diagnostics.steps=[2,3]' "
      "measures the norms at steps 2,3 of one run, and eval.every=1 its validation losses"]),
    (["steps=10,20", "optimizer.decay=constant,cosine"],
     ["1 of these would train beginnings of others again: steps=20 diagnostics.schedule=list 'diagnostics.steps=[10]' "
      "measures the norms at steps 10 of one run, and eval.every=10 its validation losses"]),
    (["steps=2,3", "diagnostics=trajectory"], []),
    (["steps=0,4", "seed=1"], []),
    (["seed=1,2"], []),
])  # fmt: skip
def test_beginnings_of_one_run_are_pointed_out(words: list[str], said: list[str], tmp_path: Path) -> None:
    kinds, notes = plan(tmp_path, "model=tiny", *words)
    assert set(kinds) == {"train"}
    assert notes == said


def test_how_jobs_begin_in_words(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    sweeper = sweeper_of("model=tiny")
    jobs = sweeper._admitted([["seed=1"], ["seed=2"]], tmp_path)
    of_jobs.say(jobs, jobs, retry=None)
    assert caplog.messages[-1] == "2 jobs: 2 to do"
    jobs[0].start = of_jobs.Start({}, tmp_path, 100, 150)
    of_jobs.say(jobs, jobs, retry=None)
    assert caplog.messages[-1] == "2 jobs: 2 to do: analyse 0, continue 1, train 1"


def test_where_finished_runs_are_looked_for(tmp_path: Path) -> None:
    assert searched("auto", tmp_path) == tmp_path
    assert searched("auto", None) is None
    assert [searched(off, tmp_path) for off in ("off", False, None)] == [None] * 3
    assert searched(str(tmp_path), None) == tmp_path
    with pytest.raises(ConfigError, match="is no folder"):
        searched(tmp_path / "nosuch", tmp_path)
