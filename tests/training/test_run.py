"""A run end to end: rows, folder, replay, reproducibility, bad days; and the command line as a user meets it."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support import reference
from support.commands import TINY, assert_ends_well_without_a_reader, command
from support.paths import ROOT
from support.small import SMALL, corpus
from torch import Tensor, nn

import lnjac
from lnjac.columns import VOLATILE
from lnjac.config.compose import compose
from lnjac.errors import ConfigError
from lnjac.files import file_sha256, write_atomically
from lnjac.norms.probe import probe
from lnjac.runs import folder as runs
from lnjac.runs import state as plan
from lnjac.runs.schema import FROZEN, RUNS, with_role
from lnjac.training import checkpoint, loop
from lnjac.training import run as train


def finished(folder: Path, *overrides: str) -> lnjac.Run:
    assert train.run(compose(*SMALL, *overrides), folder, corpus()) == runs.DONE
    return lnjac.load_run(folder)


# ---------------------------------------------------------------- rows against plain formulas


def plain_rows(model: nn.Module, idx: Tensor, targets: Tensor, at: str) -> dict[str, dict[str, float]]:
    """r_mean, r_radial, radial_share and cosines of each norm by the textbook formulas, through ordinary torch hooks."""
    seen: dict[str, dict[str, Tensor]] = {}

    def hook(name: str) -> Any:
        def on_forward(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = {"x": args[0].detach().double()}
            output.register_hook(lambda grad: seen[name].update(G=grad.double()))

        return on_forward

    names = [name for name, module in model.named_modules() if type(module).__name__ == "Norm"]
    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    model(idx, targets)[1].backward()
    for handle in handles:
        handle.remove()
    rows = {}
    for name in names:
        module = model.get_submodule(name)
        x, g = seen[name]["x"], seen[name]["G"]
        if at == "normalized":
            g = g * module.weight.detach().double()
        d = x.shape[-1]
        sigma = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        z = (x - x.mean(-1, keepdim=True)) / sigma
        mean = g.mean(-1, keepdim=True).expand_as(g)
        radial = z * (g * z).mean(-1, keepdim=True)
        true = (g - mean - radial) / sigma
        along = z / z.norm(dim=-1, keepdim=True)
        radial_energy = (g * along).sum(-1).square()

        def cos(a: Tensor, b: Tensor) -> float:
            return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())

        rows[name] = {
            "r_mean": float(mean.square().sum() / g.square().sum()),
            "r_radial": float(radial.square().sum() / g.square().sum()),
            "radial_share": float(radial_energy.sum() / (g.square().sum() - d * g.mean(-1).square().sum())),
            "sigma_mean": float(sigma.mean()),
            "sigma_std": float(sigma.std()),
            "cos_center_vs_true": cos((g - mean) / sigma, true),
            "cos_ste_vs_true": cos(g, true),
            "cos_center_vs_ste": cos((g - mean) / sigma, g),
            "flat_cos_projected": float((true * sigma * true).sum() / ((true * sigma).norm() * true.norm())),
            "gain_ste": float(g.norm() / true.norm()),
        }
    return rows


@pytest.mark.parametrize("at", ["normalized", "output"])
@pytest.mark.parametrize("method", ["bp", "fa", "dfa"])
def test_rows_can_be_recomputed_from_the_folder(tmp_path: Path, method: str, at: str) -> None:
    # three updates at a high rate move γ off one, so that the two places of reading differ
    run = finished(tmp_path, f"method={method}", f"diagnostics.grad_at={at}", "optimizer.lr=0.05", "precision=fp64")
    idx, targets = run.diagnostic_batch()
    expected = plain_rows(run.model(), idx[0], targets[0], at)
    layers = run.layers.set_index("site")
    assert list(layers.index) == list(expected)
    assert set(layers["diagnostics.grad_at"]) == {at}
    for site, values in expected.items():
        for column, value in values.items():
            assert layers.loc[site, column] == pytest.approx(value, rel=1e-8), (site, column)


def test_the_two_places_of_reading_differ(tmp_path: Path) -> None:
    pair = [
        finished(tmp_path / at, f"diagnostics.grad_at={at}", "optimizer.lr=0.05") for at in ("normalized", "output")
    ]
    assert pair[0].run["run_id"][0] == pair[1].run["run_id"][0]
    assert pair[0].layers["diag_id"][0] != pair[1].layers["diag_id"][0]
    assert (pair[0].layers["r_mean"] - pair[1].layers["r_mean"]).abs().min() > 1e-6


# ---------------------------------------------------------------- reproducibility and pairing


def test_the_same_run_twice_gives_the_same_science(tmp_path: Path) -> None:
    one, other = (finished(tmp_path / name, "model.dropout=0.1") for name in "ab")
    pd.testing.assert_frame_equal(one.layers, other.layers)
    pd.testing.assert_frame_equal(one.curve, other.curve)
    volatile = [name for name in with_role(VOLATILE, FROZEN["runs"]) if name in one.run]
    pd.testing.assert_frame_equal(one.run.drop(columns=volatile), other.run.drop(columns=volatile))
    for name, value in one.model().state_dict().items():
        assert torch.equal(value, other.model().state_dict()[name])


@pytest.mark.parametrize("override", ["attn_mode=sigmoid", "ln_backward=ste"])
def test_runs_of_one_seed_share_init_feedback_batches_and_diagnostic_batch(override: str) -> None:
    one, other = (loop.Training(compose(*SMALL, *more), corpus()) for more in ([], [override]))
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert any("feedback" in name for name in one.model.state_dict())
    for a, b in zip(one.diagnostic_batches(), other.diagnostic_batches(), strict=True):
        assert torch.equal(a[0], b[0])
    for _ in range(3):
        assert torch.equal(one.batches.next()[0], other.batches.next()[0])


def test_measuring_along_the_way_does_not_change_the_run(tmp_path: Path) -> None:
    plain = finished(tmp_path / "plain", "model.dropout=0.1")
    watched = finished(tmp_path / "watched", "model.dropout=0.1", "diagnostics=trajectory")
    for name, value in plain.model().state_dict().items():
        assert torch.equal(value, watched.model().state_dict()[name])


def test_micro_batches_of_the_diagnostic_add_up(tmp_path: Path) -> None:
    """Two batches' row equals the row of their union: sums are added, ratios never averaged."""
    run = finished(tmp_path, "diagnostics.batches=2", "precision=fp64")
    idx, targets = run.diagnostic_batch()
    assert idx.shape[0] == 2
    whole = (idx.flatten(0, 1), targets.flatten(0, 1))
    union = probe(run.model()).measure([whole], lambda m, b: (m(*b)[1], b[0].numel()))
    for (_, row), (_, stored) in zip(union.iterrows(), run.layers.iterrows(), strict=True):
        for column in ("r_mean", "radial_share", "flat_cos_ste", "gain_center", "sigma_q50", "sum_A", "sum_C_rstd2"):
            assert stored[column] == pytest.approx(row[column], rel=1e-9), column


