"""Corpora, each a folder of tokens in nanoGPT's format that is verified before anything trains on it.

A prepared folder holds `train.bin` and `val.bin` (raw little-endian uint16 tokens) and `meta.pkl` (vocab_size, itos, stoi),
so nanoGPT reads a folder that is written here, and the other way round. Our own meta.pkl adds the content hash. It is
written last, so a folder without it is not prepared yet.
"""

import hashlib
import http.client
import json
import logging
import pickle
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from lnjac.data import synthetic
from lnjac.data.inputs import decode, read_file
from lnjac.data.nanogpt_format import Meta, is_prepared, read_meta, require_uint16
from lnjac.data.tokens import DTYPE, MOST_TOKENS, TokenArray, chunks
from lnjac.errors import ConfigError
from lnjac.files import write_atomically
from lnjac.progress import share

SPLITS = ("train", "val")
MARKER = ".lnjac"  # written first into a folder that is prepared here, and so may be written again
PLAY_TEXT_SHA256 = "4036b0bdedb46cde0fc76085bc130558b7307a4ec8f538aae8821dec808f2d97"
PLAY_SHA256 = "9d1ca2dc03bad2c025d8a50bea414fecc336b74e73def9b57c16174dff229e96"
SHAKESPEARE_TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SHA256 = "9674184e6c81e3d472f323ef4dff0b6d34a328b0f7d8fabdb6f2228598d8cba0"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A verified corpus, whose splits are 1-D uint16 memory maps with every token below vocab_size.

    sha256 covers vocab_size, the vocabulary and both splits' tokens, but no path, so equal hashes mean equal data.
    """

    name: str
    train: TokenArray
    val: TokenArray
    vocab_size: int
    sha256: str
    vocabulary: tuple[str, ...] | None


class Source(Protocol):
    """The origin of a corpus (conf/data)."""

    name: str

    @abstractmethod
    def load(self) -> Corpus:
        """Return the corpus, verified. Raises ConfigError if it cannot be had."""


@dataclass
class Play:
    """The embedded corpus of lnjac.data.synthetic, generated once and cached in `dir`."""

    name: str
    dir: str = "data/play"

    def load(self) -> Corpus:
        return _cached(self.name, Path(self.dir), self._text, sha256=PLAY_SHA256)

    def _text(self) -> str:
        text = synthetic.generate()
        if _sha256(text.encode()) != PLAY_TEXT_SHA256:
            raise ConfigError(
                "lnjac/data/synthetic.py no longer writes the text it used to: restore it, or pick another data="
            )
        return text


@dataclass
class ShakespeareChar:
    """Tiny Shakespeare by characters, split as by nanoGPT, from `dir`, else from `source`, else downloaded."""

    name: str
    dir: str = "data/shakespeare_char"
    source: str | None = None
    url: str = SHAKESPEARE_URL
    timeout_s: float = 20.0

    def load(self) -> Corpus:
        folder = Path(self.dir)
        if not is_prepared(folder):
            prepare(folder, self._text())
        return _expect(SHAKESPEARE_SHA256, open_folder(self.name, folder))

    def _text(self) -> str:
        raw = _download(self.url, self.timeout_s) if self.source is None else read_file(self.source, "data.source")
        if _sha256(raw) != SHAKESPEARE_TEXT_SHA256:
            own = self.source or "your.txt"
            raise ConfigError(
                f"{self.source or self.url} is not tiny Shakespeare (its SHA-256 differs): "
                f"to train on a text of your own, use data=text 'data.files=[{own}]'"
            )
        return raw.decode()


@dataclass
class NanoGPT:
    """Any folder in nanoGPT's format; `vocab_size` takes precedence over its meta.pkl."""

    name: str
    dir: str
    vocab_size: int | None = None

    def load(self) -> Corpus:
        return open_folder(self.name, Path(self.dir), self.vocab_size)


@dataclass
class TextFiles:
    """A user's UTF-8 files by characters, concatenated in their order and cached in `dir` by content."""

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
        text = "".join(map(decode, self.files))
        folder = Path(self.dir) / _sha256(f"{self.val_fraction}\n{text}".encode())[:16]
        return _cached(self.name, folder, lambda: text, self.val_fraction)


