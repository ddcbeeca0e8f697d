"""Σ⟨g,z⟩ by its paths, the residual's two gradients, and attention's weights, in float64 against graphs spelt out."""

import functools
import math
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from support.small import SMALL, corpus, members
from torch import Tensor

from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig
from lnjac.diagnostics import attention as mechanism
from lnjac.diagnostics.attention import MECHANISM, Mechanism
from lnjac.diagnostics.base import Subject, measure
from lnjac.diagnostics.catalogue import BUILT_IN
from lnjac.gpt import model as gpt
from lnjac.gpt.attention import Attention, Linear, Relu, Sigmoid, Softmax, causal_mask
from lnjac.gpt.credit import is_feedback
from lnjac.norms.capture import Capture, capture
from lnjac.norms.probe import probe, replay
from lnjac.runs import folder as runs
from lnjac.training.loop import Training

VOCAB, T, D = 11, 8, 8
Found = dict[tuple[str, str], float]


@functools.cache
def config_of(*overrides: str) -> RunConfig:
    return compose(*SMALL, "precision=fp64", "seed=5", *overrides)


@torch.no_grad()
def made(*overrides: str) -> gpt.GPT:
    """A model whose every parameter, γ, β and biases too, is away from its start."""
    model = gpt.build(config_of(*overrides), VOCAB)
    for name, p in model.named_parameters():
        if not is_feedback(name):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (n, T), generator=generator), torch.randint(VOCAB, (n, T), generator=generator)


