"""The columns of merged tables: types, order, config columns, undeclared ones; and none but merged tables are loaded."""

from pathlib import Path

import pyarrow as pa
import pytest
from support.folders import make_run, rewrite, rows_of, with_column

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs.merge import load, merge
from lnjac.runs.merged import companions
from lnjac.runs.schema import FROZEN


def test_every_declared_column_has_its_type_and_place(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1)
    make_run(tmp_path / "s" / "1", seed=2)
    merge([tmp_path / "s"], out)
    for name, path in companions(out).items():
        declared = runs.schema(c for c in FROZEN[name].values() if c.name != "stacked")  # which is no longer written
        found = runs.read_table(path).schema.remove_metadata()
        assert pa.schema(list(found)[: len(declared)]) == declared
        later = ["products"] if name == "runs" else []
        assert found.names[len(declared) :] == later + ([] if name == "curves" else ["seed", "attn_mode", "data"])


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


def test_empty_layers_are_fine(tmp_path: Path, out: Path):
    make_run(tmp_path / "s" / "0", seed=1, steps=())
    make_run(tmp_path / "s" / "1", seed=2, status="diverged", sites=())
    report = merge([tmp_path / "s"], out)
    assert (report.merged, report.rows["layers"]) == (2, 0)
    assert runs.read_table(out).schema.field("r_mean").type == pa.float64()


def test_load_names_a_table_that_is_not_merged(tmp_path: Path):
    folder = make_run(tmp_path / "0")
    with pytest.raises(ConfigError, match="not a merged table"):
        load(folder / "layers.parquet")
    with pytest.raises(ConfigError, match="is missing"):
        load(tmp_path / "nope.parquet")
