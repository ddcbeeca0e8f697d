"""Credit assignment in float64: closed forms for one layer, independent pullbacks for whole models, laws over updates."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from support.trained import BLOCK, N_LAYER, TINY, VOCAB, D, config_of, corpus, perturb, tokens, trained
from torch import Tensor, nn

from lnjac.config.compose import compose
from lnjac.config.schema import Precision, check
from lnjac.gpt import credit, methods
from lnjac.gpt import model as gpt
from lnjac.gpt import optimizers as optim
from lnjac.norms.probe import probe
from lnjac.training.loop import Training

METHODS = ("bp", "fa", "usf", "frsf", "brsf", "kp", "frozen", "dfa")
LAYERWISE = ("fa", "usf", "frsf", "brsf", "kp")
SIGNED = ("usf", "frsf", "brsf")


def build(*overrides: str) -> gpt.GPT:
    return gpt.build(config_of(*overrides), VOCAB)


IDX, TARGETS = tokens(3, BLOCK), tokens(3, BLOCK, seed=1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The loss's gradients by name, feedback left out; they are taken anew."""
    model.zero_grad()
    model(IDX, TARGETS)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "feedback" not in name}


def matrices(model: nn.Module) -> dict[str, credit.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, credit.Linear)}


KIND = {"attn.qkv": "qkv", "attn.proj": "attn_proj", "mlp.fc": "fc", "mlp.proj": "mlp_proj", "head": "head"}


def kind_of(name: str) -> str:
    return KIND[name.rpartition("blocks.")[2].partition(".")[2] or name]


def policy(**kinds: str) -> list[str]:
    return [f"method.policy.{kind}={kinds.get(kind, 'true')}" for kind in KIND.values()]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=tol, atol=tol * 1e-3, msg=name)


# One layer, closed form


