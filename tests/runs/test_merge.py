"""Merging: what is found, what is skipped and why, types, duplicates, order, and that nothing is lost unsaid."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.folders import SITES, make_run, rewrite, rows_of, with_column

from lnjac import load_run
from lnjac.columns import Column
from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.files import file_sha256
from lnjac.runs import combine, merged, parallel
from lnjac.runs import folder as runs
from lnjac.runs import read as reader
from lnjac.runs import state as plan
from lnjac.runs.diff import diff
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions
from lnjac.runs.read import search
from lnjac.runs.schema import CORE, FROZEN, SCHEMA_VERSION


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "all.parquet"


# What is found


def test_runs_sweeps_and_merged_files_mix(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "old", seed=1)], tmp_path / "old.parquet")
    make_run(tmp_path / "sweep" / "0", seed=2)
    make_run(tmp_path / "sweep" / "deeper" / "1", seed=3)
    one = make_run(tmp_path / "one", seed=4)
    report = merge([tmp_path / "old.parquet", tmp_path / "sweep", one], out)
    assert (report.found, report.merged, report.skipped) == (4, 4, [])
    assert load(companions(out)["runs"])["seed"].tolist() == [1, 2, 3, 4]
    assert report.rows == {"layers": 4 * 6, "runs": 4, "curves": 4 * 3}
    assert {name: len(load(path)) for name, path in companions(out).items()} == report.rows


def test_hidden_folders_are_not_searched(tmp_path: Path, out: Path):
    make_run(tmp_path / "sweep" / "0")
    make_run(tmp_path / "sweep" / ".hydra" / "1", seed=2)
    assert merge([tmp_path / "sweep"], out).found == 1


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "seed=1,attn_mode=x",
        "größe-√σ-模型",
        "x" * 200 + "/" + "y" * 150,
        "seed=1/attn_mode=relu",
        "a'b\"c#d%20",
    ],
)
def test_any_folder_name_will_do(tmp_path: Path, out: Path, name: str):
    make_run(tmp_path / name / "0", seed=5)
    merge([tmp_path], out)
    frame = load(companions(out)["runs"])
    assert frame["seed"].tolist() == [5]
    assert frame["attn_mode"].tolist() == ["softmax"]  # from the file, not from the path


def test_one_folder_under_two_names_is_read_once(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "sweep" / "0")
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    names = ["sweep", "./sweep/0", "sweep/../sweep", "link", str(tmp_path / "sweep")]
    report = merge([Path(name) for name in names], out)
    assert (report.found, report.merged, report.duplicates["runs"]) == (1, 1, 0)


def test_a_merged_file_counts_only_when_named(tmp_path: Path, out: Path):
    make_run(tmp_path / "sweep" / "0", seed=1)
    inside = tmp_path / "sweep" / "all.parquet"
    merge([make_run(tmp_path / "else", seed=2)], inside)
    assert merge([tmp_path / "sweep"], out).found == 1
    assert merge([tmp_path / "sweep", inside], out).found == 2


def test_a_shell_pattern_that_names_all_files_of_a_merge_names_one(tmp_path: Path, out: Path):
    first = tmp_path / "first.v1.parquet"
    merge([make_run(tmp_path / "0")], first)
    report = merge(sorted(tmp_path.glob("*.parquet")), out)
    assert (report.found, report.merged, report.duplicates["runs"]) == (1, 1, 0)


def test_a_link_to_itself_is_skipped_by_name(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    (tmp_path / "s" / "loop").symlink_to("loop")
    report = merge([tmp_path / "s"], out)
    assert (report.merged, report.found) == (1, 2)
    assert report.skipped == [reader.Skip(str(tmp_path / "s" / "loop"), "too many levels of symbolic links")]
    assert open_tables(tmp_path / "s").warnings == [f"1 runs were found and not merged: {tmp_path / 's' / 'loop'}"]
    with pytest.raises(ConfigError, match=r"strict(?s:.*)loop: too many levels"):
        merge([tmp_path / "s"], out, strict=True)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"no runs in .*\n.*loop: too many levels"):
        merge([tmp_path / "t"], out)


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Take the permission to read a file or folder away, from root too."""
    paths: set[str] = set()

    def guarded(real: Any) -> Any:
        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            if str(path) in paths:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **more)

        return call

    monkeypatch.setattr(os, "scandir", guarded(os.scandir))
    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    return lambda path: paths.add(str(path))


