"""Everything about one GPU, in one call: tests, updates, processes, whole sweeps, where the time goes, and a probe.

    python benchmarks/gpu.py [OUT [SECONDS]]

OUT gets gpu.json and the tests' log (default: a new temporary folder); SECONDS bounds the whole (default 480): what does not
fit is named and left out. Without a GPU it runs at small sizes on the CPU, to show that the script itself works.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from plain import PlainTraining
from torch.profiler import ProfilerActivity, profile

from lnjac.config.compose import compose
from lnjac.gpt import model as gpt
from lnjac.norms.probe import probe as probe_of
from lnjac.training import loop
from lnjac.training import run as train

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = [] if CUDA else ["model=tiny", "batch_size=2", "model.block_size=16"]
UPDATES = 250

found: dict[str, Any] = {}
started = time.perf_counter()


def say(name: str, value: Any) -> None:
    found[name] = value
    print(f"[{time.perf_counter() - started:5.0f} s] {name}: {value}", flush=True)


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def ms(call: Callable[[], object], rounds: int = 30, warmup: int = 5) -> float:
    """Median milliseconds of a call, over windows of five calls between two synchronisations."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(max(1, rounds // 5)):
        sync()
        start = time.perf_counter()
        for _ in range(5):
            call()
        sync()
        times.append(1e3 * (time.perf_counter() - start) / 5)
    return round(statistics.median(times), 3)


@contextmanager
def launched_one_by_one() -> Iterator[None]:
    """Within the context updates are not replayed as a CUDA graph."""
    before, loop.captured = loop.captured, lambda passes, *_: passes
    try:
        yield
    finally:
        loop.captured = before


def training(*words: str) -> loop.Training:
    config = compose(f"device={DEVICE}", *SMALL, *words)
    return loop.Training(config, train.admit(config))


# Parts


def tests(out: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-n",
        "8" if CUDA else "2",
        "tests/norms",
        "tests/training",
    ]
    with (out / "tests.log").open("w") as log:
        subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=200, check=False)
    lines = (out / "tests.log").read_text().splitlines()
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40]:
        print("   ", line[:220], flush=True)
    say("tests", lines[-1] if lines else "no output")


def updates() -> None:
    """Milliseconds of one update of the bare default and of model=baby: plain, launched one by one, replayed."""
    corpus = train.admit(compose(f"device={DEVICE}"))
    tokens = torch.from_numpy(corpus.train.astype("int64"))
    plain = PlainTraining(tokens, corpus.vocab_size, device=DEVICE)
    say("plain_ms", ms(plain.update, 60))
    baby = ["model=baby", "batch_size=64"] if CUDA else []
    for precision in ("fp32", "bf16"):
        for name, words in (("default", []), ("baby", baby)):
            with launched_one_by_one():
                say(f"{name}_{precision}_launched_ms", ms(training(f"precision={precision}", *words).update, 20))
            say(f"{name}_{precision}_ms", ms(training(f"precision={precision}", *words).update, 60))
    say("plain_again_ms", ms(plain.update, 60))


@contextmanager
def mps() -> Iterator[None]:
    """Within the context processes use the GPU at once (NVIDIA's Multi-Process Service), where its program is found."""
    program = shutil.which("nvidia-cuda-mps-control", path=f"{os.environ['PATH']}:/usr/local/nvidia/bin")
    if not program:
        raise FileNotFoundError("nvidia-cuda-mps-control")
    with tempfile.TemporaryDirectory() as folder:
        places = {f"CUDA_MPS_{name}_DIRECTORY": folder for name in ("PIPE", "LOG")}
        os.environ.update(places)
        try:
            subprocess.run([program, "-d"], check=True, timeout=20)
            yield
        finally:
            subprocess.run([program], input="quit\n", text=True, capture_output=True, timeout=30, check=False)
            for name in places:
                del os.environ[name]


def under_mps(left: Callable[[], float]) -> None:
    with mps():
        processes((8, 16), "mps_")
        sweeps(left, {"mps_8_processes": 8})


def processes(numbers: tuple[int, ...] = (4, 8) if CUDA else (2,), prefix: str = "") -> None:
    """Updates a second of several processes on one GPU, each with a run of its own, counted in one window of time."""
    seconds = 4 if CUDA else 2
    for n in numbers:
        with tempfile.TemporaryDirectory() as folder:
            line = [sys.executable, __file__, "--worker", folder, str(n), str(seconds)]
            workers = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(n)]
            done = sum(int(worker.communicate()[0].split()[-1]) for worker in workers)
        say(f"{prefix}processes_{n}_updates_per_s", round(done / seconds))


def worker(folder: str, n: int, seconds: float) -> None:
    """Wait until all workers are ready, update for so many seconds, print the number of updates."""
    update = training("threads=1").update
    for _ in range(5):
        update()
    Path(folder, str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < n:
        time.sleep(0.01)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        update()
        done += 1
    print(done)


def sweeps(left: Callable[[], float], named: dict[str, int] | None = None) -> None:
    """Seconds of whole sweeps of the bare default, from command to merged table, by so many processes."""
    n = 64 if CUDA else 2
    seeds = ",".join(map(str, range(n)))
    kinds = {} if named else {"one_run": ["seed=1"]}
    for name, jobs in (named or {f"{jobs}_processes": jobs for jobs in (8, 16, 4)}).items():
        kinds[name] = ["-m", f"seed={seeds}", f"hydra.launcher.jobs={jobs}"]
    for kind, words in kinds.items():
        if left() < 60:
            say(f"sweep_{kind}_s", "left out: no time")
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = f"hydra.sweep.dir={folder}/sweep" if "-m" in words else f"hydra.run.dir={folder}/run"
            start = time.perf_counter()
            line = [sys.executable, "run.py", *words, place, "report=off", *SMALL, f"steps={UPDATES if CUDA else 3}"]
            ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=max(60, left()), check=False)
            say(f"sweep_{kind}_s", round(time.perf_counter() - start, 1))
            if ran.returncode:
                say(f"sweep_{kind}_failed", (ran.stdout + ran.stderr)[-600:])
            else:
                say(f"sweep_{kind}_parts", _parts(Path(folder)))


