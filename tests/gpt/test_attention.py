"""Attention modes against a loop over queries and keys; causality through the whole model; sigmoid's bias; the 1/n."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig, check
from lnjac.gpt import model as gpt
from lnjac.gpt.attention import Attention

MODES = ("softmax", "sigmoid", "relu", "linear")
BLOCK = 12
"""The configured block_size: larger than most sequences below."""


@functools.cache
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    return compose("model=tiny", "model.n_embd=16", f"model.block_size={BLOCK}", "precision=fp64", *overrides)


def config_of(*overrides: str) -> RunConfig:
    return copy.deepcopy(_composed(overrides))


def mode_of(name: str) -> Attention:
    mode: Attention = config_of(f"attn_mode={name}").attn_mode
    return mode


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def row_of_weights(name: str, scores: Tensor) -> Tensor:
    """The published formula on one query's scores with the keys it may see: (i,) -> (i,)."""
    formulas: dict[str, Callable[[], Tensor]] = {
        "softmax": lambda: (scores - scores.max()).exp() / (scores - scores.max()).exp().sum(),
        "sigmoid": lambda: 1 / (1 + (-(scores - math.log(BLOCK))).exp()),
        "relu": lambda: scores * (scores > 0) / BLOCK,
        "linear": lambda: scores / BLOCK,
    }
    return formulas[name]()


