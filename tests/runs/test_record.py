"""A run from anybody's loop: its folder, identity, columns, tables and status; merged and compared as ours are."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lnjac
from lnjac.columns import Column
from lnjac.comparing.experiment import factors, norm_rows
from lnjac.comparing.tables import open_tables
from lnjac.errors import ConfigError
from lnjac.norms import formulas
from lnjac.runs import folder as runs
from lnjac.runs.handed import Handed, hand
from lnjac.runs.identity import identify
from lnjac.runs.record import Record

CONFIG = {"lr": 0.1, "model": {"width": 8, "norms": ["a", "b"], "tied": False}, "note": None}
MINE = [Column("place", "string", "", "where"), Column("value", "float64", "", "how much")]


def record(folder: Path, **more: Any) -> Record:
    return lnjac.record(str(folder), **{"config": CONFIG, "seed": 1, **more})


class Plain(nn.Module):
    """Two torch norms, and nothing of lnjac."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = getattr(F, activation)
        self.fc, self.ln, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.rms = nn.RMSNorm(4, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.ln(self.activation(self.fc(self.rms(x)))))
        return out


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    x, y = batch
    return F.cross_entropy(model(x), y), len(y)


def train(folder: Path, activation: str, seed: int) -> None:
    """A small loop of its own, which measures every second step by the pass that it makes anyway."""
    torch.manual_seed(seed)
    model = Plain(activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = lnjac.probe(model)
    with lnjac.record(folder, config={"activation": activation, "model": {"width": 8}}, seed=seed) as run:
        for step in range(1, 5):
            batch = torch.randn(16, 4), torch.randint(3, (16,))
            optimizer.zero_grad()
            with probe.watch(step) as seen:
                mean, tokens = loss(model, batch)
                seen.tokens(tokens, mean)
                mean.backward()
            if step % 2 == 0:
                run.layers(probe.rows(step), step)
            optimizer.step()
            run.scalars(step, train_loss=mean.detach())
        run.scalars(4, val_loss=loss(model, batch)[0].item())
        run.describe(n_params=sum(p.numel() for p in model.parameters()))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for activation in ("relu", "tanh"):
        for seed in (1, 2, 3):
            train(folder / "runs" / f"{activation}{seed}", activation, seed)
    report = lnjac.merge([str(folder / "runs")], str(folder / "all.parquet"))
    assert (report.merged, report.skipped, report.rows) == (
        6,
        [],
        {"layers": 24, "runs": 6, "curves": 24, "configs": 6},
    )
    return folder / "all.parquet"


def test_runs_of_a_plain_loop_make_a_report(merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("altair", reason="needs the extra [report]")
    made = lnjac.report(str(merged), output=str(tmp_path / "new" / "page.html"), by="activation")
    html = (tmp_path / "new" / "page.html").read_text()
    assert html == made.html
    assert ">6 runs</a>" in html
    assert "<dt>activation" in html


def test_runs_of_a_plain_loop_merge_and_compare(merged: Path) -> None:
    layers = lnjac.load(merged)
    assert layers.groupby("activation")["seed"].unique().map(sorted).to_dict() == {"relu": [1, 2, 3], "tanh": [1, 2, 3]}
    assert set(layers["model.width"]) == {8}
    whole = lnjac.load(merged.with_name("all.runs.parquet"))
    assert whole["train_loss_nats"].notna().all()
    assert whole["val_loss_nats"].notna().all()
    assert set(whole["steps_done"]) == {4}
    found = lnjac.compare(merged, "activation", metrics=["radial_share"])
    rows = pd.DataFrame(found.rows)
    assert set(rows["site"]) == {"ln", "rms"}
    last = layers[layers["step"] == 4].pivot_table(index=["site", "seed"], columns="activation", values="radial_share")
    for site, difference in (last["relu"] - last["tanh"]).groupby("site").mean().items():
        assert abs(rows.set_index("site").loc[site, "difference"]) == pytest.approx(abs(difference))
    assert set(rows["n"]) == {3}


def test_the_passes_of_one_step_are_what_measure_finds_of_their_mean_loss() -> None:
    torch.manual_seed(0)
    model, batches = Plain("tanh"), [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (5, 9)]
    table = lnjac.probe(model).measure(batches, loss)
    probe = lnjac.probe(model)
    for batch in batches:
        model.zero_grad()
        with probe.watch(7) as seen:
            mean, tokens = loss(model, batch)
            seen.tokens(tokens, mean)
            (mean * tokens / 14).backward()
    residuals = ["jacobian_residual", "forward_residual"]
    pd.testing.assert_frame_equal(probe.rows(7).drop(columns=residuals), table.drop(columns=residuals), rtol=1e-5)


def test_config_and_seed_are_columns_and_identity(tmp_path: Path) -> None:
    with record(tmp_path / "a") as run:
        pass
    row = runs.read_table(tmp_path / "a" / "run.parquet").to_pylist()[0]
    given = {"seed": 1, "lr": 0.1, "model.width": 8, "model.norms": "a+b", "model.tied": False, "note": None}
    assert {name: row[name] for name in given} == given
    assert row["run_id"] == run.identity["run_id"] == runs.read_status(tmp_path / "a")["run_id"]
    assert runs.read_metadata(tmp_path / "a" / "run.parquet")["config"] == {"seed": 1, **CONFIG}
    turned = dict(reversed(CONFIG.items()))
    assert (
        record(tmp_path, config=turned).identity
        == record(tmp_path, config={"seed": 1, **CONFIG}).identity
        == run.identity
    )
    others = ({"seed": 2}, {"config": CONFIG | {"lr": 0.2}})
    assert len({record(tmp_path, **other).identity["run_id"] for other in others} | {run.identity["run_id"]}) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"config": {"site": "x"}}, "the config has site, as another column"),
        ({"config": {"seed": 2}}, "seed=1, but config has seed=2"),
        ({"tables": {"run": MINE}}, "'run' cannot be a table's name"),
        ({"tables": {"../x": MINE}}, "cannot be a table's name"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_any_work(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        record(tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_execution_keys_are_kept_in_the_note_alone(tmp_path: Path) -> None:
    config = {"lr": 0.1, "device": "cpu", "paths": {"data": "/data", "out": Path("/out")}}
    with lnjac.record(tmp_path / "a", config=config, seed=1, execution=("device", "paths")):
        pass
    (row,) = runs.read_table(tmp_path / "a" / "run.parquet").to_pylist()
    assert "paths.data" not in row
    assert "device" in row  # lnjac's own column
    note = runs.read_metadata(tmp_path / "a" / "run.parquet")
    assert note["config"] == {"seed": 1, "lr": 0.1}
    assert note["execution"] == {"device": "cpu", "paths": {"data": "/data", "out": "/out"}}
    with lnjac.record(tmp_path / "a", config={"lr": 0.1}, seed=1) as run:
        assert run.found == "done"


# What a sweep hands over


@pytest.fixture
def handed(tmp_path: Path) -> Iterator[Handed]:
    given = Handed(tmp_path / "handed", {"lr": 0.1, "seed": 3, "root": "/data"}, ("root",))
    hand(given)
    yield given
    hand(None)


def test_without_arguments_a_run_is_the_handed_one(handed: Handed) -> None:
    with lnjac.record() as run:
        run.scalars(1, train_loss=0.5)
    (row,) = runs.read_table(handed.folder / "run.parquet").to_pylist()
    assert (row["lr"], row["seed"]) == (0.1, 3)
    assert row["run_id"] == identify(handed.config, execution=handed.execution).identity["run_id"]
    assert lnjac.record(config=handed.config).identity == run.identity


def test_a_given_argument_wins_but_the_handed_folder_is_the_handed_configs(handed: Handed, tmp_path: Path) -> None:
    mine = lnjac.record(tmp_path / "mine", config={"lr": 0.2}, seed=1, execution=())
    assert (mine.path, mine.metadata["config"]) == (tmp_path / "mine", {"lr": 0.2, "seed": 1})
    for other in ({"config": {"lr": 0.2, "seed": 3, "root": "/data"}}, {"seed": 3, "execution": ("root", "lr")}):
        with pytest.raises(
            ConfigError, match=r"another config, seed or execution .*: leave them out, or give a folder"
        ):
            lnjac.record(**other)


@pytest.mark.parametrize(
    ("given", "missing"),
    [({}, "no folder and no config"), ({"config": CONFIG, "seed": 1}, "no folder"), ({"folder": "a"}, "no config")],
)
def test_without_a_sweep_folder_and_config_are_needed(given: dict[str, Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"was given {missing}, .* give record\(folder, config=…\)"):
        lnjac.record(**given)


def test_the_status_is_how_the_context_ended(tmp_path: Path) -> None:
    with record(tmp_path / "done") as run:
        run.scalars(1, train_loss=0.5)
        assert runs.read_status(run.path)["status"] == "running"
    with record(tmp_path / "diverged", seed=2) as run:
        run.scalars(1, train_loss=0.5)
        run.diverged(1)
    for error in (RuntimeError("no memory"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)), record(tmp_path / type(error).__name__):
            raise error
    found = {path.name: runs.read_status(path) for path in tmp_path.iterdir()}
    assert {name: status["status"] for name, status in found.items()} == {
        "done": "done",
        "diverged": "diverged",
        "RuntimeError": "failed",
        "KeyboardInterrupt": "interrupted",
        "SystemExit": "interrupted",
    }
    assert found["diverged"]["step"] == 1
    assert found["RuntimeError"]["error"] == "RuntimeError: no memory"
    assert "raise error" in found["RuntimeError"]["traceback"]
    assert not (tmp_path / "RuntimeError" / "run.parquet").exists()
    report = lnjac.merge([tmp_path], tmp_path / "all.parquet")
    assert (report.merged, len(report.skipped)) == (2, 3)


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    with record(tmp_path / "a") as run:
        run.scalars(1, train_loss=0.5)
    before = (tmp_path / "a" / "curve.parquet").read_bytes()
    with record(tmp_path / "a") as run:
        assert run.found == "done"
    with pytest.raises(ConfigError, match=r"holds this run already \(done\)"), record(tmp_path / "a") as run:
        run.scalars(1, train_loss=0.6)
    assert runs.read_status(tmp_path / "a")["status"] == "done"
    assert (tmp_path / "a" / "curve.parquet").read_bytes() == before
    with pytest.raises(ConfigError, match="holds another run"), record(tmp_path / "a", seed=2):
        pass
    with record(tmp_path / "b"), pytest.raises(ConfigError, match="being written"), record(tmp_path / "b"):
        pass


def test_points_of_one_step_are_one_row(tmp_path: Path) -> None:
    with record(tmp_path / "a") as run:
        run.scalars(0, val_loss=2.0)
        run.scalars(1, train_loss=1.5, lr=0.1)
        run.scalars(1, val_loss=1.4)
    rows = runs.read_table(tmp_path / "a" / "curve.parquet").to_pylist()
    assert [tuple(row.values())[1:] for row in rows] == [(0, None, 2.0, None), (1, 1.5, 1.4, 0.1)]


def test_timed_parts_are_columns(tmp_path: Path) -> None:
    with record(tmp_path / "a") as run:
        for _ in range(2):
            with run.timing("eval_s"):
                pass
    (row,) = runs.read_table(tmp_path / "a" / "run.parquet").to_pylist()
    assert 0 < row["eval_s"] < row["wall_s"]
    assert row["train_s"] is None


def test_rows_are_frames_or_dicts_and_missing_is_null(tmp_path: Path) -> None:
    frame = pd.DataFrame({"place": ["a", None], "value": [math.nan, 1.0]})
    dicts = [{"place": "a", "value": math.nan}, {"place": None, "value": 1.0}]
    for name, rows in {"frame": frame, "dicts": dicts}.items():
        with record(tmp_path / name, tables={"mine": MINE}) as run:
            run.rows("mine", rows, step=3)
            run.rows("mine", rows[:0], step=4)
    one, other = (runs.read_table(tmp_path / name / "mine.parquet") for name in ("frame", "dicts"))
    assert one.column_names == ["run_id", "diag_id", "step", "place", "value"]
    assert repr(one.to_pylist()) == repr(other.to_pylist())
    assert one["value"].null_count == 0
    assert one["place"].null_count == 1
    assert one["step"].to_pylist() == [3, 3]


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    row = {column.name: None for column in formulas.columns()}
    with record(tmp_path / "a", tables={"mine": MINE}) as run:
        run.layers([row], 0)
        with pytest.raises(ConfigError, match=r"rows of layers .* differ in r_mean"):
            run.layers([{name: value for name, value in row.items() if name != "r_mean"}], 0)
        with pytest.raises(ConfigError, match=r"rows of mine .* differ in more"):
            run.rows("mine", [{"place": "a", "value": 1.0, "more": 2}], 0)
        with pytest.raises(ConfigError, match=r"yours is not a declared table: give .* tables="):
            run.rows("yours", [], 0)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["status"] == "done"


# Columns of one's own


GAP = Column("gap", "float64", "nats/token", "how far from the best", pool="mean weighted by n_tokens")
ROW = {column.name: None for column in formulas.columns()} | {"site": "ln", "call": 0, "n_tokens": 1}


def test_columns_of_ones_own_are_described_and_others_never_pooled(tmp_path: Path) -> None:
    for seed in (1, 2):
        own = {"layers": [GAP], "curves": [GAP._replace(pool="")], "runs": [Column("top1", "float64", "", "accuracy")]}
        with record(tmp_path / "runs" / str(seed), seed=seed, tables=own) as run:
            calls = [ROW | {"n_tokens": n, "gap": n, "hits": n} for n in (1, 3)]
            run.layers(pd.DataFrame([row | {"call": call} for call, row in enumerate(calls)]), 1)
            run.layers([ROW | {"gap": np.float32(0.5)}], 2)
            run.scalars(1, train_loss=torch.tensor(0.5), gap=1, grad_norm=np.float64(2.0))
            run.scalars(2, train_loss=0.4)
            run.describe(top1=0.75, notes="mine")
    folder = tmp_path / "runs" / "1"
    said = runs.read_metadata(folder / "layers.parquet")["columns"]
    assert said["gap"] == {
        "dtype": "float64", "unit": "nats/token", "meaning": "how far from the best", "pool": "mean weighted by n_tokens"
    }  # fmt: skip
    assert said["hits"] == {"dtype": "int64"}
    rows = runs.read_table(folder / "layers.parquet").to_pylist()
    assert [(row["gap"], row["hits"]) for row in rows] == [(1.0, 1), (3.0, 3), (0.5, None)]
    curve = runs.read_table(folder / "curve.parquet").to_pylist()
    assert [(row["gap"], row["grad_norm"]) for row in curve] == [(1.0, 2.0), (None, None)]
    (row,) = runs.read_table(folder / "run.parquet").to_pylist()
    assert (row["top1"], row["notes"]) == (0.75, "mine")
    lnjac.merge(tmp_path / "runs", tmp_path / "all.parquet")
    tables = open_tables(tmp_path / "all.parquet")
    every = tables.frame("runs")
    assert {"top1", "notes"}.isdisjoint(factors(every, tables.described("runs")))
    found = norm_rows(tables, every, ["gap", "hits"], each_step=True)
    at = found[found["step"] == 1].iloc[0]
    assert at["gap"] == (1 * 1 + 3 * 3) / 4
    assert math.isnan(at["hits"])


def test_undeclared_columns_have_the_type_of_their_values(tmp_path: Path) -> None:
    with record(tmp_path) as run:
        run.layers([ROW | {"a": None, "b": 1, "c": "x", "d2": True}], 1)
        run.layers([ROW | {"a": None, "b": 0.5}], 2)
        for wrong in ({"c": 1}, {"b": "x"}, {"d2": 0.5}, {"c": [1]}, {"c": torch.ones(2)}):
            with pytest.raises(
                ConfigError, match=r"=.* in a row of layers is no (string|float64|bool): give one, or None"
            ):
                run.layers([ROW | wrong], 3)
        with pytest.raises(
            ConfigError, match=r"rows of layers .* differ in lr: .* rename what is called as a key of the"
        ):
            run.layers([ROW | {"lr": 1.0}], 3)
        with pytest.raises(ConfigError, match=r"rows of runs .* differ in lr"):
            run.describe(lr=1.0)
        with pytest.raises(ConfigError, match="train_loss_nats='low' in a row of curves is no float64"):
            run.scalars(1, train_loss="low")  # type: ignore[arg-type]
    table = runs.read_table(tmp_path / "layers.parquet")
    assert table.select(["b", "c", "d2"]).to_pylist() == [
        {"b": 1.0, "c": "x", "d2": True},
        {"b": 0.5, "c": None, "d2": None},
    ]
    assert "a" not in table.column_names


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"layers": [GAP._replace(name="lr")]}, "column lr of layers is called as another column is: rename it"),
        ({"layers": [GAP, GAP]}, "column gap of layers is called as another"),
        ({"layers": [GAP._replace(name="r_mean")]}, "column r_mean of layers is called as another"),
        ({"curves": [GAP._replace(name="lr", pool="")]}, "column lr of curves is called as another"),
        ({"mine": [GAP._replace(name="step", pool="")]}, "column step of mine is called as another"),
        ({"layers": [GAP._replace(dtype="float")]}, "has the type 'float': choose one of int64, float64, string, bool"),
        ({"layers": [GAP._replace(role="key")]}, "has the role 'key': choose value, or volatile"),
        ({"layers": [GAP._replace(pool="average")]}, "is pooled by average, which layers does not have"),
        ({"layers": [GAP._replace(pool="sum of all")]}, "has a pooling that cannot be understood: 'sum of all' is no"),
        ({"mine": [GAP]}, "is pooled by n_tokens, which mine does not have"),
    ],
)
def test_columns_that_cannot_be_are_refused_at_once(tables: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        record(tmp_path / "a", tables=tables)
    assert not (tmp_path / "a").exists()


# The end


def test_a_loss_that_stays_non_finite_is_a_divergence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, losses in {"late": [1, math.nan, 0.5, math.inf, math.nan], "back": [1, math.nan, 0.5]}.items():
        with record(tmp_path / name, config={"name": name}) as run:
            for step, loss in enumerate(losses, 1):
                run.scalars(step, train_loss=loss)
    assert [runs.read_status(tmp_path / name)["status"] for name in ("late", "back")] == ["diverged", "done"]
    assert runs.read_status(tmp_path / "late")["step"] == 4
    assert "the loss is not finite from step 4 on" in caplog.text
    (row,) = runs.read_table(tmp_path / "late" / "run.parquet").to_pylist()
    assert (row["diverged_step"], row["train_loss_nats"]) == (4, 0.75)


def test_a_step_is_any_whole_number(tmp_path: Path) -> None:
    with record(tmp_path) as run:
        for step in (1, np.int64(2), torch.tensor(3)):
            run.scalars(step, train_loss=0.5)  # type: ignore[arg-type]
            run.layers([ROW], step)  # type: ignore[arg-type]
        for wrong in (1.5, None, True, "4"):
            with pytest.raises(ConfigError, match=r"step=.* is no whole number: give the number of updates done"):
                run.scalars(wrong, train_loss=0.5)  # type: ignore[arg-type]
    assert runs.read_table(tmp_path / "curve.parquet")["step"].to_pylist() == [1, 2, 3]


def test_points_come_in_any_order_and_a_missing_last_evaluation_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with record(tmp_path) as run:
        run.scalars(3, train_loss=0.5)
        run.scalars(1, train_loss=1.0)
        run.scalars(2, val_loss=0.7)
        run.layers([ROW], 4)
    rows = runs.read_table(tmp_path / "curve.parquet").to_pylist()
    assert [row["step"] for row in rows] == [1, 2, 3]
    (row,) = runs.read_table(tmp_path / "run.parquet").to_pylist()
    assert (row["steps_done"], row["val_loss_nats"], row["train_loss_nats"]) == (4, None, 0.75)
    assert "val_loss was last given at step 2, but the run ends at step 3" in caplog.text
    assert "call run.scalars(3, val_loss=…)" in caplog.text