def test_what_may_not_be_read_is_skipped_by_name(tmp_path: Path, out: Path, denied: Callable[[Path], None]):
    make_run(tmp_path / "s" / "0", seed=1)
    secret = make_run(tmp_path / "s" / "secret", seed=2)
    denied(secret / runs.STATUS)
    (tmp_path / "s" / "closed").mkdir()
    denied(tmp_path / "s" / "closed")
    report = merge([tmp_path / "s"], out)
    assert report.merged == 1
    assert [(Path(path).name, reason) for path, reason in report.skipped] == [
        ("closed", "permission denied"),
        ("secret", "status.json: permission denied"),
    ]
    identity = {"run_id": "softmax-2", "diag_id": "d"}
    assert plan.state(secret, identity) == plan.State(plan.BROKEN, "status.json: permission denied")


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_left_where_flock_is_not_offered_is_said_and_not_taken_for_a_living_run(
    tmp_path: Path, monkeypatch: Any
):
    folder = make_run(tmp_path / "0", status="running")
    identity = {"run_id": "softmax-1", "diag_id": "d"}
    held = runs.claimed(folder)
    assert plan.state(folder, identity) == plan.State(runs.RUNNING)
    held.release()
    shutil.copytree(folder, other := tmp_path / "2")  # what a killed process leaves: its lock's file, empty
    assert plan.state(other, identity) == plan.State(runs.INTERRUPTED)
    monkeypatch.setattr(merged.fcntl, "flock", lambda *_: raise_(OSError(errno.ENOSYS, "Function not implemented")))
    found = plan.state(other, identity)
    assert found.name == plan.BROKEN
    assert found.reason.endswith(f"if no run writes there, delete {other / runs.LOCK}")
    with pytest.raises(runs.InUse, match="offers no flock"):
        runs.RunFolder(other, identity)
    (other / runs.LOCK).unlink()
    assert plan.state(other, identity) == plan.State(runs.INTERRUPTED)
    out = runs.RunFolder(other, identity)
    out.release()


def test_a_folder_that_may_hold_runs_is_not_taken_for_its_merged_table(tmp_path: Path, denied: Callable[[Path], None]):
    merge([make_run(tmp_path / "0")], tmp_path / "s" / "all.parquet")
    (tmp_path / "s" / "closed").mkdir()
    denied(tmp_path / "s" / "closed")
    with pytest.raises(ConfigError, match=r"no runs in .*\n.*closed: permission denied"):
        open_tables([tmp_path / "s"])


@pytest.mark.parametrize("name", ["layers.parquet", "run.parquet", "status.json"])
def test_one_file_of_a_run_is_refused_with_the_remedy(tmp_path: Path, out: Path, name: str):
    folder = make_run(tmp_path / "0")
    with pytest.raises(ConfigError, match="name its folder"):
        merge([folder / name], out)


def test_nothing_found_says_what_to_name(tmp_path: Path, out: Path):
    with pytest.raises(ConfigError, match=r"no runs in .*name run folders"):
        merge([tmp_path], out)
    with pytest.raises(ConfigError, match="does not exist"):
        merge([tmp_path / "nope"], out)


# What is skipped


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


def test_one_corpus_read_by_two_names_is_one_run(tmp_path: Path, out: Path):
    make_run(tmp_path / "a")
    twin = make_run(tmp_path / "b")
    for file in ("layers.parquet", "run.parquet"):
        rewrite(twin / file, lambda t: with_column("data", pa.array(["nanogpt"] * len(t)))(t))
    report = merge([tmp_path / "a", tmp_path / "b"], out)
    assert (report.merged, report.duplicates["runs"]) == (1, 1)


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
    """Each bit of each footer: refused, or (in the key of the checksum itself) read as it was written."""
    merge([make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)], out)
    for path in companions(out).values():
        whole, good = path.read_bytes(), runs.read_table(path).replace_schema_metadata()
        start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        seal = whole.index(runs.SEAL.encode())
        for bit in range(8 * start, 8 * len(whole)):
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


