"""Corpora: the embedded play, tiny Shakespeare and one's own texts; every refusal in one line."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from support.corpora import TEXT, char_meta, decoded, refused, write_folder
from support.paths import ROOT

from lnjac.data import batches as data_batches
from lnjac.data import corpus as data
from lnjac.data import synthetic as play

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"

needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.exists(),
    reason="tiny Shakespeare is absent: put it at ../shared/data/tinyshakespeare/input.txt",
)


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
