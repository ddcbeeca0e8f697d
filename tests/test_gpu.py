"""The CUDA path against the CPU's: runs alone, resumed and stacked, feedback, bf16, determinism, memory that runs out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_stack
import torch
from test_conformance import corpus, members

from lnjac import credit, stack, train
from lnjac.config import Device, RunConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def on_gpu(these: Sequence[RunConfig]) -> list[RunConfig]:
    return [replace(config, device=Device.cuda) for config in these]


def assert_same(one: test_stack.Outcome, other: test_stack.Outcome, rtol: float) -> None:
    """Rows, curves and weights of two runs, the columns that name their device left out."""
    assert one.ended == other.ended
    test_stack.assert_rows_close(one.layers, other.layers, rtol)
    test_stack.assert_rows_close(one.curve, other.curve, rtol)
    for name, value in one.weights.items():
        if not name.endswith("k_norm.bias"):
            torch.testing.assert_close(value.cpu(), other.weights[name].cpu(), rtol=rtol, atol=1e2 * rtol, msg=name)


@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 2e-3), ("fp64", 1e-8)])
@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("method", "attn_mode") for name in members(group)]
)
def test_a_run_is_the_cpus(group: str, name: str, precision: str, rtol: float, tmp_path: Path) -> None:
    these = test_stack.configs(f"precision={precision}", f"{group}={name}", "steps=10", varied=[["seed=1"]])
    cpu = test_stack.alone(these, tmp_path / "cpu")
    gpu = test_stack.alone(on_gpu(these), tmp_path / "gpu")
    assert_same(cpu[0], gpu[0], rtol)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["fa", "brsf", "kp"])
def test_a_run_goes_on_from_its_checkpoint(method: str, precision: str, tmp_path: Path) -> None:
    options = ("model.dropout=0.1", "deterministic=true", f"method={method}", f"precision={precision}", "steps=8")
    (config,) = on_gpu(test_stack.configs(*options, varied=[["seed=1"]]))
    whole = test_stack.alone([config], tmp_path / "whole")[0]
    with pytest.raises(KeyboardInterrupt), train.execution(config), train.Job(config, tmp_path / "cut", corpus()) as job:
        job.record.observe()
        for _ in range(4):
            job.record.observe(job.training.update(), job.training.optimizer.param_groups[0]["lr"])
        job.save()
        raise KeyboardInterrupt
    with train.execution(config), train.Job(config, tmp_path / "cut", corpus()) as job:
        assert job.resumed == 4
        resumed = test_stack.outcome(job, train._train(job))
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name
    test_stack.assert_rows_close(whole.layers, resumed.layers, 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("method", members("method"))
def test_two_runs_are_equal_to_the_last_bit(method: str, precision: str, tmp_path: Path) -> None:
    these = test_stack.configs(
        "deterministic=true", f"method={method}", f"precision={precision}", varied=[["seed=1"], ["seed=1"]]
    )
    one, other = test_stack.alone(on_gpu(these), tmp_path)
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name
    test_stack.assert_rows_close(one.layers, other.layers, 0.0)


@pytest.mark.parametrize("method", members("method"))
def test_bf16_stays_close(method: str, tmp_path: Path) -> None:
    these = test_stack.configs(f"method={method}", "precision=bf16", "steps=3", "diagnostics=off", varied=[["seed=1"]])
    (cpu,), (gpu,) = test_stack.alone(these, tmp_path / "cpu"), test_stack.alone(on_gpu(these), tmp_path / "gpu")
    test_stack.assert_rows_close(cpu.curve, gpu.curve, 2e-2)


@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 2e-3), ("fp64", 1e-8)])
@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("method", "attn_mode", "ln_backward") for name in members(group)]
)
def test_a_stack_is_its_runs(group: str, name: str, precision: str, rtol: float, tmp_path: Path) -> None:
    these = on_gpu(test_stack.configs(f"precision={precision}", f"{group}={name}", "steps=10"))
    for one, other in zip(
        test_stack.alone(these, tmp_path), test_stack.stacked(these, tmp_path), strict=True
    ):
        assert_same(one, other, rtol)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_feedback_that_is_ignored_in_a_stack_is_found(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credit._Linear, "vmap", staticmethod(test_stack.wrong_transpose))
    these = on_gpu(test_stack.configs("method=fa", f"precision={precision}"))
    with pytest.raises(RuntimeError, match=r"stacked gradient of \w+.* is off by"):
        test_stack.stacked(these, tmp_path)


def test_a_stack_that_runs_out_of_memory_says_so(tmp_path: Path) -> None:
    these = on_gpu(test_stack.configs("batch_size=512", "model.n_embd=256", varied=[[f"seed={i}"] for i in range(8)]))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 5e8) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            test_stack.stacked(these, tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_estimate_of_a_stacks_memory_holds() -> None:
    these: list[Any] = on_gpu(test_stack.configs("batch_size=32", "model.n_embd=128", varied=[[f"seed={i}"] for i in range(8)]))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = stack.Stack([train.Training(config, corpus()) for config in these])
    whole.update()
    whole.update()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 1.25 * len(these) * stack.bytes_per_run(these[0], 11)