def test_empty_layers_are_fine(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1, steps=())
    make_run(tmp_path / "s" / "1", seed=2, status="diverged", sites=())
    report = merge([tmp_path / "s"], out)
    assert (report.merged, report.rows["layers"]) == (2, 0)
    assert runs.read_table(out).schema.field("r_mean").type == pa.float64()


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


# Types and columns


def test_every_declared_column_has_its_type_and_place(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2)
    merge([tmp_path / "s"], out)
    for name, path in companions(out).items():
        declared = runs.schema(c for c in FROZEN[name].values() if c.name != "stacked")  # which is no longer written
        found = runs.read_table(path).schema.remove_metadata()
        assert pa.schema(list(found)[: len(declared)]) == declared
        assert found.names[len(declared) :] == ([] if name == "curves" else ["seed", "attn_mode", "data"])


def test_an_all_null_column_keeps_its_type(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0", config=[(Column("eval.every", "int64", "", ""), None)])], out)
    schema = runs.read_table(companions(out)["runs"]).schema
    assert [schema.field(name).type for name in ("diverged_step", "eval.every")] == [pa.int64(), pa.int64()]
    assert runs.read_table(out).schema.field("block").type == pa.int64()


def test_columns_in_another_order_or_width_are_brought_to_the_schema(tmp_path: Path, out: Path):
    folder = make_run(tmp_path / "0")
    merge([folder], out)
    expected = rows_of(out)
    rewrite(
        folder / "layers.parquet",
        lambda t: t.select(
            [*reversed(t.column_names[: len(FROZEN["layers"])]), *t.column_names[len(FROZEN["layers"]) :]]
        ),
    )
    rewrite(folder / "layers.parquet", lambda t: with_column("step", t["step"].cast(pa.int32()))(t))
    rewrite(folder / "layers.parquet", lambda t: with_column("site", t["site"].cast(pa.large_string()))(t))
    rewrite(folder / "layers.parquet", lambda t: with_column("block", pa.nulls(len(t)))(t))
    rewrite(folder / "layers.parquet", lambda t: with_column("call", t["call"].cast(pa.float64()))(t))
    merge([folder], out)
    assert rows_of(out) == expected


def test_config_columns_are_united_and_typed(tmp_path: Path, out: Path):
    whole, half = Column("model.gain", "int64", "", ""), Column("model.gain", "float64", "", "")
    late = Column("attn_mode.bias", "bool", "", "")
    make_run(tmp_path / "s" / "0", seed=1, config=[(whole, 2)])
    make_run(tmp_path / "s" / "1", seed=2, attn_mode="sigmoid", config=[(half, 0.5), (late, True)])
    make_run(tmp_path / "s" / "2", seed=3)
    report = merge([tmp_path / "s"], out)
    for path in (out, companions(out)["runs"]):
        table = runs.read_table(path)
        assert table.column_names[-5:] == ["seed", "attn_mode", "data", "model.gain", "attn_mode.bias"]
        assert (table["model.gain"].type, table["attn_mode.bias"].type) == (pa.float64(), pa.bool_())
    assert table["model.gain"].to_pylist() == [2.0, 0.5, None]
    assert table["attn_mode.bias"].to_pylist() == [None, True, None]
    partial = "mixed schema: only some sources have model.gain; null in the others"
    assert partial in report.warnings  # attn_mode.bias is one mode's own: that others lack it is no news
    make_run(tmp_path / "s" / "3", seed=4, attn_mode="sigmoid")
    partial = "mixed schema: only some sources have model.gain, attn_mode.bias; null in the others"
    assert partial in merge([tmp_path / "s"], out).warnings  # one and the same mode with it and without


@pytest.mark.parametrize(("one", "other"), [("int64", "string"), ("bool", "int64"), ("string", "float64")])
def test_columns_of_two_kinds_are_an_error_that_names_both(tmp_path: Path, out: Path, one: str, other: str):
    value = {"int64": 1, "string": "x", "bool": True, "float64": 0.5}
    for i, dtype in enumerate((one, other)):
        make_run(tmp_path / "s" / f"run{i}", seed=i, config=[(Column("method.b", dtype, "", ""), value[dtype])])
    arrow = {"float64": "double"}
    with pytest.raises(
        ConfigError,
        match=f"method.b is {arrow.get(one, one)} in .*run0 but {arrow.get(other, other)} in .*run1",
    ):
        merge([tmp_path / "s"], out)
    assert not out.exists()


def test_an_undeclared_column_is_kept(tmp_path: Path, out: Path):
    folder = make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2)
    rewrite(folder / "layers.parquet", lambda t: t.append_column("my_own", pa.array(range(len(t)), pa.int16())))
    rewrite(folder / "curve.parquet", lambda t: t.append_column("all_null", pa.nulls(len(t))))
    merge([tmp_path / "s"], out)
    assert runs.read_table(out)["my_own"].to_pylist() == [0, 1, 2, 3, 4, 5] + [None] * 6
    assert "all_null" in runs.read_table(companions(out)["curves"]).column_names


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
    monkeypatch.setattr(parallel, "FEW", 1)
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
            parts.append(combine.stacked(source, reader.read(source)))
    tables = combine.combine(combine.together(parts), 0).tables
    return {name: (str(table.schema), repr(table.to_pylist())) for name, table in tables.items()}


