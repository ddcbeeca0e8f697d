"""Ask for the resources of this process's machine, and choose how its memory is handled."""

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h has them


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones, where the C library is glibc.

    By default it may give that of large tensors back to the system and ask for it again: an update of the bare default then
    met up to 14,000 page faults, a fifth of its time, in some processes and not in others. Numbers do not change.
    """
    with suppress(OSError, TypeError, AttributeError):  # another C library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(threshold, 1 << 30)
