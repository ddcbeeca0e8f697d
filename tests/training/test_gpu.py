"""The CUDA path against the CPU's: runs, resumed runs, replayed updates, finished runs measured again, bf16, divergence."""

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.paths import ROOT
from support.small import SMALL, corpus, members
from torch import Tensor

import lnjac
from lnjac.config.compose import compose
from lnjac.config.identity import to_dict
from lnjac.config.schema import Device, RunConfig, build
from lnjac.gpt import model as gpt
from lnjac.gpt.attention import Attention
from lnjac.norms.probe import probe
from lnjac.runs import folder as runs
from lnjac.runs.record import Record
from lnjac.training import graph, loop
from lnjac.training import run as train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


ROUNDING = {"forward_residual", "jacobian_residual"}
"""Columns that are nothing but rounding."""


@dataclass
class Outcome:
    ended: int | None
    layers: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    weights: dict[str, Tensor]


def configs(*overrides: str, varied: Sequence[list[str]]) -> list[RunConfig]:
    """One composed config, and from it a run for each list of what it alone has: `seed=…`, `optimizer.…=…`."""
    base = to_dict(compose(*SMALL, *overrides))
    return [build(base | changed(base, own)) for own in varied]


def changed(base: dict[str, Any], own: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"optimizer": dict(base["optimizer"])}
    for override in own:
        name, _, value = override.partition("=")
        match name.split("."):
            case ["optimizer"]:
                values[name] = yaml.safe_load((ROOT / "conf" / "optimizer" / f"{value}.yaml").read_text())
            case ["optimizer", field]:
                values["optimizer"][field] = yaml.safe_load(value)
            case _:
                values[name] = yaml.safe_load(value)
    return values


def finished(config: RunConfig, record: Record, resumed: int = 0) -> Outcome:
    """Train within the record's context, to the end."""
    training = train.begin(config, corpus(), record)
    assert training.updates == resumed
    loop.train(training, record, lambda: None)
    weights = {name: value.clone() for name, value in gpt.saved(training.model).items()}
    ended = record.described.get("diverged_step")
    return Outcome(ended, record.tables["layers"].rows, record.tables["curves"].rows, weights)


def alone(these: Sequence[RunConfig], folder: Path) -> list[Outcome]:
    found = []
    for i, config in enumerate(these):
        with train.execution(config), train.opened(config, folder / f"alone{i}", corpus()) as record:
            found.append(finished(config, record))
    return found


def assert_rows_close(rows: list[dict[str, Any]], others: list[dict[str, Any]], rtol: float) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - ROUNDING:
            if isinstance(row[name], float) and isinstance(other[name], float):
                assert math.isclose(row[name], other[name], rel_tol=rtol) or math.isnan(row[name] + other[name]), (
                    f"{name}: {row[name]} against {other[name]} ({row['run_id']}, {row.get('site')}, step {row.get('step')})"
                )
            else:
                assert row[name] == other[name], name


def on_gpu(these: Sequence[RunConfig]) -> list[RunConfig]:
    return [replace(config, device=Device.cuda) for config in these]


def assert_same(one: Outcome, other: Outcome, rtol: float) -> None:
    """Rows, curves and weights of two runs, the columns that name their device left out."""
    assert one.ended == other.ended
    assert_rows_close(one.layers, other.layers, rtol)
    assert_rows_close(one.curve, other.curve, rtol)
    for name, value in one.weights.items():
        if not name.endswith("k_norm.bias"):
            torch.testing.assert_close(value.cpu(), other.weights[name].cpu(), rtol=rtol, atol=1e2 * rtol, msg=name)


@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 2e-3), ("fp64", 1e-8)])
@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("method", "attn_mode") for name in members(group)]
)
def test_a_run_is_the_cpus(group: str, name: str, precision: str, rtol: float, tmp_path: Path) -> None:
    these = configs(f"precision={precision}", f"{group}={name}", "steps=10", varied=[["seed=1"]])
    cpu = alone(these, tmp_path / "cpu")
    gpu = alone(on_gpu(these), tmp_path / "gpu")
    assert_same(cpu[0], gpu[0], rtol)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["fa", "brsf", "kp"])
