"""Unfinished and damaged runs are skipped with the reason, and checksums catch altered files."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.folders import make_run, rewrite, with_column

from lnjac import load_run
from lnjac.errors import ConfigError
from lnjac.files import file_sha256
from lnjac.runs import folder as runs
from lnjac.runs import read as reader
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions
from lnjac.runs.schema import CORE, SCHEMA_VERSION


def test_unfinished_runs_are_skipped_with_the_reason(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "done", seed=1)
    make_run(tmp_path / "s" / "diverged", seed=2, status="diverged", run={"diverged_step": 3})
    make_run(tmp_path / "s" / "running", seed=3, status="running")
    failed = make_run(tmp_path / "s" / "failed", seed=4)
    runs.RunFolder(failed, {}).status("failed", error="ValueError:\n  out of memory")
    (make_run(tmp_path / "s" / "silent", seed=5) / "status.json").unlink()
    (make_run(tmp_path / "s" / "torn", seed=6) / "status.json").write_text('{"status": "do')
    (tmp_path / "s" / "early").mkdir()
    runs.RunFolder(tmp_path / "s" / "early", {}).status("running")
    report = merge([tmp_path / "s"], out)
    assert {Path(path).name: reason for path, reason in report.skipped} == {
        "early": "running",
        "failed": "failed: ValueError: out of memory",
        "running": "running",
        "silent": "no readable status.json",
        "torn": "no readable status.json",
    }
    assert (report.found, report.merged) == (7, 2)
    assert load(companions(out)["runs"])["status"].tolist() == ["done", "diverged"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def foreign(path: Path) -> None:
    pq.write_table(runs.read_table(path).replace_schema_metadata(), path)


def foreign_note(path: Path) -> None:
    pq.write_table(runs.read_table(path).replace_schema_metadata({"lnjac": "[not ours"}), path)


def edited(edit: Callable[[pa.Table], pa.Table], **note: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, edit, **note)


def noted(**note: Any) -> Callable[[Path], None]:
    return edited(lambda table: table, **note)


def all_are(value: Any, *names: str) -> Callable[[Path], None]:
    """Every row holds `value` in the first of these columns that the table has."""

    def edit(table: pa.Table) -> pa.Table:
        name = next(name for name in names if name in table.column_names)
        return with_column(name, pa.array([value] * len(table)))(table)

    return edited(edit)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "cannot be read"),
    "cut short": (cut_short, "cannot be read"),
    "zero bytes": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("not a parquet file" * 99), "cannot be read"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "foreign": (foreign, "was not written by lnjac"),
    "foreign note": (foreign_note, "was not written by lnjac"),
    "another table": (noted(table="else"), "does not hold the"),
    "a merge's": (noted(merged=True), "does not hold the"),
    "next schema": (noted(schema_version=SCHEMA_VERSION + 1), f"has schema version {SCHEMA_VERSION + 1}"),
    "key lost": (edited(lambda table: table.drop_columns([table.column_names[1]])), "lacks the column"),
    "text for numbers": (all_are("x", "step", "threads"), "as string, which is no int64"),
    "numbers for text": (all_are(1, "run_id"), "as int64, which is no string"),
    "half a step": (all_are(0.5, "step", "threads"), "does not fit int64"),
    "lists": (edited(lambda t: t.append_column("more", pa.array([[1]] * len(t)))), "lists or records"),
    "another run's rows": (all_are("x", "run_id"), "of a run that it does not have"),
}


@pytest.mark.parametrize("table", list(CORE))
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_run_is_named_and_the_others_merged(tmp_path: Path, out: Path, table: str, kind: str):
    make_run(tmp_path / "s" / "good", seed=1)
    bad = make_run(tmp_path / "s" / "bad", seed=2)
    damage, reason = DAMAGE[kind]
    damage(bad / runs.FILES[table])
    report = merge([tmp_path / "s"], out)
    assert (report.found, report.merged) == (2, 1)
    assert [Path(skip.path).name for skip in report.skipped] == ["bad"]
    assert reason in report.skipped[0].reason
    assert "\n" not in report.skipped[0].reason
    assert load(companions(out)["runs"])["seed"].tolist() == [1]


@pytest.mark.parametrize("table", list(CORE))
@pytest.mark.parametrize(
    "kind", ["foreign", "another table", "next schema", "key lost", "text for numbers", "half a step"]
)
def test_load_run_holds_a_table_to_what_a_merge_does(tmp_path: Path, table: str, kind: str):
    folder = make_run(tmp_path / "0", note={"config": {}})
    damage, reason = DAMAGE[kind]
    whole = load_run(folder)
    assert len(whole.table(table)) == {"layers": 6, "runs": 1, "curves": 3}[table]
    damage(folder / runs.FILES[table])
    status = json.loads((folder / runs.STATUS).read_text())
    status["sha256"][runs.FILES[table]] = file_sha256(folder / runs.FILES[table])
    (folder / runs.STATUS).write_text(json.dumps(status))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(folder))}: .*{re.escape(reason)}"):
        load_run(folder).table(table)


@pytest.mark.parametrize("file", [runs.FILES[table] for table in CORE])
def test_a_readable_file_that_the_run_did_not_write_is_skipped(tmp_path: Path, out: Path, file: str):
    """What a table's own checksums cannot see: a valid table put in another's place."""
    make_run(tmp_path / "s" / "good", seed=1)
    bad = make_run(tmp_path / "s" / "bad", seed=2)
    table, note = runs.read_table(bad / file), runs.read_metadata(bad / file)
    runs.write_table(bad / file, table, note | {"edited": True})
    (skip,) = merge([tmp_path / "s"], out).skipped
    assert skip.path == str(bad)
    assert skip.reason.startswith(f"{file} is not the file that the run wrote")


def test_a_run_file_holds_one_run(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "good", seed=1)
    for i, (n, _) in enumerate([(0, "none"), (2, "two")]):
        folder = make_run(tmp_path / "s" / f"bad{i}", seed=2 + i)
        rewrite(folder / "run.parquet", lambda t, n=n: pa.concat_tables([t] * n) if n else t.slice(0, 0))
    assert [skip.reason for skip in merge([tmp_path / "s"], out).skipped] == ["holds 0 runs", "holds 2 runs"]


def flip_in_data(path: Path, column: str) -> bytes:
    """Flip one byte in the column's pages such that a reader that does not verify gets other numbers; the bytes before."""
    good, before = pq.read_table(path), path.read_bytes()
    layout = pq.read_metadata(path)
    group = layout.row_group(0)
    chunk = next(c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    for place in reversed(range(start, start + chunk.total_compressed_size)):
        path.write_bytes(before[:place] + bytes([before[place] ^ 16]) + before[place + 1 :])
        try:
            read = pq.read_table(path)
        except (OSError, pa.ArrowException):
            continue
        if read[column].to_pylist() != good[column].to_pylist():
            return before
    raise AssertionError("no flip in this column goes unnoticed")


@pytest.mark.parametrize(
    ("table", "column"), [("layers", "r_mean"), ("runs", "val_loss_nats"), ("curves", "train_loss_nats")]
)
def test_a_flipped_bit_in_the_data_is_caught_by_its_checksum(tmp_path: Path, out: Path, table: str, column: str):
    make_run(tmp_path / "s" / "good", seed=1)
    path = make_run(tmp_path / "s" / "bad", seed=2) / runs.FILES[table]
    before = flip_in_data(path, column)  # shows that pyarrow alone reads a wrong number
    assert [skip.path for skip in merge([tmp_path / "s"], out).skipped] == [str(path.parent)]
    path.write_bytes(before)
    assert merge([tmp_path / "s"], out).skipped == []


def test_a_merged_file_carries_checksums_too(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)], out)
    flip_in_data(out, "r_mean")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(out)


