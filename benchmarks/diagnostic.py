"""The diagnostic on one batch against a plain forward and backward on it: interleaved times and peak memory.

    python benchmarks/diagnostic.py [ROUNDS [SWAP_ROUNDS]]

All swaps are timed against a training step, the mean of ten in each round.

Peak memory is the largest sum of live tensor storage, counted at every allocation by torch's profiler, over what lived
before.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

from interleaved import interleaved, ratio
from torch.profiler import ProfilerActivity, profile

from lnjac import swap, train
from lnjac.analyse import analyse
from lnjac.config import compose


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak of allocated minus freed bytes while call runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


UPDATES = 10


def main(rounds: int, swap_rounds: int) -> None:
    config = compose("device=cpu")
    training = train.Training(config, train.admit(config))
    for _ in range(3):
        training.update()
    training.model.eval()
    batches = training.diagnostic_batches()
    parameters = list(training.model.parameters())

    def plain() -> None:
        training.model.zero_grad(set_to_none=True)
        training.loss(training.model, batches[0])[0].backward()
        for parameter in parameters:
            parameter.grad = None

    def diagnostic() -> None:
        analyse(training.model, batches, training.loss)

    def updates() -> None:
        for _ in range(UPDATES):
            training.update()

    def swaps() -> None:
        swap.measure(
            training.model,
            batches,
            training.loss,
            trained=training.trained,
            optimizer=training.optimizer,
            settings=config.optimizer,
        )

    times = interleaved({"plain": plain, "diagnostic": diagnostic}, rounds)
    for name, values in times.items():
        print(f"{name:12} {statistics.median(values):6.1f} ms")
    print(f"time ratio   {ratio(times, 'diagnostic', 'plain'):6.2f}")
    times = interleaved({"updates": updates, "swaps": swaps}, swap_rounds, warmup=1)
    print(f"swaps        {statistics.median(times['swaps']):6.0f} ms")
    print(f"time ratio   {ratio(times, 'swaps', 'updates') * UPDATES:6.1f} training steps")
    plain_peak = peak_bytes(plain)
    print(f"peak memory  {plain_peak / 2**20:.1f} MiB plain", end="")
    for name, call in (("diagnostic", diagnostic), ("swaps", swaps)):
        peak = peak_bytes(call)
        print(f", {peak / 2**20:.1f} MiB {name} (ratio {peak / plain_peak:.2f})", end="")
    print()


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(30, 3)[len(given) :])
