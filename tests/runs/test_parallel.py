"""Runs that several processes read are merged as if one had read them."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
from support.folders import make_run, rows_of

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.runs import combine, parallel
from lnjac.runs import read as reader
from lnjac.runs.merge import merge
from lnjac.runs.read import search


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Runs with other columns and types, some of them unfit, in more than one batch."""
    for i in range(23):
        extra = [(Column("method.b", "float64" if i > 14 else "int64", "", ""), i)] if i > 12 else []
        make_run(tmp_path / "s" / f"{i:02}", seed=i, config=extra, status="running" if i in (3, 21) else "done")
    return tmp_path / "s"


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.slow
def test_runs_read_by_several_processes_are_as_if_read_by_one(many: Path, out: Path, cores: int, monkeypatch: Any):
    one_batch = merge([many], out)
    expected = rows_of(out)
    assert expected == rows_in_one_piece(many)
    monkeypatch.setattr(parallel, "PATIENCE_S", 0)
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    calls: list[tuple[int, int]] = []
    assert merge([many], out, progress=lambda done, total: calls.append((done, total))) == one_batch
    assert rows_of(out) == expected
    assert calls[-1] == (23, 23)
    assert [Path(skip.path).name for skip in one_batch.skipped] == ["03", "21"]


def rows_in_one_piece(folder: Path) -> dict[str, tuple[str, str]]:
    """The merged rows by the plainest way: no batches, no processes."""
    parts = []
    for source in search([folder]).sources:
        with contextlib.suppress(reader.Unfit):
            parts.append(combine.stacked([source], reader.read(source)))
    tables = combine.combine(combine.together(parts), 0).tables
    return {name: (str(table.schema), repr(table.to_pylist())) for name, table in tables.items()}


def test_a_helper_reads_and_one_that_fails_costs_nothing(many: Path, monkeypatch: Any):
    sources = search([many]).sources
    with parallel._helper() as read_there:
        for batch, unfit in zip((sources[:10], sources[10:]), ("03", "21"), strict=True):
            found, skipped = read_there(batch)
            assert found.sources == [source for source in batch if source.path.name != unfit]
            assert [skip.path for skip in skipped] == [str(many / unfit)]
    monkeypatch.setattr(parallel, "PATIENCE_S", 0)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    for broken in ("/bin/false", "/nowhere"):
        monkeypatch.setattr(sys, "executable", broken)
        assert len(parallel.read_all(sources).found.sources) == 21


def test_a_helper_that_meets_an_error_leaves_it_to_the_caller(tmp_path: Path, out: Path, monkeypatch: Any):
    for i, dtype in enumerate(["int64", "string"] * 10):
        make_run(
            tmp_path / "s" / str(i), seed=i, config=[(Column("method.b", dtype, "", ""), {"int64": 1}.get(dtype, "x"))]
        )
    monkeypatch.setattr(parallel, "PATIENCE_S", 0)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    with pytest.raises(ConfigError, match=r"method\.b is int64 in .* but string in"):
        merge([tmp_path / "s"], out)