def test_tied_embeddings_come_back(tmp_path: Path) -> None:
    model = finished(tmp_path, "method=bp", "model.tie=true").model()
    assert model.head.weight is model.wte.weight


# ---------------------------------------------------------------- losses


def test_validation_loss_is_the_mean_over_the_whole_split(tmp_path: Path) -> None:
    run = finished(tmp_path, "eval.tokens=null", "eval.batch_size=3", "precision=fp64")
    val, t = torch.from_numpy(corpus().val.astype("int64")), run.config.model.block_size
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(val) - 1, t):
            window = val[start : start + t + 1]
            total += float(run.model()(window[None, :-1], window[None, 1:])[1]) * (len(window) - 1)
    assert run.run["val_loss_nats"][0] == pytest.approx(total / (len(val) - 1), rel=1e-12)


def test_evaluation_happens_when_asked(tmp_path: Path) -> None:
    curve = finished(tmp_path, "eval.every=2").curve
    assert curve["step"].tolist() == [0, 1, 2, 3]
    assert curve["val_loss_nats"].notna().tolist() == [True, False, True, True]


# ---------------------------------------------------------------- bad days


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_is_never_silently_cut() -> None:
    with pytest.raises(KeyError, match="unheard"):
        runs.table(RUNS, (), [{**{column.name: None for column in RUNS}, "unheard": 1}])


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


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad",
    [
        "attn_mode=softmx",
        "attn_mod=softmax",
        "seed=abc",
        "model.n_embd=130",
        "method=dfa method.policy.head=random",
        "attn_mode=nan",
        "attn_mode._target_=lnjac.gpt.attention.Relu",
        "optimizer.lr=inf",
    ],
)
def test_a_bad_value_exits_without_traceback(tmp_path: Path, bad: str) -> None:
    done = command(*bad.split(), cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    assert bad.split("=")[0].split(".")[0] in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "every"), [(signal.SIGINT, "300"), (signal.SIGTERM, "300"), (signal.SIGTERM, "null")]
)
def test_a_run_told_to_stop_keeps_a_checkpoint_and_no_half_written_file(
    tmp_path: Path, number: int, every: str
) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    words = ["model=tiny", "steps=200", "batch_size=64", "eval.tokens=500", "threads=1", "hydra.run.dir=out"]
    words.append(f"checkpoint.every={every}")
    line = [sys.executable, str(ROOT / "run.py"), *words]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while runs.read_status(tmp_path / "out").get("status") != "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        while "step" not in (log := tmp_path / "out" / "run.log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -number
    status = runs.read_status(tmp_path / "out")
    assert status["status"] == runs.INTERRUPTED
    left = {path.name for path in (tmp_path / "out").iterdir()}
    saved = every != "null"
    assert left == {".hydra", "run.log", runs.STATUS, runs.LOCK, *([runs.CHECKPOINT] if saved else [])}
    promised = "to resume from the checkpoint" if saved else "to start from the beginning"
    assert re.search(rf"interrupted: .*the same command with hydra.run.dir=\S*out {promised}\n", log.read_text())
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("goes on from the checkpoint after update" in log.read_text()) == saved
    assert lnjac.load_run(tmp_path / "out").run["steps_done"][0] == 200


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (("file", "File exists"), ("file/out", "Not a directory"), ("/proc", "No such file")):
        done = command(*TINY, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"nothing can be written in the folder {folder} ({why}")
        assert line.endswith("set hydra.run.dir to another one")


