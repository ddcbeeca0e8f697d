"""Credit assignment in float64: closed forms for one layer, independent pullbacks for whole models, laws over updates."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.gradients import (
    IDX,
    IN_A_BLOCK,
    KIND,
    LAYERWISE,
    METHODS,
    SIGNED,
    TARGETS,
    assert_close,
    assert_equal,
    build,
    feedback,
    gradients,
    kind_of,
    matrices,
    policy,
    problems,
)
from support.trained import N_LAYER, TINY, VOCAB, config_of, corpus, perturb, trained
from torch import Tensor, nn

from lnjac.config.compose import compose
from lnjac.gpt import credit, methods
from lnjac.gpt import model as gpt
from lnjac.gpt import optimizers as optim
from lnjac.gpt.settings import Precision
from lnjac.norms.probe import probe
from lnjac.training.loop import Training

# One layer, closed form


def layer(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[credit.FeedbackLinear, Tensor]:
    """A layer (5 -> 3) of draws and a feedback matrix of its own."""
    generator = torch.Generator().manual_seed(0)
    one = credit.FeedbackLinear(5, 3, bias=bias, kind="fc", init_std=0.02)
    with torch.no_grad():
        for p in one.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    one.to(dtype)
    b = torch.randn(3, 5, generator=generator).to(dtype)
    one.feedback, one.feedback_rule = b, lambda weight, m: m
    return one, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)], ids=str)
def test_input_gradient_is_g_b_and_parameters_gradients_are_true(shape: tuple[int, ...], bias: bool) -> None:
    one, b = layer(bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*shape[:-1], 3, generator=generator, dtype=torch.float64)
    y = one(x)
    assert torch.equal(y, F.linear(x, one.weight, one.bias))
    y.backward(g)
    torch.testing.assert_close(x.grad, torch.einsum("...o,oi->...i", g, b), rtol=1e-12, atol=1e-14)
    weight, bias_ = torch.einsum("no,ni->oi", g.reshape(-1, 3), x.detach().reshape(-1, 5)), g.reshape(-1, 3).sum(0)
    torch.testing.assert_close(one.weight.grad, weight, rtol=1e-12, atol=1e-14)
    if bias:
        torch.testing.assert_close(one.bias.grad, bias_, rtol=1e-12, atol=1e-14)


def test_a_layer_without_a_rule_is_a_plain_linear() -> None:
    one, _ = layer(bias=True)
    one.feedback_rule = None
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    one(x).backward(g := torch.randn(4, 3, dtype=torch.float64))
    torch.testing.assert_close(x.grad, g @ one.weight)
    assert torch.equal(one.backward_matrix(), one.weight)


def test_a_broadcast_cotangent_and_a_strided_input_are_taken() -> None:
    one, b = layer(bias=True)
    x = torch.randn(5, 4, dtype=torch.float64).t().requires_grad_()
    one(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 3, dtype=torch.float64) @ b)


def test_bf16_autocast_gives_g_b_in_float32_leaves() -> None:
    one, b = layer(bias=True, dtype=torch.float32)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    g = torch.randn(64, 3, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = one(x)
    assert y.dtype == torch.bfloat16
    y.backward(g)
    assert {t.grad.dtype for t in (x, one.weight, one.bias)} == {torch.float32}
    for found, expected in ((x.grad, g.float() @ b), (one.weight.grad, g.float().t() @ x.detach())):
        assert (found - expected).norm() / expected.norm() < 1e-2


def test_bf16_training_of_fa_runs_and_with_b_w_is_bps() -> None:
    config = config_of("method=fa", "precision=bf16")
    losses = [trained(config, 3).update() for _ in range(2)]
    assert losses[0] == losses[1]
    found = []
    for method in ("fa", "bp"):
        model = build(f"method={method}", "precision=bf16")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        feed_back_weights(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(model))
    assert_equal(*found)


# B = W


def feed_back_weights(model: nn.Module) -> None:
    for one in matrices(model).values():
        if one.feedback_rule is not None:
            one.feedback.data.copy_(one.weight.data)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("method", ["fa", "kp"])
def test_with_b_equal_to_w_every_gradient_is_bps_bit_for_bit(method: str, precision: str) -> None:
    ours, bp = (perturb(build(f"method={m}", f"precision={precision}")) for m in (method, "bp"))
    assert gradients(ours)["wte.weight"].ne(gradients(bp)["wte.weight"]).any()
    feed_back_weights(ours)
    assert_equal(gradients(ours), gradients(bp))


# Whole models against a detach-only oracle


def by_detaching(model: gpt.GPT, b: dict[str, Tensor]) -> None:
    """Give a bp model's layers y = linear(x detached) + (x − x detached)·Bᵀ: its value is y, its input gradient g·B."""

    def forward(one: credit.FeedbackLinear, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x.detach(), one.weight, one.bias) + F.linear(x - x.detach(), matrix)

    for name, one in matrices(model).items():
        if name in b:
            one.forward = forward(one, b[name])


