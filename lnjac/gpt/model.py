"""The GPT under study, in nanoGPT's shape, with learned positions and N(0, 0.02²) initialisation."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.errors import ConfigError
from lnjac.gpt.attention import Attention
from lnjac.gpt.credit import Broadcast, Cut, FeedbackLinear, is_feedback, keep
from lnjac.gpt.settings import Model, Precision
from lnjac.norms.backward import set_backward
from lnjac.norms.layers import Norm, OtherNorm, norms
from lnjac.seeding import normal, stream

INIT_STD = 0.02


class SelfAttention(nn.Module):
    """Causal multi-head attention, whose mode turns scores into weights."""

    def __init__(self, model: Model, mode: Attention) -> None:
        super().__init__()
        d = model.n_embd
        self.n_head, self.block_size, self.mode = model.n_head, model.block_size, mode
        self.qkv = FeedbackLinear(d, 3 * d, bias=model.bias, kind="qkv", init_std=INIT_STD)
        self.proj = FeedbackLinear(d, d, bias=model.bias, kind="attn_proj", init_std=residual_std(model))
        self.q_norm = _norm(model, d // model.n_head) if model.qk_norm else nn.Identity()
        self.k_norm = _norm(model, d // model.n_head) if model.qk_norm else nn.Identity()
        self.drop = nn.Dropout(model.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (B, T, d) to (B, T, d)."""
        b, t, d = x.shape
        q, k, v = (part.view(b, t, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).split(d, dim=-1))
        dropout = self.drop.p if self.training else 0.0
        o = self.mode.attend(self.q_norm(q), self.k_norm(k), v, self.block_size, dropout)
        out: Tensor = self.drop(self.proj(o.transpose(1, 2).reshape(b, t, d)))
        return out


class MLP(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        d = model.n_embd
        self.fc = FeedbackLinear(d, 4 * d, bias=model.bias, kind="fc", init_std=INIT_STD)
        self.proj = FeedbackLinear(4 * d, d, bias=model.bias, kind="mlp_proj", init_std=residual_std(model))
        self.drop = nn.Dropout(model.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (B, T, d) to (B, T, d)."""
        out: Tensor = self.drop(self.proj(F.gelu(self.fc(x))))
        return out


class Block(nn.Module):
    """A block of two branches, attention and the MLP, with norms around each as the placement has them."""

    attn: SelfAttention
    mlp: MLP

    def __init__(self, model: Model, mode: Attention) -> None:
        super().__init__()
        self.placement = model.placement
        for number, (name, branch) in enumerate((("attn", SelfAttention(model, mode)), ("mlp", MLP(model))), 1):
            for norm in self.placement.norms:
                self.add_module(f"{norm}_{number}", _norm(model, model.n_embd))
            self.add_module(name, branch)

    def branches(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Return attention and the MLP, each with its norms."""
        return [
            (branch, [getattr(self, f"{norm}_{number}") for norm in self.placement.norms])
            for number, branch in enumerate((self.attn, self.mlp), 1)
        ]

    def forward(self, h: Tensor, cut: Cut = keep) -> Tensor:
        """Map h: (B, T, d) to (B, T, d); `cut` is called on each sublayer's output."""
        for (branch, its_norms), point in zip(self.branches(), ("sublayer", "block"), strict=True):
            h = cut(self.placement.add(h, branch, its_norms), point)
        return h


class GPT(nn.Module):
    """The model; `logits, loss = model(idx, targets)`. The head has a matrix of its own unless `model.tie`."""

    def __init__(self, model: Model, mode: Attention, vocab_size: int) -> None:
        super().__init__()
        d = model.n_embd
        self.block_size = model.block_size
        self.wte = _embedding(vocab_size, d)
        self.wpe = _embedding(model.block_size, d)
        self.ln_e = _norm(model, d) if model.placement.embedding else nn.Identity()
        self.drop = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model, mode) for _ in range(model.n_layer))
        self.ln_f = _norm(model, d) if model.placement.final else nn.Identity()
        self.head = FeedbackLinear(d, vocab_size, bias=False, kind="head", init_std=INIT_STD)
        if model.tie:
            self.head.weight = self.wte.weight  # type: ignore[assignment]
        self.broadcast: Broadcast | None = None

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits, (B, T, vocab), and the mean cross-entropy in nats, () or None without targets.

        Args:
            idx: tokens, (B, T) int64.
            targets: the tokens to predict, (B, T) int64, or None.
        """
        taught: list[Tensor] = []
        broadcast = self.broadcast if torch.is_grad_enabled() else None
        cut = keep if broadcast is None else broadcast.cutter(taught)
        h = self.drop(self.ln_e(self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))))
        for block in self.blocks:
            h = block(h, cut)
        logits: Tensor = self.head(self.ln_f(h))
        if targets is None:
            return logits, None
        top = logits.float() if logits.dtype == torch.bfloat16 else logits
        loss = F.cross_entropy(top.flatten(0, -2), targets.flatten())
        if broadcast is not None:
            loss = loss + broadcast.teach(taught, top, targets, self.head)
        return logits, loss


def build(config: Any, vocab_size: int) -> GPT:
    """Return the config's model on the CPU, initialised, with its method's feedback and its norms' backward.

    Each parameter draws from a stream of its own name, so models that share a parameter start it alike.

    Args:
        config: a run's config; its model, attn_mode, method, ln_backward, precision and seed are used.
        vocab_size: the number of distinct tokens.
    """
    model = GPT(config.model, config.attn_mode, vocab_size)
    if config.precision is Precision.fp64:
        model.double()
    initialise(model, config.seed)
    config.method.install(model, config.seed)
    if norms(model):
        set_backward(model, config.ln_backward)
    return model


def feedback(config: Any, vocab_size: int) -> dict[str, Tensor]:
    """Return every feedback matrix by name, as the run's seed draws it."""
    state = build(config, vocab_size).state_dict()
    return {name: value for name, value in state.items() if is_feedback(name)}


