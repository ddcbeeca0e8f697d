"""The GPT against an independent reference and a functional oracle; its initialisation, shapes, options and streams."""

import copy
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from torch import Tensor

from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig, check
from lnjac.data import batches
from lnjac.data import corpus as data
from lnjac.gpt import model as gpt
from lnjac.gpt.norms import DyT, Kind, LayerNorm, PeriLN, PostLN, RMSNorm
from lnjac.norms.layers import norms
from lnjac.seeding import normal, sequence, stream
from lnjac.training.loop import Training

VOCAB = 11
RMS, POST, PERI = RMSNorm("rmsnorm"), PostLN("post"), PeriLN("peri")
DYT = DyT("dyt", 0.7)
TINY = ("model=tiny", "model.n_embd=16", "model.block_size=8", "precision=fp64", "method=bp", "batch_size=4")


@functools.cache
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    return compose(*TINY, *overrides)


def config_of(*overrides: str, **model: Any) -> RunConfig:
    """The tiny config with overrides, and with fields of its model set by keyword."""
    config = copy.deepcopy(_composed(overrides))
    for key, value in model.items():
        assert hasattr(config.model, key)
        setattr(config.model, key, value)
    return config


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def corpus(n: int = 400) -> data.Corpus:
    train, val = (np.random.default_rng(s).integers(0, VOCAB, n).astype(np.uint16) for s in (0, 1))
    return data.Corpus("noise", train, val, VOCAB, "0" * 64, None)


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter, biases and γ too, away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)


def reference_of(model: gpt.GPT, config: RunConfig) -> reference.GPT:
    """A reference with the model's weights."""
    m = config.model
    twin = reference.GPT(VOCAB, m.n_layer, m.n_head, m.n_embd, m.block_size).double()
    twin.load_state_dict(dict(model.named_parameters()))
    return twin


# Against the reference


@pytest.mark.parametrize("n_layer", [1, 3])
def test_logits_and_gradients_are_the_references(n_layer: int) -> None:
    config = config_of(n_layer=n_layer)
    model = gpt.build(config, VOCAB)
    perturb(model)
    twin = reference_of(model, config)
    idx, targets = tokens(3, 8), tokens(3, 8, seed=1)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, twin(idx), rtol=1e-10, atol=1e-10)
    expected = reference.cross_entropy(twin(idx), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs.pop(name).grad, rtol=1e-10, atol=1e-12, msg=name)
    assert not theirs


def test_five_adamw_updates_are_the_references() -> None:
    """The same batches, the same weights after: to 1e-8."""
    config = config_of("optimizer=adamw", "steps=5")
    training = Training(config, corpus())
    twin = reference_of(training.model, config)
    start = copy.deepcopy(dict(twin.named_parameters()))
    again = batches.Batches(corpus().train, 4, 8, stream(config.seed, "batches"))
    reference.train(twin, iter(again.next, None), 5, lr=1e-3, weight_decay=0.01)
    for _ in range(5):
        training.update()
    theirs = dict(twin.named_parameters())
    for name, p in training.model.named_parameters():
        if name.endswith("qkv.bias"):  # a key's bias has no gradient: Adam would step on its rounding errors
            d = config.model.n_embd
            keep = torch.cat([torch.arange(d), torch.arange(2 * d, 3 * d)])
            torch.testing.assert_close(p[keep], theirs[name][keep], rtol=0, atol=1e-8, msg=name)
            continue
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-8, msg=name)
        assert (p - start[name]).abs().max() > 1e-4, name
    expected = reference.validation_loss(twin, corpus().val, 8)
    assert training.validation_loss() == pytest.approx(expected, abs=1e-6)


def test_train_reference_learns_a_period_it_can_see() -> None:
    """A sequence that repeats every 5 tokens costs nothing once learnt; before, it costs log 5."""
    periodic = np.tile(np.array([3, 1, 4, 0, 2], dtype=np.uint16), 60)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 8}
    before = reference.train_reference(periodic, periodic[:48], steps=0, seed=1, **shape)
    after = reference.train_reference(periodic, periodic[:48], steps=60, seed=1, lr=1e-2, **shape)
    assert before == pytest.approx(math.log(5), abs=0.05)
    assert after < 0.2
    assert after == reference.train_reference(periodic, periodic[:48], steps=60, seed=1, lr=1e-2, **shape)


# Options, against a functional oracle