def test_a_helper_reads_and_one_that_fails_costs_nothing(many: Path, monkeypatch: Any):
    sources = search([many]).sources
    with parallel._helper() as read_there:
        for batch, unfit in zip((sources[:10], sources[10:]), ("03", "21"), strict=True):
            found, skipped = read_there(batch)
            assert found.sources == [source for source in batch if source.path.name != unfit]
            assert [skip.path for skip in skipped] == [str(many / unfit)]
    monkeypatch.setattr(parallel, "FEW", 1)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    for broken in ("/bin/false", "/nowhere"):
        monkeypatch.setattr(sys, "executable", broken)
        assert len(parallel.read_all(sources).found.sources) == 21


def test_a_helper_that_meets_an_error_leaves_it_to_the_caller(tmp_path: Path, out: Path, monkeypatch: Any):
    for i, dtype in enumerate(["int64", "string"] * 10):
        make_run(
            tmp_path / "s" / str(i), seed=i, config=[(Column("method.b", dtype, "", ""), {"int64": 1}.get(dtype, "x"))]
        )
    monkeypatch.setattr(parallel, "FEW", 1)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    with pytest.raises(ConfigError, match=r"method\.b is int64 in .* but string in"):
        merge([tmp_path / "s"], out)


def test_load_names_a_table_that_is_not_merged(tmp_path: Path):
    folder = make_run(tmp_path / "0")
    with pytest.raises(ConfigError, match="not a merged table"):
        load(folder / "layers.parquet")
    with pytest.raises(ConfigError, match="is missing"):
        load(tmp_path / "nope.parquet")


# Duplicates


def test_an_equal_run_is_dropped_and_counted(tmp_path: Path, out: Path):
    late = make_run(tmp_path / "a", run={"started_at": "2024-05-02T00:00:00+00:00", "wall_s": 9.0, "commit": "late"})
    early = make_run(tmp_path / "b", run={"started_at": "2024-05-01T00:00:00+00:00", "wall_s": 1.0, "commit": "early"})
    for sources in ([late, early], [early, late]):
        report = merge(sources, out)
        assert report.duplicates == {"layers": 6, "runs": 1, "curves": 3}
        assert report.found == report.merged + len(report.skipped) + report.duplicates["runs"] == 2
        assert load(companions(out)["runs"])["commit"].tolist() == ["early"]
        assert any(line.startswith("duplicates: 6 rows of layers, 1 rows of runs") for line in report.lines())


def test_runs_begun_in_the_same_second_give_one_result_whatever_the_order(tmp_path: Path, out: Path):
    pair = [make_run(tmp_path / name, run={"device": name}) for name in ("b", "a")]
    for sources in (pair, pair[::-1]):
        merge(sources, out)
        assert load(companions(out)["runs"])["device"].tolist() == ["a"]


