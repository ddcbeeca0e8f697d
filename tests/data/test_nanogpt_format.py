"""Folders in nanoGPT's format: what is read, what is refused in one line, and hostile pickles that run nothing."""

import contextlib
import os
import pickle
import pickletools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.corpora import TEXT, char_meta, refused, write_folder

from lnjac.data import corpus as data
from lnjac.data import nanogpt_format
from lnjac.data import tokens as data_tokens


def test_a_nanogpt_folder_with_meta() -> None:
    folder = write_folder(Path("mine"), [0, 1, 2, 2], [2, 0], char_meta("abc"))
    corpus = data.NanoGPT("nanogpt", str(folder)).load()
    assert (corpus.vocab_size, corpus.vocabulary) == (3, ("a", "b", "c"))
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.dtype == np.uint16
    assert corpus.train.ndim == 1
    assert not corpus.train.flags.writeable
    assert corpus.train.tolist() == [0, 1, 2, 2]
    assert data.NanoGPT("nanogpt", str(folder), vocab_size=8).load().vocab_size == 8
    refused(data.NanoGPT("nanogpt", str(folder), vocab_size=2).load, "data.vocab_size=2", "3 entries")


def test_a_nanogpt_folder_without_meta_needs_its_vocabulary_size() -> None:
    folder = write_folder(Path("bpe"), [0, 50256, 7], [11, 13])
    refused(data.NanoGPT("nanogpt", str(folder)).load, "data.vocab_size", "50304")
    corpus = data.NanoGPT("nanogpt", str(folder), vocab_size=50304).load()
    assert (corpus.vocab_size, corpus.vocabulary) == (50304, None)
    for impossible in (0, -1, 65537):
        refused(data.NanoGPT("nanogpt", str(folder), vocab_size=impossible).load, f"data.vocab_size={impossible}")


