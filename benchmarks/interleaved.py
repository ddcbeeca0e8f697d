"""Times of several calls taken in turns, so that what else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, the first ones left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + warmup):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over rounds of one call's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