def test_another_diagnostic_of_the_same_run_is_no_duplicate_but_its_curve_is(tmp_path: Path, out: Path):
    report = merge([make_run(tmp_path / "a", diag_id="d1"), make_run(tmp_path / "b", diag_id="d2")], out)
    assert report.duplicates == {"layers": 0, "runs": 0, "curves": 3}
    assert (report.merged, report.rows) == (2, {"layers": 12, "runs": 2, "curves": 3})


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        (1.0, 1.0 + 1e-8, True),
        (1.0, 1.0 + 1e-4, False),
        (1e-30, 1.1e-30, False),  # relative, however small
        (math.nan, math.nan, True),
        (None, None, True),
        (None, math.nan, False),
        (math.nan, 1.0, False),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
    ],
)
def test_science_agrees_within_the_tolerance(
    tmp_path: Path, out: Path, one: float | None, other: float | None, agree: bool
):
    folders = [make_run(tmp_path / str(i), layers={"r_radial": value}) for i, value in enumerate((one, other))]
    if agree:
        assert merge(folders, out).duplicates["layers"] == 6
    else:
        with pytest.raises(ConfigError, match="r_radial"):
            merge(folders, out)


def test_a_contradiction_names_sources_key_column_and_both_values(tmp_path: Path, out: Path):
    one = make_run(tmp_path / "one", layers={"r_mean": 0.25, "r_radial": 0.5})
    other = make_run(tmp_path / "other", layers={"r_mean": 0.25, "r_radial": 0.75})
    with pytest.raises(ConfigError) as caught:
        merge([one, other], out)
    text = str(caught.value)
    for part in (
        str(one),
        str(other),
        "run_id=softmax-1, diag_id=d, step=0, site=blocks.0.ln_1, call=0",
        "r_radial is 0.5 ",
        "0.75",
    ):
        assert part in text
    assert "r_mean" not in text
    assert "\n" not in text
    assert not out.exists()
    assert merge([one, other], out, rtol=1.0).duplicates["layers"] == 6


def test_a_contradiction_names_its_size_and_in_what_the_runs_differ(tmp_path: Path, out: Path):
    made = {"threads": 1, "commit": "aaa", "device": "cpu", "torch_version": "2.13", "wall_s": 1.0}
    one = make_run(tmp_path / "one", run=made, layers={"r_mean": 1.0, "r_radial": 1.0})
    other = made | {"threads": 2, "commit": None, "wall_s": 2.0}
    two = make_run(tmp_path / "two", run=other, layers={"r_mean": 1.0 + 2e-6, "r_radial": 1.0 - 3e-6})
    with pytest.raises(ConfigError) as caught:
        merge([one, two], out)
    said = str(caught.value)
    values = "r_radial is 1.0 in the one and 0.999997 in the other"
    assert (
        f"{values}, a relative difference of 3e-06 where rtol allows 1e-06 (11 more values differ, none by more)"
        in said
    )
    apart = "the two runs differ in commit (aaa and None), threads (1 and 2)"
    assert said.endswith(f"{apart}: drop one of them, or raise rtol")
    same = make_run(tmp_path / "same", run=made, layers={"r_mean": 1.5, "r_radial": 1.0})
    with pytest.raises(
        ConfigError, match=r"difference of 0\.33 .*agree in .*commit, .*torch_version, .*device, threads"
    ):
        merge([one, same], out)
    fewer = make_run(tmp_path / "fewer", run=other, layers={"r_mean": 1.0, "r_radial": 1.0}, steps=(0,))
    with pytest.raises(ConfigError, match=f"not the same rows of layers; {re.escape(apart)}"):
        merge([one, fewer], out)
    text = make_run(tmp_path / "text", run=made, layers={"r_mean": 1.0, "r_radial": 1.0, "norm": "rmsnorm"})
    with pytest.raises(ConfigError, match=r"norm is .* and rmsnorm in the other") as caught:
        merge([one, text], out)
    assert "relative" not in str(caught.value)
    assert "rtol" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("run", {"val_loss_nats": 3.0}),
        ("run", {"steps_done": 99}),
        ("run", {"data_sha256": "other"}),
        ("curves", {"lr": 3.0}),
        ("layers", {"norm": "rmsnorm"}),
        ("layers", {"n_zero": 1}),
    ],
)
def test_any_science_column_of_any_table_can_contradict(tmp_path: Path, out: Path, table: str, change: dict[str, Any]):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **{table: change})]
    with pytest.raises(ConfigError, match=next(iter(change))):
        merge(folders, out)


