"""How a long job tells of itself: a bar on a terminal, plain dated lines in the log."""

import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lnjac.escape import visible

log = logging.getLogger(__name__)


class Progress:
    """Reports a run's updates: `tick` after each one; a log line every tenth of the run and at least every 30 s."""

    def __init__(self, total: int, tokens_per_update: int, before: int) -> None:
        self.total, self.tokens, self.before = total, tokens_per_update, before
        self.started = self.spoken = time.perf_counter()
        self.bar: object | None = None

    def tick(self, done: int, loss: float) -> None:
        now = time.perf_counter()
        per_update = (now - self.started) / (done - self.before)
        rate = self.tokens / max(per_update, 1e-9)
        if self.bar is not None:
            self.bar.update(0, completed=done, loss=loss, rate=rate)  # type: ignore[attr-defined]
        tenth = max(1, self.total // 10)
        if done % tenth == 0 or done == self.total or now - self.spoken > 30:
            self.spoken = now
            left = (self.total - done) * per_update
            log.info("step %d/%d  loss %.4f  %.0f tokens/s  %.0f s left", done, self.total, loss, rate, left)


@contextmanager
def progress(total: int, tokens_per_update: int, before: int = 0) -> Iterator[Progress]:
    """A Progress over `total` updates, `before` of them already done.

    On a terminal with a live bar (loss, tokens/s, time left) in place of log lines on the screen; not in a worker
    process, whose bar would be drawn over its neighbour's.
    """
    report = Progress(total, tokens_per_update, before)
    if not sys.stderr.isatty() or multiprocessing.parent_process() is not None:
        yield report
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with _log_to_files_only(), Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task("", total=total, loss=float("nan"), rate=0.0)
        report.bar = bar
        yield report


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's stderr, moved by calls with (done, total); None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(what, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


@contextmanager
def _log_to_files_only() -> Iterator[None]:
    """While a bar is drawn, lines of this module stay off the screen (they would tear it) and go to the log file."""
    screens = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]

    def not_ours(record: logging.LogRecord) -> bool:
        return record.name != __name__

    for handler in screens:
        handler.addFilter(not_ours)
    try:
        yield
    finally:
        for handler in screens:
            handler.removeFilter(not_ours)


def share(label: str, done: int, total: int, worth: int = 1) -> None:
    """One moving line on a terminal; nothing elsewhere, nor for less than `worth` units of work."""
    if total >= worth and sys.stderr.isatty():
        print(
            f"\r{visible(label)} {100 * done // total:3d} %",
            end="" if done < total else "\n",
            file=sys.stderr,
            flush=True,
        )