def oracle(p: dict[str, Tensor], config: RunConfig, idx: Tensor) -> Tensor:
    """logits of softmax attention from named parameters, token by token definitions written out; absent ones are skipped."""
    m = config.model
    d, size, t = m.n_embd, m.n_embd // m.n_head, idx.shape[1]

    def norm(x: Tensor, site: str) -> Tensor:
        if m.norm.name == "dyt":
            squashed = torch.tanh(p[f"{site}.learned.alpha"] * x)
            return squashed * p.get(f"{site}.weight", 1.0) + p.get(f"{site}.bias", 0.0)
        centred = x if m.norm.name == "rmsnorm" else x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + m.eps).sqrt() * p.get(f"{site}.weight", 1.0)
        return y + p.get(f"{site}.bias", 0.0)

    def linear(x: Tensor, layer: str) -> Tensor:
        return x @ p[f"{layer}.weight"].T + p.get(f"{layer}.bias", 0.0)

    def attention(x: Tensor, site: str) -> Tensor:
        q, k, v = linear(x, f"{site}.qkv").split(d, dim=-1)
        out = []
        for h in range(m.n_head):
            mine = slice(h * size, (h + 1) * size)
            one_q, one_k = q[..., mine], k[..., mine]
            if m.qk_norm:
                one_q, one_k = norm(one_q, f"{site}.q_norm"), norm(one_k, f"{site}.k_norm")
            scores = one_q @ one_k.transpose(1, 2) / math.sqrt(size)
            past = torch.tril(scores.exp())
            out.append(past / past.sum(-1, keepdim=True) @ v[..., mine])
        return linear(torch.cat(out, -1), f"{site}.proj")

    def mlp(x: Tensor, site: str) -> Tensor:
        a = linear(x, f"{site}.fc")
        return linear(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))), f"{site}.proj")

    h = p["wte.weight"][idx] + p["wpe.weight"][:t]
    h = norm(h, "ln_e") if m.placement.name == "peri" else h
    for i in range(m.n_layer):
        b = f"blocks.{i}"
        if m.placement.name == "pre":
            h = h + attention(norm(h, f"{b}.ln_1"), f"{b}.attn")
            h = h + mlp(norm(h, f"{b}.ln_2"), f"{b}.mlp")
        elif m.placement.name == "peri":
            h = h + norm(attention(norm(h, f"{b}.ln_1"), f"{b}.attn"), f"{b}.ln_out_1")
            h = h + norm(mlp(norm(h, f"{b}.ln_2"), f"{b}.mlp"), f"{b}.ln_out_2")
        else:
            h = norm(h + attention(h, f"{b}.attn"), f"{b}.ln_1")
            h = norm(h + mlp(h, f"{b}.mlp"), f"{b}.ln_2")
    h = h if m.placement.name == "post" else norm(h, "ln_f")
    return h @ p.get("head.weight", p["wte.weight"]).T


VARIANTS = [
    {},
    {"bias": False},
    {"affine": False},
    {"norm": RMS},
    {"norm": RMS, "affine": False, "bias": False},
    {"placement": POST},
    {"placement": POST, "norm": RMS, "qk_norm": True},
    {"norm": DYT},
    {"norm": DYT, "placement": PERI, "qk_norm": True, "affine": False},
    {"placement": PERI},
    {"placement": PERI, "norm": RMS, "qk_norm": True, "n_layer": 3},
    {"qk_norm": True},
    {"qk_norm": True, "bias": False, "n_head": 4},
    {"tie": True},
    {"eps": 0.1},
]