@pytest.mark.slow
def test_a_run_loses_no_table_to_its_outputs_encoding(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = command(*TINY, "hydra.run.dir=out", cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sigma_mu  cos_c/t" in done.stdout
    assert "ln_f  " in done.stdout
    assert "σ_μ  cos_c/t" in (tmp_path / "out" / "run.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert_ends_well_without_a_reader(*TINY, "hydra.run.dir=out", cwd=tmp_path)
    assert len(lnjac.load_run(tmp_path / "out").layers) == 5


@pytest.mark.slow
def test_one_run_is_not_told_what_is_said_of_sweeps(tmp_path: Path) -> None:
    done = command(*TINY, "sweep=A", cwd=tmp_path)
    assert done.returncode != 0
    assert "add -m" in done.stderr
    dry = command(*TINY, "dry_run=true", "hydra.run.dir=out", cwd=tmp_path)
    assert dry.returncode == 0
    assert "dry_run: the config is sound; nothing was started" in dry.stdout
    assert not (tmp_path / "out" / runs.STATUS).exists()


@pytest.mark.slow
def test_backprop_on_shakespeare_learns_what_a_plain_reference_learns(tmp_path: Path) -> None:
    """The bare bp run and a nanoGPT-style script of its own, from one start and on the same batches, 60 updates."""
    source = ROOT / "../shared/data/tinyshakespeare/input.txt"
    if not source.exists():
        pytest.skip("needs tiny Shakespeare in ../shared/data/tinyshakespeare")
    config = compose("method=bp", "data=shakespeare_char", f"data.source={source}", f"data.dir={tmp_path}")
    corpus = train.admit(config)
    ours = loop.Training(config, corpus)
    plain = reference.GPT(corpus.vocab_size, 4, 4, 128, 64)
    plain.load_state_dict(ours.model.state_dict())
    batches = iter(loop.Training(config, corpus).batches.next, None)
    reference.train(plain, batches, 60, lr=1e-3, weight_decay=0.01)
    while ours.updates < 60:
        ours.update()
    loss = reference.validation_loss(plain, corpus.val, 64)
    assert 2.5 < loss < 2.6
    assert ours.validation_loss() == pytest.approx(loss, abs=0.001)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_first_query_under_softmax_is_known_to_hold_rounding_errors(precision: str) -> None:
    """It attends to one key, whatever its value: its true gradient is zero, and its cosines would be those of noise."""
    settings = compose(*TINY, "model.qk_norm=true", f"precision={precision}", "method=bp", "steps=0")
    training = loop.Training(settings, settings.data.load())
    for row in training.diagnose()["layers"].to_dict("records"):
        sequences = settings.diagnostics.batch_size * settings.model.n_head
        assert row["n_zero"] == (sequences if row["role"] == "q_norm" else 0), row["site"]


def test_only_the_packages_own_files_make_its_code_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True)

    code, note = tmp_path / "package" / "runs" / "folder.py", tmp_path / "note.md"
    code.parent.mkdir(parents=True)
    code.touch()
    note.touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(runs, "__file__", str(code))
    note.write_text("changed")
    assert runs.provenance.__wrapped__()["dirty"] is False
    code.write_text("changed")
    assert runs.provenance.__wrapped__()["dirty"] is True
