"""Progress of long work: a bar on a terminal or in a notebook, plain lines in the log."""

import logging
import multiprocessing
import sys
import time
import warnings
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
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update(done - self.bar.n)
        if done % max(1, self.total // 10) == 0 or done == self.total or now - self.logged > 30:
            self.logged = now
            left_s = (self.total - done) * per_update_s
            log.info("step %d/%d  loss %.4f  %.0f tokens/s  %.0f s left", done, self.total, loss, rate, left_s)


@contextmanager
def progress(total: int, tokens_per_update: int, before: int = 0) -> Iterator[Progress]:
    """Give the Progress of a run, with a live bar in place of log lines where a bar is seen."""
    if not _seen():
        yield Progress(total, tokens_per_update, before)
        return
    with _log_to_files_only(), _drawn("training", total, before) as drawn:
        yield Progress(total, tokens_per_update, before, drawn)


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Draw a bar where it is seen, and give a function of (done, total) that moves it; elsewhere give None."""
    if not _seen():
        yield None
        return
    with _drawn(label) as drawn:

        def move(done: int, total: int) -> None:
            drawn.total = total
            drawn.update(done - drawn.n)

        yield move


def share(label: str, done: int, total: int, worth: int = 1) -> None:
    """Show the finished share of some work as one moving line where it is seen, if it is `worth` units of work or more."""
    if total >= worth and _seen():
        end = "" if done < total else "\n"
        print(f"\r{visible(label)} {100 * done // total:3d} %", end=end, file=sys.stderr, flush=True)


def _seen() -> bool:
    """Return whether standard error is a terminal or a notebook's cell.

    A worker process draws nothing: it would be drawn over its neighbour's.
    """
    notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return (notebook or sys.stderr.isatty()) and multiprocessing.parent_process() is None


def _drawn(label: str, total: int | None = None, before: int = 0) -> Any:
    """Return a bar, which is erased at its end: a widget in a notebook with ipywidgets, else one line of text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm warns where there is no ipywidgets
        from tqdm.auto import tqdm
    return tqdm(total=total, initial=before, desc=label, leave=False, dynamic_ncols=True)


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
