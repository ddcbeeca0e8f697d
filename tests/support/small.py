"""The smallest runs: their overrides, a made corpus, a run made with both, and the members of each config group."""

from pathlib import Path

import numpy as np
from support.paths import ROOT

import lnjac
from lnjac.config.compose import compose
from lnjac.data.corpus import Corpus
from lnjac.runs import folder as runs
from lnjac.training import run as train

SMALL = ("model.n_layer=2", "model.n_head=2", "model.n_embd=8", "model.block_size=8", "batch_size=4", "steps=3",
         "eval.tokens=40", "diagnostics.batch_size=2", "device=cpu")  # fmt: skip


def members(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 11, 400).astype(np.uint16)
    return Corpus("made", tokens[:300], tokens[300:], 11, "0" * 64, None)


def finished(folder: Path, *overrides: str) -> lnjac.Run:
    assert train.run(compose(*SMALL, *overrides), folder, corpus()) == runs.DONE
    return lnjac.load_run(folder)
