"""Everything about one GPU, in one call: tests, updates, processes, whole sweeps, where the time goes, and a probe.

    python benchmarks/gpu.py [OUT [SECONDS]]

OUT gets gpu.json and the tests' log (default: a new temporary folder); SECONDS bounds the whole (default 480): what does not fit is
named and left out. Without a GPU it runs at small sizes on the CPU, to show that the script itself works.
"""

import json
import os
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

from lnjac import analyse, gpt, stack, train
from lnjac.config import compose

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


def trainings(runs: int, *words: str) -> list[train.Training]:
    config = compose(f"device={DEVICE}", *SMALL, *words)
    corpus = train.admit(config)
    made = []
    for seed in range(runs):
        config = compose(f"device={DEVICE}", f"seed={seed}", *SMALL, *words)
        made.append(train.Training(config, corpus))
    return made


class Graphed:
    """A run's or a stack's update with forward and backward pass, and the optimizer's step, each captured as a CUDA graph."""

    def __init__(self, training: train.Training | stack.Stack) -> None:
        self.training, self.stacked = training, isinstance(training, stack.Stack)
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["capturable"], group["lr"] = True, torch.tensor(group["lr"], device="cuda")
        self.batch = tuple(part.to("cuda") for part in self.draw())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward_backward()
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        if not self.stacked:
            self.training.model.zero_grad(set_to_none=True)
        self.passes, self.steps = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.passes):
            self.loss = self.forward_backward(first=False)
        with torch.cuda.graph(self.steps):
            self.step()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [own.optimizer for own in self.training.steps] if self.stacked else [self.training.optimizer]

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.training.draw() if self.stacked else self.training.batches.next()

    def forward_backward(self, first: bool = True) -> torch.Tensor:
        if self.stacked:
            losses = self.training.losses(self.batch)
            self.training._backward(losses)
            return losses.detach()
        if first:
            self.training.model.zero_grad(set_to_none=True)
        loss, _ = self.training.loss(self.training.model, self.batch)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        for optimizer in self.optimizers():
            optimizer.step()

    def update(self) -> Any:
        for mine, new in zip(self.batch, self.draw(), strict=True):
            mine.copy_(new, non_blocking=True)
        self.passes.replay()
        value = self.loss.tolist()  # the host looks at the loss before the step
        self.steps.replay()
        return value


# Parts


def tests(out: Path) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-n", "8" if CUDA else "2", "--maxfail=400"]
    with (out / "tests.log").open("w") as log:
        subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=200, check=False)
    lines = (out / "tests.log").read_text().splitlines()
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40]:
        print("   ", line[:220], flush=True)
    say("tests", lines[-1] if lines else "no output")


def updates() -> None:
    """Milliseconds of one update of one run."""
    corpus = train.admit(compose(f"device={DEVICE}"))
    tokens = torch.from_numpy(corpus.train.astype("int64"))
    say("plain_ms", ms(PlainTraining(tokens, corpus.vocab_size, device=DEVICE).update, 60))
    for precision in ("fp32", "bf16"):
        say(f"solo_{precision}_ms", ms(trainings(1, f"precision={precision}")[0].update, 60))
        if CUDA:
            say(f"solo_graph_{precision}_ms", ms(Graphed(trainings(1, f"precision={precision}")[0]).update, 60))
    for precision in ("fp32", "bf16"):
        for runs in (16, 64, 256) if CUDA else (2,):
            with guarded(f"stack_{runs}_{precision}"):
                whole = stack.Stack(trainings(runs, f"precision={precision}"))
                whole.update()
                say(f"stack_{runs}_{precision}_ms_a_run", round(ms(whole.update, 10, 1) / runs, 4))
                if CUDA and runs <= 64:
                    say(f"stack_{runs}_graph_{precision}_ms_a_run", round(ms(Graphed(whole).update, 10, 1) / runs, 4))
            del whole
            if CUDA:
                torch.cuda.empty_cache()
    if CUDA:
        torch.backends.cuda.matmul.allow_tf32 = True
        with guarded("tf32"):
            say("solo_graph_tf32_ms", ms(Graphed(trainings(1)[0]).update, 60))
            say("stack_64_tf32_ms_a_run", round(ms(stack.Stack(trainings(64)).update, 10, 2) / 64, 4))
        torch.backends.cuda.matmul.allow_tf32 = False
    say("plain_again_ms", ms(PlainTraining(tokens, corpus.vocab_size, device=DEVICE).update, 60))


