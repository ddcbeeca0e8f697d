"""An independent GPT in plain PyTorch, trained by plain backprop: the slower truth for the package's own model.

Written from the published description (Radford et al. 2019; nanoGPT's shape): learned positions, pre-LN blocks with one
matrix for q, k and v, exact GELU, a final LayerNorm, an untied head without bias. It imports nothing of the package, and
its parameters bear the package's names, so that a state_dict fits both.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, d: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d) -> (B, T, d); softmax over the past is written out."""
        t, size = x.shape[1], x.shape[2] // self.n_head
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        heads = []
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        for mine in (slice(h * size, (h + 1) * size) for h in range(self.n_head)):
            scores = torch.einsum("bid,bjd->bij", q[..., mine], k[..., mine]) / math.sqrt(size)
            heads.append(torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1) @ v[..., mine])
        return self.proj(torch.cat(heads, dim=-1))


class Block(nn.Module):
    def __init__(self, d: int, n_head: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(d), Attention(d, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(d), nn.Module()
        self.mlp.fc, self.mlp.proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d) -> (B, T, d)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.proj(F.gelu(self.mlp.fc(self.ln_2(x))))


class GPT(nn.Module):
    """idx: (B, T) -> logits: (B, T, vocab)."""

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        return self.head(self.ln_f(self.blocks(x)))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "GPT":
        """N(0, 0.02²), residual projections smaller by √(2·n_layer); biases 0, γ = 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if name.endswith("proj.weight") else 0.02
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
        return self


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token: −log softmax(logits) at the targets."""
    logp = logits - logits.logsumexp(-1, keepdim=True)
    return -logp.gather(-1, targets.unsqueeze(-1)).mean()


def train(model: GPT, batches: Iterator[tuple[Tensor, Tensor]], steps: int, *, lr: float, weight_decay: float) -> None:
    """Plain backprop and AdamW, one batch (idx, targets) an update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, foreach=False)
    for _ in range(steps):
        idx, targets = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(idx), targets).backward()
        optimizer.step()


@torch.no_grad()
def validation_loss(model: GPT, tokens: np.ndarray, block_size: int) -> float:
    """Nats per token over non-overlapping windows: tokens 1, 2, … are predicted once each; the last window may be short."""
    flat = torch.from_numpy(tokens.astype(np.int64))
    inputs, targets = flat[:-1], flat[1:]
    whole = len(inputs) // block_size * block_size
    batches = [*zip(*(part[:whole].view(-1, block_size).split(64) for part in (inputs, targets)), strict=True)]
    if whole < len(inputs):
        batches.append((inputs[None, whole:], targets[None, whole:]))
    return sum(float(cross_entropy(model(i), t).double()) * i.numel() for i, t in batches) / len(inputs)


def random_batches(tokens: np.ndarray, batch_size: int, block_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - block_size, size=batch_size)
        rows = np.stack([np.asarray(tokens[s : s + block_size + 1], dtype=np.int64) for s in starts])
        both = torch.from_numpy(rows)
        yield both[:, :-1], both[:, 1:]


def train_reference(
    train_tokens: np.ndarray,
    val_tokens: np.ndarray,
    *,
    steps: int = 250,
    seed: int = 1337,
    n_layer: int = 4,
    n_head: int = 4,
    n_embd: int = 128,
    block_size: int = 64,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
) -> float:
    """Train a float32 reference on train_tokens; returns its validation loss in nats per token."""
    vocab_size = int(max(train_tokens.max(), val_tokens.max())) + 1
    model = GPT(vocab_size, n_layer, n_head, n_embd, block_size).initialise(torch.Generator().manual_seed(seed))
    batches = random_batches(train_tokens, batch_size, block_size, seed)
    train(model, batches, steps, lr=lr, weight_decay=weight_decay)
    return validation_loss(model, val_tokens, block_size)
