"""Tokens as files hold them: little-endian uint16, read in pieces."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint16]
DTYPE = np.dtype("<u2")
MOST_TOKENS = 2**16
"""Distinct tokens that a uint16 can name."""

CHUNK = 2**22
"""Tokens of a split in memory at once."""


def chunks(split: Tokens, overlap: int = 0) -> Iterator[Tokens]:
    """The split in pieces of CHUNK tokens, each with the first `overlap` tokens of the next."""
    for start in range(0, len(split), CHUNK):
        yield split[start : start + CHUNK + overlap]