def processes() -> None:
    """Updates a second of several processes on one GPU, each with a run of its own, counted in one window of time."""
    seconds = 4 if CUDA else 2
    wanted = {("solo", "fp32"): (4, 8, 16), ("graph", "fp32"): (4, 8, 16), ("graph", "bf16"): (8,)}
    for (kind, precision), numbers in (wanted if CUDA else {("solo", "fp32"): (2,)}).items():
        for n in numbers:
            with tempfile.TemporaryDirectory() as folder:
                line = [sys.executable, __file__, "--worker", kind, precision, folder, str(n), str(seconds)]
                workers = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(n)]
                done = sum(int(worker.communicate()[0].split()[-1]) for worker in workers)
            say(f"processes_{n}_{kind}_{precision}_updates_per_s", round(done / seconds))


def worker(kind: str, precision: str, folder: str, n: int, seconds: float) -> None:
    """Wait until all workers are ready, update for so many seconds, print the number of updates."""
    training = trainings(1, f"precision={precision}", *(["threads=1"]))[0]
    torch.set_num_threads(1)
    update = Graphed(training).update if kind == "graph" else training.update
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


def sweeps(left: Callable[[], float]) -> None:
    """Seconds of whole sweeps of the bare default, from command to merged table."""
    n = 64 if CUDA else 2
    seeds = ",".join(map(str, range(n)))
    kinds = {
        "one_run": ["seed=1"],
        "processes_8": ["-m", f"seed={seeds}", "hydra/launcher=local", "hydra.launcher.jobs=8"],
        "stacked": ["-m", f"seed={seeds}", "hydra/launcher=stacked"],
        "stacked_4": ["-m", f"seed={seeds}", "hydra/launcher=stacked", "hydra.launcher.jobs=4"],
        "processes_16": ["-m", f"seed={seeds}", "hydra/launcher=local", "hydra.launcher.jobs=16"],
    }
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
            elif kind in ("one_run", "stacked", "processes_8"):
                said = [line for line in (ran.stdout + ran.stderr).splitlines() if "validation loss" in line or "at " in line]
                say(f"sweep_{kind}_said", said[-1:] and said[-1][:200])
                say(f"sweep_{kind}_parts", _parts(Path(folder)))


