"""Batches predict each token once; the baselines' counts agree with a loop."""

from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lnjac.data import batches as data_batches
from lnjac.data import corpus as data
from lnjac.data import tokens as data_tokens


def test_gather_shifts_targets_by_one() -> None:
    split = np.arange(100, 130, dtype=np.uint16)
    idx, targets = data_batches.gather(split, np.array([0, 5, 26]), 3)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.tolist() == [[100, 101, 102], [105, 106, 107], [126, 127, 128]]
    assert targets.tolist() == [[101, 102, 103], [106, 107, 108], [127, 128, 129]]
    assert idx.is_contiguous()
    assert targets.is_contiguous()
    top = data_batches.gather(np.array([65535, 0], dtype=np.uint16), np.array([0]), 1)
    assert top[0].item() == 65535  # not wrapped to -1


def test_batches_repeat_with_their_seed_and_reach_both_ends() -> None:
    split = np.arange(12, dtype=np.uint16)

    def draw(seed: int, n: int) -> list[torch.Tensor]:
        batches = data_batches.Batches(split, 5, 4, np.random.default_rng(seed))
        return [batches.next()[0] for _ in range(n)]

    assert all(map(torch.equal, draw(1, 4), draw(1, 4)))
    assert not all(map(torch.equal, draw(1, 4), draw(2, 4)))
    starts = torch.cat(draw(1, 200))[:, 0].tolist()
    assert set(starts) == set(range(12 - 4))  # 0 to len - block_size - 1
    assert min(Counter(starts).values()) > 60  # 125 expected of each
    data_batches.Batches(split, 1, 11, np.random.default_rng(0)).next()


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 70),
    block_size=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    max_tokens=st.one_of(st.none(), st.integers(1, 80)),
)
def test_windows_predict_each_token_exactly_once(
    n: int, block_size: int, batch_size: int, max_tokens: int | None
) -> None:
    split = np.arange(n, dtype=np.uint16)
    seen: list[int] = []
    shapes = []
    for idx, targets in data_batches.windows(split, block_size, batch_size, max_tokens):
        assert torch.equal(idx + 1, targets)
        assert torch.equal(idx[:, 0] % block_size, torch.zeros(len(idx), dtype=torch.int64))
        seen += targets.flatten().tolist()
        shapes.append(tuple(idx.shape))
    assert seen == list(range(1, n if max_tokens is None else min(n, max_tokens + 1)))
    assert all(width == block_size for _, width in shapes[:-1])
    assert all(rows <= batch_size for rows, _ in shapes)
    assert shapes[-1][1] == block_size or shapes[-1][0] == 1


# Baselines


def counted(train: list[int], val: list[int], vocab_size: int) -> tuple[float, float]:
    """The slow truth: dictionaries and a loop."""
    one, two, before = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    pairs = list(pairwise(val))
    uni = [-np.log((one[b] + 1) / (len(train) + vocab_size)) for _, b in pairs]
    bi = [-np.log((two[a, b] + 1) / (before[a] + vocab_size)) for a, b in pairs]
    return float(np.mean(uni)), float(np.mean(bi))


@settings(max_examples=60, deadline=None)
@given(
    train=st.lists(st.integers(0, 5), min_size=2, max_size=60),
    val=st.lists(st.integers(0, 5), min_size=2, max_size=30),
    vocab_size=st.sampled_from([6, 9, 50304]),
    max_tokens=st.sampled_from([None, 1, 7]),
    chunk=st.sampled_from([1, 3, 2**22]),
)
def test_baselines_agree_with_a_loop(
    train: list[int], val: list[int], vocab_size: int, max_tokens: int | None, chunk: int
) -> None:
    uint16 = partial(np.array, dtype=np.uint16)
    corpus = data.Corpus("toy", uint16(train), uint16(val), vocab_size, "", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tokens, "CHUNK", chunk)
        found = data_batches.baselines(corpus, max_tokens)
    predicted = val if max_tokens is None else val[: max_tokens + 1]
    assert (found.unigram_nats, found.bigram_nats) == pytest.approx(counted(train, predicted, vocab_size), rel=1e-12)


def test_baselines_of_the_play_leave_room_to_learn() -> None:
    found = data_batches.baselines(data.Play("play").load(), None)
    assert 3.0 < found.unigram_nats < 3.6
    assert 2.2 < found.bigram_nats < 2.7