def test_what_may_differ_may_differ(tmp_path: Path, out: Path):
    free = {
        "train_s": 1.0,
        "tokens_per_s": 1.0,
        "device": "x",
        "threads": 1,
        "dirty": True,
        "commit": None,
        "torch_version": "0",
    }
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", run=free, layers={"jacobian_residual": 1e-3}),
    ]
    assert merge(folders, out).duplicates["runs"] == 1


@pytest.mark.parametrize("year", [2023, 2025])  # the part began before or after the whole: is kept or is dropped
@pytest.mark.parametrize("fewer", [{"steps": (100,)}, {"sites": SITES[:2]}, {"steps": ()}, {"steps": (0, 50)}])
def test_the_same_run_with_other_rows_is_a_contradiction(tmp_path: Path, out: Path, fewer: dict[str, Any], year: int):
    whole = make_run(tmp_path / "whole")
    part = make_run(tmp_path / "part", run={"started_at": f"{year}-01-01T00:00:00+00:00"}, **fewer)
    with pytest.raises(ConfigError, match="not the same rows of layers") as caught:
        merge([whole, part], out)
    assert str(whole) in str(caught.value)
    assert str(part) in str(caught.value)


def test_a_row_twice_in_one_file_is_counted(tmp_path: Path, out: Path):
    folder = make_run(tmp_path / "0")
    rewrite(folder / "curve.parquet", lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    assert merge([folder], out).duplicates == {"layers": 0, "runs": 0, "curves": 1}


# Order


def test_rows_come_by_start_of_run_then_step_then_as_in_the_run(tmp_path: Path, out: Path):
    for seed in (3, 1, 2):
        make_run(tmp_path / "s" / f"{9 - seed}", seed=seed, steps=(100, 0), sites=("z", "a", "m"))
    merge([tmp_path / "s"], out)
    frame = load(out)
    assert frame["seed"].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert frame["step"].tolist() == [0, 0, 0, 100, 100, 100] * 3
    assert frame["site"].tolist() == ["z", "a", "m"] * 6
    assert load(companions(out)["curves"])["step"].tolist() == [0, 50, 100] * 3


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs with duplicates (also begun in one second), two diagnostics, other columns and types, and no layers."""
    root = tmp_path_factory.mktemp("pool")
    gain = [(Column("method.gain", dtype, "", ""), 1) for dtype in ("int64", "float64")]
    return [
        make_run(root / "a", seed=1),
        make_run(root / "b", seed=1, run={"device": "other"}),
        make_run(root / "c", seed=1, run={"started_at": "2023-01-01T00:00:00+00:00"}),
        make_run(root / "d", seed=1, diag_id="d2", run={"started_at": "2022-01-01T00:00:00+00:00"}),
        make_run(root / "e", seed=2, config=gain[:1]),
        make_run(root / "f", seed=3, config=gain[1:]),
        make_run(root / "g", seed=4, status="diverged", steps=(), run={"started_at": None}),
        make_run(root / "h", seed=5, layers={"r_mean": math.nan}),
    ]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.slow
def test_merging_in_stages_gives_the_same_rows(pool: list[Path], tmp_path: Path, data: st.DataObject):
    order = data.draw(st.permutations(pool))
    cut, end = sorted(data.draw(st.sets(st.integers(1, len(pool)), min_size=2, max_size=2)))
    ab, abc, at_once, again, other = (
        tmp_path / f"{name}.parquet" for name in ("ab", "abc", "at_once", "again", "other")
    )
    merge(order[:cut], ab)
    merge([ab, *order[cut:end]], abc)
    merge(order[:end], at_once)
    assert rows_of(abc) == rows_of(at_once)
    merge([abc, at_once, ab], again)
    assert rows_of(again) == rows_of(at_once)
    merge(order[:end][::-1], other)  # another order of sources changes at most the order of config columns
    for name, path in companions(other).items():
        pd.testing.assert_frame_equal(load(path), load(companions(at_once)[name]), check_like=True)


# What is said


def test_the_report_is_written_beside_the_output(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2, status="running")
    report = merge([tmp_path / "s"], out)
    written = json.loads(out.with_suffix(".merge.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["skipped"] == [{"path": str(tmp_path / "s" / "1"), "reason": "running"}]
    assert (written["found"], written["merged"], written["rows"]["runs"]) == (2, 1, 1)


def test_the_files_say_what_they_are(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0")], out)
    for name, path in companions(out).items():
        note = runs.read_metadata(path)
        assert (note["table"], note["merged"], note["schema_version"]) == (name, True, SCHEMA_VERSION)
        assert note["rows"] == {"layers": 6, "runs": 1, "curves": 3}


def warnings_of(out: Path, *folders: Path) -> str:
    return "\n".join(merge(folders, out).warnings)


def test_a_clean_merge_warns_of_nothing(tmp_path: Path, out: Path):
    assert warnings_of(out, make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)) == ""


def test_warnings_are_said(tmp_path: Path, out: Path):
    one = make_run(
        tmp_path / "0",
        seed=1,
        run={"commit": "aaa", "dirty": True, "data_sha256": "s1", "numerics_version": 1},
    )
    two = make_run(
        tmp_path / "1",
        seed=2,
        run={"commit": None, "dirty": None, "data_sha256": "s2", "numerics_version": 2},
    )
    text = warnings_of(out, one, two)
    assert "mixed commits: None (1 runs), aaa (1 runs)" in text
    assert "1 runs were made by code with uncommitted changes" in text
    assert "data=play is not one corpus, its data_sha256 are s1, s2" in text
    assert "mixed numerics versions: 1 (1 runs), 2 (1 runs)" in text


def test_missing_seeds_are_named(tmp_path: Path, out: Path):
    slope = Column("attn_mode.slope", "float64", "", "")
    for mode, value, seeds in (("softmax", None, (1, 3)), ("relu", 0.5, (1, 2, 3)), ("relu", 1.0, (2,))):
        for seed in seeds:
            make_run(
                tmp_path / "s" / f"{mode}{value}{seed}",
                seed=seed,
                attn_mode=mode,
                config=[(slope, value)],
                run_id=f"{mode}{value}{seed}",
            )
    found = [text for text in merge([tmp_path / "s"], out).warnings if "missing seeds" in text]
    assert found == [
        "missing seeds: attn_mode=relu attn_mode.slope=1.0 lacks 1, 3",
        "missing seeds: attn_mode=softmax attn_mode.slope=null lacks 2",
    ]


def test_progress_is_called_as_sources_have_been_read(tmp_path: Path, out: Path):
    for i in range(12):
        make_run(tmp_path / "s" / str(i), seed=i)
    calls: list[tuple[int, int]] = []
    merge([tmp_path / "s"], out, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(10, 12), (12, 12)]


# What is written


@pytest.mark.parametrize(
    "name",
    [
        "all",
        "all.csv",
        "all.parquet.gz",
        "layers.parquet",
        "run.parquet",
        "all.runs.parquet",
        "all.curves.parquet",
    ],
)
def test_an_output_name_that_cannot_be_meant_is_refused(tmp_path: Path, name: str):
    make_run(tmp_path / "s" / "0")
    with pytest.raises(ConfigError, match="the output"):
        merge([tmp_path / "s"], tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path, out: Path):
    out.mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder"):
        merge([make_run(tmp_path / "0")], out)


def test_the_output_may_be_among_the_sources(tmp_path: Path, out: Path):
    merge([make_run(tmp_path / "0", seed=1)], out)
    assert merge([out, make_run(tmp_path / "1", seed=2)], out).merged == 2
    assert load(companions(out)["runs"])["seed"].tolist() == [1, 2]


def test_a_failing_write_leaves_the_earlier_output_whole(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    merge([make_run(tmp_path / "0", seed=1)], out)
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    real = runs.write_table

    def full(path: Path, data: pa.Table, metadata: Mapping[str, Any]) -> None:
        if metadata["table"] == "curves":
            raise OSError("no space left on device")
        real(path, data, metadata)

    monkeypatch.setattr(runs, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        merge([tmp_path / "0", make_run(tmp_path / "1", seed=2)], out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A run with a table in long form, and one without."""
    swaps = [{"place": "all", "surrogate": "ste", "radial": 0.0, "part": "all"}]
    return make_run(tmp_path / "0", seed=1, long={"swaps": swaps}), make_run(tmp_path / "1", seed=2)


class Killed(BaseException):
    """The process's end, as far as the code can tell."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process be killed before its `step`-th change of the output's folder: nothing that follows is done."""
    n = 0

    def dying(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal n
            n += 1
            if n > step:
                raise Killed
            return real(*arguments, **more)

        return call

    for owner, name in ((Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


LOOKS: dict[str, Callable[[Path], Any]] = {
    "merge": lambda out: merge([out], out),
    "load": lambda out: load(companions(out)["runs"]),
    "read": lambda out: open_tables([out]),
    "diff": lambda out: diff(out, out),
}


@pytest.mark.parametrize(("look", "rich_first"), [("merge", True), ("load", False), ("read", True), ("diff", False)])
@pytest.mark.slow
def test_a_merge_is_one_step_whenever_it_is_killed(
    two: tuple[Path, Path], tmp_path: Path, out: Path, look: str, rich_first: bool, monkeypatch: pytest.MonkeyPatch
):
    """Before the step the old merge is there, and after it the new one, whoever looks at it first."""
    before, after = two if rich_first else two[::-1]
    merge([after], tmp_path / "new" / "all.parquet")
    merge([before], tmp_path / "old" / "all.parquet")
    new, old = (rows_of(tmp_path / name / "all.parquet") for name in ("new", "old"))
    seen, n_steps = [], 0
    while True:
        shutil.rmtree(out.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out.parent)
        with monkeypatch.context() as patched:
            killed_at(n_steps, patched)
            try:
                merge([after], out)
                break
            except Killed:
                pass
        LOOKS[look](out)
        seen.append(rows_of(out))
        assert seen[-1] in (old, new)
        n_steps += 1
    assert seen[0] == old
    assert seen[-1] == new
    assert n_steps >= 6  # so many moves there are
    merge([after], out)
    assert {path.name for path in out.parent.iterdir()} == {path.name for path in companions(out).values()} | {
        "all.merge.json"
    }


def test_what_killed_merges_left_is_removed_but_not_what_one_is_writing(tmp_path: Path, out: Path):
    left = out.parent / ".merge-abc"
    left.mkdir(parents=True)
    (left / "all.parquet").touch()
    run = make_run(tmp_path / "0")
    merge([run], out)
    assert not left.exists()
    code = "import sys; from lnjac.runs.merge import *; merge([Path(sys.argv[1])], Path(sys.argv[2]))"
    with merged.replacing(out) as layers:
        other = subprocess.Popen([sys.executable, "-c", f"from pathlib import Path; {code}", run, out])
        with pytest.raises(subprocess.TimeoutExpired):  # it waits
            other.wait(3)
        assert layers.parent.is_dir()
        for path in out.parent.glob("all.*"):
            shutil.copy(path, layers.parent)
    assert other.wait(60) == 0


def test_without_a_lock_for_folders_a_merge_is_made_and_leaves_what_it_cannot_judge(
    two: Any, out: Path, monkeypatch: Any
):
    monkeypatch.setattr(merged.fcntl, "flock", lambda *_: raise_(OSError(errno.ENOSYS, "no flock here")))
    (out.parent / ".merge-abc").mkdir(parents=True)
    merge([two[0]], out)
    merge([two[1]], out)
    assert load(companions(out)["runs"])["seed"].tolist() == [2]
    assert (out.parent / ".merge-abc").exists()


def raise_(error: BaseException) -> Any:
    raise error


def test_the_same_merge_gives_the_same_bytes_and_readable_files(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2)
    merge([tmp_path / "s"], out)
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    merge([tmp_path / "s"], out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.parent.iterdir()} == {0o666 & ~umask}
