"""Progress of long work: a bar on a terminal, plain lines in the log."""

import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lnjac.escape import visible

log = logging.getLogger(__name__)


class Progress:
    """The progress of a run of `total` updates, `before` of them done at its start.

    `tick` is called after each update. It logs a line every tenth of the run, and at least every 30 s.
    """

    def __init__(self, total: int, tokens_per_update: int, before: int, bar: Any = None) -> None:
        self.total, self.tokens, self.before, self.bar = total, tokens_per_update, before, bar
        self.started = self.logged = time.perf_counter()

    def tick(self, done: int, loss: float) -> None:
        now = time.perf_counter()
        per_update_s = (now - self.started) / (done - self.before)
        rate = self.tokens / max(per_update_s, 1e-9)
        if self.bar is not None:
            self.bar.update(0, completed=done, loss=loss, rate=rate)
        if done % max(1, self.total // 10) == 0 or done == self.total or now - self.logged > 30:
            self.logged = now
            left_s = (self.total - done) * per_update_s
            log.info("step %d/%d  loss %.4f  %.0f tokens/s  %.0f s left", done, self.total, loss, rate, left_s)


@contextmanager
def progress(total: int, tokens_per_update: int, before: int = 0) -> Iterator[Progress]:
    """Give the Progress of a run, with a live bar in place of log lines on a terminal.

    A worker process draws none: it would be drawn over its neighbour's.
    """
    if not sys.stderr.isatty() or multiprocessing.parent_process() is not None:
        yield Progress(total, tokens_per_update, before)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    loss, rate = TextColumn("loss {task.fields[loss]:.3f}"), TextColumn("{task.fields[rate]:,.0f} tokens/s")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), loss, rate, TimeRemainingColumn())
    with _log_to_files_only(), Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task("", total=total, loss=float("nan"), rate=0.0)
        yield Progress(total, tokens_per_update, before, bar)


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Draw a bar on a terminal, and give a function of (done, total) that moves it; elsewhere give None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(label, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


def share(label: str, done: int, total: int, worth: int = 1) -> None:
    """Show the finished share of some work as one moving line on a terminal, if it is `worth` units of work or more."""
    if total >= worth and sys.stderr.isatty():
        end = "" if done < total else "\n"
        print(f"\r{visible(label)} {100 * done // total:3d} %", end=end, file=sys.stderr, flush=True)


@contextmanager
def _log_to_files_only() -> Iterator[None]:
    """Keep this module's log lines off the screen, where they would tear the bar."""
    screens = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]

    def foreign(record: logging.LogRecord) -> bool:
        return record.name != __name__

    for handler in screens:
        handler.addFilter(foreign)
    try:
        yield
    finally:
        for handler in screens:
            handler.removeFilter(foreign)