def layer(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[credit.Linear, Tensor]:
    """A layer (5 -> 3) of draws and a feedback matrix of its own."""
    generator = torch.Generator().manual_seed(0)
    one = credit.Linear(5, 3, bias=bias, kind="fc", init_std=0.02)
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

    def forward(one: credit.Linear, matrix: Tensor) -> Callable[[Tensor], Tensor]:
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


IN_A_BLOCK = ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.fc", "mlp.proj")
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


def feedback(model: nn.Module) -> dict[str, Tensor]:
    """What is stored with the run: every feedback matrix in its state_dict."""
    return {name: t.clone() for name, t in model.state_dict().items() if "feedback" in name}


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


# Kolen–Pollack

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


# Direct feedback


def errors(logits: Tensor, head: Tensor, error: str) -> Tensor:
    """e at each token: (softmax − onehot)/N, or that pulled through the head."""
    e = (logits.softmax(-1) - F.one_hot(TARGETS, VOCAB)) / TARGETS.numel()
    return e if error == "logits" else e @ head


def parts_of(model: gpt.GPT, inject: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The taught parts in order, each with its parameters' prefix or prefixes."""
    for i, block in enumerate(model.blocks):
        if inject == "block":
            yield (f"blocks.{i}.",), block
        elif block.pre:
            yield (f"blocks.{i}.ln_1.", f"blocks.{i}.attn."), lambda h, b=block: h + b.attn(b.ln_1(h))
            yield (f"blocks.{i}.ln_2.", f"blocks.{i}.mlp."), lambda h, b=block: h + b.mlp(b.ln_2(h))
        else:
            yield (f"blocks.{i}.ln_1.", f"blocks.{i}.attn."), lambda h, b=block: b.ln_1(h + b.attn(h))
            yield (f"blocks.{i}.ln_2.", f"blocks.{i}.mlp."), lambda h, b=block: b.ln_2(h + b.mlp(h))


def pulled_back(model: gpt.GPT, bp: gpt.GPT, inject: str, error: str, cut_head: bool) -> dict[str, Tensor]:
    """dfa's gradients part by part: each part's own pullback of e·B; the rest by true backprop of what is left.

    `bp` is a backprop model of the same weights; B_ℓ is read from the dfa model.
    """
    p = dict(bp.named_parameters())
    found: dict[str, Tensor] = {}
    h = bp.wte(IDX) + bp.wpe(torch.arange(BLOCK))
    top = errors(bp(IDX)[0], bp.head.weight, error).detach()
    parts = list(parts_of(bp, inject))
    for i, (prefixes, part) in enumerate(parts):
        names = [n for n in p if n.startswith(tuple(prefixes))] + (["wte.weight", "wpe.weight"] if i == 0 else [])
        out = part(h)
        if i == len(parts) - 1 and not cut_head:
            loss = F.cross_entropy(bp.head(bp.ln_f(out)).view(-1, VOCAB), TARGETS.view(-1))
            grads = torch.autograd.grad(loss, [p[n] for n in names])
        else:
            b = model.state_dict()[f"broadcast.feedback_{i}"]
            grads = torch.autograd.grad(out, [p[n] for n in names], top @ b)
        found |= dict(zip(names, grads, strict=True))
        h = out.detach()
    loss = F.cross_entropy(bp.head(bp.ln_f(h)).view(-1, VOCAB), TARGETS.view(-1))
    above = [n for n in p if n.startswith(("ln_f", "head"))]
    return found | dict(zip(above, torch.autograd.grad(loss, [p[n] for n in above]), strict=True))


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("cut_head", [True, False])
@pytest.mark.parametrize("error", ["logits", "hidden"])
@pytest.mark.parametrize("inject", ["block", "sublayer"])
def test_dfa_is_the_pullback_of_each_part(inject: str, error: str, cut_head: bool, placement: str) -> None:
    options = [f"method.inject={inject}", f"method.error={error}", f"method.cut_head={cut_head}"]
    shape = f"model.placement={placement}"
    ours = perturb(build("method=dfa", *options, shape))
    bp = perturb(build("method=bp", shape))
    points = N_LAYER * (1 if inject == "block" else 2) - (not cut_head)
    b = feedback(ours)
    assert len(b) == points
    assert {tuple(m.shape) for m in b.values()} == {(VOCAB if error == "logits" else D, D)}
    found = gradients(ours)
    assert_close(found, pulled_back(ours, bp, inject, error, cut_head))
    truth = gradients(bp)
    above = [n for n in found if n.startswith(("ln_f", "head"))]
    assert above
    assert_equal({n: found[n] for n in above}, {n: truth[n] for n in above})


def test_a_surrogate_at_ln_f_reaches_no_block_under_dfa() -> None:
    """Only the rounding of ln_f's own gradient differs, by which docs/study judges the costs of so unstable a method."""
    exact = gradients(perturb(build("method=dfa")))
    found = gradients(perturb(build("method=dfa", "ln_backward=center_scale", "ln_backward.sites=[ln_f]")))
    assert_close(found, exact)
    others = [name for name in found if not name.startswith("ln_f")]
    assert_equal({n: found[n] for n in others}, {n: exact[n] for n in others})


def test_dfa_error_is_the_derivative_of_the_loss_by_the_logits() -> None:
    logits = build("method=bp")(IDX)[0].detach().requires_grad_()
    F.cross_entropy(logits.view(-1, VOCAB), TARGETS.view(-1)).backward()
    torch.testing.assert_close(errors(logits, None, "logits"), logits.grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_dfas_loss_is_the_cross_entropy_bit_for_bit(precision: str) -> None:
    for options in ([], ["method.inject=sublayer", "method.error=hidden"], ["method.cut_head=false"]):
        model = build("method=dfa", f"precision={precision}", *options)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits, loss = model(IDX, TARGETS)
            with torch.autocast("cpu", enabled=False):
                top = logits if precision == "fp64" else logits.float()
                assert torch.equal(loss, F.cross_entropy(top.view(-1, VOCAB), TARGETS.view(-1)))
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_bf16_dfa_is_near_fp32_dfa() -> None:
    found = []
    for precision in ("fp32", "bf16"):
        model = perturb(build("method=dfa", f"precision={precision}"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.05


@pytest.mark.parametrize(("error", "std"), [("logits", 0.02), ("hidden", 1 / math.sqrt(64))])
def test_dfas_matrices_have_the_stated_spread(error: str, std: float) -> None:
    b = feedback(build("method=dfa", "model.n_embd=64", f"method.error={error}", "method.scale=2"))
    for m in b.values():
        assert m.std().item() == pytest.approx(2 * std, rel=5 / math.sqrt(2 * m.numel()))
    one, two = b.values()
    assert abs(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) < 5 / math.sqrt(one.numel())


def test_dfa_outputs_reach_no_earlier_block() -> None:
    model = perturb(build("method=dfa"))
    taught: list[Tensor] = []
    model.broadcast.teach = lambda outputs, *_: taught.extend(outputs) or torch.zeros(())
    model(IDX, TARGETS)
    assert len(taught) == N_LAYER
    for out, block in zip(taught, model.blocks, strict=True):
        reached = torch.autograd.grad(out.sin().sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
        names = {
            n.rpartition(".")[0] for (n, _), g in zip(model.named_parameters(), reached, strict=True) if g is not None
        }
        embeddings = {"wte", "wpe"} if block is model.blocks[0] else set()
        assert {n for n in names if not n.startswith("blocks.")} == embeddings
        own = next(f"blocks.{i}." for i in range(N_LAYER) if model.blocks[i] is block)
        assert {n for n in names if n.startswith("blocks.")} == {own + m for m in IN_A_BLOCK}


def test_dfa_policy_acts_inside_a_block() -> None:
    """fc random: in each block what lies before fc changes, the rest and the other blocks' errors do not."""
    ours, plain = (gradients(perturb(build("method=dfa", *more))) for more in (["method.policy.fc=random"], []))
    changed = {n for n in ours if not torch.equal(ours[n], plain[n])}
    modules = ("ln_1", "attn.qkv", "attn.proj", "ln_2")
    before = {f"blocks.{i}.{m}.{leaf}" for i in range(N_LAYER) for m in modules for leaf in ("weight", "bias")}
    assert changed == before | {"wte.weight", "wpe.weight"}


def test_dfa_with_nothing_to_teach_is_refused() -> None:
    """One block, left to its true gradient: no point is taught, and what remains is backprop."""
    (said,) = problems("method=dfa", "model.n_layer=1", "method.cut_head=false", "method.inject=block")
    assert "use method=bp" in said
    assert not problems("method=dfa", "model.n_layer=1", "method.cut_head=false", "method.inject=sublayer")


def test_dfa_without_targets_gives_the_logits() -> None:
    logits, loss = build("method=dfa")(IDX)
    assert loss is None
    assert torch.equal(logits, build("method=bp")(IDX)[0])


# What is refused


def problems(*overrides: str) -> list[str]:
    return check(config_of(*overrides))


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