def block_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the blocks' parameters by name, without feedback."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and not is_feedback(name)
    }


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters and buffers of these names other values within the context, and their own afterwards, bit for bit.

    The tensors are written into, so that others which share their memory change too.
    """
    state = model.state_dict()
    own = {name: state[name].clone() for name in values}
    try:
        for name, value in values.items():
            state[name].copy_(value)
        yield
    finally:
        for name, value in own.items():
            state[name].copy_(value)


def saved(model: GPT) -> dict[str, Tensor]:
    """Return weights and feedback by name, a tied matrix under one name, because safetensors refuses two."""
    state = model.state_dict()
    if model.head.weight is model.wte.weight:
        del state["head.weight"]
    return state


def load_saved(model: GPT, state: dict[str, Tensor]) -> None:
    """Load the tensors that `saved` returned into a model of the same config."""
    if model.head.weight is model.wte.weight:
        state = {**state, "head.weight": state["wte.weight"]}
    model.load_state_dict(state)


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Draw weights from N(0, 0.02²), residual projections' smaller by 1/√(2·n_layer); set biases to 0.

    Norms keep the values that they are made with.
    """
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, (FeedbackLinear, nn.Embedding)):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        else:
            std = module.init_std if isinstance(module, FeedbackLinear) else INIT_STD
            parameter.copy_(normal(tuple(parameter.shape), stream(seed, "init", name)) * std)


def residual_std(model: Model) -> float:
    return INIT_STD / math.sqrt(2 * model.n_layer)


def _embedding(n: int, d: int) -> nn.Embedding:
    """Return an embedding without values, because torch's own draw imports its compiler on the meta device."""
    made: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(n, d), freeze=False)  # type: ignore[no-untyped-call]
    return made


def _norm(model: Model, d: int) -> Norm | OtherNorm:
    made = model.norm.make(d, model)
    if not isinstance(made, (Norm, OtherNorm)):
        raise ConfigError(
            f"model.norm={model.norm.name} makes a {type(made).__name__}, which diagnostics do not know: "
            "derive it from Norm or OtherNorm of lnjac.norms.layers"
        )
    return made
