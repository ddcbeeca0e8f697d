"""A checkpoint: all that the coming updates depend on, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lnjac.gpt import model as gpt

if TYPE_CHECKING:
    from lnjac.training.loop import Training

VERSION = 5
"""Raised when the file's contents change: another version's checkpoint is not used."""


class Unusable(Exception):
    """Raised when a checkpoint cannot be resumed."""


def state(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights, feedback, optimizer and generators: tensors, and plain values."""
    tensors = {f"model.{name}": value for name, value in gpt.saved(training.model).items()}
    for i, moments in training.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items() if value is not None}
    tensors["generator.cpu"] = torch.get_rng_state()
    if training.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(training.device)
    return tensors, {"updates": training.updates, "batches": training.batches.rng.bit_generator.state}


def restore(training: Training, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Put the training where `state` was taken. Weights alone, of `read_weights`, are enough to measure, not to train on."""
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    gpt.load_saved(training.model, weights)
    training.updates = note["updates"]
    if "batches" not in note:
        return
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            moments.setdefault(int(i), {})[key] = value
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    torch.set_rng_state(tensors["generator.cpu"])
    if training.device.type == "cuda" and "generator.cuda" in tensors:  # else it was begun on a CPU
        torch.cuda.set_rng_state(tensors["generator.cuda"], training.device)
    training.batches.rng.bit_generator.state = note["batches"]


class Timer:
    """Return, called after an update, whether `every` seconds have passed since the last True; never for None."""

    def __init__(self, every: float | None) -> None:
        self.every, self.last = every, time.monotonic()

    def __call__(self) -> bool:
        if self.every is None or time.monotonic() - self.last < self.every:
            return False
        self.last = time.monotonic()
        return True


def write(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and note with a SHA-256 over both.

    Raises:
        OSError: There is no room.
    """
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"version": VERSION, **note})
    header = {"lnjac": text, "sha256": _sha256(ready, text)}
    try:
        save_file(ready, path, header)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read(path: Path, identity: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the note of the checkpoint of the run `identity`.

    Raises:
        Unusable: The file is broken, was altered after it was written, or belongs to another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header["sha256"] != _sha256(tensors, header["lnjac"]):
            raise Unusable("it was altered after it was written: its SHA-256 differs")
        note = json.loads(header["lnjac"])
    except KeyError as error:
        raise Unusable(f"its header lacks {error}: it was altered, or written by an earlier lnjac") from None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise Unusable(f"it cannot be read: {error}") from None
    if note.get("version") != VERSION or any(note.get(key) != value for key, value in identity.items()):
        raise Unusable("it is another run's, or of another version of lnjac")
    return tensors, note


def read_weights(path: Path, updates: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a finished run's weights, made by so many updates, as a checkpoint that holds nothing else."""
    return {f"model.{name}": value for name, value in load_file(path).items()}, {"updates": updates}


def _sha256(tensors: Mapping[str, Tensor], note: str) -> str:
    """Hash every name, type, shape and byte: safetensors itself checks none of them."""
    digest = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
