"""A checkpoint's file: one safetensors file, replaced in one step, with whatever is not a tensor as JSON in its header."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lnjac.runs import write_atomically

VERSION = 2
"""Raised when the file's contents change: another version's checkpoint is not used."""


class Unusable(Exception):
    """Why a checkpoint cannot be gone on from."""


class Timer:
    """Called after each update: whether `every` seconds have passed since it last said so; never for None."""

    def __init__(self, every: float | None) -> None:
        self.every, self.last = every, time.monotonic()

    def __call__(self) -> bool:
        if self.every is None or time.monotonic() - self.last < self.every:
            return False
        self.last = time.monotonic()
        return True


def write(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Raises OSError when there is no room; what was there before then stays."""
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {"lnjac": json.dumps({"version": VERSION, **note})}
    try:
        write_atomically(path, lambda temporary: save_file(ready, temporary, header))
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read(path: Path, identity: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and note of the checkpoint of the run `identity`. Raises Unusable for another's, and for a broken file."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads(file.metadata()["lnjac"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Unusable(f"it cannot be read: {error}") from None
    if note.get("version") != VERSION or any(note.get(key) != value for key, value in identity.items()):
        raise Unusable("it is another run's, or of another version of lnjac")
    return tensors, note
