"""Runs that begin where a finished one ended: their rows against those of runs trained in one go, to the last bit."""

from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.small import SMALL, corpus

import lnjac
from lnjac.columns import VOLATILE
from lnjac.config.compose import compose
from lnjac.runs import folder as runs
from lnjac.runs.merge import merge
from lnjac.runs.schema import FROZEN, with_role
from lnjac.training import loop
from lnjac.training import run as train

pytestmark = pytest.mark.slow

TINY = (*SMALL, "model.n_layer=1", "diagnostics.swap_parts=model")
STATE = "keep_state=true"


def made(folder: Path, *words: str, reuse: Path | None = None, status: str = runs.DONE) -> lnjac.Run:
    assert train.run(compose(*TINY, *words), folder, corpus(), reuse=reuse) == status
    return lnjac.load_run(folder)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The updates made from now on, each by its number."""
    numbers, update = [], loop.Training.update

    def counted(self: loop.Training) -> float:
        numbers.append(self.updates)
        return update(self)

    monkeypatch.setattr(loop.Training, "update", counted)
    return numbers


def assert_same_rows(one: lnjac.Run, other: lnjac.Run) -> None:
    """All tables of both are the same, to the last bit and but for volatile columns, and so are their weights."""
    tables = [sorted(file for file in run.status["sha256"] if file.endswith(".parquet")) for run in (one, other)]
    assert tables[0] == tables[1]
    volatile = with_role(VOLATILE, FROZEN["runs"])
    for file in tables[0]:
        names = {known: name for name, known in runs.FILES.items()}
        frames = [run.table(names.get(file, file.removesuffix(".parquet"))) for run in (one, other)]
        frames = [frame.drop(columns=[name for name in volatile if name in frame]) for frame in frames]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    notes = [run.read("layers")[1].get("coverage") for run in (one, other)]
    assert notes[0] == notes[1]
    for mine, theirs in zip(one.diagnostic_batch(), other.diagnostic_batch(), strict=True):
        assert torch.equal(mine, theirs)
    for name, value in one.model().state_dict().items():
        assert torch.equal(value, other.model().state_dict()[name]), name


@pytest.mark.parametrize(("trained", "measured"), [
    (["diagnostics=final", STATE], ["diagnostics=full"]),
    (["diagnostics=final", STATE], ["diagnostics=swap", STATE]),
    (["diagnostics=final"], ["diagnostics=full", "diagnostics.swap=false"]),
    (["diagnostics=final"], ["diagnostics.batches=3", "diagnostics.split=val"]),
    (["diagnostics=trajectory", "method=brsf"], ["diagnostics=alignment"]),
    (["diagnostics=off"], ["diagnostics.schedule=list", "diagnostics.steps=[0]", "diagnostics.feedback_draws=2"]),
    (["diagnostics=swap"], ["diagnostics=off"]),
    (["optimizer=sgd", "optimizer.momentum=0.9", STATE], ["optimizer=sgd", "optimizer.momentum=0.9", "diagnostics=swap"]),
    (["model.tie=true", "method=bp", "precision=fp64"], ["model.tie=true", "method=bp", "precision=fp64",
                                                        "diagnostics=attention"]),
])  # fmt: skip
def test_another_diagnostic_of_a_finished_run_trains_nothing(
    trained: list[str], measured: list[str], tmp_path: Path, updates: list[int]
) -> None:
    both = ["steps=4", "eval.every=2", "model.dropout=0.1"]
    if trained[-1] == "method=brsf":
        measured = [*measured, "method=brsf"]
    whole = made(tmp_path / "whole", *both, *measured)
    source = made(tmp_path / "source", *both, *trained)
    updates.clear()
    again = made(tmp_path / "again", *both, *measured, reuse=tmp_path / "source")
    assert updates == []
    assert again.run["resumed_at"].tolist() == [4]
    assert again.run["train_s"][0] == source.run["train_s"][0]
    if "diagnostics=off" in measured:
        assert again.run["diagnostics_s"][0] < 0.1 * source.run["diagnostics_s"][0]
    assert_same_rows(again, whole)
    kept = made(tmp_path / "source", *both, *trained)  # found as it was
    assert kept.status == source.status


@pytest.mark.parametrize("words", [
    ["optimizer.warmup_steps=3", "optimizer.grad_clip=0.5", "diagnostics=trajectory"],
    ["method=kp", "diagnostics=swap"],
    ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "diagnostics.schedule=list", "diagnostics.steps=[10,20]",
     "diagnostics.feedback_draws=2"],
])  # fmt: skip
def test_a_finished_run_is_continued_bit_for_bit(words: list[str], tmp_path: Path, updates: list[int]) -> None:
    """The step at which it ended is measured by one of these schedules, and validated by none."""
    both = [*words, "eval.every=7", "model.dropout=0.2", STATE]
    whole = made(tmp_path / "whole", *both, "steps=40")
    short = made(tmp_path / "short", *both, "steps=20")
    updates.clear()
    longer = made(tmp_path / "longer", *both, "steps=40", reuse=tmp_path / "short")
    assert updates == [*range(20, 40)]
    assert longer.run["resumed_at"].tolist() == [20]
    assert_same_rows(longer, whole)
    assert (20 in longer.layers["step"].tolist()) == ("diagnostics.steps=[10,20]" in words)
    assert [pd.isna(run.curve.set_index("step")["val_loss_nats"][20]) for run in (longer, short)] == [True, False]


def test_the_norms_states_are_taken_over(tmp_path: Path) -> None:
    """They would be lost where the continued run diverges before it is measured."""
    words = ["diagnostics=trajectory", STATE]
    short, config = made(tmp_path / "short", *words), compose(*TINY, *words, "steps=4")
    with suppress(KeyboardInterrupt), train.opened(config, tmp_path / "longer", corpus()) as record:
        assert train.begin(config, corpus(), record, tmp_path / "short").updates == 3
        assert record.coverage == dict.fromkeys(short.layers["site"], "measured")
        raise KeyboardInterrupt


def test_a_run_is_continued_with_another_diagnostic(tmp_path: Path, updates: list[int]) -> None:
    """Where it ended and at step 0 it is measured anew, as what the finished run measured there is another thing."""
    full = ["diagnostics=full", "diagnostics.schedule=list", "diagnostics.steps=[0,4]", "diagnostics.feedback_draws=2"]
    made(tmp_path / "short", "steps=4", "diagnostics=trajectory", STATE)
    whole = made(tmp_path / "whole", "steps=6", *full)
    updates.clear()
    longer = made(tmp_path / "longer", "steps=6", *full, reuse=tmp_path / "short")
    assert updates == [4, 5]
    assert sorted(set(longer.layers["step"])) == [0, 4, 6]
    assert_same_rows(longer, whole)


def test_a_continued_run_can_be_interrupted_and_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model.dropout=0.1", "diagnostics=trajectory", "checkpoint.every=0", STATE]
    whole = made(tmp_path / "whole", *words, "steps=8")
    made(tmp_path / "short", *words, "steps=3")
    update = loop.Training.update

    def until(self: loop.Training) -> float:
        if self.updates == 6:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "update", until)
        with pytest.raises(KeyboardInterrupt):
            train.run(compose(*TINY, *words, "steps=8"), tmp_path / "cut", corpus(), reuse=tmp_path / "short")
    cut = made(tmp_path / "cut", *words, "steps=8", reuse=tmp_path / "short")
    assert cut.run["resumed_at"].tolist() == [6]
    assert_same_rows(cut, whole)
    swap = ["model.dropout=0.1", "diagnostics=swap", "steps=8"]
    assert_same_rows(
        made(tmp_path / "again", *swap, reuse=tmp_path / "cut"), made(tmp_path / "trained", *swap)
    )  # fmt: skip


def test_an_interrupted_analysis_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: list[int]
) -> None:
    made(tmp_path / "source")
    updates.clear()
    steps = ["diagnostics=alignment", "diagnostics.schedule=list", "diagnostics.steps=[0]"]

    def interrupted(self: loop.Training) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "diagnose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(compose(*TINY, *steps), tmp_path / "again", corpus(), reuse=tmp_path / "source")
    assert runs.read_status(tmp_path / "again")["status"] == runs.INTERRUPTED
    again = made(tmp_path / "again", *steps, reuse=tmp_path / "source")
    assert updates == []
    assert not (tmp_path / "again" / runs.JOURNAL).exists()
    assert_same_rows(again, made(tmp_path / "whole", *steps))


@pytest.mark.parametrize("state", [[], [STATE]])
def test_a_diverged_run_is_measured_again_where_it_was_measured(
    state: list[str], tmp_path: Path, updates: list[int]
) -> None:
    wild = ["optimizer=sgd", "optimizer.lr=1e30", "steps=50", "method=bp", *state]
    full = ["diagnostics=full", "diagnostics.schedule=list", "diagnostics.steps=[0]"]
    made(tmp_path / "source", *wild, status=runs.DIVERGED)
    whole = made(tmp_path / "whole", *wild, *full, status=runs.DIVERGED)
    updates.clear()
    again = made(tmp_path / "again", *wild, *full, reuse=tmp_path / "source", status=runs.DIVERGED)
    assert updates == []
    assert again.status["step"] == whole.status["step"]
    assert_same_rows(again, whole)


def test_both_runs_merge_with_equal_science(tmp_path: Path) -> None:
    made(tmp_path / "runs" / "a", "eval.every=1")
    made(tmp_path / "runs" / "b", "eval.every=1", "diagnostics=alignment", reuse=tmp_path / "runs" / "a")
    merge([tmp_path / "runs"], tmp_path / "all.parquet")
    table = pd.read_parquet(tmp_path / "all.runs.parquet")
    assert table["run_id"].nunique() == 1
    assert table["diag_id"].nunique() == 2
    assert sorted(table["resumed_at"]) == [0, 3]
    assert len(pd.read_parquet(tmp_path / "all.curves.parquet")) == 4


REFUSED = {
    "swap of weights alone": (
        [], ["diagnostics=swap"],
        "swaps need the optimizer's state, which the finished runs do not hold: runs made with keep_state=true keep it",
    ),
    "a trajectory": (
        [STATE], ["diagnostics=trajectory"],
        "diagnostics.schedule=log measures at step 1, before the end of the finished runs (step 3), which only training "
        "passes through: diagnostics.schedule=final trains nothing",
    ),
    "no weights": (
        ["save_model=false"], ["diagnostics=alignment"],
        "the finished runs hold no weights: runs made with save_model=true keep them",
    ),
    "a state to keep": (
        [], ["diagnostics=alignment", STATE],
        "keep_state=true asks for the optimizer's state, which the finished runs do not hold: runs made with keep_state=true "
        "keep it",
    ),
    "continued from weights alone": (
        [], ["steps=5"],
        "finished runs of steps=3 cannot be continued without the optimizer's state: runs made with keep_state=true keep it",
    ),
    "another schedule": (
        [STATE, "optimizer.decay=cosine"], ["steps=5", "optimizer.decay=cosine"],
        "finished runs of steps=3 had other learning rates, as their schedule depends on steps: runs with "
        "optimizer.decay=constant can be continued",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_a_folder_does_not_hold_is_trained_and_said(
    case: str, tmp_path: Path, updates: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    trained, asked, said = REFUSED[case]
    made(tmp_path / "source", *trained)
    updates.clear()
    again = made(tmp_path / "again", *asked, reuse=tmp_path / "source")
    assert updates == [*range(len(updates))]
    assert again.run["resumed_at"].tolist() == [0]
    assert f"{said}; it is trained from the start" in caplog.text


@pytest.mark.parametrize("file", [runs.MODEL, runs.CHECKPOINT, "curve.parquet"])
def test_a_damaged_source_is_named_and_not_used(
    file: str, tmp_path: Path, updates: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path / "source", *([STATE] if file == runs.CHECKPOINT else []))
    content = bytearray((tmp_path / "source" / file).read_bytes())
    content[-20] ^= 1
    (tmp_path / "source" / file).write_bytes(content)
    updates.clear()
    made(tmp_path / "again", "diagnostics=alignment", reuse=tmp_path / "source")
    assert updates == [0, 1, 2]
    assert f"{tmp_path / 'source'} is damaged: {file} " in caplog.text


def test_a_source_that_is_damaged_after_it_was_chosen_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path / "source")
    choose = train.kept.choose

    def then_damaged(*args: object) -> object:
        start = choose(*args)  # type: ignore[arg-type]
        (tmp_path / "source" / runs.MODEL).write_bytes(b"")
        return start

    monkeypatch.setattr(train.kept, "choose", then_damaged)
    updates.clear()
    made(tmp_path / "again", "diagnostics=alignment", reuse=tmp_path / "source")
    assert updates == [0, 1, 2]
    assert "is not used, the run is trained from the start" in caplog.text


def test_the_source_with_the_most_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path / "a", "diagnostics.batches=2")
    made(tmp_path / "b", "diagnostics.batches=3", STATE)
    made(tmp_path / "c", "diagnostics.batches=4", STATE)
    caplog.set_level("INFO")
    made(tmp_path / "d", "diagnostics=alignment", reuse=tmp_path)
    assert f"begins from {tmp_path / 'b'} after update 3: nothing is trained" in caplog.text
    made(tmp_path / "e", "steps=4", "diagnostics.batches=4", reuse=tmp_path)  # the measurements may be taken over
    assert f"begins from {tmp_path / 'c'} after update 3: 1 updates are left" in caplog.text
    (tmp_path / "b" / runs.CHECKPOINT).unlink()
    made(tmp_path / "f", "diagnostics=swap", reuse=tmp_path)
    assert f"begins from {tmp_path / 'c'} after update 3: nothing is trained" in caplog.text


def test_the_same_run_elsewhere_is_made_anew(tmp_path: Path, updates: list[int]) -> None:
    made(tmp_path / "a")
    made(tmp_path / "b", reuse=tmp_path)
    assert updates == [0, 1, 2, 0, 1, 2]


def test_other_means_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        code = train._code()
        patch.setattr(train, "_code", lambda: code | {"torch_version": "2.0"})
        made(tmp_path / "a")
    made(tmp_path / "b", "diagnostics=alignment", reuse=tmp_path)
    version = torch.__version__
    assert (
        f"its digits may differ from those of a run made here: it was made with torch_version 2.0, here {version}"
        in caplog.text
    )
