"""Read many sources, in several processes where there are many: small files are read in Python's time."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import NamedTuple

from lnjac.machine import cores
from lnjac.runs.combine import Stacked, stacked, together
from lnjac.runs.read import Opened, Skip, Source, Unfit, contents, opened

AT_ONCE = 100
"""Sources in a batch, which one process reads, at most: runs of one kind are checked together."""

SHARES = 4
"""Batches for each process, at least: many share the work evenly."""

PATIENCE_S = 1.0
"""Seconds for which this process reads alone: another one takes half of it to start."""

MOST = 8
"""Processes that read at once: beyond this the disk, or the unpacking of what they send, is the limit."""


class Read(NamedTuple):
    """The tables of sources, and the sources that cannot be read."""

    found: Stacked
    skipped: list[Skip]


def read_all(sources: Sequence[Source], progress: Callable[[int, int], None] | None = None) -> Read:
    """Read every source, in order; `progress(done, total)` is called after each batch."""
    processes, all_taken = min(cores(), MOST), Event()
    size = min(AT_ONCE, max(10, len(sources) // (SHARES * processes)))
    batches = [sources[first : first + size] for first in range(0, len(sources), size)]
    todo, done, said = deque(range(len(batches))), dict[int, Read](), 0

    def say() -> None:
        nonlocal said
        n_done = sum(len(batches[each]) for each in list(done))
        if progress and n_done > said:
            said = n_done
            progress(n_done, len(sources))

    def work(read_one: Callable[[Sequence[Source]], Read], then: Callable[[], None] = lambda: None) -> None:
        while todo:
            try:
                number = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            done[number] = read_one(batches[number])
            then()

    def work_elsewhere() -> None:
        if not all_taken.wait(PATIENCE_S):
            with _helper() as read_one:
                work(read_one)

    with ThreadPoolExecutor(processes) as threads:  # each waits for a process
        try:
            for _ in range(processes - 1):
                threads.submit(work_elsewhere)
            work(read_batch, say)
        finally:
            todo.clear()
            all_taken.set()
    todo.extend(number for number in range(len(batches)) if number not in done)  # those at which a helper failed
    work(read_batch, say)
    say()
    parts = [done.pop(number) for number in range(len(batches))]
    return Read(together([part.found for part in parts]), [skip for part in parts for skip in part.skipped])


def read_batch(sources: Sequence[Source]) -> Read:
    """Read these sources in this process, those of one kind together."""
    kinds: dict[Hashable, list[Opened]] = {}
    found, unfit = [], dict[Source, Unfit]()
    for source in sources:
        try:
            each = opened(source)
        except Unfit as error:
            unfit[source] = error
        else:
            kinds.setdefault(each.kind, []).append(each)
    for group in kinds.values():
        try:
            found.append(_stacked(group))
        except Unfit:
            for each in group:
                try:
                    found.append(_stacked([each]))
                except Unfit as error:
                    unfit[each.source] = error
    return Read(together(found), [Skip(str(source.path), str(unfit[source])) for source in sources if source in unfit])


def _stacked(group: Sequence[Opened]) -> Stacked:
    found = contents(group)
    if group[0].source.merged:
        return stacked([group[0].source] * found.tables["runs"].num_rows, found)
    return stacked([each.source for each in group], found)


@contextmanager
def _helper() -> Iterator[Callable[[Sequence[Source]], Read]]:
    """Start a process, and give a function that has it read a batch.

    Not by multiprocessing: its processes run the caller's script again, or are copies of one that may hold locks. If the
    process fails at a batch, so does the function, and the batch is left to the caller, who meets the same error if it is
    one of the batch.
    """
    start = f"import sys; sys.path[:] = {sys.path!r}; from lnjac.runs.parallel import serve; serve()"
    words, pipe = [sys.executable, "-c", start], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def read_there(batch: Sequence[Source]) -> Read:
            pickle.dump(batch, requests)
            requests.flush()
            found: Read = pickle.load(answers)
            return found

        yield read_there


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
