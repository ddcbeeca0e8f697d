"""Softmax attention by the fused kernel against its explicit form: one update of the bare default, interleaved.

    python benchmarks/attention.py [ROUNDS]

`lnjac.gpt.attention.Softmax` picks the kernel by what this shows.
"""

import statistics
import sys

import torch.nn.functional as F
from interleaved import interleaved, ratio
from torch import Tensor

from lnjac.config.compose import compose
from lnjac.gpt.attention import Attention, Softmax
from lnjac.training import loop
from lnjac.training import run as train


class Fused(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, dropout: float = 0.0) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class Explicit(Softmax):
    attend = Attention.attend


def main(rounds: int) -> None:
    for precision in ("fp32", "bf16"):
        updates = {}
        for mode in (Fused, Explicit):
            config = compose("device=cpu", f"precision={precision}")
            config.attn_mode = mode("softmax")
            updates[mode.__name__] = loop.Training(config, train.admit(config)).update
        times = interleaved(updates, rounds)
        fused, explicit = (statistics.median(times[name]) for name in ("Fused", "Explicit"))
        print(
            f"{precision}  fused {fused:6.1f} ms  explicit {explicit:6.1f} ms  ratio {ratio(times, 'Fused', 'Explicit'):.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