def _parts(folder: Path) -> dict[str, float]:
    """Mean seconds a run spent on each of its parts."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(file) for file in folder.rglob("run.parquet")]
    names = ("train_s", "eval_s", "diagnostics_s", "wall_s")
    return {name: round(statistics.mean(table[name][0].as_py() for table in tables), 3) for name in names}


def where_the_time_goes() -> None:
    """The kernels of an update, alone and stacked, and the floor for these shapes."""
    if not CUDA:
        return
    a = torch.randn(8192, 8192, device="cuda")
    say("fp32_product_tflops", round(2 * 8192**3 / ms(lambda: a @ a, 10) / 1e9, 1))
    b = a.bfloat16()
    say("bf16_product_tflops", round(2 * 8192**3 / ms(lambda: b @ b, 10) / 1e9, 1))
    big = torch.empty(2**29, device="cuda")
    other = torch.empty_like(big)
    say("copy_tb_s", round(2 * big.nbytes / ms(lambda: other.copy_(big), 10) / 1e9, 2))
    del big, other
    for runs in (1, 64):
        products = []
        for d_in, d_out in [(128, 384), (128, 128), (128, 512), (512, 128)] * 4 + [(128, 64)]:
            x, w, g = (torch.randn(runs, *shape, device="cuda") for shape in ((2048, d_in), (d_in, d_out), (2048, d_out)))
            products += [(x, w), (g, w.mT), (g.mT, x)]
        say(f"linear_products_alone_{runs}_ms_a_run", round(ms(lambda p=products: [a @ b for a, b in p], 20) / runs, 4))
    for name, made in (
        ("solo", lambda: trainings(1)[0]),
        ("stack_64", lambda: stack.Stack(trainings(64))),
    ):
        one = made()
        one.update()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            for _ in range(5):
                one.update()
            sync()
        events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        say(f"{name}_kernels_ms_an_update", round(total / 5e3, 3))
        say(f"{name}_launches_an_update", sum(e.count for e in events if e.key in ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cuLaunchKernel")) / 5)
        say(f"{name}_top", [f"{e.self_device_time_total / total:.0%} {e.count / 5:.0f}x {e.key[:70]}" for e in events[:10]])


def finishing() -> None:
    """What a run costs besides its updates."""
    training = trainings(1)[0]
    training.update()
    for name, call in (("validation", training.validation_loss), ("diagnose", training.diagnose)):
        call()
        say(f"{name}_ms", ms(call, 5, 1))


def baby() -> None:
    """model=baby in bf16: (64, 256), 10.7 M parameters."""
    words = ["model=baby", "batch_size=64", "precision=bf16"] if CUDA else []
    one = trainings(1, *words)[0]
    say("baby_bf16_ms", ms(one.update, 20))
    say("baby_fp32_ms", ms(trainings(1, *words, *(["precision=fp32"] if CUDA else []))[0].update, 10))
    if CUDA:
        say("baby_bf16_graph_ms", ms(Graphed(one).update, 20))
        no_dropout = [*words, "model.dropout=0"]
        for runs in (4, 16):
            with guarded(f"baby_stack_{runs}"):
                whole = stack.Stack(trainings(runs, *no_dropout))
                whole.update()
                say(f"baby_stack_{runs}_bf16_ms_a_run", round(ms(whole.update, 5, 1) / runs, 3))
            del whole
            torch.cuda.empty_cache()


def probe() -> None:
    """Analysis of our GPT at GPT-2's shape, random weights, (8, 1024): time and memory against a forward and backward pass."""
    words = ["model.n_layer=12", "model.n_head=12", "model.n_embd=768", "model.block_size=1024"] if CUDA else SMALL
    config = compose(f"device={DEVICE}", "method=bp", *words)
    model = gpt.build(config, 50304 if CUDA else 64).to(DEVICE)
    shape = (8, config.model.block_size)
    batch = tuple(torch.randint(0, 50304 if CUDA else 64, shape, device=DEVICE) for _ in range(2))

    def loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        return model(*batch)[1], batch[1].numel()

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        loss(model, batch)[0].backward()
        model.zero_grad(set_to_none=True)

    def analysis() -> None:
        analyse.analyse(model, [batch], loss)

    for name, call in (("pass", plain), ("analyse", analysis)):
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        call()
        if CUDA:
            say(f"probe_{name}_peak_gb", round(torch.cuda.max_memory_allocated() / 1e9, 2))
        say(f"probe_{name}_ms", ms(call, 10, 1))
    say("probe_time_ratio", round(found["probe_analyse_ms"] / found["probe_pass_ms"], 3))
    if CUDA:
        say("probe_memory_ratio", round(found["probe_analyse_peak_gb"] / found["probe_pass_peak_gb"], 3))


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
        ("finishing", finishing),
        ("sweeps", lambda: sweeps(left)),
        ("processes", processes),
        ("where the time goes", where_the_time_goes),
        ("baby", baby),
        ("probe", probe),
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
        worker(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), float(sys.argv[6]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()), float(sys.argv[2]) if len(sys.argv) > 2 else 480.0)
