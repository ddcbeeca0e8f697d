"""Attention modes, which turn scores QKᵀ/√d_h into causal weights; n is the configured block size, not the current T.

A mode is a dataclass with a method `weights`. A file conf/attn_mode/NAME.yaml names it and gives its fields.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lnjac.gpt.products import batched


@dataclass
class Attention(ABC):
    """The base of every mode, o = weights(QKᵀ/√d_h)·V."""

    name: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, dropout: float = 0.0) -> Tensor:
        """Return the attention's output, (B, heads, T, d_h).

        Args:
            q: queries, (B, heads, T, d_h).
            k: keys, of the same shape.
            v: values, of the same shape.
            block_size: the configured number of positions, n.
            dropout: the share of weights that is dropped.
        """
        scores = batched(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        weights = self.weights(scores, causal_mask(scores), block_size)
        return batched(F.dropout(weights, dropout), v)

    @abstractmethod
    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        """Return the weights, (B, heads, T, T), which are zero where a query may not look.

        Args:
            scores: QKᵀ/√d_h, (B, heads, T, T).
            mask: (T, T), true where a query may look.
            block_size: the configured number of positions, n.
        """


def causal_mask(scores: Tensor) -> Tensor:
    """Return a (T, T) mask that is true on and below the diagonal."""
    t = scores.shape[-1]
    return torch.ones(t, t, dtype=torch.bool, device=scores.device).tril()


def barrier(scores: Tensor, mask: Tensor, bias: float = 0.0) -> Tensor:
    """Return (T, T) terms to add to scores, `bias` where a query may look, else −∞: the backward has no pass for a sum."""
    return scores.new_full(mask.shape, bias).masked_fill(~mask, -math.inf)


@dataclass
class Softmax(Attention):
    """softmax(QKᵀ/√d_h) over the keys (Vaswani et al. 2017).

    The fused kernel serves everywhere but on a CPU in bf16, where its backward is slow at short blocks, and on a CPU for
    heads narrower than 16 (benchmarks/README.md).
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, dropout: float = 0.0) -> Tensor:
        if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[-1] < 16):
            return super().attend(q, k, v, block_size, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        return (scores + barrier(scores, mask)).softmax(-1)


@dataclass
class Sigmoid(Attention):
    """sigmoid(QKᵀ/√d_h + b) (Ramapuram et al. 2024, arXiv 2409.04431), with a fixed bias b; null means −log(block_size).

    With that bias the weights of row i add up to about i/n at initialisation.
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
    """QKᵀ/(√d_h·n), attention without a nonlinearity (von Oswald et al. 2023, arXiv 2212.07677)."""

    def weights(self, scores: Tensor, mask: Tensor, block_size: int) -> Tensor:
        return scores.masked_fill(~mask, 0.0) / block_size
