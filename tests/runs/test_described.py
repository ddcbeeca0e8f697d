"""Files that describe their columns: later ones, a stranger's tables, and what no reader may be led to by a description."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.folders import make_run, rewrite, rows_of

from lnjac import load_run
from lnjac.columns import KEY, VOLATILE, Column
from lnjac.comparing.experiment import arrange, varying
from lnjac.comparing.tables import MergedTables, open_tables
from lnjac.diagnostics import catalogue
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import schema
from lnjac.runs.diff import diff
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions

SCORE = Column("score", "float64", "points", "a stranger's score of the run")
HOST = Column("host", "string", "", "where it ran", VOLATILE)
SPREAD = Column("spread", "float64", "", "mean over tokens", pool="mean weighted by n_tokens")
SHAPES = (
    Column("run_id", "string", "", "the run", KEY),
    Column("diag_id", "string", "", "the diagnostic", KEY),
    Column("step", "int64", "updates", "when", KEY),
    Column("axis", "string", "", "which axis", KEY),
    Column("width", "float64", "m", "how wide"),
    Column("clock", "float64", "s", "how long it took", VOLATILE),
)


def described(folder: Path, name: str, columns: Sequence[Column], values: dict[str, Any]) -> None:
    """Give a run's table further columns, described, as a later lnjac or a stranger would have written it."""

    def edit(table: pa.Table) -> pa.Table:
        for column in columns:
            more = pa.array([values[column.name]] * len(table), runs.ARROW[column.dtype])
            table = table.append_column(column.name, more)
        return table

    path = folder / runs.file_of(name)
    rewrite(path, edit, columns=runs.read_metadata(path).get("columns", {}) | schema.describe(columns))


def with_shapes(folder: Path, *rows: tuple[str, float], clock: float = 1.0, columns: Any = SHAPES) -> Path:
    """A run with a table that this lnjac does not know."""
    status = runs.read_status(folder)
    ids = {"run_id": status["run_id"], "diag_id": status["diag_id"]}
    out = runs.RunFolder(folder, ids)
    out.written = status["sha256"]
    values = [ids | {"step": 0, "axis": axis, "width": width, "clock": clock} for axis, width in rows]
    out.write("shapes", columns, values, (), {})
    out.status("done")
    out.release()
    return folder


# Frozen


def test_the_columns_of_files_from_before_are_never_edited() -> None:
    text = Path(schema.__file__).with_name("frozen.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "419ddae13c595e16861dfe3a57fcea59a1460f782292fc44b48bd92d8b9fab22"


def test_what_is_declared_agrees_with_what_files_from_before_hold() -> None:
    for table, columns in catalogue.columns().items():
        frozen = schema.FROZEN[table]
        for column in columns:
            if column.name in frozen:
                assert column == frozen[column.name]


def test_a_run_of_ours_describes_nothing_that_was_always_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "0", long={"swaps": [{"place": "all"}]})
    for name in ("layers", "runs", "curves", "swaps"):
        said = runs.read_metadata(folder / runs.file_of(name)).get("columns", {})
        assert not set(said) & set(schema.FROZEN[name])


# Later columns


def test_a_merged_table_describes_all_its_columns(tmp_path: Path, out: Path) -> None:
    folder = make_run(tmp_path / "0")
    described(folder, "runs", [SCORE, HOST], {"score": 1.0, "host": "a"})
    merge([folder], out)
    for name, path in companions(out).items():
        said, columns = runs.read_metadata(path)["columns"], runs.read_table(path).column_names
        config = [] if name == "curves" else ["seed", "attn_mode", "data"]
        assert [*said, *config] == columns
    said = runs.read_metadata(companions(out)["runs"])["columns"]
    assert said["score"] == {"dtype": "float64", "unit": "points", "meaning": SCORE.meaning}
    assert said["host"]["role"] == "volatile"
    layers = runs.read_metadata(out)["columns"]
    assert layers["radial_share"]["pool"] == "sum_B / (sum_B + sum_C)"


