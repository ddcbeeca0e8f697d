"""Stacked runs against the same runs alone: rows, weights, divergence, the check of the gradients, and what is refused."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from test_conformance import SMALL, corpus, members
from torch import Tensor

from lnjac import credit, gpt, optim, runs, stack, train
from lnjac.config import RunConfig, build, compose, to_dict

ROUNDING = {"jacobian_residual"}
"""Columns that are nothing but rounding."""

VARIED = (
    ["seed=1"],
    ["seed=2", "optimizer.lr=0.003", "optimizer.warmup_steps=3", "optimizer.weight_decay=0.1"],
    ["seed=3"],
)
"""What the runs of a stack differ in; the first and the last share their settings."""


@dataclass
class Outcome:
    ended: int | Exception | None
    layers: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    run: dict[str, Any] | None
    weights: dict[str, Tensor]


def configs(*overrides: str, varied: Sequence[list[str]] = VARIED) -> list[RunConfig]:
    """One composed config, and from it a run for each list of what it alone has: `seed=…`, `optimizer.…=…`."""
    base = to_dict(compose(*SMALL, *overrides))
    return [build(base | changed(base, own)) for own in varied]


def changed(base: dict[str, Any], own: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"optimizer": dict(base["optimizer"])}
    for override in own:
        name, _, value = override.partition("=")
        match name.split("."):
            case ["optimizer"]:
                values[name] = to_dict(compose(f"optimizer={value}"))["optimizer"]
            case ["optimizer", field]:
                values["optimizer"][field] = yaml.safe_load(value)
            case _:
                values[name] = yaml.safe_load(value)
    return values


def outcome(job: train.Job, ended: int | Exception | None) -> Outcome:
    run = None
    if not isinstance(ended, Exception):
        job.finish(ended)
        run = runs.read_table(job.out.path / runs.FILES["runs"]).to_pylist()[0]
    weights = {name: value.clone() for name, value in gpt.saved(job.training.model).items()}
    return Outcome(ended, job.record.rows["layers"], job.record.rows["curves"], run, weights)


def alone(these: Sequence[RunConfig], folder: Path) -> list[Outcome]:
    found = []
    for i, config in enumerate(these):
        with train.execution(config), train.Job(config, folder / f"alone{i}", corpus()) as job:
            found.append(outcome(job, train._train(job)))
    return found


def stacked(these: Sequence[RunConfig], folder: Path) -> list[Outcome]:
    with ExitStack() as entered:
        entered.enter_context(train.execution(these[0]))
        jobs = [
            entered.enter_context(train.Job(config, folder / f"stacked{i}", corpus())) for i, config in enumerate(these)
        ]
        return [outcome(job, ended) for job, ended in zip(jobs, stack.train_stacked(jobs), strict=True)]


def assert_rows_close(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], rtol: float, but: frozenset[str] = frozenset()
) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - ROUNDING - but:
            if isinstance(row[name], float) and isinstance(other[name], float):
                assert math.isclose(row[name], other[name], rel_tol=rtol) or math.isnan(row[name] + other[name]), (
                    f"{name}: {row[name]} against {other[name]} ({row['run_id']}, {row.get('site')}, step {row.get('step')})"
                )
            else:
                assert row[name] == other[name], name


TIMES = frozenset({"tokens_per_s", "train_s", "eval_s", "diagnostics_s", "wall_s", "started_at", "stacked"})


def assert_equal(one: Outcome, other: Outcome, rtol: float, but: frozenset[str] = frozenset()) -> None:
    assert one.ended == other.ended
    assert_rows_close(one.layers, other.layers, rtol, but)
    assert_rows_close(one.curve, other.curve, rtol)
    assert one.run is not None
    assert other.run is not None
    assert_rows_close([one.run], [other.run], rtol, TIMES)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        if name.endswith("k_norm.bias"):  # softmax does not see it: its gradient is rounding alone
            continue
        scale = float(value.abs().max())  # beside an entry of 1e30, one of 1 is rounding
        torch.testing.assert_close(
            value, other.weights[name], rtol=rtol, atol=1e2 * rtol * scale, equal_nan=True, msg=name
        )


def assert_stacking_changes_nothing(
    these: Sequence[RunConfig], folder: Path, rtol: float, but: frozenset[str] = frozenset()
) -> list[Outcome]:
    pairs = list(zip(alone(these, folder), stacked(these, folder), strict=True))
    for one, other in pairs:
        assert_equal(one, other, rtol, but)
        assert other.run is not None
        assert other.run["stacked"] == len(these)
    return [other for _, other in pairs]


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("method", "attn_mode") for name in members(group)]
)
def test_fifty_updates_are_those_of_the_runs_alone(group: str, name: str, tmp_path: Path) -> None:
    on_the_way = ("diagnostics=trajectory", "diagnostics.schedule=list", "diagnostics.steps=[0,8]", "eval.every=20")
    these = configs(f"{group}={name}", "steps=50", *on_the_way, varied=VARIED[:2])
    found = assert_stacking_changes_nothing(these, tmp_path, 1e-4)
    assert {row["step"] for row in found[0].layers} == {0, 8, 50}
    assert found[0].curve[-1]["val_loss_nats"] != found[1].curve[-1]["val_loss_nats"]


@pytest.mark.parametrize("name", ["bp", "fa", "kp"])
def test_large_products_are_made_run_by_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "RUN_BY_RUN", 0)
    assert_stacking_changes_nothing(configs(f"method={name}", "steps=10"), tmp_path, 1e-4)


NORMED_QUERIES = frozenset(
    {"n_zero", "cos_ste_vs_true", "cos_center_vs_true", "cos_radial_vs_true", "cos_center_vs_ste"}
)
"""The first query's gradient is zero but for rounding, so what is a mean of cosines over tokens is rounding in part."""


