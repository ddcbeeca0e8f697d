"""Runs that diverge, fail, are interrupted or find another's files: what they keep, and how they go on."""

import math
import sys
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.small import SMALL, corpus, finished

import lnjac
from lnjac.config.compose import compose
from lnjac.errors import ConfigError
from lnjac.files import file_sha256
from lnjac.runs import folder as runs
from lnjac.runs import state as plan
from lnjac.runs.record import Record
from lnjac.training import checkpoint, loop
from lnjac.training import run as train

pytestmark = pytest.mark.slow


def test_a_diverging_run_stops_and_keeps_what_it_has(tmp_path: Path) -> None:
    wild = compose(*SMALL, "optimizer=sgd", "optimizer.lr=1e30", "diagnostics=trajectory", "steps=50", "method=bp")
    assert train.run(wild, tmp_path, corpus()) == runs.DIVERGED
    status = runs.read_status(tmp_path)
    run = lnjac.load_run(tmp_path)
    step = int(run.run["diverged_step"][0])
    assert (status["status"], status["step"]) == ("diverged", step)
    assert status["run_id"] == run.run["run_id"][0]
    assert 0 < step < 50
    assert run.curve["step"].max() == step
    assert math.isfinite(run.curve["train_loss_nats"].iloc[-1])
    assert 0 in run.layers["step"].tolist()
    assert pd.isna(run.run["val_loss_nats"][0])


def test_a_failing_run_says_why_and_leaves_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> float:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(loop.Training, "update", broken)
    with pytest.raises(RuntimeError):
        train.run(compose(*SMALL), tmp_path, corpus())
    assert runs.read_status(tmp_path)["status"] == "failed"
    assert "disk is on fire" in runs.read_status(tmp_path)["error"]
    assert "in broken" in runs.read_status(tmp_path)["traceback"]
    assert {path.name for path in tmp_path.iterdir()} == {runs.STATUS, runs.LOCK}
    with pytest.raises(ConfigError, match="not a finished run"):
        lnjac.load_run(tmp_path)


def test_a_run_that_names_foreign_code_is_opened_only_on_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    foreign = lnjac.load_run(tmp_path)
    foreign.metadata["config"]["attn_mode"]["_target_"] = "this.Zen"
    with pytest.raises(ConfigError, match="trust=True"):
        _ = foreign.config
    assert "this" not in sys.modules


def test_a_run_leaves_torch_as_it_found_it(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.get_rng_state(), torch.get_num_threads()
    try:
        finished(tmp_path, "threads=1", "model.dropout=0.1")
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.get_num_threads() == before[1]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    run = finished(tmp_path)
    path = tmp_path / runs.MODEL
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not the file that the run wrote"):
        run.model()


def test_a_finished_run_is_not_made_again_and_never_written_over(tmp_path: Path) -> None:
    run = finished(tmp_path, "seed=1")
    before = file_sha256(tmp_path / "run.parquet")
    assert train.run(compose(*SMALL, "seed=1"), tmp_path, corpus()) == runs.DONE
    assert file_sha256(tmp_path / "run.parquet") == before
    with pytest.raises(ConfigError, match="holds another run"):
        train.run(compose(*SMALL, "seed=2"), tmp_path, corpus())
    assert lnjac.load_run(tmp_path).layers.equals(run.layers)
    (tmp_path / "layers.parquet").write_bytes(b"")  # broken: made again
    assert train.run(compose(*SMALL, "seed=1"), tmp_path, corpus()) == runs.DONE
    pd.testing.assert_frame_equal(lnjac.load_run(tmp_path).layers, run.layers)


def test_what_comes_after_the_end_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_say", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(compose(*SMALL), tmp_path, corpus())
    assert lnjac.load_run(tmp_path).status["status"] == runs.DONE
    with suppress(KeyboardInterrupt), train.opened(compose(*SMALL), tmp_path, corpus()) as record:
        assert record.found == runs.DONE
        raise KeyboardInterrupt
    assert lnjac.load_run(tmp_path).status["status"] == runs.DONE


def test_a_status_that_cannot_be_written_frees_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: runs.RunFolder, state: str, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "status", full)
        with pytest.raises(OSError, match="No space"):
            train.run(compose(*SMALL), tmp_path, corpus())
    runs.claimed(tmp_path).release()  # free


