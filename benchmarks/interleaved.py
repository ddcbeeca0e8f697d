"""Times of several calls taken in turns, so that what else the machine does falls on all alike."""

import statistics
import subprocess
import sys
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


def apart(*line: str) -> Callable[[], object]:
    """A call that is made in a process of its own: of this script with these arguments, which `serve`s it."""
    process = subprocess.Popen([sys.executable, *line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    asked, answers = process.stdin, process.stdout
    assert asked
    assert answers

    def call() -> None:
        print(file=asked, flush=True)
        answers.readline()

    return call


def serve(call: Callable[[], object]) -> None:
    """Make the call as often as the other process asks for it."""
    for _ in sys.stdin:
        call()
        print(flush=True)
