"""Read many sources into one pile, in several processes where there are many: small files are read in Python's time."""

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from lnjac.machine import cores
from lnjac.runs.pile import Pile
from lnjac.runs.read import Skip, Source, Unfit, read

BATCHES = 100
"""Batches of sources, each of which one process reads: many share the work evenly, few take less memory."""

FEW = 100
"""Sources that this process has read sooner than another one has started."""

MOST = 8
"""Processes that read at once: beyond this the disk, or the unpacking of what they send, is the limit."""

Batch = tuple[Pile, list[Skip]]


def read_all(sources: Sequence[Source], progress: Callable[[int, int], None] | None = None) -> Batch:
    """Read every source, in order; return the pile of their tables and the sources that cannot be merged.

    `progress(done, total)` is called after each batch.
    """
    size = max(10, len(sources) // BATCHES)
    batches = [sources[first : first + size] for first in range(0, len(sources), size)]
    todo, done = deque(range(len(batches))), dict[int, Batch]()

    def read_here() -> None:
        while todo:
            try:
                number = todo.popleft()
            except IndexError:  # a helper took the last one
                return
            done[number] = read_batch(batches[number])
            if progress:
                progress(sum(len(batches[each]) for each in list(done)), len(sources))

    helpers = min(cores(), MOST) - 1 if len(sources) > FEW else 0
    if helpers:
        with ThreadPoolExecutor(helpers) as threads:  # one waits for each helper
            try:
                for _ in range(helpers):
                    threads.submit(_let_read, batches, todo, done)
                read_here()
            finally:
                todo.clear()
        todo.extend(number for number in range(len(batches)) if number not in done)  # what a helper failed at
        if progress and not todo:
            progress(len(sources), len(sources))
    read_here()
    pile, skipped = Pile(), []
    for number in range(len(batches)):
        of_batch, unfit = done.pop(number)
        pile.extend(of_batch)
        skipped += unfit
    return pile, skipped


def read_batch(sources: Sequence[Source]) -> Batch:
    pile, skipped = Pile(), []
    for source in sources:
        try:
            pile.add(source, read(source))
        except Unfit as error:
            skipped.append(Skip(str(source.path), str(error)))
    pile.compact()
    return pile, skipped


def _let_read(batches: Sequence[Sequence[Source]], todo: deque[int], done: dict[int, Batch]) -> None:
    """Have a process of its own read batches while there are any.

    Not by multiprocessing: its processes run the caller's script again, or are copies of one that may hold locks. A
    batch at which the process fails is left to the caller, who then meets the same error, if it is one of the batch.
    """
    start = f"import sys; sys.path[:] = {sys.path!r}; from lnjac.runs.reading import serve; serve()"
    words, pipe = [sys.executable, "-c", start], subprocess.PIPE
    with (
        contextlib.suppress(OSError, EOFError, IndexError, pickle.UnpicklingError),
        subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        while todo:
            number = todo.popleft()
            pickle.dump(batches[number], process.stdin)
            process.stdin.flush()
            done[number] = pickle.load(process.stdout)


def serve() -> None:
    """Read batches from standard input and answer on standard output, until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may be printed among the answers
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(read_batch(batch), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