def n_parameters(config: RunConfig) -> int:
    """The closed form: embeddings, n_layer blocks, ln_f, head."""
    m = config.model
    d, b = m.n_embd, int(m.bias)
    per_entry = int(m.affine) * (1 + int(m.bias and m.norm.name != "rmsnorm"))
    of_norm, of_head = (size * per_entry + int(m.norm.name == "dyt") for size in (d, d // m.n_head))
    of_block, outside = {"pre": (2, 1), "post": (2, 0), "peri": (4, 2)}[m.placement.name]
    block = 12 * d * d + 9 * d * b + of_block * of_norm + 2 * of_head * int(m.qk_norm)
    return VOCAB * d * (1 if m.tie else 2) + m.block_size * d + m.n_layer * block + outside * of_norm


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_is_the_oracle_and_has_its_parameters(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    assert check(config) == []
    model = gpt.build(config, VOCAB)
    assert sum(p.numel() for p in model.parameters()) == n_parameters(config)
    perturb(model)
    idx = tokens(3, 7)
    p = dict(model.named_parameters())
    logits, expected = model(idx)[0], oracle(p, config, idx)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, truth = (torch.autograd.grad(y, list(p.values()), cotangent) for y in (logits, expected))
    for name, f, e in zip(p, found, truth, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10, msg=name)


def test_parameter_count_of_the_default_model() -> None:
    """4·(12·128² + 13·128) + (2·65 + 64)·128 + 2·128 for 65 characters."""
    model = gpt.build(compose("method=bp"), 65)
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 13 * 128) + 194 * 128 + 256


def sites(**changes: Any) -> dict[str, tuple[int, ...]]:
    return {name: module.normalized_shape for name, module in norms(gpt.build(config_of(**changes), VOCAB))}


def test_pre_placement_has_two_norms_a_block_and_ln_f() -> None:
    in_blocks = {f"blocks.{i}.ln_{j}": (16,) for i in range(2) for j in (1, 2)}
    assert sites() == {**in_blocks, "ln_f": (16,)}


def test_post_placement_has_no_ln_f() -> None:
    assert sites(placement=POST) == {f"blocks.{i}.ln_{j}": (16,) for i in range(2) for j in (1, 2)}


def test_peri_placement_has_four_norms_a_block_and_one_at_each_end() -> None:
    in_blocks = {f"blocks.{i}.{norm}_{j}": (16,) for i in range(2) for norm in ("ln", "ln_out") for j in (1, 2)}
    assert sites(placement=PERI) == {"ln_e": (16,), **in_blocks, "ln_f": (16,)}


def test_qk_norm_adds_norms_over_one_heads_dimensions() -> None:
    with_norm = sites(qk_norm=True, n_head=4)
    added = {k: v for k, v in with_norm.items() if k not in sites()}
    assert added == {f"blocks.{i}.attn.{c}_norm": (4,) for i in range(2) for c in "qk"}


@pytest.mark.parametrize("kind", [LayerNorm("layernorm"), RMS])
def test_norms_get_eps_kind_and_affine(kind: Kind) -> None:
    for _, module in norms(gpt.build(config_of(norm=kind, eps=0.25, qk_norm=True, affine=False), VOCAB)):
        assert (module.eps, module.rms) == (0.25, kind is RMS)
        assert not list(module.parameters())


def test_bias_false_leaves_no_bias_anywhere() -> None:
    assert [n for n, _ in gpt.build(config_of(bias=False), VOCAB).named_parameters() if n.endswith("bias")] == []


def test_tied_head_is_the_embedding_and_gets_both_gradients() -> None:
    tied, untied = (gpt.build(config_of(tie=tie), VOCAB) for tie in (True, False))
    assert tied.head.weight is tied.wte.weight
    assert torch.equal(tied.wte.weight, untied.wte.weight)  # its draw is the embedding's
    with torch.no_grad():
        untied.head.weight.copy_(untied.wte.weight)
    for model in (tied, untied):
        model(tokens(2, 8), tokens(2, 8, seed=1))[1].backward()
    torch.testing.assert_close(tied.wte.weight.grad, untied.wte.weight.grad + untied.head.weight.grad)


# The loss


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_loss_is_the_mean_cross_entropy(precision: str) -> None:
    model = gpt.build(config_of(f"precision={precision}"), VOCAB)
    assert next(model.parameters()).dtype == {"fp32": torch.float32, "fp64": torch.float64}[precision]
    targets = tokens(3, 8, seed=1)
    logits, loss = model(tokens(3, 8), targets)
    assert torch.equal(loss, F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1)))
    assert logits.shape == (3, 8, VOCAB)
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)  # small weights at the start


def test_without_targets_there_is_no_loss_and_the_same_logits() -> None:
    model = gpt.build(config_of(), VOCAB)
    logits, loss = model(tokens(2, 8))
    assert loss is None
    assert torch.equal(logits, model(tokens(2, 8), tokens(2, 8))[0])


def test_dropout_acts_in_training_only() -> None:
    model = gpt.build(config_of(dropout=0.5), VOCAB)
    idx = tokens(2, 8)
    plain = gpt.build(config_of(), VOCAB)(idx)[0]
    assert torch.equal(model.eval()(idx)[0], plain)
    assert not torch.equal(model.train()(idx)[0], plain)


