"""Training loops as researchers write them: what is watched there is what `measure` finds on the one whole batch."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from support.loops import (
    CLASSES,
    KINDS,
    SITES,
    Batch,
    D,
    assert_row,
    assert_rows_equal,
    batch,
    halves,
    loss,
    net,
    vectors,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lnjac.norms.probe import Probe, probe

REENTRANT = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def sites_of(kind: str) -> list[str]:
    return ["blocks.0.layer_norm_0", "blocks.1.layer_norm_0", "ln_f"] if kind == "functional" else SITES


def watched(measuring: Probe, batches: list[Batch], *, scale: float = 1.0, step: int = 3, after: bool = False) -> Any:
    """The rows of an accumulated gradient; `after`: the tokens are told after the backward pass."""
    k = len(batches)
    for one in batches:
        with measuring.watch(step=step, scale=scale) as seen:
            mean, tokens = loss(measuring.model, one)
            if not after:
                seen.tokens(tokens, mean)
            (scale * mean / k).backward()
            if after:
                seen.tokens(tokens, mean)
    return measuring.rows(step)


# gradient accumulation


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_micro_batches_are_the_one_batch(kind: str, k: int) -> None:
    model, whole = net(kind), batch()
    expected = probe(model).measure([whole], loss)
    found = watched(probe(model), halves(whole, k))
    assert_rows_equal(found, expected)
    assert found["site"].tolist() == sorted(sites_of(kind))
    assert found["call"].tolist() == [0, 0, 0]
    assert set(found["n_tokens"]) == {40}


def test_a_loop_without_the_division_has_another_gradient() -> None:
    """So that the law above is not satisfied by chance."""
    model, whole = net(), batch()
    expected = probe(model).measure([whole], loss)
    found = watched(probe(model), halves(whole)[:1])
    assert (found["radial_share"] / expected["radial_share"] - 1).abs().min() > 1e-4


def test_the_whole_batchs_row_is_the_one_of_explicit_vectors() -> None:
    model, (x, targets) = net(), batch()
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        y.retain_grad()
        seen.update(x=args[0], y=y)

    handle = model.ln_f.register_forward_hook(keep)
    F.cross_entropy(model(x).flatten(0, 1), targets.flatten(), reduction="sum").backward()
    handle.remove()
    true = vectors(seen["x"], seen["y"].grad, model.ln_f.weight, 1e-5, rms=False)
    assert_row(watched(probe(model), halves((x, targets), 4)).set_index("site").loc["ln_f"], true)


def test_tokens_may_be_told_after_the_backward_pass() -> None:
    model, whole = net(), batch()
    found = watched(probe(model), halves(whole), after=True)
    assert_rows_equal(found, watched(probe(model), halves(whole)), rel=1e-12)


def test_a_pass_that_was_not_told_its_tokens_is_refused() -> None:
    measuring = probe(net())
    with measuring.watch(step=0):
        loss(measuring.model, batch())[0].backward()
    with pytest.raises(ValueError, match=r"was not told its tokens: call seen.tokens\(n\)"):
        measuring.rows(0)


def test_a_step_forgets_the_one_before() -> None:
    model, (one, other) = net(), halves(batch())
    measuring = probe(model)
    watched(measuring, [one], step=1)
    assert_rows_equal(watched(measuring, [other], step=2), probe(model).measure([other], loss))
    with pytest.raises(ValueError, match="step 1 is not the one that was watched last, 2"):
        measuring.rows(1)


def test_a_failed_micro_batch_is_left_out() -> None:
    model, whole = net(), batch()
    measuring = probe(model)
    first, second = halves(whole)

    def step(one: Batch, fails: bool) -> None:
        with measuring.watch(step=0) as seen:
            mean, tokens = loss(model, one)
            seen.tokens(tokens, mean)
            if fails:
                raise MemoryError
            (mean / 2).backward()

    step(first, False)
    with pytest.raises(MemoryError):
        step(second, True)
    step(second, False)
    assert_rows_equal(measuring.rows(0), probe(model).measure([whole], loss))


# mixed precision


def test_a_grad_scalers_factor_is_taken_off() -> None:
    model, whole = net(), batch()
    expected = watched(probe(model), halves(whole))
    scaler, optimizer = torch.amp.GradScaler(device="cpu"), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    measuring = probe(model)
    for one in halves(whole):
        with measuring.watch(step=0, scale=scaler.get_scale()) as seen:
            mean, tokens = loss(model, one)
            seen.tokens(tokens, mean)
            scaler.scale(mean / 2).backward()
    assert scaler.get_scale() == 65536
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert_rows_equal(measuring.rows(0), expected)


def test_clipping_and_the_update_change_no_row() -> None:
    model, whole = net(), batch()
    expected = watched(probe(model), [whole])
    optimizer, measuring = torch.optim.AdamW(model.parameters(), lr=0.1), probe(model)
    with measuring.watch(step=0) as seen:
        mean, tokens = loss(model, whole)
        seen.tokens(tokens, mean)
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert_rows_equal(measuring.rows(0), expected, rel=0)


COARSE = {
    "radial_share": 0.05,
    "share_kept": 0.01,
    "cos_center_vs_true": 0.01,
    "sigma_mean": 0.01,
    "flat_cos_ste": 0.01,
}
"""How far rows in bfloat16, whose unit of rounding is 1/256, may be from float64's, relative."""


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_the_rows_of_float64_but_for_rounding(kind: str, how: str) -> None:
    exact = probe(net(kind)).measure([batch()], loss)
    dtype = {"autocast": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[how]
    model, one = net(kind, dtype=dtype), batch(dtype=dtype)
    measuring = probe(model)
    with torch.autocast("cpu", dtype=torch.bfloat16) if how == "autocast" else nullcontext():
        found = watched(measuring, halves(one))
    for name, tolerance in COARSE.items():
        assert found[name].tolist() == pytest.approx(exact[name].tolist(), rel=tolerance), name
    assert (found["jacobian_residual"] < 1e-5).all()  # each norm is replayed in float32
    assert (found["forward_residual"] < 1e-5).all()


def test_autocast_rows_are_those_of_what_was_seen_there() -> None:
    """The same inputs and gradients, taken to float64: no threshold but float32's."""
    model, (x, targets) = net(dtype=torch.float32), batch(dtype=torch.float32)
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        y.retain_grad()
        kept.update(x=args[0], y=y)

    handle, measuring = model.ln_f.register_forward_hook(keep), probe(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), measuring.watch(step=0) as seen:
        mean, tokens = loss(model, (x, targets))
        seen.tokens(tokens, mean)
        mean.backward()
    handle.remove()
    true = vectors(kept["x"], kept["y"].grad.double() * tokens, model.ln_f.weight.double(), 1e-5, rms=False)
    assert_row(measuring.rows(0).set_index("site").loc["ln_f"], true, rel=1e-5)


# activation checkpointing


@REENTRANT
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_row(kind: str, reentrant: bool) -> None:
    model, whole = net(kind), batch()
    expected = probe(model).measure([whole], loss)
    model.checkpointed = reentrant
    found = watched(probe(model), halves(whole))
    assert_rows_equal(found, expected)
    assert probe(model).measure([whole], loss).equals(probe(model).measure([whole], loss))


class Within(nn.Module):
    """Checkpoints a method, no module, which calls F.layer_norm: its recomputation runs outside of any module."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.embed, self.norm, self.head = (
            reentrant,
            nn.Linear(4, D),
            nn.LayerNorm(D),
            nn.Linear(D, CLASSES),
        )

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(F.layer_norm(x, (D,)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(checkpoint(self.part, self.embed(x), use_reentrant=self.reentrant)))
        return out


def test_a_function_that_is_recomputed_outside_of_any_module_is_measured_or_named() -> None:
    """A reentrant checkpoint calls it anew where autograd has laid torch's modes aside."""
    torch.manual_seed(0)
    model = Within(False).double()
    assert probe(model).measure([batch()], loss)["site"].tolist() == ["layer_norm_0", "norm"]
    model.reentrant = True
    measuring = probe(model)
    assert measuring.measure([batch()], loss)["site"].tolist() == ["norm"]
    assert measuring.coverage().set_index("site")["state"].to_dict() == {
        "norm": "measured",
        "layer_norm_0": "no gradient",
    }


# an optimizer in the backward pass


@contextmanager
def stepping(model: nn.Module, rate: float = 0.1) -> Iterator[None]:
    """Within the context each parameter is updated as soon as its gradient is there, and the gradient dropped."""

    def step(p: Tensor) -> None:
        with torch.no_grad():
            assert p.grad is not None
            p -= rate * p.grad
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    yield
    for handle in handles:
        handle.remove()


@REENTRANT
@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_in_the_backward_pass_is_watched_as_it_trains(kind: str, checkpointed: bool | None) -> None:
    whole = batch()
    expected = probe(net(kind)).measure([whole], loss)
    model = net(kind, checkpointed=checkpointed)
    before = [p.detach().clone() for p in model.parameters()]
    with stepping(model):
        found = watched(probe(model), [whole])
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert_rows_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_measure_suspends_the_optimizer_in_the_backward_pass(kind: str) -> None:
    whole = batch()
    expected, model = probe(net(kind)).measure([whole], loss), net(kind)
    before = [p.detach().clone() for p in model.parameters()]
    with stepping(model):
        assert_rows_equal(probe(model).measure(halves(whole), loss), expected)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        loss(model, whole)[0].backward()  # it steps again afterwards
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_a_hook_of_an_autograd_node_that_steps_is_left_out_or_refused(whole: bool) -> None:
    """Such a hook, as on AccumulateGrad, cannot be suspended from outside; a pass for the norms' gradients alone has none."""
    model = net()
    weight = model.head.weight
    node, before = weight.expand_as(weight).grad_fn.next_functions[0][0], weight.clone()

    def step(*_: Any) -> None:
        with torch.no_grad():
            weight.sub_(0.1 * weight.grad)

    def checkpointed(module: nn.Module, given: Any) -> tuple[torch.Tensor, int]:
        anchor = torch.zeros((), requires_grad=True)
        return checkpoint(lambda x: loss(module, given)[0] + 0 * x, anchor, use_reentrant=True), 1

    node.register_hook(step)
    if whole:  # a reentrant checkpoint makes a whole backward pass
        with pytest.raises(ValueError, match=r"^the backward pass changed parameters: take off the hook that steps"):
            probe(model).measure([batch()], checkpointed)
    else:
        probe(model).measure([batch()], loss)
        assert torch.equal(weight, before)


def test_several_updates_in_one_loop(recwarn: pytest.WarningsRecorder) -> None:
    """Accumulation, clipping and an optimizer together; only every other step is measured."""
    whole, table = batch(), []
    model, twin = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, twin)]
    measuring = probe(model)
    for step in range(4):
        if step % 2 == 0:
            expected = probe(twin).measure([whole], loss)
        for one in halves(whole):
            with measuring.watch(step) if step % 2 == 0 else nullcontext() as seen:
                mean, tokens = loss(model, one)
                if seen is not None:
                    seen.tokens(tokens, mean)
                (mean / 2).backward()
        loss(twin, whole)[0].backward()
        if step % 2 == 0:
            table.append(measuring.rows(step).assign(step=step))
            assert_rows_equal(table[-1].drop(columns="step"), expected)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    both = pd.concat(table)
    assert both.groupby("site")["radial_share"].nunique().tolist() == [2, 2, 2]
    assert not recwarn.list
