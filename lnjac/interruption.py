"""Obey Ctrl-C, SIGTERM and a cluster's notice where nothing is half done, as between two updates."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""The signals of Ctrl-C, of the end of a process, and of Slurm and the like ahead of a time limit or a preemption."""


@contextmanager
def held_back() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Hold signals back until the function that this yields is called, where nothing is half done.

    Called as `due(save)`, it does nothing unless a signal came; then it saves and does what the signal's own handler
    does, which as a rule raises. A second signal is not held back. Signals without a Python handler, and all of them
    outside the main thread, are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda save: None
        return
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    came: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if came:
            handlers[number](number, frame)
        came.append((number, frame))

    def due(save: Callable[[], None]) -> None:
        if came:
            save()
            number, frame = came.pop()
            came.clear()
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield due
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
