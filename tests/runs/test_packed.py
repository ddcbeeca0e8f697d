"""Tables read from a run's one packed file are those of its Parquet files, and never others."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.folders import make_run, rewrite, rows_of, with_column

from lnjac import load
from lnjac.runs import folder as runs
from lnjac.runs.merge import merge
from lnjac.runs.packed import LARGEST, PACKED, as_stored, pack, unpack

SEEDS = range(4)


def sweep(folder: Path, *, packed: bool) -> Path:
    """Runs of two kinds, with nulls, numbers that are none, an empty table, and one too large to be packed."""
    for seed in SEEDS:
        values = {"r_mean": [None, math.nan, -0.0, math.inf][seed]}
        swaps = [{"step": step, "place": "é" * LARGEST} for step in range(2)]
        make_run(
            folder / str(seed),
            seed=seed,
            steps=(0,) if seed else (),
            layers=values,
            long={"swaps": swaps} if seed == 1 else None,
            note={"config": {"seed": seed, "dir": "/data"}},
            packed=packed,
        )
    return folder


def test_a_merge_is_the_same_with_and_without_packed_files(tmp_path: Path):
    merged = {}
    for packed in (True, False):
        folder, out = sweep(tmp_path / str(packed), packed=packed), tmp_path / f"{packed}.parquet"
        assert (folder / "1" / PACKED).exists() == packed
        merge([folder], out)
        merged[packed] = rows_of(out), runs.read_metadata(out)
    assert merged[True] == merged[False]


def test_small_tables_are_read_from_the_packed_file_alone(tmp_path: Path, out: Path, monkeypatch: Any):
    folder, opened = sweep(tmp_path / "s", packed=True), []
    read_table = runs.read_table
    monkeypatch.setattr(runs, "read_table", lambda *words: opened.append(words) or read_table(*words))
    merge([folder], out)
    assert len(opened) == 1  # the large one


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another(path: Path) -> None:
    path.write_bytes((path.parents[1] / "2" / PACKED).read_bytes())


@pytest.mark.parametrize(
    "damage", [flipped, of_another, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])]
)
def test_a_packed_file_that_is_not_as_written_costs_no_run(tmp_path: Path, out: Path, damage: Callable[[Path], None]):
    folder, whole = sweep(tmp_path / "s", packed=True), tmp_path / "whole.parquet"
    merge([folder], whole)
    damage(folder / "1" / PACKED)
    assert not merge([folder], out).skipped
    assert rows_of(out) == rows_of(whole)


def test_a_table_that_was_written_anew_is_read_and_not_its_packed_copy(tmp_path: Path, out: Path):
    folder = make_run(tmp_path / "s" / "0", seed=1)
    rewrite(folder / "layers.parquet", lambda table: with_column("r_mean", pa.array([0.25] * len(table)))(table))
    merge([tmp_path / "s"], out)
    assert set(load(out)["r_mean"]) == {0.25}


def test_what_is_packed_comes_back_with_its_types_and_note():
    table = pa.table({"n": [1, None], "x": [math.nan, None], "s": ["é", None], "b": [True, None]})
    tables = {"a": as_stored(table, {"table": "runs", "said": [1, "é"]}), "b": as_stored(table[:0], {})}
    found = unpack(pack(tables))
    assert list(found) == ["a", "b"]
    assert [each.note for each in found.values()] == [each.note for each in tables.values()]
    assert repr(pa.Table.from_batches(found["a"].rows).to_pylist()) == repr(table.to_pylist())
    assert [each.n_rows for each in found.values()] == [2, 0]
    assert {pa.Table.from_batches(each.rows).schema for each in found.values()} == {table.schema}
