"""Merged tables whose numbers can be computed by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from lnjac.comparing.compare import Differences, compare
from lnjac.comparing.tables import MergedTables, open_tables
from lnjac.runs import folder as runs
from lnjac.runs.merged import companions

PLAIN = {
    "attn_mode": "softmax",
    "attn_mode.bias": None,
    "method": "fa",
    "model.n_embd": 64,
    "steps": 100,
    "ln_backward": "exact",
    "ln_backward.sites": "all",
    "optimizer": "adamw",
    "optimizer.lr": 0.001,
    "diagnostics": "final",
    "data": "play",
    "data_sha256": "aa",
    "numerics_version": 2,
    "status": "done",
}


SITES = ("blocks.0.ln_1", "ln_f")


def run(seed: int, loss: float = 2.0, share: Sequence[float] | None = None, **config: Any) -> dict[str, Any]:
    """One run: its loss, the radial_share of its norms, and where its config is not PLAIN's."""
    known = {name.replace("__", "."): value for name, value in config.items()}
    return PLAIN | {"seed": seed, "val_loss_nats": loss, "share": share or [loss / 10, loss / 5]} | known


def study(folder: Path, rows: Sequence[dict[str, Any]], **layers: Any) -> MergedTables:
    """The rows as a merged table, with layer rows at steps 0 (all zero) and 100."""
    of_runs, of_layers = [], []
    for i, row in enumerate(rows):
        ids = {"run_id": row.get("run_id", f"r{i}"), "diag_id": row.get("diag_id", "d")}
        of_runs.append(ids | {name: value for name, value in row.items() if name != "share"})
        for step, site, share in [(s, *at) for s in (0, 100) for at in zip(SITES, row["share"], strict=False)]:
            values = {"radial_share": share * (step > 0), "role": site.split(".")[-1]} | layers
            of_layers.append(ids | {"step": step, "site": site, "call": 0} | values)
    tables = {"runs": of_runs, "layers": of_layers, "curves": [{"run_id": "r0", "step": 0}]}
    path = folder / "all.parquet"
    for name, file in companions(path).items():
        data = pa.Table.from_pandas(pd.DataFrame(tables[name]), preserve_index=False).replace_schema_metadata()
        runs.write_table(file, data, {"table": name, "merged": True, "merge_id": "m"})
    path.with_suffix(".merge.json").write_text(json.dumps({"warnings": [], "skipped": []}))
    return open_tables(path)


def losses(folder: Path, by: str, rows: Sequence[dict[str, Any]], **options: Any) -> Differences:
    """The validation losses of these rows, compared."""
    return compare(study(folder, rows), by, metrics=["val_loss_nats"], table="runs", **options)


def noted(found: Any, start: str) -> str:
    """The one note that starts so."""
    (line,) = [note for note in found.notes if note.startswith(start)]
    return str(line)


TWO_MODES = [
    run(seed, loss, attn_mode=mode, attn_mode__bias=bias)
    for mode, bias, values in (("softmax", None, (3.0, 3.5, 5.0)), ("sigmoid", -4.0, (2.0, 3.0, 3.5)))
    for seed, loss in enumerate(values, 1)
]


COSTS = [
    run(seed, loss + seed, attn_mode=mode, ln_backward=backward, ln_backward__sites=sites)
    for mode, backward, sites, loss in (
        ("softmax", "exact", "all", 2.0),
        ("softmax", "center_scale", "all", 3.0),
        ("softmax", "center_scale", "ln_f", 2.5),
        ("sigmoid", "exact", "all", 4.0),
        ("sigmoid", "center_scale", "all", 4.25),
        ("sigmoid", "center_scale", "ln_f", 4.0),
    )
    for seed in (1, 2, 3)
]


NULLS = [
    run(seed, loss + seed / 8, method=method, method__scale=scale, model__n_embd=width)
    for method, scale, loss in (("bp", math.nan, 2.0), ("fa", 0.5, 3.0), ("fa", 2.0, 3.5))
    for width in (64, 128)
    for seed in (1, 2, 3)
]
