"""Feedback alignment on models of timm and transformers: blocks learn by it, and their weights turn towards the feedback."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lnjac

timm = pytest.importorskip("timm", reason="needs the extra [zoo]: make test-zoo installs it")
transformers = pytest.importorskip("transformers", reason="needs the extra [zoo]: make test-zoo installs it")

UPDATES = 150

Batch = tuple[Tensor, Tensor]


def images(generator: torch.Generator) -> Batch:
    """Waves in noise, whose direction and frequency are the class: images (64, 3, 16, 16) and classes (64,)."""
    phase = torch.arange(16) / 16 * 2 * torch.pi
    waves = [wave.expand(16, 16) for k in (1, 2) for wave in (torch.sin(k * phase), torch.sin(k * phase).unsqueeze(1))]
    classes = torch.randint(4, (64,), generator=generator)
    return torch.stack(waves)[classes].unsqueeze(1) + 0.3 * torch.randn(64, 3, 16, 16, generator=generator), classes


def text(generator: torch.Generator) -> Batch:
    """Sequences in which each token follows from the two before it: tokens and next tokens, (32, 16) each."""
    tokens = [torch.randint(5, (32,), generator=generator) for _ in range(2)]
    while len(tokens) < 17:
        tokens.append((tokens[-2] + 1) % 5 + 5 * (tokens[-1] % 2))
    sequence = torch.stack(tokens, 1)
    return sequence[:, :-1], sequence[:, 1:]


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 10, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    undropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **undropped, bos_token_id=0, eos_token_id=0))


@dataclass(frozen=True)
class Case:
    """A model with its batches, the layers that keep backprop, and how the names of its blocks begin."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    skip: list[str]
    blocks: str
    lr: float


CASES = {
    "timm's ViT": Case(vit, images, [], "blocks.", 1e-3),
    "GPT-2 of transformers": Case(gpt2, text, ["lm_head"], "transformer.h.", 3e-3),
}


def alignment(model: nn.Module, b: dict[str, Tensor], backward: Callable[[], object]) -> float:
    """The mean over layers of the cosine of g·B with g·W, for the g that arrives at each layer in a backward pass."""
    found: list[float] = []

    def compare(layer: nn.Module, _: object, arrived: tuple[Tensor], matrix: Tensor) -> None:
        w = layer.weight.t() if type(layer).__name__.endswith("Conv1D") else layer.weight
        found.append(float(torch.cosine_similarity((arrived[0] @ matrix).flatten(), (arrived[0] @ w).flatten(), dim=0)))

    with ExitStack() as hooks:
        for name, matrix in b.items():
            hook = partial(compare, matrix=matrix)
            hooks.callback(model.get_submodule(name).register_full_backward_hook(hook).remove)
        backward()
    assert len(found) == len(b)
    return sum(found) / len(found)


def trained(case: Case, frozen: bool) -> tuple[list[float], list[float]]:
    """The losses and the alignments of the blocks' layers, each before and after updates that may leave out the blocks."""
    torch.manual_seed(0)
    model = case.build().train()
    generator = torch.Generator().manual_seed(0)

    def backward() -> None:
        x, y = case.batch(generator)
        model.zero_grad()
        out = model(x)
        loss = F.cross_entropy((out if isinstance(out, Tensor) else out.logits).flatten(0, -2), y.flatten())
        loss.backward()
        losses.append(loss.item())

    losses: list[float] = []
    with lnjac.set_credit(model, "fa", skip=case.skip, seed=1) as credit:
        assert len(credit.layers) == 2 * 4 + (not case.skip)
        in_blocks = {name: m for name, m in credit.state_dict().items() if name.startswith(case.blocks)}
        b = {name.removesuffix(".feedback"): m for name, m in in_blocks.items() if name.endswith(".feedback")}
        learning = [p for name, p in model.named_parameters() if not (frozen and name.startswith(case.blocks))]
        optimizer = torch.optim.AdamW(learning, lr=case.lr, weight_decay=0.0)
        alignments = [alignment(model, b, backward)]
        for _ in range(UPDATES):
            backward()
            optimizer.step()
        alignments.append(alignment(model, b, backward))
    return [losses[0], losses[-1]], alignments


@pytest.mark.parametrize("case", CASES)
def test_blocks_learn_by_feedback_alignment_and_align(case: str) -> None:
    losses, aligned = trained(CASES[case], frozen=False)
    frozen_losses, frozen_aligned = trained(CASES[case], frozen=True)
    for name, (_, loss), (before, after) in (("learn", losses, aligned), ("frozen", frozen_losses, frozen_aligned)):
        print(f"{case}, blocks {name}: loss {loss:.3f} after {UPDATES} updates, cosine {before:.3f}, then {after:.3f}")
    assert losses[0] == frozen_losses[0]
    assert losses[1] < 0.6 * frozen_losses[1]
    assert aligned[0] == frozen_aligned[0] < 0.1
    assert aligned[1] > aligned[0] + 0.1
    assert abs(frozen_aligned[1] - frozen_aligned[0]) < 0.05


def test_tied_head_of_gpt2_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"lm_head .* shares one matrix .*wte\.weight.*skip=\['lm_head'\]"):
        lnjac.set_credit(gpt2(), "fa")
