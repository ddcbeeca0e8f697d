"""The folder and config that this process's run was started with, by a sweep or by Hydra, for `lnjac.record()`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Handed(NamedTuple):
    """The arguments of `record` that a script need not give."""

    folder: Path
    config: Mapping[str, Any]
    execution: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    """The script's file name, and the words that it was started with by Hydra."""


_given: Handed | None = None


def hand(handed: Handed | None) -> None:
    """Set what `record()` takes in this process from now on; None takes it back."""
    global _given
    _given = handed


def given() -> Handed | None:
    """Return what was handed to this process's run, or None if nothing was."""
    return _given
