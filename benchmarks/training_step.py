"""One update at the bare default against the plain script's, interleaved in one process: medians and their ratio.

python benchmarks/training_step.py [ROUNDS]
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from plain import PlainTraining

from lnjac import train
from lnjac.config import compose


def milliseconds(update: Callable[[], object]) -> float:
    start = time.perf_counter()
    update()
    return 1e3 * (time.perf_counter() - start)


def main(rounds: int) -> None:
    for overrides in ([], ["attn_mode=sigmoid"], ["precision=bf16"]):
        config = compose(*overrides)
        corpus = train.admit(config)
        ours = train.Training(config, corpus)
        plain = PlainTraining(torch.from_numpy(corpus.train.astype("int64")), corpus.vocab_size)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for i in range(rounds + 5):
            pair = {"ours": milliseconds(ours.update), "plain": milliseconds(plain.update)}
            if i >= 5:  # the first rounds warm up
                for name, ms in pair.items():
                    times[name].append(ms)
        mine, base = (statistics.median(times[name]) for name in ("ours", "plain"))
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
        name = " ".join(overrides) or "bare default"
        print(f"{name:20} ours {mine:6.1f} ms   plain softmax fp32 {base:6.1f} ms   ratio {ratio:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
