"""Direct feedback alignment against an independent pullback of each part of the model."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from support.gradients import (
    IDX,
    IN_A_BLOCK,
    TARGETS,
    assert_close,
    assert_equal,
    build,
    feedback,
    gradients,
    problems,
)
from support.trained import BLOCK, N_LAYER, VOCAB, D, perturb
from torch import Tensor

from lnjac.gpt import model as gpt


def errors(logits: Tensor, head: Tensor, error: str) -> Tensor:
    """e at each token: (softmax − onehot)/N, or that pulled through the head."""
    e = (logits.softmax(-1) - F.one_hot(TARGETS, VOCAB)) / TARGETS.numel()
    return e if error == "logits" else e @ head


def parts_of(model: gpt.GPT, inject: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The taught parts in order, each with its parameters' prefix or prefixes."""
    for i, block in enumerate(model.blocks):
        if inject == "block":
            yield (f"blocks.{i}.",), block
        elif block.placement.name == "pre":
            yield (f"blocks.{i}.ln_1.", f"blocks.{i}.attn."), lambda h, b=block: h + b.attn(b.ln_1(h))
            yield (f"blocks.{i}.ln_2.", f"blocks.{i}.mlp."), lambda h, b=block: h + b.mlp(b.ln_2(h))
        elif block.placement.name == "peri":
            for n, name in ((1, "attn"), (2, "mlp")):
                ln, ln_out, f = (getattr(block, part) for part in (f"ln_{n}", f"ln_out_{n}", name))
                names = tuple(f"blocks.{i}.{part}." for part in (f"ln_{n}", f"ln_out_{n}", name))
                yield names, lambda h, ln=ln, ln_out=ln_out, f=f: h + ln_out(f(ln(h)))
        else:
            yield (f"blocks.{i}.ln_1.", f"blocks.{i}.attn."), lambda h, b=block: b.ln_1(h + b.attn(h))
            yield (f"blocks.{i}.ln_2.", f"blocks.{i}.mlp."), lambda h, b=block: b.ln_2(h + b.mlp(h))


def pulled_back(model: gpt.GPT, bp: gpt.GPT, inject: str, error: str, cut_head: bool) -> dict[str, Tensor]:
    """dfa's gradients part by part: each part's own pullback of e·B; the rest by true backprop of what is left.

    `bp` is a backprop model of the same weights; B_ℓ is read from the dfa model.
    """
    p = dict(bp.named_parameters())
    found: dict[str, Tensor] = {}
    h = bp.ln_e(bp.wte(IDX) + bp.wpe(torch.arange(BLOCK)))
    top = errors(bp(IDX)[0], bp.head.weight, error).detach()
    parts = list(parts_of(bp, inject))
    for i, (prefixes, part) in enumerate(parts):
        names = [n for n in p if n.startswith((*prefixes, *(("wte.", "wpe.", "ln_e.") if i == 0 else ())))]
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


@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
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
    """Only the rounding of ln_f's own gradient differs, by which docs/study.md judges the costs of so unstable a method."""
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