def with_header(magic: int, dtype: str, tokens: list[int]) -> bytes:
    """A file as llm.c's write_datafile makes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens)
    return header.tobytes() + np.array(tokens, dtype=dtype).tobytes()


OTHER_FORMATS = {
    "uint32": lambda tokens: np.array(tokens, dtype="<u4").tobytes(),
    "int64": lambda tokens: np.array(tokens, dtype="<i8").tobytes(),
    "llm.c's header before uint16": partial(with_header, 20240520, "<u2"),
    "llm.c's header before uint32": partial(with_header, 20240801, "<u4"),
}


@pytest.mark.parametrize("vocab_size", [None, 50304])
@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_of_tokens_are_refused_with_a_command_that_converts_them(
    name: str, vocab_size: int | None
) -> None:
    rng = np.random.default_rng(0)
    splits = {"train": rng.integers(0, 50257, 2000).tolist(), "val": rng.integers(0, 50257, 300).tolist()}
    folder = Path("my $bins")
    folder.mkdir()
    for split, tokens in splits.items():
        (folder / f"{split}.bin").write_bytes(OTHER_FORMATS[name](tokens))
    said = refused(data.NanoGPT("n", str(folder), vocab_size).load, f"train.bin holds {name}", "my $bins-uint16")
    command = re.search("`python (.*)`", said)
    assert command
    subprocess.run(f"{sys.executable} {command[1]}", shell=True, check=True)
    corpus = data.NanoGPT("n", "my $bins-uint16", 50304).load()
    assert (corpus.train.tolist(), corpus.val.tolist()) == (splits["train"], splits["val"])


def test_characters_in_uint32_are_refused_too_and_keep_their_meta() -> None:
    folder = write_folder(Path("chars"), [0], [0], char_meta("abc"))
    for split in data.SPLITS:
        np.array([0, 1, 2, 2] * 50, dtype="<u4").tofile(folder / f"{split}.bin")
    said = refused(data.NanoGPT("n", "chars").load, "holds uint32 tokens")
    subprocess.run(sys.executable + said.split("`python")[1].split("`")[0], shell=True, check=True)
    assert data.NanoGPT("n", "chars-uint16").load().vocabulary == ("a", "b", "c")


@pytest.mark.parametrize(
    "write", [lambda tokens: tokens.astype("<u4").tobytes(), lambda tokens: with_header(20240801, "<u4", tokens)]
)
def test_tokens_that_no_uint16_holds_are_said(write: Callable[[Any], bytes]) -> None:
    Path("llama").mkdir()
    for split in data.SPLITS:
        Path("llama", f"{split}.bin").write_bytes(write(np.arange(0, 128256, 5)))
    said = refused(data.NanoGPT("n", "llama", 65536).load, "token 128255 does not fit", "at most 65536")
    assert "python" not in said


def test_uint16_tokens_are_not_taken_for_others() -> None:
    rng = np.random.default_rng(0)
    for i, tokens in enumerate(
        (rng.integers(0, 2, 200), rng.integers(0, 50257, 2000), np.zeros(200, int), np.arange(200) % 2)
    ):
        folder = write_folder(Path(str(i)), tokens.tolist(), tokens.tolist())
        assert data.NanoGPT("n", str(folder), 50304).load().train.tolist() == tokens.tolist()
    own = data.TextFiles("text", ["own.txt"])
    Path("own.txt").write_text("ba" * 200)  # every second token is 0, and it was prepared here
    assert own.load().train[:4].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("setting", ["data.files", "data.source"])
def test_a_pipe_is_refused_and_not_waited_for(setting: str) -> None:
    os.mkfifo("pipe")
    one = data.TextFiles("text", ["pipe"]) if setting == "data.files" else data.ShakespeareChar("s", source="pipe")
    refused(one.load, "pipe", "no regular file", setting)


def test_the_content_hash_follows_content_and_no_path() -> None:
    def sha256(folder: str, train: list[int], val: list[int], meta: Any = None, vocab_size: int | None = None) -> str:
        return data.NanoGPT("n", str(write_folder(Path(folder), train, val, meta)), vocab_size).load().sha256

    base = sha256("a", [0, 1, 1], [1, 0], meta=char_meta("xy"))
    assert sha256("b", [0, 1, 1], [1, 0], meta=char_meta("xy")) == base
    others = [
        sha256("c", [0, 1, 0], [1, 0], meta=char_meta("xy")),
        sha256("d", [0, 1, 1], [1, 1], meta=char_meta("xy")),
        sha256("e", [0, 1], [1, 1, 0], meta=char_meta("xy")),  # the same tokens, cut elsewhere
        sha256("f", [0, 1, 1], [1, 0], meta=char_meta("xz")),
        sha256("g", [0, 1, 1], [1, 0], meta=char_meta("xy"), vocab_size=3),
        sha256("h", [0, 1, 1], [1, 0], vocab_size=2),
    ]
    assert len({base, *others}) == 7


def test_a_folder_that_changes_is_read_again() -> None:
    folder = write_folder(Path("mine"), [0, 1], [1, 0], char_meta("ab"))
    first = data.NanoGPT("n", str(folder)).load()
    assert data.NanoGPT("n", str(folder)).load() is first
    write_folder(folder, [1, 1, 1], [1, 0], char_meta("ab"))
    assert data.NanoGPT("n", str(folder)).load().train.tolist() == [1, 1, 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_is_found_wherever_it_is(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tokens, "CHUNK", 4)
    tokens = [0, 1] * 9
    for at in (0, 7, 17):
        bad = [*tokens[:at], 2, *tokens[at + 1 :]]
        train, val = (bad, tokens) if split == "train" else (tokens, bad)
        folder = write_folder(Path(f"{at}"), train, val, char_meta("ab"))
        refused(data.NanoGPT("n", str(folder)).load, f"{split}.bin", "token 2", "vocabulary of 2")


def test_broken_folders_are_refused_in_one_line() -> None:
    def load(folder: str) -> Callable[[], data.Corpus]:
        return data.NanoGPT("n", folder).load

    refused(load("gone"), "gone does not exist", "data.dir")
    Path("file").write_text("")
    refused(load("file"), "file is not a folder", "data.dir")
    for name in ("train.bin", "val.bin"):
        folder = write_folder(Path(f"no_{name}"), [0], [0], char_meta("a"))
        (folder / name).unlink()
        refused(load(str(folder)), name, "is missing")
        (folder / name).write_bytes(b"")
        refused(load(str(folder)), name, "is empty")
        (folder / name).write_bytes(b"\0\0\0")
        refused(load(str(folder)), name, "odd size of 3 bytes")


def test_a_prepared_folder_that_was_tampered_with_is_refused() -> None:
    data.prepare(Path("mine"), TEXT)
    assert data.NanoGPT("n", "mine").load().vocab_size == len(set(TEXT))
    content = bytearray(Path("mine/train.bin").read_bytes())
    content[0] ^= 1
    Path("mine/train.bin").write_bytes(content)
    refused(data.NanoGPT("n", "mine").load, "damaged", "delete the folder")


# Hostile pickles


class Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _laughs() -> bytes:
    """Thirty lists, each holding the one before twice: small in memory, 2**30 long to a naive walk."""
    bomb: list[Any] = []
    for _ in range(30):
        bomb = [bomb, bomb]
    return pickle.dumps({"vocab_size": bomb, "itos": bomb})


GOOD = pickle.dumps(char_meta("ab"))
HOSTILE = {
    "os.system": pickle.dumps(Runs(os.system, "touch ran")),
    "open": pickle.dumps(Runs(open, "ran", "w")),
    "eval": pickle.dumps({"vocab_size": Runs(eval, "open('ran', 'w')")}),
    "eval, protocol 0": b"cbuiltins\neval\n(S\"open('ran','w')\"\ntR.",
    "inst": b"(S'touch ran'\nios\nsystem\n.",
    "a global, never called": pickle.dumps({"vocab_size": 2, "itos": os.system}),
    "numpy array": pickle.dumps({"vocab_size": np.arange(3)}),
    "numpy scalar": pickle.dumps({"vocab_size": np.int64(2)}),
    "extension code": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x04\x8c\x01aQ.",
    "deep tuple as a key": b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
    "deep lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "huge memo index": b"\x80\x04}r\xff\xff\xff\x7f.",
    "huge string length": b"\x80\x04X\xff\xff\xff\x7fab.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "too many opcodes": b"\x80\x04" + b"}" * (nanogpt_format.MOST_OPCODES + 2) + b".",
    "too large a file": pickle.dumps({"vocab_size": 2, "note": "x" * nanogpt_format.MOST_META_BYTES}),
    "billion laughs": _laughs(),
    "a list that holds itself": b"\x80\x04]\x94h\x00a.",
    "set": pickle.dumps({1}),
    "bytes": pickle.dumps({"vocab_size": b"2"}),
    "float": pickle.dumps({"vocab_size": 2.0}),
    "bool": pickle.dumps({"vocab_size": True}),
    "huge integer": pickle.dumps({"vocab_size": 10**40}),
    "unhashable key": b"\x80\x04}]K\x01s.",
    "append to a string": b"\x80\x04\x8c\x01aK\x01a.",
    "memo never filled": b"\x80\x04h\x05.",
    "stack underflow": b"\x80\x04s.",
    "unknown protocol": b"\x80\xff}.",
    "empty": b"",
    "text": b"hello",
    "no vocab_size": pickle.dumps({"itos": {0: "a"}}),
    "vocab_size 0": pickle.dumps({"vocab_size": 0}),
    "vocab_size beyond uint16": pickle.dumps({"vocab_size": 65537}),
    "itos with a gap": pickle.dumps({"vocab_size": 2, "itos": {0: "a", 2: "b"}}),
    "itos of numbers": pickle.dumps({"vocab_size": 2, "itos": {0: 1, 1: 2}}),
    "itos of mixed keys": pickle.dumps({"vocab_size": 2, "itos": {0: "a", "b": "b"}}),
    "itos beyond vocab_size": pickle.dumps({"vocab_size": 1, "itos": {0: "a", 1: "b"}}),
    "not a dict": pickle.dumps([2, ["a", "b"]]),
} | {f"truncated at {n}": GOOD[:n] for n in range(1, len(GOOD), 7)}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_meta_is_refused_and_nothing_in_it_runs(name: str) -> None:
    folder = write_folder(Path("evil"), [0, 1], [1, 0])
    (folder / "meta.pkl").write_bytes(HOSTILE[name])
    message = refused(data.NanoGPT("n", str(folder)).load, "meta.pkl", "refused")
    assert len(message) < 500
    refused(data.NanoGPT("n", str(folder), vocab_size=2).load, "refused")  # giving the size does not unlock it
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["huge memo index", "too many opcodes", "too large a file"])
def test_a_meta_that_would_fill_the_memory_is_refused_for_its_size(name: str) -> None:
    Path("meta.pkl").write_bytes(HOSTILE[name])
    refused(lambda: nanogpt_format.read_meta(Path("meta.pkl")), "large")


def test_the_hostile_pickles_would_run_elsewhere() -> None:
    """The control of the test above: its payloads are live."""
    for name in ("os.system", "open", "eval", "eval, protocol 0", "inst"):
        with contextlib.suppress(Exception):
            pickle.loads(HOSTILE[name])
        assert Path("ran").exists(), name
        Path("ran").unlink()


def test_the_unpickler_alone_refuses_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were an opcode too many let through, nothing would run either."""
    every = frozenset(opcode.name for opcode in pickletools.opcodes)
    monkeypatch.setattr(nanogpt_format, "PLAIN_OPCODES", every)
    for name in ("os.system", "eval", "inst", "a global, never called", "numpy array", "persistent id"):
        Path("meta.pkl").write_bytes(HOSTILE[name])
        refused(
            lambda: nanogpt_format.read_meta(Path("meta.pkl")),
            "it names" if name != "persistent id" else "persistent id",
        )
    assert not Path("ran").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_honest_meta_is_read(protocol: int) -> None:
    vocabulary = tuple(map(chr, range(40, 1000)))
    for itos in (dict(enumerate(vocabulary)), list(vocabulary)):
        meta = {"vocab_size": 1000, "itos": itos, "stoi": {ch: i for i, ch in enumerate(vocabulary)}}
        Path("meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        assert nanogpt_format.read_meta(Path("meta.pkl")) == nanogpt_format.Meta(1000, vocabulary, None)
    Path("meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50304}, protocol))
    assert nanogpt_format.read_meta(Path("meta.pkl")) == nanogpt_format.Meta(50304, None, None)


def test_the_largest_vocabulary_fits_the_limits() -> None:
    text = "".join(chr(code) for code in range(0x20, 0x20 + 2**16 + 0x800) if not 0xD800 <= code < 0xE000)
    data.prepare(Path("large"), text)
    corpus = data.open_folder("large", Path("large"))
    assert corpus.vocab_size == 2**16
    assert corpus.val[-1] == 2**16 - 1
    refused(lambda: data.prepare(Path("larger"), text + "\U0001f600"), "65537 distinct characters")