def test_no_flipped_bit_in_a_merged_footer_goes_unnoticed(tmp_path: Path, out: Path):
    """Every bit about the checksum's key and bits all over each footer: refused, or (in the key) read as it was written."""
    merge([make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)], out)
    for path in companions(out).values():
        whole, good = path.read_bytes(), runs.read_table(path).replace_schema_metadata()
        start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        seal = whole.index(runs.SEAL.encode())
        near = range(8 * (seal - 16), 8 * (seal + len(runs.SEAL) + 16))
        for bit in sorted({*near, *range(8 * start, 8 * len(whole), 5)}):
            altered = whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
            try:
                found = runs.read_table(pa.BufferReader(altered)).replace_schema_metadata()
            except (OSError, pa.ArrowException):
                continue
            assert seal <= bit // 8 < seal + len(runs.SEAL) + 2  # and the type and length of what follows
            assert repr((found.schema, found.to_pylist())) == repr((good.schema, good.to_pylist()))


def test_a_renamed_column_of_a_merge_is_named_wherever_it_is_read(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)], out)
    runs_file = companions(out)["runs"]
    for path, column in ((out, b"radial_share"), (runs_file, b"attn_mode")):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(column, b"q" + column[1:]))
        assert "q" + column[1:].decode() in pq.read_schema(path).names  # pyarrow alone takes it
        for read in (load, runs.read_metadata, lambda _: reader.read(reader.Source(out, merged=True))):
            with pytest.raises((ConfigError, reader.Unfit, pa.ArrowException), match="its footer was altered"):
                read(path)
        path.write_bytes(whole)
    assert len(load(out)) == len(runs.read_table(out))