def loss(model: gpt.GPT, part: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return model(*part)[1], part[1].numel()


def subject(model: gpt.GPT, *batches: tuple[Tensor, Tensor], loss: Any = loss) -> Subject:
    """A run that is no more than its model and some batches."""
    given = {"model": model, "loss": loss, "config": config_of(), "updates": 0}
    return SimpleNamespace(**given, diagnostic_batches=lambda: batches or [batch(3)])  # type: ignore[return-value]


def rows_of(model: gpt.GPT, *batches: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    return measure([Mechanism()], subject(model, *batches))["mechanism"]


def values(rows: list[dict[str, Any]]) -> Found:
    return {(row["place"], row["quantity"]): row["value"] for row in rows}


def calls(model: gpt.GPT) -> dict[str, Capture]:
    """Of the summed loss."""
    with capture(model) as found:
        value, tokens = loss(model, batch(3))
        (value * tokens).backward()
    return {call.site: call for call in found}


def gz(call: Capture) -> float:
    x = call.x
    z = x if call.rms else x - x.mean(-1, keepdim=True)
    z = z / (z.square().mean(-1, keepdim=True) + call.eps).sqrt()
    g = call.grad if call.weight is None else call.grad * call.weight
    return float((g * z).sum())


SHAPES = [["model.bias=true"], ["model.bias=false"], ["model.norm=rmsnorm"], ["model.affine=false"]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
@pytest.mark.parametrize("method", ["bp", "fa"])
@pytest.mark.parametrize("mode", members("attn_mode"))
def test_paths_make_up_gz(mode: str, method: str, shape: list[str]) -> None:
    model = made(f"attn_mode={mode}", f"method={method}", *shape)
    found, at = values(rows_of(model)), calls(model)
    for site, call in at.items():
        assert found[site, "gz"] == pytest.approx(gz(call), rel=1e-9)
    for i in (0, 1):
        site = f"blocks.{i}.ln_1"
        q, k, v = (found[site, f"gz_{path}"] for path in "qkv")
        assert q + k + v == pytest.approx(gz(at[site]), rel=1e-9)
        assert min(map(abs, (q, k, v))) > 1e-4 * max(map(abs, (q, k, v)))
        by_scores, by_values = (found[site, f"gz_from_{what}"] for what in ("scores", "values"))
        agree = [by_scores == pytest.approx(q + k, rel=1e-9), by_values == pytest.approx(v, rel=1e-9)]
        assert agree == [method == "bp"] * 2
    assert found["ln_f", "gz_head"] == pytest.approx(gz(at["ln_f"]), rel=1e-9)
    by_logits = found["ln_f", "gz_from_logits"] == pytest.approx(gz(at["ln_f"]), rel=1e-9)
    assert by_logits == (method == "bp")


def test_each_path_and_prediction_by_an_explicit_graph() -> None:
    """fa, softmax: block 0's attention and the head written out, from values and gradients caught on the way."""
    model = made("method=fa")
    block, caught = model.blocks[0], {}

    def catch(name: str, tensor: Tensor) -> None:
        caught[name] = tensor.detach()
        tensor.register_hook(lambda grad: caught.update({f"d {name}": grad}))

    block.ln_1.register_forward_hook(lambda m, a, out: catch("y", out))
    block.attn.qkv.register_forward_hook(lambda m, a, out: catch("qkv", out))
    block.attn.proj.register_forward_pre_hook(lambda m, a: catch("o", a[0]))
    model.ln_f.register_forward_hook(lambda m, a, out: catch("top", out))
    model.head.register_forward_hook(lambda m, a, out: catch("logits", out))
    found = values(rows_of(model))
    value, tokens = loss(model, batch(3))
    (value * tokens).backward()

    qkv, z = block.attn.qkv, caught["y"] - block.ln_1.bias.detach()
    w, b = qkv.weight.detach(), qkv.backward_matrix()
    for i, path in enumerate("qkv"):
        part = slice(i * D, (i + 1) * D)
        expected = float((caught["d qkv"][..., part] * (z @ b[part].T)).sum())
        assert found["blocks.0.ln_1", f"gz_{path}"] == pytest.approx(expected, rel=1e-9)
    true = [float((caught["d qkv"] * (z @ w.T))[..., i * D : (i + 1) * D].sum()) for i in range(3)]
    assert found["blocks.0.ln_1", "gz_from_scores"] == pytest.approx(true[0] + true[1], rel=1e-9)
    assert found["blocks.0.ln_1", "gz_from_values"] == pytest.approx(true[2], rel=1e-9)

    q, k, v = (x.reshape(3, T, 2, D // 2).transpose(1, 2) for x in caught["qkv"].chunk(3, dim=-1))
    scores = (q @ k.mT / math.sqrt(D / 2)).requires_grad_()
    o = scores.masked_fill(~causal_mask(scores), -math.inf).softmax(-1) @ v
    (by_scores,) = torch.autograd.grad(o, scores, caught["d o"].reshape(3, T, 2, D // 2).transpose(1, 2))
    scores = scores.detach()
    assert found["blocks.0.attn", "scores_pull"] == pytest.approx(2 * float((by_scores * scores).sum()), rel=1e-9)
    assert found["blocks.0.attn", "values_pull"] == pytest.approx(float((caught["d o"] * caught["o"]).sum()), rel=1e-9)

    _, targets = batch(3)
    error = caught["logits"].softmax(-1) - torch.nn.functional.one_hot(targets, VOCAB)
    z, head = caught["top"] - model.ln_f.bias.detach(), model.head
    by_feedback = float((error * (z @ head.feedback.T)).sum())
    by_logits = float((error * (caught["logits"] - head.weight.detach() @ model.ln_f.bias.detach())).sum())
    assert found["ln_f", "gz_head"] == pytest.approx(by_feedback, rel=1e-9)
    assert found["ln_f", "gz_from_logits"] == pytest.approx(by_logits, rel=1e-9)


def test_scores_pull_is_the_slope_against_temperature() -> None:
    """Under bp, by finite differences of the loss: q and k scaled by s through qkv's rows, all at once or v's alone."""
    model = made("method=bp", "attn_mode=sigmoid")
    found, part, h = values(rows_of(model)), batch(3), 1e-5

    @torch.no_grad()
    def scaled(rows: slice, by: float) -> float:
        linear = model.blocks[1].attn.qkv
        before = linear.weight.clone(), linear.bias.clone()
        linear.weight[rows] *= by
        linear.bias[rows] *= by
        value, tokens = loss(model, part)
        linear.weight.copy_(before[0])
        linear.bias.copy_(before[1])
        return float(value) * tokens

    for rows, quantity in ((slice(0, 2 * D), "scores_pull"), (slice(2 * D, 3 * D), "values_pull")):
        slope = (scaled(rows, 1 + h) - scaled(rows, 1 - h)) / (2 * h)
        assert found["blocks.1.attn", quantity] == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("method", ["bp", "fa"])
def test_post_ln_paths_leave_the_residual_out(method: str) -> None:
    """The norm before block 1's attention feeds the residual too; the last one feeds the head alone."""
    model = made("model.placement=post", f"method={method}")
    found, at = values(rows_of(model)), calls(model)
    model.zero_grad()
    kept = {}

    def catch(m: Any, args: Any, out: Tensor) -> None:
        kept["y"] = args[0].detach() - model.blocks[0].ln_2.bias.detach()
        out.register_hook(lambda grad: kept.update(grad=grad))

    handle = model.blocks[1].attn.qkv.register_forward_hook(catch)
    value, tokens = loss(model, batch(3))
    (value * tokens).backward()
    handle.remove()
    through = float((kept["grad"] * (kept["y"] @ model.blocks[1].attn.qkv.backward_matrix().T)).sum())
    paths = sum(found["blocks.0.ln_2", f"gz_{path}"] for path in "qkv")
    assert paths == pytest.approx(through, rel=1e-9)
    assert paths != pytest.approx(gz(at["blocks.0.ln_2"]), rel=1e-3)
    assert found["blocks.0.ln_2", "gz"] == pytest.approx(gz(at["blocks.0.ln_2"]), rel=1e-9)
    assert found["blocks.1.ln_2", "gz_head"] == pytest.approx(gz(at["blocks.1.ln_2"]), rel=1e-9)
    assert not any(place == "blocks.0.attn" and quantity.startswith("gz") for place, quantity in found)


def test_post_ln_paths_end_where_dfa_cuts() -> None:
    found = values(rows_of(made("model.placement=post", "method=dfa")))
    assert not any(quantity.startswith("gz_") for _, quantity in found)


def test_tied_head() -> None:
    model = made("model.tie=true", "method=bp")
    found = values(rows_of(model))
    assert found["ln_f", "gz_head"] == pytest.approx(gz(calls(model)["ln_f"]), rel=1e-9)
    assert found["ln_f", "gz_from_logits"] == pytest.approx(found["ln_f", "gz_head"], rel=1e-9)


def test_qk_norm_has_no_prediction_from_scores() -> None:
    model = made("model.qk_norm=true", "method=bp")
    found, call = values(rows_of(model)), calls(model)["blocks.0.ln_1"]
    assert math.isnan(found["blocks.0.ln_1", "gz_from_scores"])
    assert sum(found["blocks.0.ln_1", f"gz_{path}"] for path in "qkv") == pytest.approx(gz(call), rel=1e-9)
    assert found["blocks.0.ln_1", "gz_from_values"] == pytest.approx(found["blocks.0.ln_1", "gz_v"], rel=1e-9)


# The residual


@pytest.mark.parametrize("ln_backward", ["exact", "center_scale"])
def test_branch_and_residual(ln_backward: str) -> None:
    """The branch's gradient by the norm alone, the residual's as the whole one at the block's middle and end."""
    model = made("method=fa", f"ln_backward={ln_backward}")
    block, whole = model.blocks[1], {}
    block.ln_2.register_forward_pre_hook(
        lambda m, a: a[0].register_hook(lambda grad: whole.update(middle=grad)) and None
    )
    model.ln_f.register_forward_pre_hook(lambda m, a: a[0].register_hook(lambda grad: whole.update(end=grad)) and None)
    at, found = calls(model), values(rows_of(model))
    tokens = batch(3)[1].numel()
    whole = {name: grad * tokens for name, grad in whole.items()}  # rows_of went last, of the mean loss
    for site, residual in (("blocks.1.ln_1", whole["middle"]), ("blocks.1.ln_2", whole["end"])):
        call = at[site]
        x = call.x.clone().requires_grad_()
        module = model.get_submodule(site)
        (branch,) = torch.autograd.grad(module(x), x, call.grad)
        assert found[site, "branch_sq"] == pytest.approx(float(branch.square().sum()), rel=1e-9)
        assert found[site, "residual_sq"] == pytest.approx(float(residual.square().sum()), rel=1e-9)
        cos = float((branch * residual).sum() / branch.norm() / residual.norm())
        assert found[site, "branch_residual_cos"] == pytest.approx(cos, rel=1e-7)
    if ln_backward == "exact":
        call = at["blocks.1.ln_2"]
        exact = replay(call.x, call.grad, call.eps, weight=call.weight, rms=False)
        assert found["blocks.1.ln_2", "branch_sq"] == pytest.approx(float(exact.square().sum()), rel=1e-9)
    assert found["ln_f", "residual_sq"] == 0.0
    assert math.isnan(found["ln_f", "branch_residual_cos"])


def test_post_ln_branches_start_at_the_layers() -> None:
    model = made("model.placement=post", "method=bp")
    found, whole, through = values(rows_of(model)), {}, {}
    mlp = model.blocks[0].mlp
    mlp.register_forward_pre_hook(lambda m, a: a[0].register_hook(lambda grad: whole.update(grad=grad)) and None)
    model.blocks[0].ln_2.register_forward_pre_hook(
        lambda m, a: a[0].register_hook(lambda grad: through.update(grad=grad)) and None
    )
    value, tokens = loss(model, batch(3))
    (value * tokens).backward()
    residual, branch = through["grad"], whole["grad"] - through["grad"]
    assert found["blocks.0.mlp", "branch_sq"] == pytest.approx(float(branch.square().sum()), rel=1e-9)
    assert found["blocks.0.mlp", "residual_sq"] == pytest.approx(float(residual.square().sum()), rel=1e-9)
    assert {p for p, q in found if q == "branch_sq"} == {f"blocks.{i}.{m}" for i in (0, 1) for m in ("attn", "mlp")}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_peri_ln_has_the_paths_of_pre_ln_and_branches_that_start_at_their_first_norm(norm: str) -> None:
    model = made("model.placement=peri", f"model.norm={norm}", "method=fa")
    found, at = values(rows_of(model)), calls(model)
    for i in (0, 1):
        paths = sum(found[f"blocks.{i}.ln_1", f"gz_{path}"] for path in "qkv")
        assert paths == pytest.approx(gz(at[f"blocks.{i}.ln_1"]), rel=1e-9)
    assert found["ln_f", "gz_head"] == pytest.approx(gz(at["ln_f"]), rel=1e-9)
    for site in ("ln_e", "blocks.0.ln_out_1", "blocks.1.ln_out_2"):
        assert found[site, "gz"] == pytest.approx(gz(at[site]), rel=1e-9)
    starts = {f"blocks.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)}
    assert {p for p, q in found if q == "branch_sq"} == starts | {"ln_f"}
    for site in starts:
        call = at[site]
        exact = replay(call.x, call.grad, call.eps, weight=call.weight, rms=call.rms)
        assert found[site, "branch_sq"] == pytest.approx(float(exact.square().sum()), rel=1e-9)


def test_no_junction_where_dfa_cuts() -> None:
    found = values(rows_of(made("method=dfa")))
    assert {p for p, q in found if q == "branch_sq"} == {"blocks.0.ln_1", "blocks.0.ln_2", "blocks.1.ln_2"}


# Attention's weights


def weights_of(model: gpt.GPT, i: int) -> Tensor:
    """Block i's weights, from its own mode."""
    caught = {}
    layer = model.blocks[i].attn
    handle = layer.qkv.register_forward_hook(lambda m, a, out: caught.update(qkv=out.detach()))
    loss(model, batch(3))
    handle.remove()
    q, k, _ = (x.reshape(3, T, 2, D // 2).transpose(1, 2) for x in caught["qkv"].chunk(3, dim=-1))
    scores = q @ k.mT / math.sqrt(D / 2)
    return layer.mode.weights(scores, causal_mask(scores), T)


@pytest.mark.parametrize("mode", members("attn_mode"))
def test_entropy_and_mass_by_loops(mode: str) -> None:
    model = made(f"attn_mode={mode}")
    rows = {(row["place"], row["quantity"]): row for row in rows_of(model)}
    w = weights_of(model, 1)
    entropies, masses, relative = [], [], []
    for row in w.reshape(-1, T, T):
        for i in range(T):
            mass = float(row[i].sum())
            masses.append(mass)
            relative.append(mass / ((i + 1) / T))
            if mass > 0:
                shares = [float(p) / mass for p in row[i] if p != 0]
                entropies.append(-sum(p * math.log(p) for p in shares) if min(shares) > 0 else math.nan)
    entropy = rows["blocks.1.attn", "entropy"]
    assert math.isnan(entropy["value"]) == (mode == "linear")
    if mode != "linear":
        assert entropy["value"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-9)
        assert entropy["n"] == len(entropies)
    assert rows["blocks.1.attn", "row_mass"]["value"] == pytest.approx(sum(masses) / len(masses), rel=1e-9)
    assert rows["blocks.1.attn", "row_mass_relative"]["value"] == pytest.approx(sum(relative) / len(relative), rel=1e-9)


def test_sigmoid_mass_at_initialisation_is_i_over_n() -> None:
    model = gpt.build(config_of("attn_mode=sigmoid"), VOCAB)
    found = values(rows_of(model))
    assert found["blocks.0.attn", "row_mass_relative"] == pytest.approx(
        T / (1 + T), rel=1e-3
    )  # sigmoid(−log n) = 1/(1+n)


def test_rows_without_mass_have_no_entropy() -> None:
    w = torch.tensor([[0.0, 0.0], [0.25, 0.25]])
    assert mechanism.entropy(w).tolist() == pytest.approx([math.log(2)])
    assert mechanism.entropy(torch.zeros(2, 2)).numel() == 0


@dataclass
class Squared(Attention):
    """A mode from outside: (QKᵀ/√d_h)²/n, rows divided by their own mean."""

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        squared = scores.square().masked_fill(~mask, 0.0) / block_size
        return squared / (1 + squared.mean(-1, keepdim=True))


MODES = [Softmax("softmax"), Sigmoid("sigmoid", -2.0), Relu("relu"), Linear("linear"), Squared("squared")]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_own_slopes_by_the_whole_jacobian(mode: Attention) -> None:
    t = 5
    scores = torch.randn(1, 2, t, t, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = causal_mask(scores)
    jacobian = torch.autograd.functional.jacobian(lambda s: mode.weights(s, mask, t), scores)
    own = jacobian.reshape(scores.numel(), -1).diagonal().view_as(scores)
    expected = torch.stack([own[0, h, i, j] for j in range(t) for h in range(2) for i in range(j, t)])
    torch.testing.assert_close(mechanism.own_slopes(mode, scores, t), expected, rtol=1e-12, atol=1e-14)


def test_keys_are_spread_over_the_context() -> None:
    scores = torch.zeros(1, 1, 64, 64)
    assert mechanism.own_slopes(Linear("linear"), scores, 64).tolist() == [1 / 64] * sum(
        64 - j for j in range(0, 64, 8)
    )


@pytest.mark.parametrize(("mode", "most"), list(zip(MODES[:4], (0.25, 0.25, 1 / 16, 1 / 16), strict=True)))
def test_steepest(mode: Attention, most: float) -> None:
    assert mechanism.steepest(mode, 16) == pytest.approx(most, rel=1e-3)


def test_saturation() -> None:
    """Every score far above the bias, every one far below, and half of relu's."""
    for mode, shift, expected in (
        (MODES[1], 30.0, 1.0),
        (MODES[1], 2.0, 0.0),
        (MODES[2], -9.0, 1.0),
        (MODES[3], -9.0, 0.0),
    ):
        slopes = mechanism.own_slopes(mode, torch.full((1, 1, 8, 8), shift, dtype=torch.float64), 8)
        flat = slopes.abs() < mechanism.SATURATED * mechanism.steepest(mode, 8)
        assert float(flat.double().mean()) == expected


# Batches, hooks, rows


def test_batches_add() -> None:
    model = made("method=fa", "attn_mode=relu")
    parts = [batch(3), batch(1, seed=1)]
    both, singles = rows_of(model, *parts), [rows_of(model, part) for part in parts]
    sizes = [
        {
            row["place"]: math.sqrt(row["value"] * other["value"])
            for row, other in product(rows, rows)
            if (row["quantity"], other["quantity"]) == ("branch_sq", "residual_sq") and row["place"] == other["place"]
        }
        for rows in (both, *singles)
    ]
    for row, *one in zip(both, *singles, strict=True):
        assert row["n"] == sum(single["n"] for single in one)
        if row["quantity"] in mechanism.MEANS:
            expected = sum(single["value"] * single["n"] for single in one) / row["n"]
        elif row["quantity"] == "branch_residual_cos":
            of_both, *of_one = (size[row["place"]] for size in sizes)
            dots = [single["value"] * size if size else 0.0 for single, size in zip(one, of_one, strict=True)]
            expected = sum(dots) / of_both if of_both else math.nan
        else:
            expected = sum(single["value"] for single in one)
        assert row["value"] == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def test_hooks_go_also_after_an_error() -> None:
    model = made("method=fa")

    def broken(model: gpt.GPT, part: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        loss(model, part)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        measure([Mechanism()], subject(model, loss=broken))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layer_rows_do_not_notice() -> None:
    model = made("method=fa", "attn_mode=sigmoid")
    plain = probe(model).measure([batch(3)], loss)
    pd.testing.assert_frame_equal(measure([Mechanism()], subject(model))["layers"], plain, check_exact=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lower_precisions_agree(precision: str) -> None:
    found = {}
    for p in (precision, "fp64"):
        training = Training(compose(*SMALL, "attn_mode=sigmoid", "diagnostics=attention", f"precision={p}"), corpus())
        found[p] = values(training.diagnose()["mechanism"])
    tolerance = 1e-3 if precision == "fp32" else 0.1
    for key, value in found["fp64"].items():
        if key[1] in ("gz_v", "gz_from_values", "gz_head", "branch_sq", "entropy", "row_mass"):
            assert found[precision][key] == pytest.approx(value, rel=tolerance, abs=tolerance * 1e-2), key


def test_every_quantity_is_declared_and_found() -> None:
    training = Training(config_of("diagnostics=attention", "diagnostics.feedback_draws=2"), corpus())
    rows = training.diagnose()["mechanism"] + training.before()["mechanism"]
    declared = {name for each in BUILT_IN if each.table == "mechanism" for name in each.quantities}
    assert {row["quantity"] for row in rows} == declared
    assert runs.table(MECHANISM, (), rows).num_rows == len(rows)
    assert len({(row["place"], row["call"], row["quantity"]) for row in rows}) == len(rows)