@pytest.mark.parametrize("method", LAYERWISE)
def test_every_method_puts_its_b_where_backprop_has_the_weight(method: str) -> None:
    ours, twin = perturb(build(f"method={method}")), perturb(build("method=bp"))
    b = {name: one.backward_matrix().clone() for name, one in matrices(ours).items()}
    assert len(b) == 4 * N_LAYER + 1
    by_detaching(twin, b)
    assert_close(gradients(ours), gradients(twin))


ORDER = [
    *("wte.weight", "wpe.weight"),
    *(f"blocks.{i}.{module}.{leaf}" for i in range(N_LAYER) for module in IN_A_BLOCK for leaf in ("weight", "bias")),
    *("ln_f.weight", "ln_f.bias", "head.weight"),
]
"""Parameters in the order the forward pass meets them (pre-LN)."""


@pytest.mark.parametrize("kind", KIND.values())
def test_a_policy_changes_its_own_kind_alone(kind: str) -> None:
    """One kind random: only those layers have a B, and exactly the parameters before the last of them change."""
    ours, bp = perturb(build("method=fa", *policy(**{kind: "random"}))), perturb(build("method=bp"))
    assert {kind_of(n) for n, one in matrices(ours).items() if one.feedback is not None} == {kind}
    assert {kind_of(n): one.kind for n, one in matrices(ours).items()} == {k: k for k in KIND.values()}
    found, plain = gradients(ours), gradients(bp)
    last = next(n for n in reversed(ORDER) if n.endswith("weight") and KIND.get(".".join(n.split(".")[-3:-1])) == kind)
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert changed == set(ORDER[: ORDER.index(last)])
    by_detaching(bp, {n: one.feedback for n, one in matrices(ours).items() if one.feedback is not None})
    assert_close(found, gradients(bp))


@pytest.mark.parametrize("kind", KIND.values())
def test_a_policy_can_leave_one_kind_true(kind: str) -> None:
    """Written as on the command line; the other layers' B are what they are without it."""
    ours, all_random = build("method=fa", f"method.policy.{kind}=true"), build("method=fa")
    for name, one in matrices(ours).items():
        if kind_of(name) == kind:
            assert one.feedback is None
            assert torch.equal(one.backward_matrix(), one.weight)
        else:
            assert torch.equal(one.feedback, matrices(all_random)[name].feedback)


def test_quick_configs_are_composed_ones() -> None:
    overrides = ("method=fa", "method.policy.head=true", "optimizer=sgd", "optimizer.grad_clip=null", "model.tie=true")
    assert config_of(*overrides) == compose(*TINY, *overrides)


def test_command_line_policy_is_read_as_a_member_and_not_a_boolean() -> None:
    found = compose("method.policy.head=true").method.policy
    assert found.head is methods.Transpose.true
    assert found.qkv is methods.Transpose.random


# The forward pass and the loss


def test_logits_and_loss_are_the_same_under_every_method() -> None:
    logits, loss = build("method=bp")(IDX, TARGETS)
    assert torch.equal(loss, F.cross_entropy(logits.view(-1, VOCAB), TARGETS.view(-1)))
    for method in METHODS:
        theirs = build(f"method={method}")(IDX, TARGETS)
        assert torch.equal(theirs[0], logits), method
        assert torch.equal(theirs[1], loss), method


def test_the_head_learns_by_the_true_gradient_under_every_method() -> None:
    """Nothing lies between the loss and head.weight; one layer further down, only ln_f's error differs."""
    truth = gradients(perturb(build("method=bp")))["head.weight"]
    for method in METHODS:
        assert torch.equal(gradients(perturb(build(f"method={method}")))["head.weight"], truth), method


# fa's feedback


def spread(model: nn.Module) -> dict[str, float]:
    return {name: one.feedback.std().item() for name, one in matrices(model).items()}


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_fa_draws_b_with_the_weights_initial_spread(distribution: str, scale: float) -> None:
    model = build("method=fa", "model.n_embd=64", f"method.distribution={distribution}", f"method.scale={scale}")
    for name, one in matrices(model).items():
        std = scale * 0.02 / (math.sqrt(2 * N_LAYER) if name.endswith("proj") else 1)
        b, n = one.feedback, one.feedback.numel()
        assert b.shape == one.weight.shape
        assert b.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
        assert abs(b.mean().item()) < 5 * std / math.sqrt(n), name
        assert (b.abs().max().item() <= std * math.sqrt(3)) == (distribution == "uniform"), name