def _parts(folder: Path) -> dict[str, float]:
    """Mean seconds a run spent on each of its parts."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(file) for file in folder.rglob("run.parquet")]
    names = ("train_s", "eval_s", "diagnostics_s", "wall_s")
    return {name: round(statistics.mean(table[name][0].as_py() for table in tables), 3) for name in names}


def kernels(call: Callable[[], object], times: int = 5) -> tuple[float, list[str]]:
    """Milliseconds of the GPU that a call takes, and the ten kernels that take most of it."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(times):
            call()
        sync()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    top = [f"{e.self_device_time_total / total:.0%} {e.count / times:.0f}x {e.key[:70]}" for e in events[:10]]
    return round(total / times / 1e3, 3), top


def where_the_time_goes() -> None:
    """The kernels of an update, and the floor for these shapes."""
    one = training()
    one.update()
    if not CUDA:
        return
    products = []
    for d_in, d_out in [(128, 384), (128, 128), (128, 512), (512, 128)] * 4 + [(128, 64)]:
        x, w, g = (torch.randn(*shape, device="cuda") for shape in ((2048, d_in), (d_in, d_out), (2048, d_out)))
        products += [(x, w), (g, w.mT), (g.mT, x)]
    say("linear_products_alone_ms", ms(lambda: [a @ b for a, b in products], 20))
    total, top = kernels(one.update)
    say("kernels_ms_an_update", total)
    say("top_kernels", top)
    for name, call in (("validation", one.validation_loss), ("diagnose", one.diagnose)):
        call()
        say(f"{name}_ms", ms(call, 5, 1))


def probe() -> None:
    """Our GPT at GPT-2's shape, random weights, (8, 1024): time and memory of `measure` against a forward and backward pass,
    of `watch` against the step that it watches."""
    words = ["model.n_layer=12", "model.n_head=12", "model.n_embd=768", "model.block_size=1024"] if CUDA else SMALL
    config = compose(f"device={DEVICE}", "method=bp", *words)
    model = gpt.build(config, 50304 if CUDA else 64).to(DEVICE)
    shape = (8, config.model.block_size)
    batch = tuple(torch.randint(0, 50304 if CUDA else 64, shape, device=DEVICE) for _ in range(2))

    def loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        return model(*batch)[1], batch[1].numel()

    measuring, optimizer = probe_of(model), torch.optim.AdamW(model.parameters(), lr=1e-4)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        loss(model, batch)[0].backward()

    def step() -> None:
        plain()
        optimizer.step()

    def watch() -> None:
        model.zero_grad(set_to_none=True)
        with measuring.watch() as seen:
            mean, tokens = loss(model, batch)
            seen.tokens(tokens)
            mean.backward()
        optimizer.step()

    ways = {"pass": plain, "measure": lambda: measuring.measure([batch], loss), "step": step, "watch": watch}
    for name, call in ways.items():
        model.zero_grad(set_to_none=True)
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        call()
        if CUDA:
            say(f"probe_{name}_peak_gb", round(torch.cuda.max_memory_allocated() / 1e9, 2))
        say(f"probe_{name}_ms", ms(call, 10, 1))
    for name, base in (("measure", "pass"), ("watch", "step")):
        say(f"probe_{name}_time_ratio", round(found[f"probe_{name}_ms"] / found[f"probe_{base}_ms"], 3))
        if CUDA:
            say(f"probe_{name}_memory_ratio", round(found[f"probe_{name}_peak_gb"] / found[f"probe_{base}_peak_gb"], 3))
            say(f"probe_{name}_top_kernels", kernels(ways[name])[1])


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Say an error and go on: one part's fault must not cost the others."""
    try:
        yield
    except Exception as error:
        say(f"{name}_error", f"{type(error).__name__}: {str(error)[:400]}")
        if CUDA:
            torch.cuda.empty_cache()


def main(out: Path, seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return seconds - (time.perf_counter() - started)

    say("torch", torch.__version__)
    say("device", torch.cuda.get_device_name() if CUDA else "cpu")
    parts: list[tuple[str, Callable[[], None]]] = [
        ("tests", lambda: tests(out)),
        ("updates", updates),
        ("probe", probe),
        ("where the time goes", where_the_time_goes),
        ("sweeps", lambda: sweeps(left)),
        ("processes", processes),
        ("MPS", lambda: under_mps(left)),
    ]
    for name, part in parts:
        if left() < 20:
            say(name, "left out: no time")
            continue
        with guarded(name):
            part()
        if CUDA:
            torch.cuda.empty_cache()
        (out / "gpu.json").write_text(json.dumps(found, indent=1, default=str))
    width = max(map(len, found))
    print("\n".join(f"{name:{width}}  {value}" for name, value in found.items() if not isinstance(value, list)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        main(
            Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()),
            float(sys.argv[2]) if len(sys.argv) > 2 else 480.0,
        )
