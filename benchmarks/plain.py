"""The baseline: the plain PyTorch script one would write by hand for the same model and method.

nn.LayerNorm, an autograd.Function for feedback alignment, scaled_dot_product_attention, torch.optim.AdamW as it comes.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class FeedbackFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, feedback):
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, feedback = ctx.saved_tensors
        flat_grad, flat_x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_bias = flat_grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ feedback, flat_grad.t() @ flat_x, grad_bias, None


class FeedbackLinear(nn.Linear):
    def __init__(self, d_in, d_out, std=0.02, bias=True):
        super().__init__(d_in, d_out, bias=bias)
        nn.init.normal_(self.weight, std=std)
        if bias:
            nn.init.zeros_(self.bias)
        self.register_buffer("feedback", torch.randn(d_out, d_in) * std)

    def forward(self, x):
        return FeedbackFunction.apply(x, self.weight, self.bias, self.feedback)


class Block(nn.Module):
    def __init__(self, d, heads, layers):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.fc = FeedbackLinear(d, 3 * d), FeedbackLinear(d, 4 * d)
        std = 0.02 / math.sqrt(2 * layers)
        self.attn_proj, self.mlp_proj = FeedbackLinear(d, d, std), FeedbackLinear(4 * d, d, std)

    def forward(self, h):
        b, t, d = h.shape
        q, k, v = self.qkv(self.ln_1(h)).split(d, dim=2)
        q, k, v = (a.view(b, t, self.heads, d // self.heads).transpose(1, 2) for a in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.attn_proj(o.transpose(1, 2).contiguous().view(b, t, d))
        return h + self.mlp_proj(F.gelu(self.fc(self.ln_2(h))))


class PlainGPT(nn.Module):
    def __init__(self, vocab, layers=4, heads=4, d=128, block=64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(block, d)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(d, heads, layers) for _ in range(layers))
        self.ln_f = nn.LayerNorm(d)
        self.head = FeedbackLinear(d, vocab, bias=False)

    def forward(self, idx, targets):
        h = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.ln_f(h))
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class PlainTraining:
    """Model, AdamW at 1e-3, and batches stacked from random slices."""

    def __init__(
        self, tokens: torch.Tensor, vocab: int, width: int = 128, block: int = 64, batch: int = 32, device: str = "cpu"
    ) -> None:
        torch.manual_seed(1337)
        self.tokens, self.block, self.batch, self.device = tokens, block, batch, device
        self.model = PlainGPT(vocab, d=width, block=block).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def update(self) -> float:
        starts = torch.randint(len(self.tokens) - self.block - 1, (self.batch,))
        idx = torch.stack([self.tokens[i : i + self.block] for i in starts])
        targets = torch.stack([self.tokens[i + 1 : i + 1 + self.block] for i in starts])
        loss = self.model(idx.to(self.device), targets.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