# Initialisation


def test_initial_spread_per_kind() -> None:
    """N(0, 0.02²); the two residual projections of a block N(0, 0.02²/(2 n_layer))."""
    config = config_of(n_embd=64, block_size=64, n_layer=3)
    for name, p in gpt.build(config, 64).named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif ".ln_" in name or name.startswith("ln_"):
            assert p.eq(1).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("proj.weight") else 0.02
            error = 5 / math.sqrt(2 * p.numel())  # five standard errors of an estimated spread
            assert p.std().item() == pytest.approx(std, rel=error), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
            kurtosis = ((p / p.std()) ** 4).mean().item()
            assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / p.numel())), name


def test_one_seed_builds_one_model_and_another_seed_another() -> None:
    def built(seed: int) -> dict[str, Tensor]:
        config = config_of()
        config.seed = seed
        return gpt.build(config, VOCAB).state_dict()

    first, again, other = built(3), built(3), built(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name.endswith("weight") and "ln_" not in name]
    assert len(drawn) == 11
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_global_randomness_does_not_matter() -> None:
    torch.manual_seed(99)
    first = gpt.build(config_of(), VOCAB).state_dict()
    torch.manual_seed(100)
    second = gpt.build(config_of(), VOCAB).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_precision_rounds_the_same_draws() -> None:
    fp64, fp32 = (gpt.build(config_of(f"precision={p}"), VOCAB).state_dict() for p in ("fp64", "fp32"))
    assert all(torch.equal(fp64[name].float(), fp32[name]) for name in fp64)


@pytest.mark.parametrize(
    "changes",
    [{"n_layer": 4}, {"qk_norm": True}, {"bias": False}, {"norm": RMS}, {"placement": POST}],
    ids=str,
)
def test_shared_parameters_start_alike_whatever_else_the_model_has(changes: dict[str, Any]) -> None:
    """Residual projections keep their draws: only their scale follows n_layer."""
    plain, other = (gpt.build(config_of(**c), VOCAB).state_dict() for c in ({}, changes))
    shared = plain.keys() & other.keys()
    assert "blocks.1.mlp.proj.weight" in shared
    for name in shared:
        ratio = math.sqrt(2 / changes.get("n_layer", 2)) if name.endswith("proj.weight") else 1.0
        torch.testing.assert_close(other[name], plain[name] * ratio, rtol=1e-12, atol=0, msg=name)


def test_parameters_of_one_shape_get_draws_of_their_own() -> None:
    state = gpt.build(config_of(), VOCAB).state_dict()
    seen = [state[n].flatten()[:64] for n in state if n.endswith("weight") and "ln_" not in n]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.5


# Streams

LABELS = st.lists(st.one_of(st.integers(0, 5), st.sampled_from(["init", "feedback", "a", "b", "ab"])), max_size=3)


def words(seed: int, *labels: str | int) -> tuple[int, ...]:
    return tuple(sequence(seed, *labels).generate_state(4).tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), LABELS, LABELS)
def test_streams_are_equal_exactly_when_their_labels_are(seed: int, one: list[str | int], two: list[str | int]) -> None:
    assert (words(seed, *one) == words(seed, *two)) == (one == two)


def test_no_seed_shares_a_stream_with_another() -> None:
    """Neither seed + label nor seed + step may be all that tells two streams apart."""
    labels: list[tuple[str | int, ...]] = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",)]
    labels += [("feedback", "head", step) for step in range(40)]
    seen = [words(seed, *label) for seed in range(40) for label in labels]
    assert len(set(seen)) == len(seen)


def test_a_stream_does_not_depend_on_what_was_drawn_from_another() -> None:
    alone = normal((5,), stream(7, "b"))
    normal((1000,), stream(7, "a"))
    assert torch.equal(normal((5,), stream(7, "b")), alone)
    assert np.array_equal(stream(7, "a").random(3), stream(7, "a").random(3))
    assert not np.array_equal(stream(7, "a").random(3), stream(7, "b").random(3))


def test_streams_of_neighbouring_seeds_are_uncorrelated() -> None:
    rows = torch.stack([normal((4000,), stream(s, "init", n)).float() for s in (0, 1, 2) for n in "ab"])
    off = torch.corrcoef(rows) - torch.eye(6)
    assert off.abs().max() < 5 / math.sqrt(4000)
