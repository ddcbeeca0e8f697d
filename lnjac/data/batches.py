"""Batches of a corpus, and the losses that counting its tokens and pairs reaches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from lnjac.data import tokens as tokens_module
from lnjac.data.corpus import Corpus
from lnjac.data.tokens import TokenArray, chunks
from lnjac.progress import share

Batch = tuple[torch.Tensor, torch.Tensor]


def gather(split: TokenArray, starts: npt.NDArray[np.int64], block_size: int) -> Batch:
    """Return inputs, int64 (len(starts), block_size), the tokens from each start on, and targets, those one later."""
    tokens = split[np.asarray(starts)[:, None] + np.arange(block_size + 1)]
    both = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class Batches:
    """Random training batches, in which every start of a whole block with its targets is equally likely."""

    def __init__(self, split: TokenArray, batch_size: int, block_size: int, rng: np.random.Generator) -> None:
        self.split, self.batch_size, self.block_size, self.rng = split, batch_size, block_size, rng

    def next(self) -> Batch:
        """Return the next batch's inputs and targets, int64 (batch_size, block_size)."""
        return gather(self.split, self.starts(), self.block_size)

    def starts(self) -> npt.NDArray[np.int64]:
        """Draw where the next batch's sequences begin, (batch_size,)."""
        return self.rng.integers(0, len(self.split) - self.block_size, size=self.batch_size)


def windows(split: TokenArray, block_size: int, batch_size: int, max_tokens: int | None) -> Iterator[Batch]:
    """Yield batches whose targets are the split's tokens 1, 2, …, each exactly once and in order.

    Window k has inputs [kT, kT+T) for T = block_size. A shorter last window is a batch of its own.

    Args:
        split: the tokens, (n,).
        block_size: the tokens of a window.
        batch_size: the windows of a batch.
        max_tokens: how many targets there are at most, or None for all.
    """
    n_targets = count_targets(split, max_tokens)
    starts = np.arange(0, n_targets - block_size + 1, block_size)
    for first in range(0, len(starts), batch_size):
        yield gather(split, starts[first : first + batch_size], block_size)
    if rest := n_targets % block_size:
        yield gather(split, np.array([n_targets - rest]), rest)


def count_targets(split: TokenArray, max_tokens: int | None) -> int:
    """Return how many tokens `windows` predicts."""
    return len(split) - 1 if max_tokens is None else min(len(split) - 1, max_tokens)


@dataclass(frozen=True)
class Baselines:
    """Cross-entropy, in nats per token, of two count models on the targets of `windows`."""

    unigram_nats: float
    bigram_nats: float


@cache
def baselines(corpus: Corpus, max_tokens: int | None) -> Baselines:
    """Return the validation losses of counts on train, p(b) = (#b + 1) / (N + V) and p(b | a) = (#ab + 1) / (#a· + V).

    Only the pairs of the validation split are counted, so a vocabulary of 50,000 needs no table of its square.

    Args:
        corpus: the corpus, whose train split is counted.
        max_tokens: how many tokens of the validation split are predicted, or None for all.
    """
    vocab_size = corpus.vocab_size
    n_targets = count_targets(corpus.val, max_tokens)
    evaluated = np.asarray(corpus.val[: n_targets + 1], dtype=np.int64)
    before, target = evaluated[:-1], evaluated[1:]
    wanted, where = np.unique(before * vocab_size + target, return_inverse=True)
    n_token = np.zeros(vocab_size, dtype=np.int64)
    n_pair = np.zeros(len(wanted), dtype=np.int64)
    done = 0
    for chunk in chunks(corpus.train, overlap=1):
        tokens = chunk.astype(np.int64)
        pairs = tokens[:-1] * vocab_size + tokens[1:]
        at = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
        n_pair += np.bincount(at[wanted[at] == pairs], minlength=len(wanted))
        n_token += np.bincount(tokens[: tokens_module.CHUNK], minlength=vocab_size)
        done += len(tokens)
        total = len(corpus.train)
        share("counting pairs for the bigram baseline", min(done, total), total, worth=2**26)
    n_before = n_token.copy()
    n_before[corpus.train[-1]] -= 1  # the last token begins no pair
    log_unigram = np.log(n_token[target] + 1) - math.log(len(corpus.train) + vocab_size)
    log_bigram = np.log(n_pair[where] + 1) - np.log(n_before[before] + vocab_size)
    return Baselines(float(-log_unigram.mean()), float(-log_bigram.mean()))