def looped(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, T, d_h) -> the same: query i sees keys 0…i."""
    size = q.shape[-1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = torch.stack([(q[b, h, i] * k[b, h, j]).sum() / math.sqrt(size) for j in range(i + 1)])
                weights = row_of_weights(name, scores)
                rows.append(sum(weights[j] * v[b, h, j] for j in range(i + 1)))
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("t", [1, 2, 5, BLOCK])
@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_the_loop_over_queries(name: str, t: int) -> None:
    q, k, v = draws(2, 3, t, 4)
    torch.testing.assert_close(mode_of(name).attend(q, k, v, BLOCK), looped(name, q, k, v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODES)
def test_gradients_are_those_of_the_loop(name: str) -> None:
    theirs, ours = [[x.requires_grad_() for x in draws(2, 2, 5, 4, seed=1)] for _ in range(2)]
    cotangent = draws(2, 2, 5, 4, seed=2)[0]
    expected = torch.autograd.grad(looped(name, *theirs), theirs, cotangent)
    found = torch.autograd.grad(mode_of(name).attend(*ours, BLOCK), ours, cotangent)
    for e, f in zip(expected, found, strict=True):
        assert e.norm() > 0
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("t", [1, 7, BLOCK])
def test_softmax_fused_is_softmax_explicit(t: int) -> None:
    softmax = mode_of("softmax")
    fused, explicit = ([x.requires_grad_() for x in draws(2, 3, t, 4)] for _ in range(2))
    a = softmax.attend(*fused, BLOCK)
    b = Attention.attend(softmax, *explicit, BLOCK)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for x, y in zip(
        torch.autograd.grad(a.sin().sum(), fused), torch.autograd.grad(b.sin().sum(), explicit), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MODES)
def test_explicit_weights_are_zero_on_the_future_alone(name: str) -> None:
    scores = torch.rand(2, 3, 6, 6, dtype=torch.float64) + 0.1
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(mode_of(name).weights(scores, mask, BLOCK) != 0, mask.expand(2, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODES)
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    q, k, v = draws(1, 2, 6, 4, dtype=dtype)
    out = mode_of(name).attend(q, k, v, BLOCK)
    assert out.dtype == dtype
    truth = looped(name, q.double(), k.double(), v.double())
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert (out.double() - truth).norm() / truth.norm() < bound


@pytest.mark.parametrize("name", ["relu", "linear"])
@pytest.mark.parametrize("t", [3, 6, BLOCK])
def test_n_is_the_configured_block_size_whatever_the_length(name: str, t: int) -> None:
    """Doubling n halves the output; halving T does not change what the first half sees."""
    q, k, v = draws(1, 2, t, 4)
    mode = mode_of(name)
    whole = mode.attend(q, k, v, BLOCK)
    torch.testing.assert_close(mode.attend(q, k, v, 2 * BLOCK), whole / 2)
    part = mode.attend(*(x[:, :, : t // 2 + 1] for x in (q, k, v)), BLOCK)
    torch.testing.assert_close(part, whole[:, :, : t // 2 + 1])


def test_sigmoid_bias_defaults_to_minus_log_block_size() -> None:
    for block_size in (1, 7, 64):
        config = compose("attn_mode=sigmoid", f"model.block_size={block_size}")
        assert config.attn_mode.bias == pytest.approx(-math.log(block_size), abs=1e-15)


def test_sigmoid_bias_given_is_kept_and_used() -> None:
    mode = config_of("attn_mode=sigmoid", "attn_mode.bias=-10").attn_mode
    assert mode.bias == -10
    scores = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weights = mode.weights(scores, torch.ones(3, 3, dtype=torch.bool).tril(), BLOCK)
    assert weights[0, 0, 2, 2].item() == pytest.approx(1 / (1 + math.exp(10)), rel=1e-12)


@pytest.mark.parametrize("bias", ["nan", "inf", "-inf"])
def test_sigmoid_bias_must_be_finite(bias: str) -> None:
    problems = check(config_of("attn_mode=sigmoid", f"attn_mode.bias={bias}"))
    assert [p for p in problems if "attn_mode.bias" in p and "null" in p]


def test_sigmoid_mass_at_initialisation_is_i_over_n() -> None:
    """With zero scores row i (from 1) has mass i/(1+n) exactly; a fresh model's scores are nearly zero."""
    n = 64
    config = compose("model=tiny", f"model.block_size={n}", "attn_mode=sigmoid", "precision=fp64")
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    i = torch.arange(1, n + 1, dtype=torch.float64)
    zero = config.attn_mode.weights(torch.zeros(n, n, dtype=torch.float64), mask, n).sum(-1)
    torch.testing.assert_close(zero, i / (1 + n), rtol=1e-12, atol=0)
    model = gpt.build(config, 11)
    seen = []
    inner = config.attn_mode.weights
    config.attn_mode.weights = lambda *args: seen.append(inner(*args)) or seen[-1]
    model(torch.randint(11, (3, n), generator=torch.Generator().manual_seed(0)))
    assert len(seen) == config.model.n_layer
    for weights in seen:
        mass = weights.sum(-1).mean((0, 1))
        torch.testing.assert_close(mass, i / n, rtol=0.03, atol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
@pytest.mark.parametrize("name", MODES)
def test_a_later_token_changes_no_earlier_logit(name: str, placement: str, qk_norm: bool) -> None:
    config = config_of(f"attn_mode={name}", f"model.placement={placement}", f"model.qk_norm={qk_norm}")
    model = gpt.build(config, 11)
    grow(model)
    idx = torch.randint(11, (2, BLOCK), generator=torch.Generator().manual_seed(1))
    logits = model(idx)[0]
    for at in (1, BLOCK // 2, BLOCK - 1):
        other = idx.clone()
        other[:, at] = (other[:, at] + 1) % 11
        changed = (model(other)[0] - logits).abs().amax((0, 2))
        assert changed[:at].max() == 0
        assert changed[at:].min() > 1e-9  # and it does reach every later one


@pytest.mark.parametrize("name", MODES)
def test_a_prefix_has_the_logits_it_has_in_the_whole(name: str) -> None:
    model = gpt.build(config_of(f"attn_mode={name}"), 11)
    grow(model)
    idx = torch.randint(11, (2, BLOCK), generator=torch.Generator().manual_seed(1))
    whole = model(idx)[0]
    for t in (1, 5, BLOCK - 1):
        torch.testing.assert_close(model(idx[:, :t])[0], whole[:, :t], rtol=1e-11, atol=1e-13)


@torch.no_grad()
def grow(model: torch.nn.Module) -> None:
    """Larger weights than at initialisation, so that attention is far from uniform."""
    for p in model.parameters():
        p.mul_(8.0)