def _cached(
    name: str, folder: Path, text: Callable[[], str], val_fraction: float = 0.1, sha256: str | None = None
) -> Corpus:
    """Open the folder, which is prepared anew if it is not there or damaged."""
    if is_prepared(folder):
        try:
            return _expect(sha256, open_folder(name, folder))
        except ConfigError as error:
            log.warning("preparing %s again: %s", folder, error)
    prepare(folder, text(), val_fraction)
    return _expect(sha256, open_folder(name, folder))


def open_folder(name: str, folder: Path, vocab_size: int | None = None) -> Corpus:
    """Return a folder in nanoGPT's format as a corpus, verified once per process unless its files change.

    Args:
        name: the corpus's label.
        folder: holds train.bin, val.bin and perhaps meta.pkl.
        vocab_size: the number of distinct tokens; None to take it from meta.pkl.

    Raises:
        ConfigError: the folder or a file is missing, damaged, hostile or of another format.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}: set data.dir to a folder with train.bin and val.bin")
    return _open(name, folder.absolute(), vocab_size, tuple(map(_stamp, _files(folder))))


@cache
def _open(name: str, folder: Path, vocab_size: int | None, stamps: tuple[tuple[int, ...] | None, ...]) -> Corpus:
    """Open the folder whose files have these stamps, which change with the files."""
    meta = read_meta(folder / "meta.pkl") if is_prepared(folder) else Meta(None, None, None)
    splits = {split: _map(folder / f"{split}.bin") for split in SPLITS}
    if meta.sha256 is None:  # not prepared here
        require_uint16(folder, splits)
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


def _verify(folder: Path, vocab_size: int, vocabulary: tuple[str, ...] | None, splits: Mapping[str, TokenArray]) -> str:
    """Return the content hash, from one pass that also finds any token outside the vocabulary."""
    lengths = [len(splits[split]) for split in SPLITS]
    digest = hashlib.sha256(json.dumps([vocab_size, vocabulary, lengths]).encode())
    done = 0
    for split in SPLITS:
        for chunk in chunks(splits[split]):
            if (largest := int(chunk.max())) >= vocab_size:
                raise ConfigError(
                    f"{folder}/{split}.bin holds token {largest}, outside the vocabulary of {vocab_size}: "
                    "set data.vocab_size to what it was tokenised with, or prepare the folder again"
                )
            digest.update(np.ascontiguousarray(chunk).data)
            done += len(chunk)
            share(f"checking {folder}", done, sum(lengths), worth=2**28)
    return digest.hexdigest()


def _map(file: Path) -> TokenArray:
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


def prepare(folder: Path, text: str, val_fraction: float = 0.1) -> None:
    """Write a text, by characters, as a folder that nanoGPT can read. Two processes may do so at once.

    Args:
        folder: made if it is missing.
        text: the whole corpus.
        val_fraction: the part at the end of the text that is held out for validation.

    Raises:
        ConfigError: the folder holds tokens of another program, the text is too short, or the disk cannot be written.
    """
    # in this order: another process that prepares the folder now writes the marker first
    if any(file.exists() for file in _files(folder)) and not (folder / MARKER).exists():
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


def encode(text: str) -> tuple[TokenArray, tuple[str, ...]]:
    """Return tokens, (n,), and the vocabulary that they index, which is the text's distinct characters, sorted."""
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
                share(f"downloading {url}", len(received), total)
                if len(received) > most:
                    raise ValueError("far larger than tiny Shakespeare")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise ConfigError(
            f"cannot download {url} ({reason}): get the file on a machine with a network and set "
            "data.source=/path/to/input.txt, or use data=play"
        ) from None
    return bytes(received)


def _expect(sha256: str | None, corpus: Corpus) -> Corpus:
    if sha256 not in (None, corpus.sha256):
        raise ConfigError(
            f"the folder of data={corpus.name} holds tokens it should not: delete it, set another data.dir, "
            "or read it as it is with data=nanogpt data.dir=..."
        )
    return corpus


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in ("train.bin", "val.bin", "meta.pkl")]


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