def test_a_later_column_is_null_in_earlier_runs_and_merging_in_stages_keeps_its_description(
    tmp_path: Path, out: Path
) -> None:
    early, late = make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)
    described(late, "runs", [SCORE], {"score": 2.5})
    merge([early, late], out)
    np.testing.assert_equal(load(companions(out)["runs"])["score"].tolist(), [np.nan, 2.5])
    first, both = tmp_path / "first.parquet", tmp_path / "both.parquet"
    merge([late], first)
    merge([first, early], both)
    assert rows_of(both) == rows_of(out)
    for name, path in companions(both).items():
        assert runs.read_metadata(path)["columns"] == runs.read_metadata(companions(out)[name])["columns"]


def test_a_value_column_that_is_missing_reads_as_null_beside_runs_that_have_it(tmp_path: Path, out: Path) -> None:
    poor, rich = make_run(tmp_path / "0", seed=1), make_run(tmp_path / "1", seed=2)
    rewrite(poor / "layers.parquet", lambda t: t.drop_columns(["r_mean", "sum_A"]))
    assert "r_mean" not in load_run(make_with_config(poor)).layers
    merge([poor, rich], out)
    assert runs.read_table(out)["r_mean"].to_pylist()[:6] == [None] * 6
    assert runs.read_table(out).column_names[: len(schema.FROZEN["layers"])] == [*schema.FROZEN["layers"]]


def make_with_config(folder: Path) -> Path:
    rewrite(folder / "run.parquet", lambda table: table, config={})
    return folder


@pytest.mark.parametrize(("column", "agree"), [(HOST, True), (SCORE, False)])
def test_a_described_column_may_differ_if_it_is_volatile(
    tmp_path: Path, out: Path, column: Column, agree: bool
) -> None:
    folders = [make_run(tmp_path / name) for name in "ab"]
    for folder, values in zip(folders, ({"score": 1.0, "host": "a"}, {"score": 2.0, "host": "b"}), strict=True):
        described(folder, "runs", [column], values)
    if agree:
        assert merge(folders, out).duplicates["runs"] == 1
        assert load(companions(out)["runs"])["host"].tolist() == ["a"]
    else:
        with pytest.raises(ConfigError, match=r"score is 1\.0 in the one and 2\.0 in the other"):
            merge(folders, out)


def test_a_contradiction_names_described_conditions_too(tmp_path: Path, out: Path) -> None:
    folders = [make_run(tmp_path / name, run={"val_loss_nats": loss}) for name, loss in (("a", 1.0), ("b", 2.0))]
    for folder in folders:
        described(folder, "runs", [HOST], {"host": folder.name})
    with pytest.raises(ConfigError, match=r"the two runs differ in host \(a and b\)"):
        merge(folders, out)


def test_two_descriptions_of_a_column_are_an_error_that_names_both(tmp_path: Path, out: Path) -> None:
    for name, pool in (("a", "sum"), ("b", "minimum")):
        folder = make_run(tmp_path / "s" / name, seed=ord(name))
        described(folder, "layers", [SPREAD._replace(pool=pool)], {"spread": 1.0})
    with pytest.raises(ConfigError, match=r"the pool of spread in layers is 'sum' in .*a but 'minimum' in .*b: merge"):
        merge([tmp_path / "s"], out)


def several_calls(tmp_path: Path, out: Path) -> MergedTables:
    """Runs of two modes, their norms called twice with 1 and 3 tokens, and a column `spread` of 1 and 3."""
    for seed, mode in ((1, "a"), (2, "a"), (1, "b"), (2, "b")):
        folder = make_run(tmp_path / "s" / f"{mode}{seed}", seed=seed, attn_mode=mode, steps=(0,), sites=("x", "ln_f"))

        def twice(table: pa.Table) -> pa.Table:
            frame = pd.concat([table.to_pandas().assign(call=call, n_tokens=n) for call, n in ((0, 1), (1, 3))])
            schema = table.schema.remove_metadata()
            own = frame.assign(spread=frame["n_tokens"].astype(float))
            return pa.Table.from_pandas(own, schema.append(pa.field("spread", pa.float64())), preserve_index=False)

        rewrite(folder / "layers.parquet", twice, columns=schema.describe([SPREAD]))
        described(folder, "runs", [SCORE], {"score": seed + 0.5 * (mode == "a")})
    merge([tmp_path / "s"], out)
    return open_tables(out)


