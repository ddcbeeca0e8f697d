"""Merged tables as a study leaves them, with made-up numbers: for tests of what reads them."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lnjac.runs import folder as runs
from lnjac.runs import merged
from lnjac.runs import read as sources
from lnjac.runs.schema import FROZEN

FILL = {"int64": 7, "float64": 0.25, "string": "x", "bool": False}
CONFIG = {"model": "tiny", "model.n_embd": 32, "model.n_layer": 2, "method": "fa", "ln_backward": "exact"}
CONFIG |= {"ln_backward.sites": "all", "attn_mode": "softmax", "optimizer": "adamw", "data": "play", "steps": 100}


def write_study(
    folder: Path,
    factors: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 3,
    steps: Sequence[int] = (0, 10, 100),
    blocks: int = 2,
    diverged: Sequence[int] = (),
    skipped: Sequence[tuple[str, str]] = (),
) -> Path:
    """A merge of one run per combination of levels and seed; metrics differ by level, and by seed in pairs."""
    rng = np.random.default_rng(0)
    sites = [f"blocks.{i}.ln_{j}" for i in range(blocks) for j in (1, 2)] + ["ln_f"]
    configs = [
        CONFIG | dict(zip(factors, levels, strict=True)) | {"seed": seed}
        for levels in product(*factors.values())
        for seed in range(1, seeds + 1)
    ]
    of_seed = rng.normal(size=seeds + 1)
    owners, layers, curves = [], [], []
    for number, config in enumerate(configs):
        ids = {"run_id": f"run{number:04}", "diag_id": "d"}
        effect = sum(i * (j + 1) for j, (name, of) in enumerate(factors.items()) for i in [of.index(config[name])])
        level = 1 + 0.1 * effect + 0.02 * of_seed[config["seed"]]
        status = runs.DIVERGED if number in diverged else runs.DONE
        loss = np.nan if number in diverged else level + 0.01 * rng.normal()
        owners.append(
            ids | config | {"status": status, "diverged_step": 5 if number in diverged else None, "val_loss_nats": loss}
        )
        for step, (i, site) in product(steps, enumerate(sites)):
            values = level * (1 + 0.1 * i + 0.001 * step) * np.exp(0.02 * rng.normal(size=len(_NUMBERS)))
            where = {"step": step, "site": site, "call": 0, "block": None if site == "ln_f" else i // 2}
            layers.append(ids | config | where | dict(zip(_NUMBERS, values / 10, strict=True)))
        for step in steps:
            curves.append({"run_id": ids["run_id"], "step": step, "val_loss_nats": 3 - step / 100 + level, "lr": 0.001})
    path = folder / "all.parquet"
    note = {"merged": True, "merge_id": "m", "rows": {}}
    for name, rows in (("layers", layers), ("runs", owners), ("curves", curves)):
        runs.write_table(merged.companions(path)[name], _typed(name, rows), {"table": name, **note})
    report = {"found": len(configs) + len(skipped), "merged": len(configs), "sources": ["somewhere"], "warnings": []}
    report["skipped"] = [{"path": path, "reason": reason} for path, reason in skipped]
    path.with_suffix(".merge.json").write_text(json.dumps(report))
    return path


_NUMBERS = [column.name for column in FROZEN["layers"].values() if column.dtype == "float64"]


def _typed(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows with every declared column in its type, those not given filled."""
    frame = pd.DataFrame(list(rows))
    declared = [column for column in FROZEN[name].values() if column.name != "stacked"]
    filled = frame.assign(**{column.name: FILL[column.dtype] for column in declared if column.name not in frame})
    own = [str(column) for column in frame if column not in {column.name for column in declared}]
    table = pa.Table.from_pandas(filled[[*(column.name for column in declared), *own]], preserve_index=False)
    return sources.conform(table, name, FROZEN[name]).replace_schema_metadata()