def test_anothers_checkpoint_is_never_lost(tmp_path: Path) -> None:
    config = compose(*SMALL, "seed=1")
    with suppress(KeyboardInterrupt), train.opened(config, tmp_path, corpus()) as record:
        train.save(train.begin(config, corpus(), record), record)
        (tmp_path / ".layers.parquet.0123.tmp").write_text("left by a process that was killed")
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="holds another run"):
        train.run(compose(*SMALL, "seed=2"), tmp_path, corpus())
    assert (tmp_path / runs.CHECKPOINT).exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    config = compose(*SMALL)
    with (
        train.opened(config, tmp_path, corpus()),
        pytest.raises(ConfigError, match="being written by another process"),
    ):
        train.run(config, tmp_path, corpus())
    assert train.run(config, tmp_path, corpus()) == runs.DONE


@pytest.mark.parametrize("options", [
    ["method=kp", "optimizer.grad_clip=0.5", "model.dropout=0.2"],
    *(pytest.param(options, marks=pytest.mark.slow) for options in (
        ["method=bp"], ["method=fa", "model.dropout=0.2"], ["method=brsf"], ["method=dfa", "precision=fp64"],
        ["optimizer=sgd", "optimizer.lr=0.5"], ["model.tie=true", "method=bp"], ["method=frozen", "optimizer.decay=cosine"])),
])  # fmt: skip
def test_an_interrupted_run_goes_on_bit_for_bit(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*options, "steps=7", "diagnostics=trajectory", "eval.every=2", "checkpoint.every=0"]
    whole = finished(tmp_path / "whole", *words)
    update, cut = loop.Training.update, tmp_path / "cut"
    for stop in (3, 5):

        def until(self: loop.Training, stop: int = stop) -> float:
            if self.updates == stop:
                raise KeyboardInterrupt
            return update(self)

        monkeypatch.setattr(loop.Training, "update", until)
        with pytest.raises(KeyboardInterrupt):
            train.run(compose(*SMALL, *words), cut, corpus())
        assert runs.read_status(cut)["status"] == runs.INTERRUPTED
    monkeypatch.setattr(loop.Training, "update", update)
    resumed = finished(cut, *words)
    assert (resumed.run["resumed_at"][0], whole.run["resumed_at"][0]) == (5, 0)
    assert not (cut / runs.CHECKPOINT).exists()
    pd.testing.assert_frame_equal(resumed.layers, whole.layers, check_exact=True)
    pd.testing.assert_frame_equal(resumed.curve, whole.curve, check_exact=True)
    for name, value in whole.model().state_dict().items():
        assert torch.equal(value, resumed.model().state_dict()[name]), name


