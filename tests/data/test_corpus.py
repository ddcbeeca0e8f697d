"""Corpora and batches: nanoGPT's split and format, every refusal in one line, counts against a slower loop."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import pickletools
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.paths import ROOT

from lnjac.data import batches as data_batches
from lnjac.data import corpus as data
from lnjac.data import nanogpt_format
from lnjac.data import synthetic as play
from lnjac.data import tokens as data_tokens
from lnjac.errors import ConfigError

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
TEXT = "To be, or not to be: that is the question.\n" * 40

needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.exists(),
    reason="tiny Shakespeare is absent: put it at ../shared/data/tinyshakespeare/input.txt",
)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty working directory."""
    monkeypatch.chdir(tmp_path)


def refused(load: Callable[[], Any], *said: str) -> str:
    """The text of the ConfigError that load() raises: one line, holding every word of `said`."""
    with pytest.raises(ConfigError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    for words in said:
        assert words in message
    return message


def write_folder(folder: Path, train: list[int], val: list[int], meta: Any = None) -> Path:
    """A folder as nanoGPT's own prepare.py would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def char_meta(text: str) -> dict[str, Any]:
    chars = sorted(set(text))
    return {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {ch: i for i, ch in enumerate(chars)},
    }


def decoded(corpus: data.Corpus, split: np.ndarray) -> str:
    assert corpus.vocabulary is not None
    return "".join(corpus.vocabulary[token] for token in split)


# The embedded play


@pytest.fixture(scope="module")
def text() -> str:
    return play.generate()


def test_the_play_is_the_same_bytes_under_every_hash_seed(text: str) -> None:
    assert hashlib.sha256(text.encode()).hexdigest() == data.PLAY_TEXT_SHA256
    program = (
        "import hashlib; from lnjac.data import synthetic; "
        "print(hashlib.sha256(synthetic.generate().encode()).hexdigest())"
    )
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == data.PLAY_TEXT_SHA256


def test_the_play_looks_like_one(text: str) -> None:
    assert 1_050_000 < len(text) < 1_150_000
    assert text.isascii()
    assert 60 <= len(set(text)) <= 70
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) < 200
    turns = re.findall(r"^([A-Z]+):$", text, re.MULTILINE)
    assert 20 < len(set(turns)) < 40
    assert len(turns) > 5_000
    assert len(set(re.findall(r"[a-z]+", text.lower()))) > 3_000


def test_the_play_is_another_with_another_seed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(play, "LENGTH", 20_000)
    same = play.generate()
    assert text.startswith(same)
    monkeypatch.setattr(play, "SEED", play.SEED + 1)
    assert play.generate() != same


def test_play_trains_on_its_first_nine_tenths(text: str) -> None:
    corpus = data.Play("play").load()
    assert corpus.sha256 == data.PLAY_SHA256
    assert corpus.vocab_size == len(set(text))
    cut = int(0.9 * len(text))
    assert decoded(corpus, corpus.train) == text[:cut]
    assert decoded(corpus, corpus.val) == text[cut:]


def test_a_damaged_play_cache_is_generated_again(caplog: pytest.LogCaptureFixture) -> None:
    data.Play("play").load()
    for name in ("train.bin", "val.bin", "meta.pkl"):
        file = Path("data/play", name)
        content = bytearray(file.read_bytes())
        content[1000 if name != "meta.pkl" else 3] ^= 1
        file.write_bytes(content)
        caplog.clear()
        assert data.Play("play").load().sha256 == data.PLAY_SHA256
        assert "again" in caplog.text
    Path("data/play/val.bin").unlink()
    assert data.Play("play").load().sha256 == data.PLAY_SHA256
    write_folder(Path("data/play"), [0, 1, 1], [1, 0], char_meta("ab"))  # intact, but another corpus
    assert data.Play("play").load().sha256 == data.PLAY_SHA256


def test_a_changed_generator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "generate", lambda: TEXT)
    refused(data.Play("play").load, "lnjac/data/synthetic.py", "restore it")
    assert not Path("data").exists()


def test_loading_twice_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.Play("play").load()
    monkeypatch.setattr(data, "_verify", None)
    assert data.Play("play").load() is first


# Tiny Shakespeare


@needs_shakespeare
def test_shakespeare_is_split_as_by_nanogpt() -> None:
    corpus = data.ShakespeareChar("shakespeare_char", source=str(SHAKESPEARE)).load()
    assert (len(corpus.train), len(corpus.val), corpus.vocab_size) == (
        1_003_854,
        111_540,
        65,
    )  # nanoGPT's readme
    text = SHAKESPEARE.read_text()
    assert decoded(corpus, corpus.val) == text[1_003_854:]
    assert corpus.vocabulary == tuple(sorted(set(text)))
    found = data_batches.baselines(corpus, None)
    assert found.bigram_nats == pytest.approx(2.48, abs=0.01)
    assert found.unigram_nats == pytest.approx(3.35, abs=0.01)


@needs_shakespeare
def test_shakespeare_prepared_by_nanogpt_itself_is_used() -> None:
    text = SHAKESPEARE.read_text()
    meta = char_meta(text)
    tokens = [meta["stoi"][ch] for ch in text]
    cut = int(0.9 * len(tokens))
    write_folder(Path("prepared"), tokens[:cut], tokens[cut:], meta)
    corpus = data.ShakespeareChar("shakespeare_char", dir="prepared").load()
    assert corpus.sha256 == data.SHAKESPEARE_SHA256
    ours = data.ShakespeareChar("shakespeare_char", source=str(SHAKESPEARE)).load()
    assert ours.sha256 == corpus.sha256
    for name in ("train.bin", "val.bin"):
        assert Path("prepared", name).read_bytes() == Path("data/shakespeare_char", name).read_bytes()
    written = pickle.loads(Path("data/shakespeare_char/meta.pkl").read_bytes())
    assert {key: written[key] for key in meta} == meta


def test_another_text_is_not_taken_for_shakespeare() -> None:
    Path("own.txt").write_text(TEXT)
    refused(data.ShakespeareChar("shakespeare_char", source="own.txt").load, "data=text 'data.files=[own.txt]'")
    refused(data.ShakespeareChar("shakespeare_char", source="gone.txt").load, "gone.txt", "data.source")
    assert not Path("data").exists()
    data.prepare(Path("data/shakespeare_char"), TEXT)
    refused(data.ShakespeareChar("shakespeare_char").load, "shakespeare_char", "data=nanogpt")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def small_shakespeare(monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets TEXT pass for tiny Shakespeare."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "SHAKESPEARE_TEXT_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    data.prepare(Path("reference"), TEXT)
    sha256 = data.open_folder("reference", Path("reference")).sha256
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", sha256)
    return sha256


def test_shakespeare_is_downloaded_checked_and_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_shakespeare: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    with served(tmp_path) as site:
        fetch = data.ShakespeareChar("shakespeare_char", url=f"{site}/input.txt", timeout_s=5.0)
        assert fetch.load().sha256 == small_shakespeare
        assert capsys.readouterr() == ("", "")  # no terminal, no progress
        (tmp_path / "input.txt").write_text(TEXT + "more")
        other = data.ShakespeareChar("shakespeare_char", dir="other", url=f"{site}/input.txt")
        refused(other.load, "is not tiny Shakespeare", "data=text")
        refused(data.ShakespeareChar("s", dir="other", url=f"{site}/gone").load, "File not found", "data.source=")
        (tmp_path / "input.txt").write_text(TEXT)
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        assert other.load().sha256 == small_shakespeare
        assert "100 %" in terminal.getvalue()
    assert fetch.load().sha256 == small_shakespeare  # from the folder, with the server gone
    assert sorted(os.listdir("data/shakespeare_char")) == [".lnjac", "meta.pkl", "train.bin", "val.bin"]


def test_a_download_that_is_too_large_stops(tmp_path: Path, small_shakespeare: str) -> None:
    (tmp_path / "endless").write_bytes(bytes(2**17))
    with served(tmp_path) as site:
        refused(lambda: data._download(f"{site}/endless", 5.0, most=2**16), "far larger")


def test_no_network_is_said_with_its_remedy(small_shakespeare: str) -> None:
    with socket.socket() as listener:  # bound, never listening: connections are refused
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/input.txt"
        refused(data.ShakespeareChar("s", url=url, timeout_s=1.0).load, "data.source=/path/to/input.txt")
    refused(data.ShakespeareChar("s", url="http://host.invalid/", timeout_s=1.0).load, "data.source=")
    refused(data.ShakespeareChar("s", url="nonsense").load, "cannot download nonsense", "data.source=")
    assert not Path("data").exists()


def test_a_silent_server_times_out(small_shakespeare: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        started = time.monotonic()
        refused(data.ShakespeareChar("s", url=url, timeout_s=0.1).load, "timed out")
        assert time.monotonic() - started < 10


# Folders in nanoGPT's format


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


# One's own texts


def test_own_texts_are_concatenated_and_encoded() -> None:
    Path("a.txt").write_bytes("Ünïcödé\r\n→ 😀 ".encode() * 10)
    Path("b.txt").write_bytes(b"plain " * 10)
    text = "Ünïcödé\r\n→ 😀 " * 10 + "plain " * 10
    corpus = data.TextFiles("text", ["a.txt", "b.txt"], val_fraction=0.25).load()
    assert decoded(corpus, corpus.train) + decoded(corpus, corpus.val) == text
    assert len(corpus.train) == int(0.75 * len(text))
    assert corpus.vocabulary == tuple(sorted(set(text)))


def test_own_texts_are_cached_by_content(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text(TEXT)
    corpus = data.TextFiles("text", ["a.txt"]).load()
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode", None)
        assert data.TextFiles("text", ["b.txt"]).load() is corpus  # the same content under another name
    longer = data.TextFiles("text", ["a.txt", "b.txt"]).load()
    shorter_val = data.TextFiles("text", ["a.txt"], val_fraction=0.2).load()
    assert len({c.sha256 for c in (corpus, longer, shorter_val)}) == 3
    assert len(os.listdir("data/text")) == 3
    for file in Path("data/text").rglob("val.bin"):
        file.write_bytes(b"\0\0")
    assert data.TextFiles("text", ["a.txt"]).load().sha256 == corpus.sha256
    assert "again" in caplog.text


def test_impossible_texts_are_refused_in_one_line() -> None:
    def load(content: bytes, **settings: Any) -> Callable[[], data.Corpus]:
        Path("t.txt").write_bytes(content)
        return data.TextFiles("text", ["t.txt"], **settings).load

    refused(load(b"caf\xe9"), "t.txt is not UTF-8 at byte 3", "iconv")
    refused(load(b""), "t.txt is empty", "data.files")
    refused(load(b"abc"), "3 characters are too few", "data.val_fraction")
    refused(load("".join(map(chr, range(0xE000, 0xE000 + 65537))).encode()), "65537 distinct characters")
    refused(load(TEXT.encode(), val_fraction=0.0), "data.val_fraction=0.0")
    refused(load(TEXT.encode(), val_fraction=1.0), "data.val_fraction=1.0")
    refused(data.TextFiles("text", []).load, "data.files is empty", "data.files=[book.txt]")
    refused(data.TextFiles("text", ["gone.txt"]).load, "gone.txt", "data.files")
    refused(data.TextFiles("text", ["."]).load, "cannot read .", "data.files")
    assert not Path("data").exists()


# Preparing


def test_what_is_prepared_is_what_nanogpt_reads() -> None:
    """The readers here are nanoGPT's: np.memmap of uint16 and a plain pickle.load."""
    data.prepare(Path("mine"), TEXT)
    train = np.memmap("mine/train.bin", dtype=np.uint16, mode="r")
    val = np.memmap("mine/val.bin", dtype=np.uint16, mode="r")
    meta = pickle.loads(Path("mine/meta.pkl").read_bytes())
    assert "".join(meta["itos"][token] for token in [*train, *val]) == TEXT
    assert [meta["stoi"][ch] for ch in TEXT] == [*train, *val]
    assert meta["vocab_size"] == len(meta["itos"]) == len(set(TEXT))
    assert len(train) == int(0.9 * len(TEXT))


def test_meta_is_written_last_and_each_file_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        order.append(target.name)
        if len(order) == 4:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    refused(lambda: data.prepare(Path("mine"), TEXT), "cannot write mine (No space left on device)", "data.dir")
    assert order == [".lnjac", "train.bin", "val.bin", "meta.pkl"]
    assert sorted(os.listdir("mine")) == [".lnjac", "train.bin", "val.bin"]  # no temporary file stays behind


@pytest.mark.parametrize("names", [["train.bin"], ["train.bin", "val.bin"], ["train.bin", "val.bin", "meta.pkl"]])
def test_tokens_that_were_not_prepared_here_are_never_written_over(names: list[str]) -> None:
    """As when data=nanogpt is forgotten and data.dir is not."""
    Path("owt").mkdir()
    for name in names:
        Path("owt", name).write_bytes(b"precious")
    refused(data.Play("play", dir="owt").load, "data=nanogpt data.dir=owt")
    assert {file.name: file.read_bytes() for file in Path("owt").iterdir()} == dict.fromkeys(names, b"precious")


def test_a_folder_that_cannot_be_made_is_said() -> None:
    Path("data").write_text("in the way")
    refused(data.Play("play").load, "cannot write data/play", "data.dir")


def _prepare_often(folder: str) -> str:
    for _ in range(20):
        data.prepare(Path(folder), TEXT)
        data.open_folder("shared", Path(folder))
    return data.open_folder("shared", Path(folder)).sha256


def test_processes_may_prepare_one_folder_at_once() -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        hashes = pool.map(_prepare_often, ["shared"] * 3, chunksize=1)
    assert set(hashes) == {data.open_folder("shared", Path("shared")).sha256}
    assert sorted(os.listdir("shared")) == [".lnjac", "meta.pkl", "train.bin", "val.bin"]


# The yaml files


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "data").glob("*.yaml")), ids=lambda file: file.stem)
def test_each_yaml_names_its_class_and_every_field(file: Path) -> None:
    node = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(node, dict)
    module, _, name = node.pop("_target_").rpartition(".")
    assert module == "lnjac.data.corpus"
    schema = OmegaConf.structured(getattr(data, name))
    assert {"name", *node} == set(schema)
    given = {"name": file.stem} | {
        key: ["a.txt"] if key == "files" else "folder" if value == "???" else value for key, value in node.items()
    }
    config: Any = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert callable(getattr(config, "load", None) or config.resolve)


