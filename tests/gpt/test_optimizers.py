"""Learning-rate schedules by their values, optimizers against their papers' formulas, groups, and what is refused."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from lnjac.config import identity, schema
from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig, check
from lnjac.data.corpus import Corpus
from lnjac.gpt import model as gpt
from lnjac.gpt import optimizers as optim
from lnjac.training.loop import Training

TINY = ("model=tiny", "model.n_embd=8", "model.block_size=8", "precision=fp64", "batch_size=4", "method=bp")


@functools.cache
def _composed(groups: tuple[str, ...]) -> RunConfig:
    return compose(*TINY, *groups)


def config_of(*overrides: str) -> RunConfig:
    """compose(*TINY, *overrides), quicker: Hydra runs once per choice of groups, dotted values are merged in afterwards."""
    groups = tuple(o for o in overrides if o.startswith(("method=", "optimizer=")))
    rest = OmegaConf.from_dotlist([o for o in overrides if o not in groups])
    return schema.build(OmegaConf.merge(OmegaConf.create(identity.to_dict(_composed(groups))), rest))


def schedule(updates: int, *overrides: str) -> list[float]:
    optimizer = config_of("optimizer.lr=1.0", *overrides).optimizer
    return [optimizer.lr_at(n, updates) for n in range(updates)]


# Schedules


def test_constant_is_the_default() -> None:
    assert schedule(4) == [1.0] * 4
    assert compose("method=bp").optimizer.lr_at(100, 250) == 1e-3


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_lr_in_equal_steps_from_the_first_update(decay: str) -> None:
    found = schedule(10, "optimizer.warmup_steps=4", f"optimizer.decay={decay}", "optimizer.final_lr_ratio=0.1")
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[-1] == pytest.approx(1.0 if decay == "constant" else 0.1)


def test_linear_decay_is_a_line_to_its_end() -> None:
    assert schedule(5, "optimizer.decay=linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    ends_at_half = schedule(5, "optimizer.decay=linear", "optimizer.final_lr_ratio=0.5")
    assert ends_at_half == pytest.approx([1, 0.875, 0.75, 0.625, 0.5])


def test_cosine_decay_is_half_a_cosine_to_its_end() -> None:
    found = schedule(5, "optimizer.decay=cosine", "optimizer.final_lr_ratio=0.2")
    half = math.sqrt(0.5)
    assert found == pytest.approx([1, 0.2 + 0.8 * (1 + half) / 2, 0.6, 0.2 + 0.8 * (1 - half) / 2, 0.2])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 40),
    st.integers(0, 40),
    st.floats(0, 1),
)
def test_a_schedule_rises_then_falls_within_its_bounds(decay: str, updates: int, warmup: int, final: float) -> None:
    config = copy.deepcopy(_composed(()))
    o = config.optimizer
    o.lr, o.decay, o.warmup_steps, o.final_lr_ratio = 0.3, optim.Decay(decay), min(warmup, updates), final
    found = [o.lr_at(n, updates) for n in range(updates)]
    peak = max(o.warmup_steps - 1, 0)
    assert found[peak] == pytest.approx(0.3)
    assert all(0 < a < b for a, b in itertools.pairwise(found[: peak + 1]))
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(found[peak:]))
    assert min(found[peak:]) >= 0.3 * final - 1e-15


def corpus() -> Corpus:
    train, val = (np.random.default_rng(s).integers(0, 7, 200).astype(np.uint16) for s in (0, 1))
    return Corpus("noise", train, val, 7, "0" * 64, None)


def test_each_update_is_made_at_its_own_rate() -> None:
    """SGD without decay moves by lr·gradient, exactly the scheduled lr."""
    options = ["optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=0.5", "optimizer.warmup_steps=2"]
    config = config_of(*options, "optimizer.decay=linear", "steps=5")
    training = Training(config, corpus())
    rates = []
    for _ in range(5):
        before = training.model.head.weight.detach().clone()
        training.update()
        grad = training.model.head.weight.grad
        rates.append(((before - training.model.head.weight).norm() / grad.norm()).item())
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.25, 0], rel=1e-6)


# Optimizers


def run_on(optimizer: optim.Optimizer, decay: float, grads: list[Tensor], start: Tensor) -> list[Tensor]:
    """The parameter after each update with the given gradients."""
    p = nn.Parameter(start.clone())
    built = optimizer.build([{"params": [p], "weight_decay": decay}])
    seen = []
    for g in grads:
        p.grad = g.clone()
        built.step()
        seen.append(p.detach().clone())
    return seen


def draws() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    return grads, torch.randn(3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_the_papers_and_torchs(decay: float) -> None:
    """θ ← θ − lr·decay·θ − lr·m̂/(√v̂ + ε) (Loshchilov & Hutter 2019, algorithm 2)."""
    options = ["optimizer.lr=0.1", "optimizer.beta1=0.7", "optimizer.beta2=0.8", "optimizer.eps=0.01"]
    optimizer = config_of("optimizer=adamw", *options).optimizer
    grads, p = draws()
    found = run_on(optimizer, decay, grads, p)
    q = nn.Parameter(p.clone())
    torchs = torch.optim.AdamW([q], lr=0.1, betas=(0.7, 0.8), eps=0.01, weight_decay=decay, foreach=False)
    m = v = torch.zeros_like(p)
    for n, g in enumerate(grads, start=1):
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g * g
        p = p - 0.1 * decay * p - 0.1 * (m / (1 - 0.7**n)) / ((v / (1 - 0.8**n)).sqrt() + 0.01)
        q.grad = g.clone()
        torchs.step()
        torch.testing.assert_close(found[n - 1], p, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found[n - 1], q.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.6, False), (0.6, True)])
def test_sgd_has_momentum_and_coupled_decay(momentum: float, nesterov: bool) -> None:
    """u ← μu + (g + decay·θ); θ ← θ − lr·u, or with Nesterov θ − lr·(g + decay·θ + μu)."""
    options = ["optimizer.lr=0.1", f"optimizer.momentum={momentum}", f"optimizer.nesterov={nesterov}"]
    grads, p = draws()
    found = run_on(config_of("optimizer=sgd", *options).optimizer, 0.3, grads, p)
    u = torch.zeros_like(p)
    for n, g in enumerate(grads):
        g = g + 0.3 * p
        u = momentum * u + g
        p = p - 0.1 * (g + momentum * u if nesterov else u)
        torch.testing.assert_close(found[n], p, rtol=1e-12, atol=1e-13)


def test_defaults_are_the_stated_ones() -> None:
    adamw, sgd = compose("optimizer=adamw").optimizer, compose("optimizer=sgd").optimizer
    assert (adamw.lr, adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay) == (1e-3, 0.9, 0.999, 1e-8, 0.01)
    assert (sgd.lr, sgd.momentum, sgd.nesterov, sgd.weight_decay) == (0.1, 0.9, False, 0.0)


# Clipping


@pytest.mark.parametrize("clip", ["null", "1000.0", "0.01"])
def test_clipping_scales_the_whole_gradient_and_only_when_it_is_too_large(clip: str) -> None:
    free, clipped = (Training(config_of("optimizer=sgd", f"optimizer.grad_clip={c}"), corpus()) for c in ("null", clip))
    for training in (free, clipped):
        training.update()
    grads = [(p.grad, q.grad) for p, q in zip(free.model.parameters(), clipped.model.parameters(), strict=True)]
    total = torch.cat([p.flatten() for p, _ in grads]).norm().item()
    assert 0.01 < total < 1000
    for p, q in grads:
        torch.testing.assert_close(q, p * (0.01 / total if clip == "0.01" else 1.0), rtol=1e-3, atol=1e-12)


# Groups


@pytest.mark.parametrize("method", ["bp", "fa", "kp", "frozen", "dfa"])
def test_every_trained_parameter_is_in_one_group(method: str) -> None:
    config = config_of(f"method={method}")
    model = gpt.build(config, 7)
    found = [id(p) for group in optim.groups(model, config.method, 0.25) for p in group["params"]]
    expected = [id(p) for n, p in model.named_parameters() if method != "frozen" or not n.startswith("blocks.")]
    assert sorted(found) == sorted(expected)


def test_kps_matrices_have_a_group_of_their_own_decay() -> None:
    config = config_of("method=kp", "method.decay=4.0", "method.policy.qkv=true")
    model = gpt.build(config, 7)
    by_decay = {group["weight_decay"]: group["params"] for group in optim.groups(model, config.method, 0.25)}
    assert by_decay.keys() == {0.25, 4.0}
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = ["head", *(f"blocks.{i}.{m}" for i in range(2) for m in ("attn.proj", "mlp.fc", "mlp.proj"))]
    assert {names[id(p)] for p in by_decay[4.0]} == {f"{m}.{leaf}" for m in matrices for leaf in ("weight", "feedback")}


def test_one_group_suffices_where_decays_agree() -> None:
    for overrides in (["method=bp"], ["method=kp", "method.decay=0.25"]):
        config = config_of(*overrides)
        groups = optim.groups(gpt.build(config, 7), config.method, 0.25)
        assert [group["weight_decay"] for group in groups] == [0.25]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_reaches_the_optimizer(optimizer: str) -> None:
    """With one decay and without: the first updates differ by lr·decay·θ."""
    start, moved = {}, {}
    for decay in (0.0, 0.5):
        config = config_of(f"optimizer={optimizer}", "optimizer.lr=0.1", f"optimizer.weight_decay={decay}")
        training = Training(config, corpus())
        start = {n: p.detach().clone() for n, p in training.model.named_parameters()}
        training.update()
        moved[decay] = {n: p.detach() for n, p in training.model.named_parameters()}
    for name, p in start.items():
        torch.testing.assert_close(moved[0.0][name] - moved[0.5][name], 0.05 * p, rtol=1e-9, atol=1e-14, msg=name)


# What is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=0.0", "must be positive"),
        ("optimizer.lr=-1.0", "must be positive"),
        ("optimizer.lr=.nan", "must be positive"),
        ("optimizer.lr=.inf", "must be positive and finite"),
        ("optimizer.weight_decay=-0.1", "must not be negative"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay"),
        ("optimizer.eps=.inf", "optimizer.eps"),
        ("optimizer.weight_decay=.nan", "must not be negative"),
        ("optimizer.warmup_steps=-1", "between 0 and steps=250"),
        ("optimizer.warmup_steps=251", "between 0 and steps=250"),
        ("optimizer.final_lr_ratio=1.5", "must lie in [0, 1]"),
        ("optimizer.final_lr_ratio=-0.1", "must lie in [0, 1]"),
        ("optimizer.grad_clip=0.0", "or null for none"),
        ("optimizer.grad_clip=.nan", "or null for none"),
        ("optimizer.beta1=1.0", "must lie in [0, 1)"),
        ("optimizer.beta2=-0.1", "must lie in [0, 1)"),
        ("optimizer.eps=-1.0", "must not be negative"),
    ],
)
def test_an_impossible_setting_is_named_with_its_remedy(override: str, said: str) -> None:
    found = check(config_of("optimizer=adamw", override))
    assert len(found) == 1
    assert override.partition("=")[0] in found[0]
    assert said in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.momentum=1.0"], "must lie in [0, 1)"),
        (["optimizer.momentum=0.0", "optimizer.nesterov=true"], "set optimizer.momentum=0.9, or nesterov=false"),
    ],
)
def test_impossible_sgd_is_refused(overrides: list[str], said: str) -> None:
    found = check(config_of("optimizer=sgd", *overrides))
    assert len(found) == 1
    assert said in found[0]


def test_sound_extremes_are_allowed() -> None:
    extremes = [
        "optimizer.warmup_steps=250",
        "optimizer.final_lr_ratio=1.0",
        "optimizer.grad_clip=1e-9",
        "optimizer.eps=0",
    ]
    assert check(config_of("optimizer=adamw", *extremes)) == []
    assert check(config_of("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true")) == []


def test_every_problem_is_listed_at_once() -> None:
    overrides = ["optimizer.lr=-1.0", "optimizer.beta1=2.0", "optimizer.grad_clip=-1.0"]
    assert len(check(config_of("optimizer=adamw", *overrides))) == 3
