"""Whole sweeps, from command to merged parquet, against a plain script that trains the same runs in a loop.

python benchmarks/sweeps.py default|bf16|widths [ROUNDS]

The plain script (benchmarks/plain.py) trains with all threads in one process, on the same tokens, and does nothing else: it
validates, analyses and writes nothing. Rounds are interleaved: plain, ours, plain, ours, ….
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from plain import PlainTraining

from lnjac.config.compose import compose
from lnjac.training import run as train

RUN = Path(__file__).resolve().parent.parent / "run.py"
STEPS = 250
SWEEPS = {
    "default": (["attn_mode=softmax,sigmoid", "seed=1,2,3"], [128] * 6),
    "bf16": (["attn_mode=softmax,sigmoid", "seed=1,2,3", "precision=bf16"], [128] * 6),
    "widths": (["model.n_embd=16,32,64", "seed=1,2,3,4,5,6,7,8"], [16, 32, 64] * 8),
}


def main(name: str, rounds: int, *more: str) -> None:
    words, widths = SWEEPS[name]
    corpus = train.admit(compose())
    tokens = torch.from_numpy(corpus.train.astype("int64"))
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        for width in widths:
            script = PlainTraining(tokens, corpus.vocab_size, width=width)
            for _ in range(STEPS):
                script.update()
        plain_s = time.perf_counter() - start
        folder = tempfile.mkdtemp()
        start = time.perf_counter()
        line = [sys.executable, str(RUN), "-m", *words, f"hydra.sweep.dir={folder}/sweep", *more]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        ours_s = time.perf_counter() - start
        shutil.rmtree(folder)
        ratios.append(ours_s / plain_s)
        print(f"{name}: plain {plain_s:6.1f} s   ours {ours_s:6.1f} s   ratio {ratios[-1]:.2f}", flush=True)
    print(f"{name}: median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3, *sys.argv[3:])
