"""Numbers that no change may alter: a tiny sweep over every method, attention mode and norm kind, and its merge.

`python tests/test_golden.py` writes tests/golden/*.parquet anew: only where a number was wrong, with a line in CHANGELOG.md.
A later column is not looked at; one that is missing, or differs beyond rounding between CPUs, fails.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lnjac.config.compose import compose
from lnjac.runs import merge as sweep
from lnjac.training import run as train

GOLDEN = Path(__file__).resolve().parent / "golden"
TINY = ("model.n_layer=1", "model.n_head=2", "model.n_embd=8", "model.block_size=8", "batch_size=4", "precision=fp64",
        "eval.tokens=40", "diagnostics.batch_size=2", "device=cpu", "threads=1", "steps=3", "seed=1")  # fmt: skip
GRID = {
    "method": ("bp", "fa", "dfa", "usf", "frsf", "brsf", "kp", "frozen"),
    "attn_mode": ("softmax", "sigmoid", "relu", "linear"),
    "model.norm": ("layernorm", "rmsnorm"),
}
NEEDED = {
    "dfa": " method.cut_head=true",  # without it dfa teaches nothing in one block
    "kp": " method.decay=0.5",  # lr * decay must stay below 1
}
OTHERS = (
    *(
        f"ln_backward={name}"
        for name in ("center_scale", "projected", "ste", "scale", "radial_scale", "center", "radial")
    ),
    "ln_backward=center_scale ln_backward.sites=[ln_f] model.placement=pre",
    "model.placement=post model.affine=false",
    "model.qk_norm=true diagnostics.batches=2",
    "model.tie=true method=bp diagnostics.grad_at=output",
    "optimizer=adamw model.bias=false optimizer.grad_clip=0.01 optimizer.decay=cosine diagnostics=trajectory",
    "model.n_layer=2 diagnostics=full",
    "model.n_layer=2 diagnostics=full method=dfa ln_backward=center_scale attn_mode=sigmoid",
    "method=bp diagnostics=full diagnostics.swap=false diagnostics.feedback_draws=2",
)
TABLES = ("layers", "runs", "curves", "distributions", "swaps", "tensors", "mechanism")
KEYS = (
    "case",
    "step",
    "site",
    "call",
    "quantity",
    "statistic",
    "at",
    "place",
    "surrogate",
    "radial",
    "part",
    "kind",
    "name",
)
RTOL, ATOL = 1e-6, 1e-9
"""Relative difference allowed, and beside it this share of the column's largest value."""
IDENTITY = {"run_id", "diag_id", "path"}
ROUNDING = {"jacobian_residual"}
EXECUTION = {
    "tokens_per_s", "train_s", "eval_s", "diagnostics_s", "wall_s", "started_at", "resumed_at", "stacked", "commit", "dirty",
    "lnjac_version", "torch_version", "python_version", "device", "threads", "deterministic",
}  # fmt: skip


def cases() -> Iterator[str]:
    for values in itertools.product(*GRID.values()):
        words = " ".join(f"{key}={value}" for key, value in zip(GRID, values, strict=True))
        yield f"{words} optimizer=sgd optimizer.lr=0.1{NEEDED.get(values[0], '')}"
    yield from OTHERS


def measured(folder: Path) -> dict[str, pd.DataFrame]:
    """Train every case in this process, merge, and give each table with the case in place of identities."""
    owner = {}
    for i, words in enumerate(cases()):
        config = compose(*TINY, *words.split())
        train.run(config, folder / str(i))
        status = json.loads((folder / str(i) / "status.json").read_text())
        owner[status["run_id"], status["diag_id"]] = words
    sweep.merge([folder], folder / "all.parquet")
    found = {}
    for table in TABLES:
        file = folder / ("all.parquet" if table == "layers" else f"all.{table}.parquet")
        frame = pd.read_parquet(file)
        by_run = {run: words for (run, _), words in owner.items()}
        whose = [by_run[run] for run in frame["run_id"]]
        assert table == "curves" or set(zip(frame["run_id"], frame["diag_id"], strict=True)) <= set(owner)
        found[table] = frame.drop(columns=[c for c in frame if c in IDENTITY | EXECUTION | ROUNDING]).assign(case=whose)
    return found


def assert_same(table: str, expected: pd.DataFrame, found: pd.DataFrame) -> None:
    missing = set(expected) - set(found)
    assert not missing, f"{table} lost {sorted(missing)}"
    keys = [key for key in KEYS if key in expected]
    one, other = (frame.sort_values(keys, ignore_index=True) for frame in (expected, found))
    assert len(one) == len(other), table
    for column in one:
        a, b = one[column], other[column]
        if pd.api.types.is_float_dtype(a):
            x, y = a.to_numpy(float), b.to_numpy(float)
            scale = np.nanmax(np.abs(x), initial=0.0, where=np.isfinite(x))
            off = ~np.isclose(x, y, rtol=RTOL, atol=ATOL * scale, equal_nan=True)
        else:
            off = (a.astype(object).where(a.notna(), None) != b.astype(object).where(b.notna(), None)).to_numpy() & ~(
                a.isna() & b.isna()
            ).to_numpy()
        assert not off.any(), f"{table}.{column}:\n{pd.DataFrame({'golden': a, 'found': b})[off].join(one[keys])}"


@pytest.mark.slow
def test_no_number_has_changed(tmp_path: Path) -> None:
    for table, found in measured(tmp_path).items():
        assert_same(table, pd.read_parquet(GOLDEN / f"{table}.parquet"), found)


@pytest.mark.parametrize("column", ["radial_share", "site_backward", "n_tokens"])
def test_an_altered_number_is_seen(column: str) -> None:
    golden = pd.read_parquet(GOLDEN / "layers.parquet")
    altered = golden.copy()
    value = altered.at[7, column]
    other = f"{value}?" if isinstance(value, str) else value + value * 1e-4
    altered[column] = altered[column].where(altered.index != 7, other)
    with pytest.raises(AssertionError, match=column):
        assert_same("layers", golden, altered)


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for table, frame in measured(Path(folder)).items():
            frame.to_parquet(GOLDEN / f"{table}.parquet", index=False, compression="zstd")
            print(table, frame.shape)


if __name__ == "__main__":
    sys.exit(write())
