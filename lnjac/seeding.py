"""Random streams: each draw of a run comes from its one seed, through a stream named for its purpose.

Streams are children of one numpy SeedSequence, keyed by labels. They are independent of one another and of the order in
which they are asked for, so a new parameter or purpose never shifts the draws of another one.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def sequence(seed: int, *labels: str | int) -> np.random.SeedSequence:
    """Return the child of SeedSequence(seed) for these labels, e.g. ("init", "blocks.0.attn.qkv.weight")."""
    words = hashlib.sha256("\0".join(map(str, labels)).encode()).digest()
    return np.random.SeedSequence(seed, spawn_key=tuple(np.frombuffer(words, dtype="<u4").tolist()))


def stream(seed: int, *labels: str | int) -> np.random.Generator:
    """Return the generator for these labels. Tensors are drawn from it too, as torch's own keeps 32 bits of a seed."""
    return np.random.Generator(np.random.PCG64(sequence(seed, *labels)))


def normal(shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Draw from the standard normal distribution in float64, so that every precision and device rounds the same numbers."""
    return torch.from_numpy(generator.standard_normal(shape))


def uniform(shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Draw from [0, 1) in float64."""
    return torch.from_numpy(generator.random(shape))
