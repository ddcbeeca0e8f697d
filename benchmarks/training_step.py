"""One update at the bare default against the plain script's, in turns in two processes: medians and their ratio.

python benchmarks/training_step.py [ROUNDS]
"""

import statistics
import sys

import torch
from interleaved import apart, interleaved, ratio, serve
from plain import PlainTraining

from lnjac.config.compose import compose
from lnjac.machine import keep_freed_memory
from lnjac.training import loop
from lnjac.training import run as train


def main(rounds: int) -> None:
    keep_freed_memory()  # as run.py does
    for overrides in ([], ["attn_mode=sigmoid"], ["precision=bf16"]):
        config = compose("device=cpu", *overrides)
        ours = loop.Training(config, train.admit(config))
        times = interleaved({"ours": ours.update, "plain": apart(__file__, "plain")}, rounds)
        mine, base = (statistics.median(times[name]) for name in ("ours", "plain"))
        name = " ".join(overrides) or "bare default"
        print(
            f"{name:18} {mine:6.1f} ms   plain fp32 softmax {base:6.1f} ms   ratio {ratio(times, 'ours', 'plain'):.2f}"
        )


def plain() -> None:
    corpus = train.admit(compose("device=cpu"))
    serve(PlainTraining(torch.from_numpy(corpus.train.astype("int64")), corpus.vocab_size).update)


if __name__ == "__main__":
    if sys.argv[1:] == ["plain"]:
        plain()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