def test_a_described_column_is_pooled_over_calls_and_is_none_of_the_configs(tmp_path: Path, out: Path) -> None:
    found = several_calls(tmp_path, out)
    measured = arrange(found, ["attn_mode"], ["spread"])
    assert measured.cells.shape == (1, 0)  # score does not divide them, as a config column would
    np.testing.assert_allclose(measured.values["value"], (1 * 1 + 3 * 3) / 4)
    frame = found.frame("runs")
    assert varying(frame, found.described("runs")) == ["attn_mode"]
    assert varying(frame) == ["score", "attn_mode"]


# Tables that this lnjac does not know


def test_an_unknown_table_is_merged_by_the_keys_that_it_describes(tmp_path: Path, out: Path) -> None:
    one = with_shapes(make_run(tmp_path / "s" / "0", seed=1), ("x", 1.0), ("y", 2.0))
    with_shapes(make_run(tmp_path / "s" / "1", seed=2), ("x", 3.0))
    make_run(tmp_path / "s" / "2", seed=3)
    report = merge([tmp_path / "s"], out)
    assert report.rows == {"layers": 18, "runs": 3, "curves": 9, "shapes": 3}
    assert companions(out)["shapes"] == out.with_name("all.shapes.parquet")
    frame = load(out.with_name("all.shapes.parquet"))
    assert frame[["run_id", "axis", "width"]].to_numpy().tolist() == [
        ["softmax-1", "x", 1.0],
        ["softmax-1", "y", 2.0],
        ["softmax-2", "x", 3.0],
    ]
    assert load_run(one).table("shapes")["width"].tolist() == [1.0, 2.0]
    first, again = tmp_path / "first.parquet", tmp_path / "again.parquet"
    merge([one], first)
    merge([first, tmp_path / "s"], again)
    assert rows_of(again) == rows_of(out)
    assert not any(diff(again, out))
    assert merge(sorted(tmp_path.glob("first.*parquet")), again).found == 1
    merge([tmp_path / "s" / "2"], out)
    assert not out.with_name("all.shapes.parquet").exists()


def test_an_unknown_table_must_agree_with_itself(tmp_path: Path, out: Path) -> None:
    same = [
        with_shapes(make_run(tmp_path / name), ("x", 1.0), ("y", 2.0), clock=clock)
        for name, clock in (("a", 1.0), ("b", 9.0))
    ]
    assert merge(same, out).duplicates["shapes"] == 2
    other = with_shapes(make_run(tmp_path / "c"), ("x", 1.0), ("y", 5.0))
    with pytest.raises(ConfigError, match=r"the row of shapes with .*axis=y, but width is 2\.0 in the one and 5\.0"):
        merge([same[0], other], out)
    (found,) = [each for each in diff(out, merged(other, tmp_path / "other.parquet")) if each]
    assert (found.table, found.changed["column"].tolist()) == ("shapes", ["width"])


def merged(folder: Path, path: Path) -> Path:
    merge([folder], path)
    return path


def test_an_unknown_table_without_keys_is_skipped_by_name(tmp_path: Path, out: Path) -> None:
    make_run(tmp_path / "s" / "good", seed=1)
    with_shapes(
        make_run(tmp_path / "s" / "bad", seed=2), ("x", 1.0), columns=[c._replace(role="value") for c in SHAPES]
    )
    (skip,) = merge([tmp_path / "s"], out).skipped
    assert "shapes.parquet does not describe the columns that name a row of shapes" in skip.reason


