"""Tokens in files, which are little-endian uint16 and are read in pieces."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.uint16]
DTYPE = np.dtype("<u2")
MOST_TOKENS = 2**16
"""The number of distinct tokens that a uint16 can name."""

CHUNK = 2**22
"""The number of a split's tokens in memory at once."""


def chunks(split: TokenArray, overlap: int = 0) -> Iterator[TokenArray]:
    """Yield the split in pieces of CHUNK tokens, each with the first `overlap` tokens of the next."""
    for start in range(0, len(split), CHUNK):
        yield split[start : start + CHUNK + overlap]
