"""Merging many runs against polars reading the same files without checking anything.

python benchmarks/merging.py make FOLDER [N_RUNS] [STEPS]
"""

import hashlib
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lnjac import config as configs
from lnjac import runs
from lnjac.tables import CORE

SITES = [*(f"blocks.{i}.ln_{j}" for i in range(4) for j in (1, 2)), "ln_f", "ln_out"]
GRID = [f"ln_backward={way} model.n_embd={d}" for way in ("exact", "center_scale", "ste", "scale") for d in (64, 128)]
"""Configurations with the same columns: polars reads no others in one scan."""
AT_ONCE = 50
"""Runs that one process writes in a row."""


def make(folder: Path, n_runs: int, steps: int = 1) -> None:
    """Write finished runs as the trainer would, of random numbers: ten layer rows for each of `steps` measured steps."""
    batches = [range(first, min(first + AT_ONCE, n_runs)) for first in range(0, n_runs, AT_ONCE)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make, batches, [folder] * len(batches), [steps] * len(batches)))


def _make(numbers: range, folder: Path, steps: int) -> None:
    for number in numbers:
        config = _config(GRID[number % len(GRID)])
        config.seed = number // len(GRID)
        columns = configs.columns(config)
        identity = {
            name: hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:16] for name in ("run_id", "diag_id")
        }
        random = np.random.default_rng(number)
        step = [50 * i for i in range(steps)]
        said = {
            "layers": [{"step": at, "site": site, "call": 0} for at in step for site in SITES],
            "runs": [
                {"status": runs.DONE, "started_at": f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:00+00:00"}
            ],
            "curves": [{"step": i} for i in range(10)],
        }
        out = runs.RunFolder(folder / "-".join(identity.values()), identity)
        metadata = {**identity, "config": configs.to_dict(config), "provenance": {"commit": "0" * 40, "threads": 1}}
        for name, declared in CORE.items():
            noise = random.random((len(said[name]), len(declared))).tolist()
            rows = [
                {c.name: _value(c.dtype, x) for c, x in zip(declared, line, strict=True)}
                | _known(declared, identity | row)
                for line, row in zip(noise, said[name], strict=True)
            ]
            out.write(name, rows, columns, metadata)
        out.status(runs.DONE)
        out.release()


@cache
def _config(words: str) -> configs.RunConfig:
    return configs.compose(*words.split())


def _value(dtype: str, noise: float) -> Any:
    return {"float64": noise, "int64": 7, "string": "text", "bool": False}[dtype]


def _known(declared: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    return {column.name: row[column.name] for column in declared if column.name in row}


if __name__ == "__main__":
    make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
