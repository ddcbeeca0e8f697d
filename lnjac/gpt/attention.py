"""Attention modes: how scores QKᵀ/√d_h become weights. All are causal; n is the configured block size, not the current T.

A mode is a dataclass with `weights`; conf/attn_mode/*.yaml names it and gives its fields.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Attention(ABC):
    """Base of every mode: o = weights(QKᵀ/√d_h)·V."""

    name: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, dropout: float = 0.0) -> Tensor:
        """q, k, v: (B, heads, T, d_h) -> (B, heads, T, d_h); `dropout` is the share of weights dropped."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = self.weights(scores, causal_mask(scores), block_size)
        return F.dropout(weights, dropout) @ v

    @abstractmethod
    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        """scores: (B, heads, T, T), mask: (T, T), true where a query may look -> weights, zero where it may not."""


def causal_mask(scores: Tensor) -> Tensor:
    """(T, T) bool: true on and below the diagonal."""
    t = scores.shape[-1]
    return torch.ones(t, t, dtype=torch.bool, device=scores.device).tril()


def barrier(scores: Tensor, mask: Tensor, bias: float = 0.0) -> Tensor:
    """(T, T) to add to scores: `bias` where a query may look, −∞ where it may not. It costs no pass in the backward."""
    return scores.new_full(mask.shape, bias).masked_fill(~mask, -math.inf)


@dataclass
class Softmax(Attention):
    """softmax(QKᵀ/√d_h) over the keys (Vaswani et al. 2017).

    The fused kernel is used where it was measured to be faster (benchmarks/README.md): everywhere but on a CPU in bf16,
    whose backward is slow at short blocks, and for heads narrower than 16.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, dropout: float = 0.0) -> Tensor:
        if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[-1] < 16):
            return super().attend(q, k, v, block_size, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        return (scores + barrier(scores, mask)).softmax(-1)


@dataclass
class Sigmoid(Attention):
    """sigmoid(QKᵀ/√d_h + b) (Ramapuram et al. 2024, arXiv 2409.04431), b fixed; null means −log(block_size).

    With that b, row i's total mass at initialisation is about i/n.
    """

    bias: float | None

    def resolve(self, config: Any) -> None:
        if self.bias is None and config.model.block_size >= 1:
            self.bias = -math.log(config.model.block_size)

    def problems(self, config: Any) -> Iterator[str]:
        if self.bias is not None and not math.isfinite(self.bias):
            yield f"attn_mode.bias={self.bias} must be finite, or null for -log(block_size)"

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        assert self.bias is not None
        return (scores + barrier(scores, mask, self.bias)).sigmoid()


@dataclass
class Relu(Attention):
    """relu(QKᵀ/√d_h)/n (Wortsman et al. 2023, arXiv 2309.08586)."""

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        return (scores + barrier(scores, mask)).relu() / block_size


@dataclass
class Linear(Attention):
    """QKᵀ/(√d_h·n): attention without a nonlinearity (von Oswald et al. 2023, arXiv 2212.07677)."""

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        return scores.masked_fill(~mask, 0.0) / block_size
