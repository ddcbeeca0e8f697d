"""The diagnostic on one batch against a plain forward and backward on it: interleaved times and peak memory.

    python benchmarks/diagnostic.py [ROUNDS]

Peak memory is the largest sum of live tensor storage, counted at every allocation by torch's profiler, over what lived
before.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

from interleaved import interleaved, ratio
from torch.profiler import ProfilerActivity, profile

from lnjac import train
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


def main(rounds: int) -> None:
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

    times = interleaved({"plain": plain, "diagnostic": diagnostic}, rounds)
    for name, values in times.items():
        print(f"{name:12} {statistics.median(values):6.1f} ms")
    print(f"time ratio   {ratio(times, 'diagnostic', 'plain'):6.2f}")
    plain_peak, diagnostic_peak = peak_bytes(plain), peak_bytes(diagnostic)
    print(f"peak memory  {plain_peak / 2**20:.1f} MiB plain, {diagnostic_peak / 2**20:.1f} MiB diagnostic", end="")
    print(f", ratio {diagnostic_peak / plain_peak:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