def test_fa_draws_b_apart_from_w_and_apart_for_each_layer() -> None:
    model = build("method=fa", "model.n_embd=64")
    draws = [t.detach().flatten()[:704] for one in matrices(model).values() for t in (one.weight, one.feedback)]
    off = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert off.abs().max() < 5.5 / math.sqrt(704)


def test_fa_leaves_the_initial_weights_of_bp() -> None:
    assert_equal(dict(build("method=fa").named_parameters()), dict(build("method=bp").named_parameters()))


@pytest.mark.parametrize("other", ["attn_mode=sigmoid", "attn_mode=linear", "ln_backward=ste", "model.qk_norm=true"])
def test_feedback_is_one_seeds_whatever_the_attention_and_the_norms_backward(other: str) -> None:
    for method in ("fa", "frsf", "kp", "dfa"):
        plain, changed = (feedback(build(f"method={method}", *more)) for more in ([], [other]))
        assert_equal(changed, plain)


def test_feedback_follows_the_seed() -> None:
    for method in ("fa", "frsf", "brsf", "kp", "dfa"):
        one, again, other = (feedback(build(f"method={method}", f"seed={s}")) for s in (1, 1, 2))
        assert one
        assert_equal(one, again)
        assert not any(torch.equal(one[name], other[name]) for name in one), method


@pytest.mark.parametrize("method", ["fa", "dfa", "usf", "frsf"])
def test_stored_feedback_is_stable_over_updates(method: str) -> None:
    training = Training(config_of(f"method={method}"), corpus())
    before = feedback(training.model)
    assert len(before) == (N_LAYER if method == "dfa" else 4 * N_LAYER + 1)
    weights = {name: p.clone() for name, p in training.model.named_parameters()}
    for _ in range(4):
        training.update()
    assert_equal(feedback(training.model), before)
    assert not any(torch.equal(p, weights[name]) for name, p in training.model.named_parameters())


# Sign-symmetric feedback


def test_usf_feeds_back_the_signs_at_one_magnitude() -> None:
    model = trained(config_of("method=usf", "method.scale=2.0", "optimizer.lr=0.02"), 3).model
    for name, one in matrices(model).items():
        s = 2 * 0.02 / (math.sqrt(2 * N_LAYER) if name.endswith("proj") else 1)
        torch.testing.assert_close(one.backward_matrix(), s * one.weight.detach().sign(), rtol=1e-12, atol=0)


def test_frsf_keeps_its_magnitudes_while_signs_follow_w() -> None:
    training = Training(config_of("method=frsf", "optimizer.lr=0.02"), corpus())
    start = {
        name: (one.backward_matrix().clone(), one.weight.clone()) for name, one in matrices(training.model).items()
    }
    for _ in range(4):
        training.update()
    for name, one in matrices(training.model).items():
        b, w = one.backward_matrix(), one.weight.detach()
        flipped = w.sign() != start[name][1].sign()
        assert 0.05 < flipped.double().mean() < 0.95  # the law is not empty
        assert torch.equal(b.abs(), start[name][0].abs())
        assert torch.equal(b.sign(), w.sign())
        assert b.abs().unique().numel() > b.numel() // 2


@pytest.mark.parametrize("method", SIGNED)
def test_sign_symmetric_magnitudes_have_the_weights_initial_spread(method: str) -> None:
    model = build(f"method={method}", "model.n_embd=64")
    for name, one in matrices(model).items():
        std = 0.02 / (math.sqrt(2 * N_LAYER) if name.endswith("proj") else 1)
        rms = one.backward_matrix().pow(2).mean().sqrt().item()
        assert rms == pytest.approx(std, rel=5 / math.sqrt(2 * one.weight.numel())), name


def used(seed: int, updates: int, *overrides: str) -> list[dict[str, Tensor]]:
    """The magnitudes |B| in use in each update's backward pass."""
    training = Training(config_of("method=brsf", f"seed={seed}", *overrides), corpus())
    seen: list[dict[str, Tensor]] = []
    training.config.method.before_update = lambda model: seen.append(
        {name: one.backward_matrix().abs() for name, one in matrices(model).items()}
    )
    for _ in range(updates):
        training.update()
    return seen


def test_brsf_redraws_its_magnitudes_for_each_update_from_seed_and_step_alone() -> None:
    first, again, other = used(1, 4), used(1, 4, "attn_mode=sigmoid", "optimizer.lr=0.01"), used(2, 4)
    for step in range(4):
        assert_equal(first[step], again[step])
    draws = [*first, *other]
    for i, one in enumerate(draws):
        for two in draws[:i]:
            assert not any(torch.equal(one[name], two[name]) for name in one)


