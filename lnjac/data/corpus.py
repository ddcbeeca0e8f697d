"""Corpora: token folders in nanoGPT's format, verified before anything trains on them, and their batches.

A prepared folder holds `train.bin` and `val.bin` (raw little-endian uint16 tokens) and `meta.pkl`
(vocab_size, itos, stoi), so nanoGPT reads what is written here and the other way round. Our own meta.pkl adds
the content hash and is written last: a folder without it is not prepared yet.
"""

import hashlib
import http.client
import io
import json
import logging
import math
import os
import pickle
import pickletools
import shlex
import sys
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lnjac.data import synthetic as play
from lnjac.errors import ConfigError
from lnjac.escape import visible
from lnjac.files import write_atomically

Tokens = npt.NDArray[np.uint16]
Batch = tuple[torch.Tensor, torch.Tensor]

SPLITS = ("train", "val")
MARKER = ".lnjac"  # written first into a folder that is prepared here, and so may be written again
DTYPE = np.dtype("<u2")
MOST_TOKENS = 2**16  # distinct tokens that a uint16 can name
CHUNK = 2**22  # tokens of a split in memory at once

PLAY_TEXT_SHA256 = "4036b0bdedb46cde0fc76085bc130558b7307a4ec8f538aae8821dec808f2d97"
PLAY_SHA256 = "9d1ca2dc03bad2c025d8a50bea414fecc336b74e73def9b57c16174dff229e96"
SHAKESPEARE_TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SHA256 = "9674184e6c81e3d472f323ef4dff0b6d34a328b0f7d8fabdb6f2228598d8cba0"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A verified corpus: train and val are 1-D uint16 memory maps, every token below vocab_size.

    sha256 covers vocab_size, the vocabulary and both splits' tokens, but no path: equal hashes, equal data.
    """

    name: str
    train: Tokens
    val: Tokens
    vocab_size: int
    sha256: str
    vocabulary: tuple[str, ...] | None


# The corpora: one dataclass here and one yaml under conf/data for each


class Source(Protocol):
    """Where a corpus comes from, as conf/data/*.yaml has it; one with `resolve` may put another in its place."""

    name: str

    @abstractmethod
    def load(self) -> Corpus:
        """The corpus, verified; raises ConfigError where it cannot be had."""


@dataclass
class Play:
    """The embedded corpus of lnjac.data.synthetic: generated once, then read from the cache `dir`."""

    name: str
    dir: str = "data/play"

    def load(self) -> Corpus:
        folder = Path(self.dir)
        if _is_prepared(folder):
            try:
                return _expect(PLAY_SHA256, open_folder(self.name, folder))
            except ConfigError as error:
                log.warning("generating the play again: %s", error)
        text = play.generate()
        if _sha256(text.encode()) != PLAY_TEXT_SHA256:
            raise ConfigError(
                "lnjac/data/synthetic.py no longer writes the text it used to: restore it, or pick another data="
            )
        prepare(folder, text)
        return _expect(PLAY_SHA256, open_folder(self.name, folder))


@dataclass
class ShakespeareChar:
    """Tiny Shakespeare by characters, split as by nanoGPT: from `dir`, else `source`, else downloaded."""

    name: str
    dir: str = "data/shakespeare_char"
    source: str | None = None
    url: str = SHAKESPEARE_URL
    timeout_s: float = 20.0

    def load(self) -> Corpus:
        folder = Path(self.dir)
        if not _is_prepared(folder):
            prepare(folder, self._text())
        return _expect(SHAKESPEARE_SHA256, open_folder(self.name, folder))

    def _text(self) -> str:
        raw = _download(self.url, self.timeout_s) if self.source is None else _read(self.source, "data.source")
        if _sha256(raw) != SHAKESPEARE_TEXT_SHA256:
            own = self.source or "your.txt"
            raise ConfigError(
                f"{self.source or self.url} is not tiny Shakespeare (its SHA-256 differs): "
                f"to train on a text of your own, use data=text 'data.files=[{own}]'"
            )
        return raw.decode()


@dataclass
class NanoGPT:
    """Any folder in nanoGPT's format; its meta.pkl says the vocabulary's size, unless `vocab_size` does."""

    name: str
    dir: str
    vocab_size: int | None = None

    def load(self) -> Corpus:
        return open_folder(self.name, Path(self.dir), self.vocab_size)


@dataclass
class TextFiles:
    """One's own UTF-8 files, concatenated in their order, by characters; cached under `dir` by content."""

    name: str
    files: list[str] = field(default_factory=list)
    val_fraction: float = 0.1
    dir: str = "data/text"

    def problems(self, config: object = None) -> Iterator[str]:
        if not self.files:
            yield "data.files is empty: name at least one text, as in 'data.files=[book.txt]'"
        if not 0 < self.val_fraction < 1:
            yield f"data.val_fraction={self.val_fraction} must lie between 0 and 1: 0.1 keeps the last tenth"

    def load(self) -> Corpus:
        for problem in self.problems():
            raise ConfigError(problem)
        text = "".join(map(_decode, self.files))
        folder = Path(self.dir) / _sha256(f"{self.val_fraction}\n{text}".encode())[:16]
        if _is_prepared(folder):
            try:
                return open_folder(self.name, folder)
            except ConfigError as error:
                log.warning("preparing data.files again: %s", error)
        prepare(folder, text, self.val_fraction)
        return open_folder(self.name, folder)


# Reading a folder


def open_folder(name: str, folder: Path, vocab_size: int | None = None) -> Corpus:
    """The folder as a Corpus, read and verified once per process for as long as its files stay the same."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}: set data.dir to a folder with train.bin and val.bin")
    return _open(name, folder.absolute(), vocab_size, tuple(map(_stamp, _files(folder))))


@cache
def _open(name: str, folder: Path, vocab_size: int | None, stamps: tuple[tuple[int, ...] | None, ...]) -> Corpus:
    """`stamps` tell one state of the folder's files from the next."""
    meta = read_meta(folder / "meta.pkl") if _is_prepared(folder) else Meta(None, None, None)
    splits = {split: _map(folder / f"{split}.bin") for split in SPLITS}
    if meta.sha256 is None:  # not prepared here
        _require_uint16(folder, splits)
    size = meta.vocab_size if vocab_size is None else vocab_size
    if size is None:
        raise ConfigError(
            f"{folder} has no meta.pkl to tell the size of its vocabulary: set data.vocab_size "
            "(50304 for nanoGPT's GPT-2 tokens: 50257, padded)"
        )
    if not 1 <= size <= MOST_TOKENS:
        raise ConfigError(f"data.vocab_size={size} must lie between 1 and {MOST_TOKENS}, since tokens are uint16")
    if meta.vocabulary is not None and len(meta.vocabulary) > size:
        raise ConfigError(
            f"data.vocab_size={size} is below the {len(meta.vocabulary)} entries of {folder}/meta.pkl: "
            "leave data.vocab_size out"
        )
    sha256 = _verify(folder, size, meta.vocabulary, splits)
    if meta.sha256 is not None and size == meta.vocab_size and sha256 != meta.sha256:
        raise ConfigError(
            f"{folder} is damaged, its tokens are not those its meta.pkl was written for: delete the folder"
        )
    return Corpus(name, splits["train"], splits["val"], size, sha256, meta.vocabulary)


def _verify(folder: Path, vocab_size: int, vocabulary: tuple[str, ...] | None, splits: Mapping[str, Tokens]) -> str:
    """The content hash, from one pass over all tokens that also finds any the vocabulary cannot hold."""
    lengths = [len(splits[split]) for split in SPLITS]
    digest = hashlib.sha256(json.dumps([vocab_size, vocabulary, lengths]).encode())
    done = 0
    for split in SPLITS:
        for chunk in _chunks(splits[split]):
            if (largest := int(chunk.max())) >= vocab_size:
                raise ConfigError(
                    f"{folder}/{split}.bin holds token {largest}, outside the vocabulary of {vocab_size}: "
                    "set data.vocab_size to what it was tokenised with, or prepare the folder again"
                )
            digest.update(np.ascontiguousarray(chunk).data)
            done += len(chunk)
            _progress(f"checking {folder}", done, sum(lengths), worth=2**28)
    return digest.hexdigest()


def _map(file: Path) -> Tokens:
    if not file.is_file():
        raise ConfigError(f"{file} is missing: prepare the folder again, or set data.dir to another one")
    size = file.stat().st_size
    if size == 0 or size % DTYPE.itemsize:
        what = "is empty" if size == 0 else f"has an odd size of {size} bytes, so it is not uint16 tokens"
        raise ConfigError(f"{file} {what}: prepare the folder again")
    try:
        return np.memmap(file, dtype=DTYPE, mode="r")
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror}): check its permissions") from None


class Format(NamedTuple):
    """How a .bin file holds its tokens: bytes before the first one, their numpy type, and a name for both."""

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
"""llm.c's formats by the first number of their header: 256 int32, namely this number, a version, how many tokens, zeros."""


def _require_uint16(folder: Path, splits: Mapping[str, Tokens]) -> None:
    """Raise ConfigError, with the command that converts it, for a folder of tokens in another format."""
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
    meta = f"shutil.copy({json.dumps(f'{folder}/meta.pkl')}, new); " if _is_prepared(folder) else ""
    program = (
        f"import pathlib, shutil, numpy; new = pathlib.Path({json.dumps(new)}); new.mkdir(); {meta}"
        f'[numpy.memmap({json.dumps(str(folder))} + f"/{{split}}.bin", dtype, "r", offset).astype("<u2")'
        f'.tofile(new / f"{{split}}.bin") for split, offset, dtype in {json.dumps(parts)}]'
    )
    raise ConfigError(f"{said}convert it by `python -c {shlex.quote(program)}`, then set data.dir={new}")


def _format(tokens: Tokens) -> Format:
    """Recognise how a file that was read as uint16 was written, by its header or by what lies at every second place."""
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
    """Tell from their largest values whether these are the lower and upper halves of tokens below a million."""
    return low > 0 and (high == 0 or (high < 16 and low >= 256))


class Meta(NamedTuple):
    """What a meta.pkl tells; sha256 is there only when the folder was prepared here."""

    vocab_size: int | None
    vocabulary: tuple[str, ...] | None
    sha256: str | None


class PlainUnpickler(pickle.Unpickler):
    """Refuses every global, so that nothing in a pickle can name code, let alone run it."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it holds a persistent id")


PLAIN_OPCODES = frozenset([
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS",
    "BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
])  # fmt: skip
"""They build dicts, lists, strings and 32-bit integers only: a deep tuple as a key would crash hash()."""

MOST_OPCODES = 10**6  # a vocabulary of 65,536 takes about 400,000
MOST_META_BYTES = 2**23


def read_meta(file: Path) -> Meta:
    """A nanoGPT meta.pkl, read without trusting it."""
    raw = _read(file, "data.dir", most=MOST_META_BYTES)
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


# Preparing a folder


def prepare(folder: Path, text: str, val_fraction: float = 0.1) -> None:
    """Write text, by characters, as a folder that nanoGPT can read; two processes may do so at once.

    Raises ConfigError for a folder that holds tokens and was not prepared here: nobody's data is written over.
    """
    if not (folder / MARKER).exists() and any(file.exists() for file in _files(folder)):
        raise ConfigError(
            f"{folder} holds another's tokens, which are left alone: use data=nanogpt data.dir={folder} to train on them, "
            "or set data.dir to a folder of its own"
        )
    tokens, vocabulary = encode(text)
    cut = int((1 - val_fraction) * len(tokens))
    splits = {"train": tokens[:cut], "val": tokens[cut:]}
    if min(map(len, splits.values())) < 2:
        raise ConfigError(
            f"{len(text)} characters are too few to hold out {val_fraction:g} of them for validation: "
            "give a longer text or another data.val_fraction"
        )
    meta = {
        "vocab_size": len(vocabulary),
        "itos": dict(enumerate(vocabulary)),
        "stoi": {entry: token for token, entry in enumerate(vocabulary)},
        "sha256": _verify(folder, len(vocabulary), vocabulary, splits),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = {f"{split}.bin": splits[split].tobytes() for split in SPLITS}
        for name, content in {MARKER: b"", **contents, "meta.pkl": pickle.dumps(meta, protocol=4)}.items():
            write_atomically(folder / name, partial(Path.write_bytes, data=content))
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder} ({error.strerror}): set data.dir to a folder you may write to"
        ) from None


def encode(text: str) -> tuple[Tokens, tuple[str, ...]]:
    """Tokens (n,) and the vocabulary they index: the text's distinct characters, sorted."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    used = np.flatnonzero(np.bincount(codes))
    if len(used) > MOST_TOKENS:
        raise ConfigError(f"the text has {len(used)} distinct characters, above {MOST_TOKENS}: use fewer data.files")
    token_of = np.zeros(used[-1] + 1 if len(used) else 0, dtype=DTYPE)
    token_of[used] = np.arange(len(used))
    return token_of[codes], tuple(map(chr, used))


def _download(url: str, timeout_s: float, most: int = 2**24) -> bytes:
    received = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read(2**16):
                received += chunk
                _progress(f"downloading {url}", len(received), total)
                if len(received) > most:
                    raise ValueError("far larger than tiny Shakespeare")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise ConfigError(
            f"cannot download {url} ({reason}): get the file on a machine with a network and set "
            "data.source=/path/to/input.txt, or use data=play"
        ) from None
    return bytes(received)


def _progress(label: str, done: int, total: int, worth: int = 1) -> None:
    """One moving line on a terminal; nothing elsewhere, nor for less than `worth` units of work."""
    if total >= worth and sys.stderr.isatty():
        print(
            f"\r{visible(label)} {100 * done // total:3d} %",
            end="" if done < total else "\n",
            file=sys.stderr,
            flush=True,
        )


def _read(file: Path | str, setting: str, most: int | None = None) -> bytes:
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe would be waited for, and can be read but once
        what = "is a folder" if os.path.isdir(file) else "is a pipe or a device"
        raise ConfigError(f"cannot read {file}, which {what} and no regular file: check {setting}")
    try:
        with open(file, "rb") as opened:
            content = opened.read(-1 if most is None else most + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror}): check {setting}") from None
    if most is not None and len(content) > most:
        raise ConfigError(f"{file} is refused, being larger than {most} bytes: check {setting}")
    return content


def _decode(file: str) -> str:
    content = _read(file, "data.files")
    if not content:
        raise ConfigError(f"{file} is empty: drop it from data.files")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 at byte {error.start}: convert it, as with iconv -t UTF-8") from None


def _expect(sha256: str, corpus: Corpus) -> Corpus:
    if corpus.sha256 != sha256:
        raise ConfigError(
            f"the folder of data={corpus.name} holds tokens it should not: delete it, set another data.dir, "
            "or read it as it is with data=nanogpt data.dir=..."
        )
    return corpus


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in ("train.bin", "val.bin", "meta.pkl")]


def _is_prepared(folder: Path) -> bool:
    return (folder / "meta.pkl").exists()


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _chunks(split: Tokens, overlap: int = 0) -> Iterator[Tokens]:
    """The split in pieces of CHUNK tokens, each with the first `overlap` tokens of the next."""
    for start in range(0, len(split), CHUNK):
        yield split[start : start + CHUNK + overlap]


# Batches


def gather(split: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> Batch:
    """Inputs and targets, int64 (len(starts), block_size): tokens from each start, and those one later."""
    tokens = split[np.asarray(starts)[:, None] + np.arange(block_size + 1)]
    both = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class Batches:
    """Random training batches: every start at which a whole block and its targets fit is equally likely."""

    def __init__(self, split: Tokens, batch_size: int, block_size: int, rng: np.random.Generator) -> None:
        if len(split) <= block_size:
            raise ConfigError(
                f"the split has {len(split)} tokens, too few for model.block_size={block_size}: "
                "choose a smaller block_size or a longer corpus"
            )
        self.split, self.batch_size, self.block_size, self.rng = split, batch_size, block_size, rng

    def next(self) -> Batch:
        """Inputs and targets, int64 (batch_size, block_size)."""
        return gather(self.split, self.starts(), self.block_size)

    def starts(self) -> npt.NDArray[np.int64]:
        """(batch_size,): where the next batch's sequences begin; drawn, so that it is the next batch no more."""
        return self.rng.integers(0, len(self.split) - self.block_size, size=self.batch_size)


def windows(split: Tokens, block_size: int, batch_size: int, max_tokens: int | None) -> Iterator[Batch]:
    """The split's tokens 1, 2, … (the first max_tokens of them) as targets, each exactly once, in order.

    Window k has inputs [kT, kT+T) for T = block_size; a shorter last window comes as a batch of its own.
    """
    n_targets = count_targets(split, max_tokens)
    starts = np.arange(0, n_targets - block_size + 1, block_size)
    for first in range(0, len(starts), batch_size):
        yield gather(split, starts[first : first + batch_size], block_size)
    if rest := n_targets % block_size:
        yield gather(split, np.array([n_targets - rest]), rest)


def count_targets(split: Tokens, max_tokens: int | None) -> int:
    """How many tokens `windows` predicts."""
    if len(split) < 2 or (max_tokens is not None and max_tokens < 1):
        raise ConfigError(f"nothing to predict in {len(split)} tokens with max_tokens={max_tokens}: allow at least one")
    return len(split) - 1 if max_tokens is None else min(len(split) - 1, max_tokens)


# Baselines


@dataclass(frozen=True)
class Baselines:
    """Cross-entropy, in nats per token, of two count models on the targets of `windows`."""

    unigram_nats: float
    bigram_nats: float


@cache
def baselines(corpus: Corpus, max_tokens: int | None) -> Baselines:
    """What counting on train reaches: p(b) = (#b + 1) / (N + V) and p(b | a) = (#ab + 1) / (#a· + V).

    Only the pairs that validation asks for are counted: a vocabulary of 50,000 needs no table of its square.
    """
    vocab_size = corpus.vocab_size
    n_targets = count_targets(corpus.val, max_tokens)
    evaluated = np.asarray(corpus.val[: n_targets + 1], dtype=np.int64)
    before, target = evaluated[:-1], evaluated[1:]
    wanted, where = np.unique(before * vocab_size + target, return_inverse=True)
    n_token = np.zeros(vocab_size, dtype=np.int64)
    n_pair = np.zeros(len(wanted), dtype=np.int64)
    done = 0
    for chunk in _chunks(corpus.train, overlap=1):
        tokens = chunk.astype(np.int64)
        pairs = tokens[:-1] * vocab_size + tokens[1:]
        at = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
        n_pair += np.bincount(at[wanted[at] == pairs], minlength=len(wanted))
        n_token += np.bincount(tokens[:CHUNK], minlength=vocab_size)
        done += len(tokens)
        _progress(
            "counting pairs for the bigram baseline",
            min(done, len(corpus.train)),
            len(corpus.train),
            worth=2**26,
        )
    n_before = n_token.copy()
    n_before[corpus.train[-1]] -= 1  # the last token begins no pair
    log_unigram = np.log(n_token[target] + 1) - math.log(len(corpus.train) + vocab_size)
    log_bigram = np.log(n_pair[where] + 1) - np.log(n_before[before] + vocab_size)
    return Baselines(float(-log_unigram.mean()), float(-log_bigram.mean()))