def test_a_run_goes_on_from_its_checkpoint(method: str, precision: str, tmp_path: Path) -> None:
    options = ("model.dropout=0.1", "deterministic=true", f"method={method}", f"precision={precision}", "steps=8")
    (config,) = on_gpu(configs(*options, varied=[["seed=1"]]))
    whole = alone([config], tmp_path / "whole")[0]
    with (
        suppress(KeyboardInterrupt),
        train.execution(config),
        train.opened(config, tmp_path / "cut", corpus()) as record,
    ):
        training = train.begin(config, corpus(), record)
        loop.observe(training, record)
        for _ in range(4):
            loop.observe(training, record, training.update())
        train.save(training, record)
        raise KeyboardInterrupt
    with train.execution(config), train.opened(config, tmp_path / "cut", corpus()) as record:
        resumed = finished(config, record, resumed=4)
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
    assert_rows_close(whole.layers, resumed.layers, 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("method", members("method"))
def test_two_runs_are_equal_to_the_last_bit(method: str, precision: str, tmp_path: Path) -> None:
    these = configs("deterministic=true", f"method={method}", f"precision={precision}", varied=[["seed=1"], ["seed=1"]])
    one, other = alone(on_gpu(these), tmp_path)
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name
    assert_rows_close(one.layers, other.layers, 0.0)


@pytest.mark.parametrize("method", members("method"))
def test_bf16_stays_close(method: str, tmp_path: Path) -> None:
    these = configs(f"method={method}", "precision=bf16", "steps=3", "diagnostics=off", varied=[["seed=1"]])
    (cpu,), (gpu,) = alone(these, tmp_path / "cpu"), alone(on_gpu(these), tmp_path / "gpu")
    assert_rows_close(cpu.curve, gpu.curve, 2e-2)


@pytest.mark.parametrize("options", [
    *([f"method={name}"] for name in members("method")), ["model.dropout=0.1"], ["precision=bf16"], ["optimizer=sgd"],
    ["optimizer.grad_clip=0.01"], ["diagnostics=full", "diagnostics.schedule=linear", "diagnostics.every=3"],
])  # fmt: skip
def test_replayed_updates_are_those_launched_one_by_one(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    these = on_gpu(configs("deterministic=true", "steps=8", *options, varied=[["seed=1"]]))
    (replayed,) = alone(these, tmp_path / "graph")
    monkeypatch.setattr(loop, "captured", lambda passes, *_: passes)
    (launched,) = alone(these, tmp_path / "eager")
    for name, value in launched.weights.items():
        assert torch.equal(value, replayed.weights[name]), name
    assert_rows_close(launched.layers, replayed.layers, 0.0)


def test_updates_are_replayed() -> None:
    (config,) = on_gpu(configs(varied=[["seed=1"]]))
    training = loop.Training(config, corpus())
    training.update()
    assert isinstance(training.passes, graph._Replay)


@pytest.mark.parametrize("seen", ["before the capture", "in the capture"])
def test_a_mode_that_looks_at_values_is_launched_kernel_by_kernel(
    seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    these = on_gpu(configs("attn_mode=relu", "model.dropout=0.1", "deterministic=true", "steps=4", varied=[["seed=1"]]))
    weights = type(these[0].attn_mode).weights

    def looks(mode: Attention, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        return weights(mode, scores, mask, block_size) * (1.0 if float(scores.detach().sum()) < 1e30 else 0.0)

    with monkeypatch.context() as patched:
        patched.setattr(type(these[0].attn_mode), "weights", looks)
        if seen == "in the capture":
            patched.setattr(graph, "_waiting_for_none", nullcontext)
        (looking,) = alone(these, tmp_path / "looking")
        assert "not as a CUDA graph" in caplog.text
        patched.setattr(loop, "captured", lambda passes, *_: passes)
        (launched,) = alone(these, tmp_path / "launched")
    (replayed,) = alone(these, tmp_path / "replayed")  # in the same process, after a capture that failed
    for name, value in launched.weights.items():
        assert torch.equal(value, looking.weights[name]), name
        assert torch.equal(value, replayed.weights[name]), name
    assert_same(replayed, looking, 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_finished_run_is_measured_again_and_continued_to_the_last_bit(precision: str, tmp_path: Path) -> None:
    words = (*SMALL, "device=cuda", "deterministic=true", f"precision={precision}", "model.dropout=0.1")
    keeping, full = "keep_state=true", ("diagnostics=full", "diagnostics.swap_parts=model")

    def made(name: str, *more: str, reuse: str = "") -> lnjac.Run:
        folder, source = tmp_path / name, tmp_path / reuse if reuse else None
        assert train.run(compose(*words, *more), folder, corpus(), reuse=source) == runs.DONE
        return lnjac.load_run(folder)

    made("source", keeping)
    for whole, again in (
        (made("measured whole", *full), made("measured again", *full, reuse="source")),
        (made("trained whole", "steps=6", keeping), made("continued", "steps=6", keeping, reuse="source")),
    ):
        assert again.run["resumed_at"].tolist() == [3]
        assert_rows_close(again.layers.to_dict("records"), whole.layers.to_dict("records"), 0.0)
        state = again.model().state_dict()
        for name, value in whole.model().state_dict().items():
            assert torch.equal(value, state[name]), name


def test_a_diverging_run_is_left_as_it_was(tmp_path: Path) -> None:
    these = on_gpu(configs("method=bp", "optimizer.lr=1.0e+30", "steps=8", varied=[["seed=1"]]))
    (found,) = alone(these, tmp_path)
    assert found.ended is not None
    assert all(value.isfinite().all() for value in found.weights.values())


def test_a_large_norm_takes_few_launches() -> None:
    """A float64 pass over a GPT-2's norm in the CPU's small pieces took fifteen times as long as the whole model's pass."""
    norm = torch.nn.LayerNorm(768, device="cuda")
    x = torch.randn(8, 1024, 768, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        probe(norm).measure([x], lambda model, batch: (model(batch).square().mean(), 8192))
    assert sum(event.count for event in recorded.key_averages()) < 1000