@pytest.mark.parametrize("options", [
    *([f"{group}={name}"] for group in ("method", "attn_mode", "ln_backward", "optimizer") for name in members(group)),
    ["model.norm=rmsnorm"], ["model.placement=post"], ["model.affine=false"], ["model.bias=false"],
    ["model.norm=rmsnorm", "model.placement=post", "model.affine=false", "ln_backward=radial"],
    ["model.qk_norm=true"], ["model.tie=true", "method=bp"], ["model.tie=true", "method=frozen"],
    ["method=dfa", "method.inject=sublayer", "method.error=hidden", "method.cut_head=false"],
    ["method=kp", "optimizer.grad_clip=0.5"], ["method=kp", "optimizer=sgd", "optimizer.lr=0.01"],
    ["optimizer.grad_clip=0.01"], ["optimizer.decay=cosine"], ["optimizer.decay=linear", "optimizer=sgd"],
    ["diagnostics.batches=2", "diagnostics.split=val"], ["steps=0"],
])  # fmt: skip
def test_double_precision_agrees_to_nine_digits(options: list[str], tmp_path: Path) -> None:
    these = configs("precision=fp64", "steps=6", "diagnostics=trajectory", "eval.every=4", *options)
    but = NORMED_QUERIES if "model.qk_norm=true" in options else frozenset()
    assert_stacking_changes_nothing(these, tmp_path, 1e-9, but)


def test_fifty_updates_in_double_precision(tmp_path: Path) -> None:
    assert_stacking_changes_nothing(configs("precision=fp64", "steps=50", "method=kp"), tmp_path, 1e-9)


@pytest.mark.parametrize("name", members("method"))
def test_bf16_stays_close(name: str, tmp_path: Path) -> None:
    these = configs(f"method={name}", "precision=bf16", "steps=3", "diagnostics=off")
    for one, other in zip(alone(these, tmp_path), stacked(these, tmp_path), strict=True):
        assert_rows_close(one.curve, other.curve, 1e-2)
        assert other.ended is None