# Batches


def test_gather_shifts_targets_by_one() -> None:
    split = np.arange(100, 130, dtype=np.uint16)
    idx, targets = data_batches.gather(split, np.array([0, 5, 26]), 3)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.tolist() == [[100, 101, 102], [105, 106, 107], [126, 127, 128]]
    assert targets.tolist() == [[101, 102, 103], [106, 107, 108], [127, 128, 129]]
    assert idx.is_contiguous()
    assert targets.is_contiguous()
    top = data_batches.gather(np.array([65535, 0], dtype=np.uint16), np.array([0]), 1)
    assert top[0].item() == 65535  # not wrapped to -1


def test_batches_repeat_with_their_seed_and_reach_both_ends() -> None:
    split = np.arange(12, dtype=np.uint16)

    def draw(seed: int, n: int) -> list[torch.Tensor]:
        batches = data_batches.Batches(split, 5, 4, np.random.default_rng(seed))
        return [batches.next()[0] for _ in range(n)]

    assert all(map(torch.equal, draw(1, 4), draw(1, 4)))
    assert not all(map(torch.equal, draw(1, 4), draw(2, 4)))
    starts = torch.cat(draw(1, 200))[:, 0].tolist()
    assert set(starts) == set(range(12 - 4))  # 0 to len - block_size - 1
    assert min(Counter(starts).values()) > 60  # 125 expected of each
    data_batches.Batches(split, 1, 11, np.random.default_rng(0)).next()
    refused(lambda: data_batches.Batches(split, 1, 12, np.random.default_rng(0)), "block_size=12", "12 tokens")


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 70),
    block_size=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    max_tokens=st.one_of(st.none(), st.integers(1, 80)),
)
def test_windows_predict_each_token_exactly_once(
    n: int, block_size: int, batch_size: int, max_tokens: int | None
) -> None:
    split = np.arange(n, dtype=np.uint16)
    seen: list[int] = []
    shapes = []
    for idx, targets in data_batches.windows(split, block_size, batch_size, max_tokens):
        assert torch.equal(idx + 1, targets)
        assert torch.equal(idx[:, 0] % block_size, torch.zeros(len(idx), dtype=torch.int64))
        seen += targets.flatten().tolist()
        shapes.append(tuple(idx.shape))
    assert seen == list(range(1, n if max_tokens is None else min(n, max_tokens + 1)))
    assert all(width == block_size for _, width in shapes[:-1])
    assert all(rows <= batch_size for rows, _ in shapes)
    assert shapes[-1][1] == block_size or shapes[-1][0] == 1


