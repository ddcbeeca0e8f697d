"""Settings of the GPT: its shape and precision (conf/model). Imports no torch, so that a config is composed fast."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


@dataclass
class Model:
    """Shape of the GPT (conf/model)."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    dropout: float
    bias: bool
    norm: Any
    placement: Any
    affine: bool
    eps: float
    qk_norm: bool
    tie: bool

    def problems(self, config: Any) -> Iterator[str]:
        for field in ("n_layer", "n_head", "n_embd", "block_size"):
            if (value := getattr(self, field)) < 1:
                yield f"model.{field}={value} must be at least 1"
        if self.n_head >= 1 and self.n_embd >= 1 and self.n_embd % self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            tries = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            yield f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}: try n_embd={tries}"
        if not 0 <= self.dropout < 1:
            yield f"model.dropout={self.dropout} must lie in [0, 1)"
        if not 0 <= self.eps < math.inf:
            yield f"model.eps={self.eps} must not be negative or infinite: LayerNorm's usual value is 1e-5"
