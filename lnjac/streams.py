"""Random streams: every draw of a run comes from one seed through a stream named for its purpose.

Streams are children of one numpy SeedSequence, keyed by labels, so that they are independent of one another and of the
order in which they are asked for: a new parameter or purpose never shifts what another one draws.
"""

import hashlib

import numpy as np
import torch


def sequence(seed: int, *labels: str | int) -> np.random.SeedSequence:
    """The child of SeedSequence(seed) that belongs to these labels, e.g. ("init", "blocks.0.attn.qkv.weight")."""
    words = hashlib.sha256("\0".join(map(str, labels)).encode()).digest()
    return np.random.SeedSequence(seed, spawn_key=tuple(np.frombuffer(words, dtype="<u4").tolist()))


def numpy_stream(seed: int, *labels: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(sequence(seed, *labels)))


def torch_stream(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator: draws are made there and moved, so that every device starts from the same numbers."""
    state = int(sequence(seed, *labels).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)
