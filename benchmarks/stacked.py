"""An update of each run in stacks of 1, 2, 4 and 8 against a run alone, interleaved in one process, on one thread.

python benchmarks/stacked.py [ROUNDS]
"""

import statistics
import sys

import torch
from interleaved import interleaved, ratio

from lnjac import stack, train
from lnjac.config import compose
from lnjac.data import Corpus

SIZES = (1, 2, 4, 8)
SHAPES = [
    *([f"model.n_embd={width}"] for width in (16, 32, 64, 128)),
    ["model.n_embd=16", "batch_size=4", "model.block_size=16"],
    ["model.n_embd=32", "batch_size=4", "model.block_size=16"],
]


def trainings(runs: int, corpus: Corpus, overrides: list[str]) -> list[train.Training]:
    return [train.Training(compose("device=cpu", f"seed={seed}", *overrides), corpus) for seed in range(runs)]


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    for overrides in SHAPES:
        config = compose("device=cpu", *overrides)
        corpus = train.admit(config)
        calls = {"solo": trainings(1, corpus, overrides)[0].update}
        calls |= {str(runs): stack.Stack(trainings(runs, corpus, overrides)).update for runs in SIZES}
        times = interleaved(calls, rounds, 2)
        shown = [f"{' '.join(overrides):55} solo {statistics.median(times['solo']):6.1f} ms"]
        for runs in SIZES:
            per_run = statistics.median(times[str(runs)]) / runs
            shown.append(f"{runs}: {per_run:6.1f} ms ({ratio(times, str(runs), 'solo') / runs:.2f})")
        size = stack.bytes_per_run(config, corpus.vocab_size) / 2**20
        print(*shown, f"{size:.0f} MiB a run", sep="   ", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
