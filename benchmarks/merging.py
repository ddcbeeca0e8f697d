"""Merging many runs.

python benchmarks/merging.py FOLDER N_RUNS [STEPS] [ROUNDS] [PYTHON]

FOLDER is filled with runs first if it is not there. Each round takes in turns the merge, what it needs to start, and as a
yardstick the reading alone of the same Parquet files by polars, if PYTHON is an interpreter that has it. Each is a process
of its own, whose helpers count in its CPU time.
"""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lnjac.config import compose, schema
from lnjac.config import identity as config_identity
from lnjac.runs import folder as runs
from lnjac.runs.schema import FROZEN

SITES = [*(f"blocks.{i}.ln_{j}" for i in range(4) for j in (1, 2)), "ln_f", "ln_out"]
GRID = [f"ln_backward={way} model.n_embd={d}" for way in ("exact", "center_scale", "ste", "scale") for d in (64, 128)]
POLARS = """
import glob, sys, polars
for name in ("layers", "run", "curve"):
    files = sorted(glob.glob(f"{sys.argv[1]}/*/{name}.parquet"))
    print(polars.scan_parquet(files, missing_columns="insert", extra_columns="ignore").collect().shape)
"""
"""Neither sums nor keys are checked, nor are columns joined that the first file lacks."""
AT_ONCE = 50
"""Runs that one process writes in a row."""


def make(folder: Path, numbers: range, steps: int) -> None:
    """Write finished runs by the trainer's own writer, of random numbers: ten layer rows at each of `steps` steps."""
    batches = [numbers[first : first + AT_ONCE] for first in range(0, len(numbers), AT_ONCE)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make, batches, [folder] * len(batches), [steps] * len(batches)))


def _make(numbers: range, folder: Path, steps: int) -> None:
    for number in numbers:
        config = _config(GRID[number % len(GRID)])
        config.seed = number // len(GRID)
        identity = {
            name: hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:16] for name in ("run_id", "diag_id")
        }
        random = np.random.default_rng(number)
        started_at = f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}+00:00"
        known: dict[str, dict[str, Any]] = {
            "layers": {"step": np.repeat(50 * np.arange(steps), len(SITES)), "site": SITES * steps, "call": 0},
            "runs": {"status": runs.DONE, "started_at": started_at},
            "curves": {"step": np.arange(10)},
        }
        out = runs.RunFolder(folder / "-".join(identity.values()), identity)
        metadata = {
            **identity,
            "config": config_identity.to_dict(config),
            "provenance": {"commit": "0" * 40, "threads": 1},
        }
        for name, n_rows in (("layers", len(SITES) * steps), ("runs", 1), ("curves", 10)):
            columns = [(c, _value(c.dtype, n_rows, random)) for c in FROZEN[name].values()]
            columns += [] if name == "curves" else config_identity.columns(config)
            values = {c.name: (identity | known[name]).get(c.name, value) for c, value in columns}
            arrays = [value if np.ndim(value) else [value] * n_rows for value in values.values()]
            data = pa.table(arrays, schema=runs.schema(c for c, _ in columns))
            out.save_table(name, data, {"table": name, **metadata})
        out.pack()
        out.status(runs.DONE)
        out.release()


@cache
def _config(words: str) -> schema.RunConfig:
    return compose.compose(*words.split())


def _value(dtype: str, n_rows: int, random: np.random.Generator) -> Any:
    return random.random(n_rows) if dtype == "float64" else {"int64": 7, "string": "text", "bool": False}[dtype]


class Cost(NamedTuple):
    """Of one process and its helpers: wall time, CPU time of all threads; of the largest, the peak of resident memory."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def cost(*words: object) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, words
    return Cost(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)


def main(folder: Path, n_runs: int, steps: int = 1, rounds: int = 1, python: str = "") -> None:
    if not folder.exists():
        make(folder, range(n_runs), steps)
    commands = {
        "merge": (sys.executable, "-m", "lnjac", "merge", folder, "-o", folder / "all.parquet"),
        "start-up": (sys.executable, "-c", "import lnjac.runs.merge, pandas"),
    }
    if python:
        commands["polars"] = (python, "-c", POLARS, folder)
    for _ in range(rounds):
        for name, words in commands.items():
            used = cost(*words)
            print(f"{name:8} {used.wall_s:7.2f} s wall {used.cpu_s:7.2f} s CPU {used.peak_mb:6.0f} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), *sys.argv[5:])
