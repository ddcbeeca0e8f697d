"""Random streams: every draw of a run comes from one seed through a stream named for its purpose.

Streams are children of one numpy SeedSequence, keyed by labels, so that they are independent of one another and of the
order in which they are asked for: a new parameter or purpose never shifts what another one draws.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def sequence(seed: int, *labels: str | int) -> np.random.SeedSequence:
    """The child of SeedSequence(seed) that belongs to these labels, e.g. ("init", "blocks.0.attn.qkv.weight")."""
    words = hashlib.sha256("\0".join(map(str, labels)).encode()).digest()
    return np.random.SeedSequence(seed, spawn_key=tuple(np.frombuffer(words, dtype="<u4").tolist()))


def stream(seed: int, *labels: str | int) -> np.random.Generator:
    """The generator of these labels. Tensors are drawn from it too, on the CPU: torch's own keep 32 bits of a seed."""
    return np.random.Generator(np.random.PCG64(sequence(seed, *labels)))


def normal(shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Standard normal draws in float64, so that every precision and device rounds the same numbers."""
    return torch.from_numpy(generator.standard_normal(shape))


def uniform(shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Draws from [0, 1) in float64."""
    return torch.from_numpy(generator.random(shape))