def test_brsf_at_one_step_does_not_depend_on_the_steps_before() -> None:
    config, model = config_of("method=brsf"), build("method=brsf")
    config.method.refresh(model, 5, 3)
    once = feedback(model)
    for step in (0, 1, 2, 3):
        config.method.refresh(model, 5, step)
    assert_equal(feedback(model), once)


@pytest.mark.parametrize("method", SIGNED)
def test_sign_symmetric_feedback_has_ws_signs(method: str) -> None:
    model = trained(config_of(f"method={method}", "optimizer.lr=0.02"), 2).model
    for one in matrices(model).values():
        assert torch.equal(one.backward_matrix().sign(), one.weight.detach().sign())


# frozen


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_moves_no_block_parameter_by_a_bit(optimizer: str) -> None:
    config = config_of("method=frozen", f"optimizer={optimizer}", "optimizer.weight_decay=0.5")
    training = Training(config, corpus())
    before = {n: p.clone() for n, p in training.model.named_parameters()}
    for _ in range(4):
        training.update()
    changed = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "head.weight"}


def test_frozen_has_bps_gradients_and_a_row_for_every_norm() -> None:
    assert_equal(gradients(build("method=frozen")), gradients(build("method=bp")))
    rows = {}
    for method in ("frozen", "bp"):
        training = Training(config_of(f"method={method}"), corpus())
        rows[method] = probe(training.model).measure([(IDX, TARGETS)], training.loss).to_dict("records")
    sites = {f"blocks.{i}.ln_{j}" for i in range(N_LAYER) for j in (1, 2)} | {"ln_f"}
    assert {row["site"] for row in rows["frozen"]} == sites
    assert rows["frozen"] == rows["bp"]
    after = trained(config_of("method=frozen"), 2)
    assert set(after.diagnose()["layers"]["site"]) == sites


def test_frozen_clips_what_it_trains() -> None:
    training = trained(config_of("method=frozen", "optimizer.grad_clip=0.05"), 1)
    norms = [p.grad.norm() for n, p in training.model.named_parameters() if not n.startswith("blocks.")]
    assert torch.stack(norms).norm().item() == pytest.approx(0.05, rel=1e-3)


# What is refused


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_head_is_refused_unless_every_gradient_is_true(method: str) -> None:
    assert problems(f"method={method}") == []
    found = problems(f"method={method}", "model.tie=true")
    if method in ("bp", "frozen"):
        assert found == []
    else:
        assert len(found) == 1
        assert "model.tie=true" in found[0]
        assert f"method={method}" in found[0]
        assert "model.tie=false" in found[0]


@pytest.mark.parametrize("method", LAYERWISE)
def test_a_policy_without_any_random_matrix_is_refused(method: str) -> None:
    found = problems(f"method={method}", *policy())
    assert len(found) == 1
    assert "method=bp" in found[0]
    assert problems(f"method={method}", *policy(fc="random")) == []


@pytest.mark.parametrize("method", [*LAYERWISE, "dfa"])
@pytest.mark.parametrize("scale", ["0.0", "-1.0", ".nan", ".inf"])
def test_an_impossible_scale_is_refused(method: str, scale: str) -> None:
    found = problems(f"method={method}", f"method.scale={scale}")
    assert len(found) == 1
    assert found[0].startswith("method.scale=")
    assert "must be positive and finite" in found[0]


@pytest.mark.parametrize("decay", [".inf", ".nan", "-1.0"])
def test_an_impossible_kp_decay_is_refused(decay: str) -> None:
    assert any("method.decay=" in p for p in problems("method=kp", f"method.decay={decay}"))


def test_kp_without_decay_and_dfa_with_a_random_head_are_refused() -> None:
    assert any("method.decay=0.0" in p and "method=fa" in p for p in problems("method=kp", "method.decay=0.0"))
    assert any("method.policy.head=random" in p for p in problems("method=dfa", "method.policy.head=random"))
    assert any("method.uniform=true" in p for p in problems("method=usf", "method.redraw=true"))


def test_only_trained_parameters_and_kps_feedback_reach_the_optimizer() -> None:
    for method in METHODS:
        config, model = config_of(f"method={method}"), build(f"method={method}")
        given = optim.trained(model, config.method)
        everything = {n for n, _ in model.named_parameters()}
        left_out = {n for n in everything if n.startswith("blocks.")} if method == "frozen" else set()
        assert given.keys() == everything - left_out, method
        assert any("feedback" in n for n in given) == (method == "kp"), method


def test_precision_rounds_the_same_feedback() -> None:
    fp64, fp32 = (feedback(build("method=fa", f"precision={p.value}")) for p in (Precision.fp64, Precision.fp32))
    assert_equal({n: m.float() for n, m in fp64.items()}, fp32)