@pytest.mark.parametrize("name", ["run", "curve", "../x", "a.b", "", "a b"])
def test_a_table_cannot_have_anothers_file(tmp_path: Path, name: str) -> None:
    folder = runs.RunFolder(tmp_path, {})
    with pytest.raises(ConfigError, match="a table cannot be called"):
        folder.write(name, SHAPES, [], (), {})


# Hostile descriptions


def test_a_status_that_lists_files_elsewhere_leads_nowhere(tmp_path: Path, out: Path) -> None:
    folder = make_run(tmp_path / "s" / "0")
    status = json.loads((folder / runs.STATUS).read_text())
    status["sha256"] |= {"../x.parquet": "0", "/etc/passwd.parquet": "0", "runs.parquet": "0", "model.safetensors": "0"}
    (folder / runs.STATUS).write_text(json.dumps(status))
    assert list(merge([folder], out).rows) == ["layers", "runs", "curves"]
    status["sha256"] = ["layers.parquet"]
    (folder / runs.STATUS).write_text(json.dumps(status))
    with pytest.raises(ConfigError, match=r"status\.json lists no files"):
        merge([folder], out)


@pytest.mark.parametrize("note", [None, "[1]", "{not json", '{"table": 7}'])
def test_a_strangers_parquet_that_is_named_is_named_as_not_ours(tmp_path: Path, out: Path, note: str | None) -> None:
    foreign = tmp_path / "mine.shapes.parquet"
    pq.write_table(pa.table({"x": [1]}, metadata={"lnjac": note} if note else None), foreign, store_schema=False)
    with pytest.raises(ConfigError, match=r"mine\.shapes\.parquet (was not written by lnjac|does not hold the layers)"):
        merge([foreign], out)


@pytest.mark.parametrize(
    "columns",
    [
        "text",
        ["r_mean"],
        {"r_mean": {"dtype": "string", "role": "key"}},
        {"run_id": {"dtype": "int64"}},
        {"val_loss_nats": {"dtype": "float64", "role": "volatile"}},
        {"mine": "text"},
        {"mine": {"dtype": "decimal"}},
        {"mine": {"dtype": "float64", "role": "owner"}},
        {"mine": {"unit": "", "meaning": ""}},
        {"mine": {"dtype": "float64", "unit": 1, "meaning": None, "pool": "__import__('os').system('x')", "more": 1}},
    ],
)
def test_a_description_that_cannot_be_read_is_none(tmp_path: Path, out: Path, columns: Any) -> None:
    """And one of a column that was always there changes nothing."""
    plain = make_run(tmp_path / "plain")
    merge([plain], tmp_path / "plain.parquet")
    hostile = make_run(tmp_path / "hostile")
    for table in ("layers",) if "r_mean" in columns else ("layers", "runs"):
        rewrite(hostile / runs.file_of(table), lambda t: t, columns=columns)
    merge([hostile], out)
    assert rows_of(out) == rows_of(tmp_path / "plain.parquet")
    other = make_run(tmp_path / "other", run={"val_loss_nats": 9.0})
    with pytest.raises(ConfigError, match="val_loss_nats"):
        merge([hostile, other], out)


def test_a_described_type_is_held_to(tmp_path: Path, out: Path) -> None:
    make_run(tmp_path / "s" / "good", seed=1)
    bad = make_run(tmp_path / "s" / "bad", seed=2)
    described(bad, "runs", [HOST], {"host": "a"})
    rewrite(bad / "run.parquet", lambda t: t, columns=schema.describe([HOST._replace(dtype="int64")]))
    (skip,) = merge([tmp_path / "s"], out).skipped
    assert "has host as string, which is no int64" in skip.reason


# Paths


def test_strings_are_paths(tmp_path: Path) -> None:
    folder, out = str(make_run(tmp_path / "0")), str(tmp_path / "all.parquet")
    assert merge(folder, out).merged == merge([folder], out).merged == 1
    assert len(load(out)) == 6
    assert not any(diff(out, str(tmp_path)))
