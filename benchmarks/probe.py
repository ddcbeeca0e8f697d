"""What does a probe cost? Time and peak memory at GPT-2's shape, of `measure` against a forward and backward pass, of
`watch` against the step that it watches: a forward and backward pass, and AdamW's update.

    OMP_NUM_THREADS=2 python benchmarks/probe.py [width layers batch length rounds]

Ratios of times are medians over interleaved rounds. Each peak is a process of its own.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas  # noqa: F401  rows need it, and its own memory is no part of a pass
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lnjac

VOCAB = 8192
AGAINST = {"pass": "pass", "measure": "pass", "step": "step", "watch": "step"}
"""With which way each is compared."""


class Block(nn.Module):
    """A block as GPT-2 has it, of torch's own modules."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, d: int, layers: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, d // 64) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.ln_f(h))
        return logits


def loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten()), ids.numel()


def passes(d: int, layers: int, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    model, ids = Model(d, layers, length), torch.randint(VOCAB, (batch, length))
    probe, optimizer = lnjac.probe(model), torch.optim.AdamW(model.parameters(), lr=1e-4)

    def plain() -> None:
        model.zero_grad()
        loss(model, ids)[0].backward()

    def step() -> None:
        plain()
        optimizer.step()

    def watched() -> None:
        model.zero_grad()
        with probe.watch() as seen:
            mean, tokens = loss(model, ids)
            seen.tokens(tokens)
            mean.backward()
        optimizer.step()

    return {"pass": plain, "measure": lambda: probe.measure([ids], loss), "step": step, "watch": watched}


def main(d: int = 384, layers: int = 8, batch: int = 2, length: int = 256, rounds: int = 15) -> None:
    ways = passes(d, layers, batch, length)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    size = sum(p.numel() for p in Model(d, layers, length).parameters())
    print(
        f"{size / 1e6:.0f} M parameters, ({batch}, {length}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    words = [str(n) for n in (d, layers, batch, length)]
    peak = {
        name: int(
            subprocess.run([sys.executable, __file__, "peak", name, *words], capture_output=True, check=True).stdout
        )
        for name in ("none", *ways)
    }
    for name, taken in times.items():
        base = AGAINST[name]
        ratio = statistics.median(a / b for a, b in zip(taken, times[base], strict=True))
        memory = (peak[name] - peak["none"]) / (peak[base] - peak["none"])
        print(
            f"{name:8} {1e3 * statistics.median(taken):8.1f} ms  {ratio:5.2f} x time  {memory:5.2f} x memory of a {base}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        made = passes(*map(int, sys.argv[3:]))
        if sys.argv[2] != "none":
            made[sys.argv[2]]()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would hold the parent's too
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    else:
        main(*map(int, sys.argv[1:]))