@pytest.mark.parametrize("journal", ["whole", "altered", "missing"])
def test_rows_after_the_checkpoint_are_measured_again(
    journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a checkpoint whose rows are lost is not used."""
    words = ["steps=6", "diagnostics=trajectory", "eval.every=2", "checkpoint.every=0"]
    whole = finished(tmp_path / "whole", *words)
    update, save, cut = loop.Training.update, train.save, tmp_path / "cut"

    def until(self: loop.Training) -> float:
        if self.updates == 5:
            raise KeyboardInterrupt
        return update(self)

    def only_after_two(training: loop.Training, record: Record) -> None:
        if training.updates == 2:
            save(training, record)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "update", until)
        patch.setattr(train, "save", only_after_two)
        with pytest.raises(KeyboardInterrupt):
            train.run(compose(*SMALL, *words), cut, corpus())
    file = cut / runs.JOURNAL
    content = file.read_bytes()
    if journal == "altered":
        file.write_bytes(flipped(content, 8 * 200))
    elif journal == "missing":
        file.unlink()
    resumed = finished(cut, *words)
    assert resumed.run["resumed_at"][0] == (2 if journal == "whole" else 0)
    assert ("the run starts anew" in caplog.text) == (journal != "whole")
    pd.testing.assert_frame_equal(resumed.layers, whole.layers, check_exact=True)
    pd.testing.assert_frame_equal(resumed.curve, whole.curve, check_exact=True)


@pytest.mark.parametrize("damage", ["truncated", "another's", "empty"])
def test_a_checkpoint_that_cannot_be_used_costs_only_itself(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = finished(tmp_path / "whole")
    cut = tmp_path / "cut"
    cut.mkdir()
    if damage == "another's":
        config = compose(*SMALL, "seed=9")
        with train.opened(config, tmp_path / "other", corpus()) as record:
            train.save(train.begin(config, corpus(), record), record)
        (tmp_path / "other" / runs.CHECKPOINT).rename(cut / runs.CHECKPOINT)
    else:
        (cut / runs.CHECKPOINT).write_bytes(b"" if damage == "empty" else b"\x10\0\0\0\0\0\0\0{")
    resumed = finished(cut)
    assert "starts anew" in caplog.text
    pd.testing.assert_frame_equal(resumed.layers, whole.layers)


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_a_checkpoint_with_any_bit_flipped_is_not_used(tmp_path: Path) -> None:
    """Bits all over the header, and some of the tensors: refused, or (a blank in the header) read as it was written."""
    path = tmp_path / runs.CHECKPOINT
    tensors = {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(7.0), "none": torch.zeros(0)}
    tensors |= {"half": torch.ones(3, dtype=torch.bfloat16), "generator.cpu": torch.get_rng_state()}
    checkpoint.write(path, tensors, {"run_id": "a", "rows": {"layers": [{"r_mean": 0.1}]}})
    whole = path.read_bytes()
    read, note = checkpoint.read(path, {"run_id": "a"})
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    header = 8 + int.from_bytes(whole[:8], "little")
    harmless = []
    for bit in (*range(0, 8 * header, 5), *range(8 * header, 8 * len(whole), 997)):
        path.write_bytes(flipped(whole, bit))
        try:
            found, said = checkpoint.read(path, {"run_id": "a"})
        except checkpoint.Unusable:
            continue
        harmless.append(bit)
        assert said == note
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert all(bit < 8 * header for bit in harmless)
    assert len(harmless) < 0.02 * 8 * header / 5


@pytest.mark.parametrize("place", ["tensor", "key"])
def test_a_run_whose_checkpoint_was_altered_starts_anew(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = finished(tmp_path / "whole")
    cut = tmp_path / "cut"
    with suppress(KeyboardInterrupt), train.opened(compose(*SMALL), cut, corpus()) as record:
        training = train.begin(compose(*SMALL), corpus(), record)
        training.update()
        train.save(training, record)
        raise KeyboardInterrupt
    file = cut / runs.CHECKPOINT
    content = file.read_bytes()
    at = len(content) // 2 if place == "tensor" else content.index(b"model.blocks.0") + 6
    file.write_bytes(flipped(content, 8 * at))
    resumed = finished(cut)
    assert f"{file} is not used, the run starts anew: it was altered" in caplog.text
    assert resumed.run["resumed_at"][0] == 0
    pd.testing.assert_frame_equal(resumed.layers, whole.layers, check_exact=True)


@pytest.mark.parametrize("file", [runs.MODEL, runs.BATCH])
def test_what_a_finished_run_lost_beside_its_rows_is_said(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished(tmp_path)
    identity = {name: run.status[name] for name in ("run_id", "diag_id")}
    assert plan.state(tmp_path, identity) == plan.State(runs.DONE)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(flipped(content, 8 * len(content) - 20))
    assert f"{file} was altered" in plan.state(tmp_path, identity).reason
    (tmp_path / file).unlink()
    finished(tmp_path)
    assert f"{file} is missing; the rows are whole: to make the run anew, delete its folder" in caplog.text
    assert not (tmp_path / file).exists()


def test_weights_can_be_left_out(tmp_path: Path) -> None:
    run = finished(tmp_path, "save_model=false")
    (tmp_path / runs.MODEL).write_bytes(b"another run's")
    assert not plan.state(tmp_path, {"run_id": run.run["run_id"][0]}).reason
    with pytest.raises(ConfigError, match="save_model=false"):
        run.model()