def test_a_table_from_before_footers_had_a_checksum_is_read(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0", seed=1)], out)
    table = runs.read_table(out)
    meta = {key: value for key, value in table.schema.metadata.items() if key != runs.SEAL.encode()}
    pq.write_table(table.replace_schema_metadata(meta), out)
    assert load(out)["site"].tolist() == table["site"].to_pylist()


def test_a_pipe_is_no_table(tmp_path: Path):
    os.mkfifo(tmp_path / "all.parquet")
    with pytest.raises(ConfigError, match="not a regular file"):
        load(tmp_path / "all.parquet")


def test_no_flipped_byte_ends_in_a_traceback(tmp_path: Path):
    path = make_run(tmp_path / "0", steps=(0,)) / "layers.parquet"
    before = path.read_bytes()
    n_caught = 0
    for i in range(150):
        place = i * len(before) // 150
        path.write_bytes(before[:place] + bytes([before[place] ^ (1 << i % 8)]) + before[place + 1 :])
        try:
            reader.read(reader.Source(path.parent, merged=False))
        except reader.Unfit:
            n_caught += 1
    assert n_caught > 75


def test_a_broken_merged_file_is_skipped_as_one(tmp_path: Path, out: Path):
    run = make_run(tmp_path / "0", seed=1)
    old = tmp_path / "old.parquet"
    merge([make_run(tmp_path / "1", seed=2), make_run(tmp_path / "2", seed=3)], old)
    truncate(companions(old)["curves"])
    report = merge([old, run], out)
    assert (report.found, report.merged) == (2, 1)
    assert report.skipped[0].path == str(old)
    assert "old.curves.parquet cannot be read" in report.skipped[0].reason


def test_files_of_two_merges_are_not_taken_for_one(tmp_path: Path, out: Path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    merge([make_run(tmp_path / "0", seed=1)], one)
    merge([tmp_path / "0", make_run(tmp_path / "1", seed=2)], two)
    companions(one)["runs"].write_bytes(companions(two)["runs"].read_bytes())
    with pytest.raises(ConfigError, match="not of one merge"):
        merge([one], out)


def test_none_mergeable_and_strict_write_nothing(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", status="running")
    failed = make_run(tmp_path / "s" / "1", seed=2)
    runs.RunFolder(failed, {}).status("failed", error="boom")
    with pytest.raises(ConfigError, match=r"none of the runs(?s:.*)0: running\n.*1: failed: boom"):
        merge([tmp_path / "s"], out)
    make_run(tmp_path / "s" / "2", seed=3)
    with pytest.raises(ConfigError, match=r"strict(?s:.*)0: running"):
        merge([tmp_path / "s"], out, strict=True)
    assert not out.parent.exists()
    assert merge([tmp_path / "s" / "2"], out, strict=True).merged == 1


def test_very_many_skips_of_one_kind_are_counted_for_the_reader_and_all_named_in_the_file(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "good")
    for i in range(30):
        (tmp_path / "s" / f"bad{i}").mkdir()
        (tmp_path / "s" / f"bad{i}" / "run.parquet").touch()
    report = merge([tmp_path / "s"], out)
    assert sum("no readable status.json" in line for line in report.lines()) == 21
    assert "skipped and 10 more: no readable status.json" in report.lines()
    assert len(json.loads(out.with_suffix(".merge.json").read_text())["skipped"]) == 30