def test_settings_of_the_optimizer_may_all_differ(tmp_path: Path) -> None:
    these = configs("precision=fp64", "method=kp", "method.decay=1.0", "steps=8", varied=[
        ["optimizer.grad_clip=0.01", "optimizer.beta1=0.5"], ["optimizer.eps=0.001"], ["optimizer=sgd"],
        ["optimizer.weight_decay=10.0"], ["optimizer=sgd", "optimizer.grad_clip=0.05", "optimizer.nesterov=true"],
        ["optimizer.grad_clip=0.01", "optimizer.beta1=0.5", "seed=9"],
    ])  # fmt: skip
    assert_stacking_changes_nothing(these, tmp_path, 1e-9)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("method", ["brsf", "kp", "bp"])
def test_a_diverging_run_leaves_the_others_alone(precision: str, method: str, tmp_path: Path) -> None:
    wild = 1e30 if precision == "fp32" else 1e200  # beyond what the next forward pass can square
    mild = [f"method.decay={1 / wild}"] if method == "kp" else []  # lr * decay must stay below 1
    varied = [["seed=1"], ["seed=2", f"optimizer.lr={wild!r}"], ["seed=3", "optimizer.lr=0.002"], ["seed=4"]]
    these = configs(f"precision={precision}", f"method={method}", "steps=8", *mild, varied=varied)
    found = assert_stacking_changes_nothing(these, tmp_path, 1e-9 if precision == "fp64" else 1e-4)
    assert [one.ended is None for one in found] == [True, False, True, True]
    assert found[1].run is not None
    assert found[1].run["status"] == runs.DIVERGED
    assert all(value.isfinite().all() for one in (found[0], found[2], found[3]) for value in one.weights.values())


def test_one_of_equal_settings_leaves_and_the_others_keep_their_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    these = configs("precision=fp64", "steps=8", "method=frsf", varied=[[f"seed={i}"] for i in range(4)])
    plain = train.Record.observe

    def ends_early(record: train.Record, *args: Any) -> bool:
        ends = (record.training.config.seed, record.training.updates) in {(1, 3), (2, 5)}
        return plain(record, *args) and not ends

    monkeypatch.setattr(train.Record, "observe", ends_early)
    found = assert_stacking_changes_nothing(these, tmp_path, 1e-9)
    assert [one.ended for one in found] == [None, 3, 5, None]


def test_clipping_leaves_an_unlimited_run_as_it_is() -> None:
    these = configs(varied=[["optimizer.grad_clip=0.01"], ["seed=2"], ["optimizer.grad_clip=1.0e+9"]])
    whole = stack.Stack([train.Training(config, corpus()) for config in these])
    grads = whole.segments[0].grads.fill_(2.0)
    grads[1, 0] = math.inf
    assert whole.limits is not None
    whole._clip(whole.limits)
    assert float(grads[0].norm()) == pytest.approx(0.01, rel=1e-5)
    assert grads[1, 0] == math.inf
    assert (grads[1, 1:] == 2.0).all()
    assert (grads[2] == 2.0).all()


def test_an_error_in_one_runs_measuring_ends_that_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    these = configs("precision=fp64", "steps=4", "diagnostics=trajectory")
    before = alone(these, tmp_path)
    plain = train.Training.diagnose

    def fails(training: train.Training) -> list[dict[str, Any]]:
        if training.config.seed == 2 and training.updates == 2:
            raise OSError("no such luck")
        return plain(training)

    monkeypatch.setattr(train.Training, "diagnose", fails)
    found = stacked(these, tmp_path)
    assert isinstance(found[1].ended, OSError)
    for i in (0, 2):
        assert_equal(before[i], found[i], 1e-9)


def test_every_run_of_a_stack_may_end(tmp_path: Path) -> None:
    these = configs("steps=5", "optimizer.lr=1.0e+30", "method=bp", varied=[["seed=1"], ["seed=2"]])
    found = assert_stacking_changes_nothing(these, tmp_path, 1e-4)
    assert None not in [one.ended for one in found]