def test_windows_need_something_to_predict() -> None:
    refused(lambda: next(data_batches.windows(np.zeros(1, dtype=np.uint16), 4, 4, None)), "nothing to predict")
    refused(lambda: next(data_batches.windows(np.zeros(9, dtype=np.uint16), 4, 4, 0)), "max_tokens=0")


# Baselines


def counted(train: list[int], val: list[int], vocab_size: int) -> tuple[float, float]:
    """The slow truth: dictionaries and a loop."""
    one, two, before = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    pairs = list(pairwise(val))
    uni = [-np.log((one[b] + 1) / (len(train) + vocab_size)) for _, b in pairs]
    bi = [-np.log((two[a, b] + 1) / (before[a] + vocab_size)) for a, b in pairs]
    return float(np.mean(uni)), float(np.mean(bi))


@settings(max_examples=60, deadline=None)
@given(
    train=st.lists(st.integers(0, 5), min_size=2, max_size=60),
    val=st.lists(st.integers(0, 5), min_size=2, max_size=30),
    vocab_size=st.sampled_from([6, 9, 50304]),
    max_tokens=st.sampled_from([None, 1, 7]),
    chunk=st.sampled_from([1, 3, 2**22]),
)
def test_baselines_agree_with_a_loop(
    train: list[int], val: list[int], vocab_size: int, max_tokens: int | None, chunk: int
) -> None:
    uint16 = partial(np.array, dtype=np.uint16)
    corpus = data.Corpus("toy", uint16(train), uint16(val), vocab_size, "", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tokens, "CHUNK", chunk)
        found = data_batches.baselines(corpus, max_tokens)
    predicted = val if max_tokens is None else val[: max_tokens + 1]
    assert (found.unigram_nats, found.bigram_nats) == pytest.approx(counted(train, predicted, vocab_size), rel=1e-12)


def test_baselines_of_the_play_leave_room_to_learn() -> None:
    found = data_batches.baselines(data.Play("play").load(), None)
    assert 3.0 < found.unigram_nats < 3.6
    assert 2.2 < found.bigram_nats < 2.7
