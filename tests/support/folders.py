"""Run folders as the trainer would write them, with rows that depend on what is asked for alone."""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lnjac.columns import Column
from lnjac.files import file_sha256
from lnjac.runs import folder as runs
from lnjac.runs.merged import companions
from lnjac.runs.schema import CURVES, FROZEN, RUNS

SITES = ("blocks.0.ln_1", "blocks.0.ln_2", "ln_f")  # a run's own order of roles, which is not the alphabet's


def noise(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return zlib.crc32(repr(key).encode()) / 2**32


def row(declared: Iterable[Column], key: object, **given: Any) -> dict[str, Any]:
    """A value for each declared column: the given one, else one that depends on the key alone."""
    made = {
        "int64": lambda name: 7,
        "float64": lambda name: noise(key, name),
        "string": str,
        "bool": lambda name: False,
    }
    return {c.name: given.get(c.name, made[c.dtype](c.name)) for c in declared}


def make_run(
    folder: Path,
    *,
    seed: int = 1,
    attn_mode: str = "softmax",
    run_id: str | None = None,
    diag_id: str = "d",
    status: str = "done",
    steps: Sequence[int] = (0, 100),
    sites: Sequence[str] = SITES,
    config: Sequence[tuple[Column, Any]] = (),
    layers: Mapping[str, Any] | Callable[[int, str], Mapping[str, Any]] | None = None,
    run: Mapping[str, Any] | None = None,
    curves: Mapping[str, Any] | None = None,
    long: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    note: Mapping[str, Any] | None = None,
    packed: bool = True,
) -> Path:
    """A run's folder as the trainer would write it; equal arguments give equal science.

    Values that are not given depend on the run, the step and the norm alone. `layers` gives values of every norm's row,
    or is a function of step and norm; `long` gives those of each row of each table in long form. A run that is not
    `packed` is as earlier versions wrote it.
    """
    run_id = run_id or f"{attn_mode}-{seed}"
    ids = {"run_id": run_id, "diag_id": diag_id}
    columns = [
        (Column("seed", "int64", "", ""), seed),
        (Column("attn_mode", "string", "", ""), attn_mode),
        (Column("data", "string", "", ""), "play"),
        *config,
    ]
    of_norm = layers if callable(layers) else lambda step, site: layers or {}
    known = {"status": status, "diverged_step": None, "started_at": f"2024-01-01T00:00:{seed:02}+00:00"}
    rows = {
        "layers": [
            row(
                FROZEN["layers"].values(),
                (run_id, step, site),
                **(ids | {"step": step, "site": site, "call": 0, "block": None} | of_norm(step, site)),
            )
            for step in steps
            for site in sites
        ],
        "runs": [row(RUNS, run_id, **(ids | known | (run or {})))],
        "curves": [
            row(CURVES, (run_id, step), **({"run_id": run_id, "step": step} | (curves or {}))) for step in (0, 50, 100)
        ],
    }
    for name, said in (long or {}).items():
        declared = FROZEN[name].values()
        rows[name] = [row(declared, (run_id, name, i), **(ids | {"step": 0} | more)) for i, more in enumerate(said)]
    out = runs.RunFolder(folder, ids)
    for name, content in rows.items():
        out.write(name, RUNS if name == "runs" else list(FROZEN[name].values()), content, columns, note or {})
    if packed:
        out.pack()
    out.status(status)
    return folder


def rewrite(path: Path, edit: Callable[[pa.Table], pa.Table], **note: Any) -> None:
    """Change a table in place as a run would have written it, and say in its note what is given."""
    old = runs.read_metadata(path)
    runs.write_table(path, edit(runs.read_table(path)), old | note)
    status = path.parent / runs.STATUS
    if status.exists():
        said = json.loads(status.read_text())
        said["sha256"][path.name] = file_sha256(path)
        status.write_text(json.dumps(said))


def with_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values)


def rows_of(layers: Path) -> dict[str, tuple[str, str]]:
    """Schema and rows of a merge in an order and a form in which NaN equals itself."""
    tables = {name: runs.read_table(path).replace_schema_metadata() for name, path in companions(layers).items()}
    return {name: (str(table.schema), repr(table.to_pylist())) for name, table in tables.items()}