class PerRun(optim.AdamW):
    """A plugin that is not elementwise: its class does not say so, though its parent does."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = super().build(groups)
        assert all(p.dim() < 3 for group in groups for p in group["params"])
        assert sum(len(group["params"]) for group in groups) > 10
        return optimizer


@pytest.mark.parametrize("method", ["fa", "kp"])
def test_a_plugin_optimizer_gets_each_runs_own_parameters(method: str, tmp_path: Path) -> None:
    plugin = "optimizer._target_=test_stack.PerRun"
    varied = [["seed=1", plugin], ["seed=2", plugin, "optimizer.lr=0.01", "optimizer.grad_clip=0.1"]]
    these = configs("precision=fp64", "steps=6", f"method={method}", varied=varied)
    assert_stacking_changes_nothing(these, tmp_path, 1e-9)


# The check of the gradients


def wrong_transpose(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> Any:
    """Backprop in place of feedback alignment."""
    out = credit.lead(x, in_dims[0], info.batch_size).flatten(1, -2) @ weight.mT
    out = out if bias is None else out + bias.unsqueeze(1)
    return out.view(*x.shape[:-1], -1), 0


def no_gradient(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Any:
    return wrong_transpose(info, in_dims, x.detach(), weight, bias, feedback)


@pytest.mark.parametrize(
    ("method", "precision", "rule"),
    [
        *((method, "fp32", wrong_transpose) for method in ("fa", "usf", "frsf", "brsf", "kp")),
        *(("fa", precision, rule) for precision in ("fp64", "bf16") for rule in (wrong_transpose, no_gradient)),
    ],
)
def test_feedback_that_is_ignored_is_found(
    rule: Any, method: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credit._Linear, "vmap", staticmethod(rule))
    these = configs(f"method={method}", f"precision={precision}", varied=VARIED[:2])
    with pytest.raises(RuntimeError, match=r"stacked gradient of \w+.* is off by"):
        stacked(these, tmp_path)


def test_direct_feedback_that_is_ignored_is_found() -> None:
    whole = stack.Stack([train.Training(config, corpus()) for config in configs("method=dfa")])
    whole.template._modules["broadcast"] = None
    whole.buffers = {name: buffer for name, buffer in whole.buffers.items() if not name.startswith("broadcast")}
    with pytest.raises(RuntimeError, match=r"stacked gradient of \w+.* is off by"):
        whole.update()


@pytest.mark.parametrize("wrong", [0, 2])
def test_first_and_last_run_are_checked(wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stack.Stack._backward

    def spoils(self: stack.Stack, found: Tensor) -> None:
        plain(self, found)
        self.grads["blocks.1.mlp.fc.weight"][wrong] *= 1.01

    monkeypatch.setattr(stack.Stack, "_backward", spoils)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.fc\.weight is off by"):
        stacked(configs(), tmp_path)


def test_a_refresh_that_replaces_feedback_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaces(self: credit.SignSymmetric, model: gpt.GPT, seed: int, step: int) -> None:
        for _, layer in self.chosen(model):
            assert layer.feedback is not None
            layer.feedback = layer.feedback.clone()

    monkeypatch.setattr(credit.SignSymmetric, "refresh", replaces)
    with pytest.raises(RuntimeError, match=r"replaced blocks\.0\.attn\.qkv\.feedback: write into it"):
        stacked(configs("method=brsf"), tmp_path)


# What may be stacked, and how many


@pytest.mark.parametrize("change", [
    "seed=5", "optimizer.lr=0.5", "optimizer.grad_clip=1.0", "optimizer.decay=cosine", "optimizer=sgd",
])  # fmt: skip
def test_seed_and_optimizer_may_differ(change: str) -> None:
    assert stack.key(compose(*SMALL)) == stack.key(compose(*SMALL, change)) is not None


@pytest.mark.parametrize("change", [
    "steps=4", "batch_size=3", "eval.every=2", "eval.tokens=20", "diagnostics=off", "model.n_embd=16", "model.eps=1e-3",
    "model.qk_norm=true", "attn_mode=relu", "method=dfa", "method.scale=2.0", "method.policy.head=true",
    "ln_backward=ste", "precision=fp64", "threads=1", "deterministic=true", "save_model=false", "checkpoint.every=null",
    "data=shakespeare_char",
])  # fmt: skip
def test_nothing_else_may_differ(change: str) -> None:
    assert stack.key(compose(*SMALL)) != stack.key(compose(*SMALL, change))


def test_dropout_is_never_stacked(tmp_path: Path) -> None:
    assert stack.key(compose(*SMALL, "model.dropout=0.1")) is None
    with pytest.raises(ValueError, match="have dropout"):
        stacked(configs("model.dropout=0.1"), tmp_path)


def test_unlike_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in more than seed and optimizer"):
        stacked(configs(varied=[["seed=1"], ["batch_size=5"]]), tmp_path)


def test_a_run_with_updates_behind_it_is_refused(tmp_path: Path) -> None:
    with train.Job(compose(*SMALL), tmp_path, corpus()) as job:
        job.training.update()
        with pytest.raises(ValueError, match="not stacked"):
            stack.train_stacked([job])


def test_a_stack_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(*SMALL)
    each = stack.bytes_per_run(config, 11)
    for budget, expected in ((0, 1), (each - 1, 1), (3.5 * each, 3), (1e9 * each, stack.LARGEST)):
        monkeypatch.setattr(stack, "CPU_BYTES", budget)
        monkeypatch.setattr(stack, "_available_ram", lambda: 10**18)
        assert stack.most(config, 11) == expected
    monkeypatch.setattr(stack, "_available_ram", lambda: 5 * each)
    assert stack.most(config, 11) == 2


def test_the_estimate_grows_with_what_takes_memory() -> None:
    base = stack.bytes_per_run(compose(*SMALL), 11)
    for change in ("batch_size=8", "model.n_layer=4", "precision=fp64", "model.block_size=16", "attn_mode=relu"):
        assert stack.bytes_per_run(compose(*SMALL, change), 11) > 1.05 * base, change
    config = compose(*SMALL, "method=bp")
    parameters = 4 * sum(p.numel() for p in gpt.build(config, 11).parameters())
    logits = 4 * 4 * 8 * 11
    assert stack.bytes_per_run(config, 11) > 5 * parameters + logits


# How it is done


def test_an_update_costs_no_operations_per_run(tmp_path: Path) -> None:
    counts = []
    for size in (2, 6):
        these = configs(
            "precision=fp64", varied=[[f"seed={i}"] for i in range(size)]
        )  # in fp32 a CPU's products are not
        whole = stack.Stack([train.Training(config, corpus()) for config in these])
        whole.update()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            whole.update()
        counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")))
    assert counts[0] == counts[1]


def test_models_are_views_while_stacked_and_own_their_tensors_afterwards(tmp_path: Path) -> None:
    trainings = [train.Training(config, corpus()) for config in configs()]
    whole = stack.Stack(trainings)
    whole.update()
    weight = trainings[1].model.blocks[0].mlp.fc.weight
    assert weight.data_ptr() == whole.parameters["blocks.0.mlp.fc.weight"][1].data_ptr()
    kept = trainings[1]
    expected = [kept.validation_loss()]
    whole.keep([True, False, True])
    expected.append(kept.validation_loss())
    whole.update()
    assert expected == [kept.validation_loss()] * 2
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_times_are_shared(tmp_path: Path) -> None:
    found = stacked(configs("steps=4"), tmp_path)
    assert len({one.run["train_s"] for one in found if one.run}) == 1
    assert all(one.run and 0 < 3 * one.run["train_s"] < one.run["wall_s"] for one in found)


def test_every_optimizer_here_says_whether_it_is_elementwise() -> None:
    for name in members("optimizer"):
        config = compose(f"optimizer={name}")
        assert "elementwise" in vars(type(config.optimizer)), name
    assert (ROOT / "conf" / "optimizer").exists()
