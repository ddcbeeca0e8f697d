"""Token folders as nanoGPT writes them, and the one-line error that a bad one must end in."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lnjac.data import corpus as data
from lnjac.errors import ConfigError

TEXT = "To be, or not to be: that is the question.\n" * 40


def refused(load: Callable[[], Any], *said: str) -> str:
    """The text of the ConfigError that load() raises: one line, holding every word of `said`."""
    with pytest.raises(ConfigError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    for words in said:
        assert words in message
    return message


def write_folder(folder: Path, train: list[int], val: list[int], meta: Any = None) -> Path:
    """A folder as nanoGPT's own prepare.py would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def char_meta(text: str) -> dict[str, Any]:
    chars = sorted(set(text))
    return {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {ch: i for i, ch in enumerate(chars)},
    }


def decoded(corpus: data.Corpus, split: np.ndarray) -> str:
    assert corpus.vocabulary is not None
    return "".join(corpus.vocabulary[token] for token in split)
