"""One update against its matrix products alone, at one thread, interleaved in one process: medians and their ratios.

    python benchmarks/products.py [ROUNDS]

The products are those of the forward pass and the two of the backward, into memory already there: by torch.mm and torch.bmm,
and the linear layers' also by `lnjac.gpt.products.product`, which an update uses.
"""

import statistics
import sys
from collections.abc import Callable

import torch
from interleaved import interleaved, ratio
from torch import Tensor

from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig
from lnjac.gpt.credit import linears
from lnjac.gpt.products import product
from lnjac.machine import keep_freed_memory
from lnjac.training import loop
from lnjac.training import run as train

Call = Callable[[], object]


def into(multiply: Callable[..., Tensor], a: Tensor, b: Tensor) -> Call:
    """A call that multiplies a by b into memory of its own."""
    out = multiply(a, b)
    return lambda: multiply(a, b, out=out)


def by_product(a: Tensor, b: Tensor) -> Call:
    return torch.no_grad()(lambda: product(a, b))  # as in a backward pass


def linear_products(training: loop.Training, call: Callable[[Tensor, Tensor], Call]) -> list[Call]:
    """y = x·Wᵀ, g·B and gᵀ·x of every linear layer."""
    config = training.config
    calls = []
    for _, layer in linears(training.model):
        weight = layer.weight.detach()
        x, g = (torch.randn(config.batch_size * config.model.block_size, n) for n in reversed(weight.shape))
        calls += [call(x, weight.t()), call(g, weight), call(g.t(), x)]
    return calls


def attention_products(config: RunConfig) -> list[Call]:
    """Q·Kᵀ and P·V, and the two gradients of each, of every layer."""
    model = config.model
    t, heads = model.block_size, config.batch_size * model.n_head
    x, scores = torch.randn(heads, t, model.n_embd // model.n_head), torch.randn(heads, t, t)
    factors = [(x, x.mT), (scores, x), (x, x.mT), (scores.mT, x), (scores, x), (scores.mT, x)]
    return [into(torch.bmm, a, b) for a, b in factors * model.n_layer]


def together(calls: list[Call]) -> Call:
    return lambda: [call() for call in calls]


def main(rounds: int) -> None:
    keep_freed_memory()  # as run.py does
    torch.set_num_threads(1)
    for width in (128, 64, 32, 16):
        config = compose("device=cpu", f"model.n_embd={width}")
        training = loop.Training(config, train.admit(config))
        attention = attention_products(config)
        calls = {
            "update": training.update,
            "mm": together(linear_products(training, lambda a, b: into(torch.mm, a, b)) + attention),
            "ours": together(linear_products(training, by_product) + attention),
        }
        times = interleaved(calls, rounds)
        update, mm, ours = (statistics.median(times[name]) for name in calls)
        print(
            f"width {width:3}  update {update:6.1f} ms   torch's products {mm:6.1f} ms, ratio "
            f"{ratio(times, 'update', 'mm'):.2f}   ours {ours:6.1f} ms, ratio {ratio(times, 'update', 'ours'):.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
