"""One update at the bare default against the plain script's, interleaved in one process: medians and their ratio.

python benchmarks/training_step.py [ROUNDS]
"""

import statistics
import sys

import torch
from interleaved import interleaved, ratio
from plain import PlainTraining

from lnjac.config.compose import compose
from lnjac.training import loop
from lnjac.training import run as train


def main(rounds: int) -> None:
    for overrides in ([], ["attn_mode=sigmoid"], ["precision=bf16"]):
        config = compose("device=cpu", *overrides)
        corpus = train.admit(config)
        ours = loop.Training(config, corpus)
        plain = PlainTraining(torch.from_numpy(corpus.train.astype("int64")), corpus.vocab_size)
        times = interleaved({"ours": ours.update, "plain": plain.update}, rounds)
        mine, base = (statistics.median(times[name]) for name in ("ours", "plain"))
        name = " ".join(overrides) or "bare default"
        print(
            f"{name:18} {mine:6.1f} ms   plain fp32 softmax {base:6.1f} ms   ratio {ratio(times, 'ours', 'plain'):.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
