"""The diagnostics on one batch against a training step and a plain forward and backward: interleaved times, peak memory.

    python benchmarks/diagnostic.py [ROUNDS [SWAP_ROUNDS]]

Peak memory is the largest sum of live tensor storage, counted at every allocation by torch's profiler, over what lived
before.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from interleaved import interleaved, ratio
from torch.profiler import ProfilerActivity, profile

from lnjac.config.compose import compose
from lnjac.diagnostics.catalogue import chosen
from lnjac.training import loop
from lnjac.training import run as train


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


def main(rounds: int, swap_rounds: int) -> None:
    config = compose("device=cpu", "diagnostics=full")
    training = loop.Training(config, train.admit(config))
    for _ in range(3):
        training.update()
    batches = training.diagnostic_batches()
    parameters = list(training.model.parameters())

    def plain() -> None:
        training.model.zero_grad(set_to_none=True)
        training.loss(training.model, batches[0])[0].backward()
        for parameter in parameters:
            parameter.grad = None

    def diagnostics(**switches: bool) -> Callable[[], object]:
        off = dict.fromkeys(("distributions", "alignment", "attention", "swap"), False)
        settings = replace(config.diagnostics, **{**off, **switches})

        def diagnose() -> None:
            training.config = replace(config, diagnostics=settings)
            training.diagnostics = chosen(settings)
            training.diagnose()

        return diagnose

    calls = {
        "plain": plain,
        "step": training.update,
        "layers": diagnostics(),
        "attention": diagnostics(attention=True),
        "alignment": diagnostics(alignment=True),
        "full": diagnostics(distributions=True, alignment=True, attention=True),
    }
    times = interleaved(calls, rounds)
    swaps = {"swaps": diagnostics(swap=True)}
    swaps["full+swaps"] = diagnostics(distributions=True, alignment=True, attention=True, swap=True)
    slow = interleaved({"plain": plain, "step": training.update, **swaps}, swap_rounds, warmup=1)
    calls |= swaps
    bytes_ = {name: peak_bytes(call) for name, call in calls.items()}
    print("           ms      of plain  of a step   MiB    of plain  of a step")
    for name in calls:
        of = slow if name in swaps else times
        time, memory = statistics.median(of[name]), bytes_[name]
        print(
            f"{name:11}{time:6.1f}  {ratio(of, name, 'plain'):6.2f}  {ratio(of, name, 'step'):9.2f}"
            f"  {memory / 2**20:8.1f}  {memory / bytes_['plain']:6.2f}  {memory / bytes_['step']:9.2f}"
        )


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(30, 5)[len(given) :])
