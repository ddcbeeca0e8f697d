"""Kolen–Pollack in closed form: feedback takes its weight's own update, and both decay until they meet."""

import pytest
import torch
from support.gradients import assert_close, assert_equal, feedback, matrices
from support.trained import VOCAB, config_of, corpus, trained
from torch import Tensor, nn

from lnjac.gpt import model as gpt
from lnjac.training.loop import Training

OPTIMIZERS = {
    "adamw": ["optimizer=adamw", "optimizer.lr=0.01"],
    "sgd": ["optimizer=sgd", "optimizer.lr=0.01", "optimizer.momentum=0"],
}


def gaps(model: nn.Module) -> dict[str, Tensor]:
    """W − B by layer."""
    return {n: (one.weight - one.feedback).detach() for n, one in matrices(model).items() if one.feedback is not None}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kp_moves_b_by_ws_own_update(optimizer: str, clip: float | None) -> None:
    config = config_of("method=kp", *OPTIMIZERS[optimizer], f"optimizer.grad_clip={'null' if clip is None else clip}")
    training = trained(config, 2)
    lr, decay = 0.01, config.method.decay
    before = {n: (one.weight.clone(), one.feedback.clone()) for n, one in matrices(training.model).items()}
    training.update()
    for name, one in matrices(training.model).items():
        w, b = before[name]
        moved = one.weight - (1 - lr * decay) * w
        assert moved.norm() > 0
        torch.testing.assert_close(one.feedback - (1 - lr * decay) * b, moved, rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("decay", [2.5, 10.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kp_shrinks_w_minus_b_in_closed_form(optimizer: str, decay: float) -> None:
    """By 1 − lr·decay an update, whatever the gradients were."""
    training = Training(config_of("method=kp", *OPTIMIZERS[optimizer], f"method.decay={decay}"), corpus())
    start = gaps(training.model)
    for n in range(1, 8):
        training.update()
        expected = {name: gap * (1 - 0.01 * decay) ** n for name, gap in start.items()}
        assert_close(gaps(training.model), expected, tol=1e-9)


def test_kp_under_momentum_follows_the_heavy_ball() -> None:
    """SGD's coupled decay goes through the momentum: u ← μu + decay·(W − B), W − B ← W − B − lr·u."""
    config = config_of("method=kp", "optimizer=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.5")
    training = Training(config, corpus())
    gap = gaps(training.model)
    u = {name: torch.zeros_like(g) for name, g in gap.items()}
    for _ in range(6):
        training.update()
        u = {name: 0.5 * u[name] + config.method.decay * gap[name] for name in gap}
        gap = {name: gap[name] - 0.01 * u[name] for name in gap}
    assert_close(gaps(training.model), gap, tol=1e-9)


def test_kp_shrinks_by_the_scheduled_rate() -> None:
    schedule = ["steps=6", "optimizer.warmup_steps=2", "optimizer.decay=cosine"]
    config = config_of("method=kp", *OPTIMIZERS["adamw"], *schedule)
    training = Training(config, corpus())
    start = gaps(training.model)
    factor = 1.0
    for n in range(6):
        training.update()
        factor *= 1 - config.optimizer.lr_at(n, 6) * config.method.decay
    assert_close(gaps(training.model), {name: gap * factor for name, gap in start.items()}, tol=1e-9)


def assert_b_reaches_w(method: str) -> None:
    """‖W − B‖ falls to 1 % of its start."""
    training = Training(config_of(f"method={method}", *OPTIMIZERS["adamw"]), corpus())
    start = gaps(training.model)
    for _ in range(44):  # 0.9^44 = 0.0097
        training.update()
    for name, gap in gaps(training.model).items():
        assert gap.norm() <= 0.01 * start[name].norm(), name


def test_kp_reaches_w_and_fa_does_not() -> None:
    assert_b_reaches_w("kp")
    with pytest.raises(AssertionError, match=r"blocks|head"):
        assert_b_reaches_w("fa")


def test_kp_decays_its_own_matrices_alone() -> None:
    """A head with a true transpose, embeddings, norms and biases keep the optimizer's decay."""
    config = config_of("method=kp", "method.policy.head=true", "optimizer.weight_decay=0.25", "method.decay=4")
    model = gpt.build(config, VOCAB)
    decays = {n: config.method.weight_decay(model, n, 0.25) for n, _ in model.named_parameters()}
    mine = {f"{n}.{leaf}" for n in matrices(model) if n != "head" for leaf in ("weight", "feedback")}
    assert {n for n, decay in decays.items() if decay == 4} == mine
    assert {decays[n] for n in decays.keys() - mine} == {0.25}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_does_not_count_feedback(optimizer: str) -> None:
    """kp and fa share W and B at the start, so under one clip all but kp's own matrices make one and the same update."""
    clip = ["optimizer.grad_clip=0.05", *OPTIMIZERS[optimizer]]
    kp, fa = (Training(config_of(f"method={m}", *clip), corpus()) for m in ("kp", "fa"))
    assert_equal({f"{k}": v for k, v in feedback(kp.model).items()}, feedback(fa.model))
    for training in (kp, fa):
        training.update()
    found = {n: p.grad for n, p in kp.model.named_parameters() if "feedback" not in n}
    assert_equal(found, {n: p.grad for n, p in fa.model.named_parameters()})
    total = torch.stack([g.norm() for g in found.values()]).norm()
    assert total.item() == pytest.approx(0.05, rel=1e-3)  # the clip did bite
    assert torch.equal(kp.model.wte.weight, fa.model.wte.weight)


def test_kp_warns_when_its_decay_cannot_bite() -> None:
    def warned(*overrides: str) -> list[str]:
        config = config_of("method=kp", *overrides)
        return list(config.method.warnings(config))

    assert len(warned("steps=250", "method.decay=0.01")) == 1  # AdamW's own decay: 0.9975 of W − B is left
    assert warned("steps=250", "method.decay=10.0") == []
