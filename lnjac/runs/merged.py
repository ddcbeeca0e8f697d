"""The files of a merge: their names, and their replacement as one step, whatever ends the process.

A merge is several files, and no system renames several at once. So they are completed in a hidden folder, and renaming
that folder to its final name is the step: from then on the merge is the new one. Its files are then moved to their
places; if the process ends before all are, whoever reads or writes the merge next moves the rest.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lnjac.runs.folder import read_metadata
from lnjac.runs.schema import CORE, FROZEN, in_order

UNFINISHED = ".merge-"
"""How the name of a folder begins in which a merge is not complete yet."""


def companion(layers: Path, table: str) -> Path:
    """Return the file of a merge that keeps this table, given the one that holds its layers."""
    return layers if table == "layers" else layers.with_suffix(f".{table}.parquet")


def companions(layers: Path) -> dict[str, Path]:
    """Return the files of a merge by table: those that every merge has, and those in long form that are there."""
    found = (layers.parent / name for name in _beside(layers))
    names = {*CORE, *(path.stem.rpartition(".")[2] for path in found if layers_file(path) == layers)}
    return {name: companion(layers, name) for name in in_order(names)}


def _beside(layers: Path) -> list[str]:
    return glob.glob(f"{glob.escape(layers.stem)}.*.parquet", root_dir=layers.parent)


def layers_file(path: Path) -> Path:
    """Return X.parquet, for X.runs.parquet and its like too: a shell's *.parquet names all files of a merge."""
    stem, _, table = path.stem.rpartition(".")
    if path.suffix != ".parquet" or not stem or table == "layers":
        return path
    return path.with_name(f"{stem}.parquet") if table in FROZEN or _holds(path, table) else path


def _holds(path: Path, table: str) -> bool:
    try:
        return bool(read_metadata(path).get("table") == table)
    except (OSError, ValueError):
        return False


def report_file(layers: Path) -> Path:
    return layers.with_suffix(".merge.json")


@contextlib.contextmanager
def replacing(layers: Path) -> Iterator[Path]:
    """Give the layers file's path in a hidden folder; the files made beside it become the merge when the block ends."""
    folder = layers.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as alone:
        if alone:
            for left in folder.glob(f"{UNFINISHED}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder, ignore_cleanup_errors=True) as hidden:
            ready = Path(hidden) / "files"
            ready.mkdir()
            yield ready / layers.name
            _move(layers)
            ready.rename(_complete(layers))
            _move(layers)


def finish(layers: Path) -> None:
    """Move the files of a complete merge to their places, if the process that made it was ended before it could."""
    if _complete(layers).is_dir():
        with contextlib.suppress(PermissionError), _alone(layers.parent):
            _move(layers)


def _complete(layers: Path) -> Path:
    return layers.with_name(f".{layers.name}.complete")


def _move(layers: Path) -> None:
    """Tables that the new merge lacks are removed first; its report, which names those it has, is moved last.

    Where there is no lock, another process may be moving the same files: one that is gone is in its place.
    """
    complete, report = _complete(layers), _complete(layers) / report_file(layers).name
    with contextlib.suppress(FileNotFoundError):
        rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
        for name in companions(layers).keys() - rows.keys():
            companion(layers, name).unlink(missing_ok=True)
        for path in sorted(complete.iterdir(), key=lambda path: path == report):
            with contextlib.suppress(FileNotFoundError):
                path.replace(layers.parent / path.name)
    with contextlib.suppress(FileNotFoundError):
        complete.rmdir()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process is here with this folder; False where the file system offers no such lock."""
    opened, locked = os.open(folder, os.O_RDONLY), False
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(opened)
