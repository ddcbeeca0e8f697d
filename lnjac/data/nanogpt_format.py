"""Files of a folder in nanoGPT's format, whose meta.pkl is read without running anything in it."""

import io
import json
import pickle
import pickletools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from lnjac.data.inputs import read_file
from lnjac.data.tokens import CHUNK, MOST_TOKENS, TokenArray
from lnjac.errors import ConfigError


class Format(NamedTuple):
    """A format of tokens in a .bin file, by the bytes before the first one, their numpy type, and its name."""

    offset: int
    dtype: str
    name: str


UINT16 = Format(0, "<u2", "uint16 tokens")
UINT32 = Format(0, "<u4", "uint32 tokens")
INT64 = Format(0, "<i8", "int64 tokens")
LLM_C = {
    20240520: Format(1024, "<u2", "llm.c's header before uint16 tokens"),
    20240801: Format(1024, "<u4", "llm.c's header before uint32 tokens"),
}
"""llm.c's formats by their number, the first of a header of 256 int32: it, a version, a count of tokens, zeros."""


def require_uint16(folder: Path, splits: Mapping[str, TokenArray]) -> None:
    """Raise ConfigError, with the command that converts the folder, if its tokens have another format."""
    formats = {split: _format(tokens) for split, tokens in splits.items()}
    if not (other := [split for split, found in formats.items() if found != UINT16]):
        return
    said = f"{folder}/{other[0]}.bin holds {formats[other[0]].name}, and lnjac reads uint16 tokens alone: "
    for split in other:
        offset, dtype, _ = formats[split]
        largest = int(np.memmap(folder / f"{split}.bin", dtype, "r", offset).max(initial=0))
        if largest >= MOST_TOKENS:
            raise ConfigError(
                f"{said}token {largest} does not fit, so tokenise with a vocabulary of at most {MOST_TOKENS}"
            )
    new = f"{folder}-uint16"
    parts = [[split, found.offset, found.dtype] for split, found in formats.items()]
    meta = f"shutil.copy({json.dumps(f'{folder}/meta.pkl')}, new); " if is_prepared(folder) else ""
    program = (
        f"import pathlib, shutil, numpy; new = pathlib.Path({json.dumps(new)}); new.mkdir(); {meta}"
        f'[numpy.memmap({json.dumps(str(folder))} + f"/{{split}}.bin", dtype, "r", offset).astype("<u2")'
        f'.tofile(new / f"{{split}}.bin") for split, offset, dtype in {json.dumps(parts)}]'
    )
    raise ConfigError(f"{said}convert it by `python -c {shlex.quote(program)}`, then set data.dir={new}")


def _format(tokens: TokenArray) -> Format:
    """Recognise the format of a file that was read as uint16, by its header or by every second value."""
    if len(tokens) > 512:
        header = np.frombuffer(tokens[:512].tobytes(), "<i4")
        if (known := LLM_C.get(int(header[0]))) and not header[3:].any():
            return known
    quarters = tokens[: min(len(tokens), CHUNK) // 4 * 4].reshape(-1, 4)
    if len(quarters) < 8:  # too few to tell
        return UINT16
    a, b, c, d = (int(part.max()) for part in quarters.T)
    if c == d == 0 and _are_halves(a, b):
        return INT64
    return UINT32 if _are_halves(max(a, c), max(b, d)) else UINT16


def _are_halves(low: int, high: int) -> bool:
    """Return whether values up to these may be the lower and upper halves of tokens below a million."""
    return low > 0 and (high == 0 or (high < 16 and low >= 256))


class Meta(NamedTuple):
    """The content of a meta.pkl; sha256 is None if the folder was not prepared here."""

    vocab_size: int | None
    vocabulary: tuple[str, ...] | None
    sha256: str | None


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that refuses every global, so that a pickle can name no code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it holds a persistent id")


PLAIN_OPCODES = frozenset([
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS",
    "BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
])  # fmt: skip
"""They build dicts, lists, strings and 32-bit integers only; a deep tuple as a key would crash hash()."""

MOST_OPCODES = 10**6  # a vocabulary of 65,536 takes about 400,000
MOST_META_BYTES = 2**23


def read_meta(file: Path) -> Meta:
    """Return the content of a meta.pkl without trusting it. Raises ConfigError if it is no plain vocabulary."""
    raw = read_file(file, "data.dir", most=MOST_META_BYTES)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if opcode.name not in PLAIN_OPCODES:
                raise pickle.UnpicklingError(f"it holds {opcode.name}")
            if count > MOST_OPCODES or (opcode.name == "LONG_BINPUT" and int(argument or 0) > MOST_OPCODES):
                raise pickle.UnpicklingError("it is too large")
        return _meta(PlainUnpickler(io.BytesIO(raw)).load())
    except Exception as error:  # whatever a hostile pickle brings about is a reason to refuse it
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"{file} is refused, being no plain nanoGPT vocabulary ({reason}): prepare the folder again, "
            "or delete that file and set data.vocab_size"
        ) from None


def _meta(meta: Any) -> Meta:
    if type(meta) is not dict or type(vocab_size := meta.get("vocab_size")) is not int:
        raise ValueError("it has no integer vocab_size")
    if not 1 <= vocab_size <= MOST_TOKENS:
        raise ValueError(f"its vocab_size is {vocab_size}")
    if type(sha256 := meta.get("sha256")) not in (str, type(None)):
        raise ValueError("its sha256 is not a string")
    if (itos := meta.get("itos")) is None:
        return Meta(vocab_size, None, sha256)
    entries = dict(enumerate(itos)) if type(itos) is list else itos
    if type(entries) is not dict or sorted(entries) != list(range(len(entries))):
        raise ValueError("its itos does not number the tokens from 0")
    vocabulary = tuple(entries[token] for token in range(len(entries)))
    if not all(type(entry) is str for entry in vocabulary) or len(vocabulary) > vocab_size:
        raise ValueError("its itos does not fit its vocab_size")
    return Meta(vocab_size, vocabulary, sha256)


def is_prepared(folder: Path) -> bool:
    """Return whether the folder holds a meta.pkl, the last file that `prepare` writes."""
    return (folder / "meta.pkl").exists()
