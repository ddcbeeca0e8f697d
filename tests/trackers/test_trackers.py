"""Trackers: what TensorBoard is shown is what the tables hold; a tracker costs a run nothing, whatever it does."""

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.commands import TINY, command
from support.paths import ROOT
from support.small import SMALL, corpus, members
from support.tracked import DRAWN, WATCHED, Points, cut, expected

import lnjac
from lnjac.config.compose import compose
from lnjac.config.identity import columns, diag_id, run_id, to_dict
from lnjac.config.schema import RunConfig, build, check
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import merge as sweep
from lnjac.trackers import MLflow, TensorBoard, TrackedRun, WandB, base, curves
from lnjac.trackers.tensorboard import _table
from lnjac.training import loop
from lnjac.training import run as train

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard: pip install -e '.[track]'"
)
TENSORBOARD = (*WATCHED, "tracker=tensorboard")


def finished(folder: Path, config: RunConfig) -> lnjac.Run:
    assert train.run(config, folder, corpus()) == runs.DONE
    return lnjac.load_run(folder)


def with_tracker(target: str, *overrides: str, **settings: Any) -> RunConfig:
    plain = to_dict(compose(*SMALL, *WATCHED, *overrides))
    return build(plain | {"tracker": {"_target_": target, **settings}})


def event_folder(run: Path) -> Path:
    (folder,) = (run / "tensorboard").iterdir()
    return folder


def accumulated(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(event_folder(run)), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def shown(run: Path) -> Points:
    """All that TensorBoard would draw, by tag and step."""
    events, found = accumulated(run), Points()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def single(points: Points) -> Points:
    """The values in float32, as TensorBoard has them."""
    return {key: [float(np.float32(value)) for value in values] for key, values in points.items()}


@needs_tensorboard
def test_tensorboard_shows_what_the_tables_hold(tmp_path: Path) -> None:
    config = compose(*SMALL, *TENSORBOARD, f"tracker.columns=[{','.join(DRAWN)}]")
    finished(tmp_path, config)
    assert shown(tmp_path) == single(expected(tmp_path))
    assert ("val_loss_nats", 0) in {(tag.partition("/")[2], step) for tag, step in shown(tmp_path)}
    assert event_folder(tmp_path).name == "softmax-fa-exact-seed1337"


@needs_tensorboard
def test_what_has_no_value_is_not_drawn(tmp_path: Path) -> None:
    finished(tmp_path, compose(*SMALL, *TENSORBOARD, "model.norm=rmsnorm", "tracker.columns=[r_mean,r_radial]"))
    assert {tag.partition("/")[0] for tag, _ in shown(tmp_path)} == {"curve", "r_radial"}  # r_mean is NaN


@needs_tensorboard
def test_tensorboard_shows_the_config_as_text_and_as_hparams(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = compose(*SMALL, *TENSORBOARD, "attn_mode=sigmoid")
    finished(tmp_path, config)
    events = accumulated(tmp_path)
    (text,) = events.Tensors("config")
    known = {column.name: value for column, value in columns(config)}
    for name, value in known.items():
        assert f"| {name} | {value} |" in text.tensor_proto.string_val[0].decode()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.group_name == f"{run_id(config, corpus().sha256)}-{diag_id(config)}"
    assert start.hparams["attn_mode"].string_value == "sigmoid"
    assert start.hparams["attn_mode.bias"].number_value == known["attn_mode.bias"]
    assert set(start.hparams) == {name for name, value in known.items() if value is not None}


def test_a_value_of_the_config_stays_in_its_cell(tmp_path: Path) -> None:
    table = _table(TrackedRun("id", tmp_path, {"data.files": "a|b\nc", "none": None}))
    assert table.splitlines()[-2:] == [r"| data.files | a\|b\<U+000A>c |", "| none | None |"]


@needs_tensorboard
@pytest.mark.parametrize("saved", [3, None])
def test_curves_go_on_without_duplicates(saved: int | None, tmp_path: Path) -> None:
    """Cut after five updates, two after its last checkpoint; without any it starts anew."""
    config = compose(*SMALL, *TENSORBOARD, "steps=7", "checkpoint.every=0", f"tracker.columns=[{','.join(DRAWN)}]")
    cut(tmp_path, config, saved)
    assert ("curve/train_loss_nats", 5) in shown(tmp_path)
    run = finished(tmp_path, config)
    assert run.run["resumed_at"][0] == (saved or 0)
    assert [file.suffix for file in event_folder(tmp_path).iterdir()] == [".0001"]
    assert shown(tmp_path) == single(expected(tmp_path))
    assert len(accumulated(tmp_path).Tensors("config")) == 1


@needs_tensorboard
def test_events_are_no_part_of_the_run(tmp_path: Path) -> None:
    tracked = finished(tmp_path / "A" / "tracked", compose(*SMALL, *TENSORBOARD))
    plain = finished(tmp_path / "plain", compose(*SMALL, *WATCHED))
    assert tracked.run["run_id"][0] == plain.run["run_id"][0]
    assert tracked.status["sha256"].keys() == plain.status["sha256"].keys()
    pd.testing.assert_frame_equal(tracked.layers, plain.layers)
    report = sweep.merge([tmp_path / "A", tmp_path / "plain"], tmp_path / "all.parquet", strict=True)
    assert (report.found, report.merged, report.skipped) == (2, 1, [])


@needs_tensorboard
@pytest.mark.slow
def test_a_sweeps_worker_processes_track(tmp_path: Path) -> None:
    done = command("-m", *TINY, "tracker=tensorboard", "seed=1,2", "hydra.launcher.jobs=2", "sweep=A", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in (tmp_path / "multirun" / "A").glob(f"*/{runs.STATUS}")]
    assert len(folders) == 2
    drawn = [name for name in curves.MEASURED if name in {tag.partition("/")[0] for tag, _ in shown(folders[0])}]
    assert "radial_share" in drawn
    for folder in folders:
        assert shown(folder) == single(expected(folder, drawn))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name", members("tracker"))
def test_a_tracker_is_no_part_of_the_identity(name: str) -> None:
    bare, tracked = compose(), compose(f"tracker={name}")
    assert (run_id(tracked, "data"), diag_id(tracked)) == (run_id(bare, "data"), diag_id(bare))
    assert columns(tracked) == columns(bare)
    assert build(to_dict(tracked)) == tracked


@pytest.mark.parametrize("tracker", [TensorBoard(), WandB(), MLflow(uri="http://127.0.0.1:5000")])
def test_without_the_extra_a_tracker_is_refused_with_the_remedy(
    tracker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = f"tracker={tracker.name} needs the package {tracker.name}: pip install 'lnjac[track]'"
    assert said in check(compose(f"tracker={tracker.name}"))
    assert check(compose()) == []
    with pytest.raises(ConfigError) as refused:
        lnjac.record(tmp_path / "run", config={}, seed=1, tracker=tracker)
    assert str(refused.value) == said
    assert not (tmp_path / "run").exists()


def test_a_folder_of_files_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert importlib.util.find_spec("wandb") is not None
    assert [*WandB().problems(None)] == ["tracker=wandb needs the package wandb: pip install 'lnjac[track]'"]


@pytest.mark.parametrize("cls", [TensorBoard, WandB, MLflow])
def test_a_trackers_defaults_are_those_of_its_file(cls: Any) -> None:
    assert compose(f"tracker={cls().name}").tracker == cls()


@needs_tensorboard
def test_a_column_that_is_not_there_is_refused() -> None:
    (said,) = check(compose("tracker=tensorboard", "tracker.columns=[radial_share,radial_shares]"))
    assert "tracker.columns=radial_shares" in said
    assert check(compose("tracker=tensorboard", "tracker.columns=['*']")) == []


@pytest.mark.slow
def test_tensorboard_is_imported_only_when_asked_for() -> None:
    code = "import sys, lnjac; lnjac.run; lnjac.compose(); sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- trackers of one's own


@dataclass
class Failing:
    """Raises in one of its methods."""

    name: str
    where: str

    def start(self, run: TrackedRun) -> None:
        self.told("start")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.told("scalars")

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.told("layers")

    def end(self, status: str) -> None:
        self.told("end")

    def told(self, what: str) -> None:
        if what == self.where:
            raise RuntimeError(f"no network in {what}")


@pytest.mark.parametrize("where", ["start", "scalars", "layers", "end"])
def test_a_failing_tracker_is_said_once_and_costs_nothing(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished(tmp_path / "run", with_tracker(f"{__name__}.Failing", name="failing", where=where))
    said = [record for record in caplog.records if record.name == base.__name__]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert f"tracker=failing failed, the run goes on without it: RuntimeError: no network in {where}" in caplog.text
    pd.testing.assert_frame_equal(run.layers, finished(tmp_path / "plain", compose(*SMALL, *WATCHED)).layers)


TOLD: list[tuple[Any, ...]] = []


@dataclass
class Listening:
    name: str

    def start(self, run: TrackedRun) -> None:
        TOLD.append(("start", run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        TOLD.append(("scalars", step, dict(values)))

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        TOLD.append(("layers", step, [row["site"] for row in rows]))

    def end(self, status: str) -> None:
        TOLD.append(("end", status))


@pytest.fixture
def listening() -> RunConfig:
    TOLD.clear()
    return with_tracker(f"{__name__}.Listening", "steps=2", name="listening")


def test_a_tracker_is_told_all_in_order(listening: RunConfig, tmp_path: Path) -> None:
    opened = finished(tmp_path, listening)
    sites = list(dict.fromkeys(opened.layers["site"]))
    (_, run), *told = TOLD
    assert (run.id, run.folder) == ("-".join(opened.run.loc[0, ["run_id", "diag_id"]]), tmp_path)
    assert run.config["model.n_embd"] == 8
    point = {(row["step"], name): value for row in opened.curve.to_dict("records") for name, value in row.items()}
    assert told == [
        ("layers", 0, sites),
        ("scalars", 0, {"val_loss_nats": point[0, "val_loss_nats"]}),
        ("layers", 1, sites),
        ("scalars", 1, {name: point[1, name] for name in ("train_loss_nats", "lr")}),
        ("layers", 2, sites),
        ("scalars", 2, {name: point[2, name] for name in ("train_loss_nats", "val_loss_nats", "lr")}),
        ("end", "done"),
    ]
    TOLD.clear()
    assert train.run(listening, tmp_path, corpus()) == runs.DONE  # it is there already
    assert TOLD == []


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), runs.FAILED), (KeyboardInterrupt(), runs.INTERRUPTED)]
)
def test_a_tracker_is_told_how_the_run_ended(
    error: BaseException, status: str, listening: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> float:
        raise error

    monkeypatch.setattr(loop.Training, "update", broken)
    with pytest.raises(type(error)):
        train.run(listening, tmp_path, corpus())
    assert TOLD[-1] == ("end", status)
    assert runs.read_status(tmp_path)["status"] == status


def test_a_resumed_run_is_told_from_its_beginning(listening: RunConfig, tmp_path: Path) -> None:
    config = build(to_dict(listening) | {"steps": 7, "checkpoint": {"every": 0}})
    cut(tmp_path, config, saved=3)
    first = [told[1:] for told in TOLD if told[0] == "scalars"]
    TOLD.clear()
    opened = finished(tmp_path, config)
    again = [told[1:] for told in TOLD if told[0] == "scalars"]
    assert again[: len(first)] == first
    assert [step for step, _ in again] == opened.curve["step"].tolist() == list(range(8))
    assert [step for kind, step, *_ in TOLD if kind == "layers"] == opened.layers["step"].unique().tolist()
    assert [kind for kind, *_ in TOLD].count("start") == 1
    steps = [told[1] for told in TOLD if told[0] in ("scalars", "layers")]
    assert steps == sorted(steps)


def test_a_loop_of_ones_own_is_tracked(tmp_path: Path) -> None:
    TOLD.clear()
    with lnjac.record(tmp_path / "a", config={"lr": 0.5}, seed=3, tracker=Listening("mine")) as run:
        run.scalars(1, train_loss=2.0)
    (_, told), *rest = TOLD
    assert (told.id, told.title) == ("-".join(run.identity.values()), "a-seed3")
    assert told.config == {"seed": 3, "lr": 0.5}
    assert rest == [("scalars", 1, {"train_loss_nats": 2.0}), ("end", "done")]
    TOLD.clear()
    with lnjac.record(tmp_path / "a", config={"lr": 0.5}, seed=3, tracker=Listening("mine")) as run:
        assert run.found == "done"
    assert TOLD == []


def test_a_failing_tracker_costs_a_loop_of_ones_own_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lnjac.record(tmp_path, config={}, seed=1, tracker=Failing("failing", "start")) as run:
        run.scalars(1, train_loss=2.0)
    assert runs.read_status(tmp_path)["status"] == runs.DONE
    assert caplog.text.count("no network in start") == 1


def test_numbers_are_drawn_by_site_and_call() -> None:
    @dataclass
    class Drawn(curves.Curves):
        def packages(self) -> list[str]:
            return []

        def draw(self, step: int, values: Mapping[str, float]) -> None:
            TOLD.append((step, values))

    TOLD.clear()
    drawn = Drawn("drawn", ["radial_share", "r_mean", "r_radial"])
    row = {
        "site": "n",
        "call": 0,
        "radial_share": 0.5,
        "r_mean": float("nan"),
        "r_radial": None,
        "site_backward": "exact",
    }
    rows = [dict.fromkeys(curves.MEASURED, 0.0) | row, dict.fromkeys(curves.MEASURED, 1.0) | row | {"call": 1}]
    drawn.layers(2, [{name: row[name] for name in row} for row in rows])
    drawn.scalars(3, {"lr": 0.1})
    assert TOLD == [(2, {"radial_share/n": 0.5, "radial_share/n[1]": 0.5}), (3, {"curve/lr": 0.1})]


def test_a_run_is_opened_without_its_tracker(listening: RunConfig, tmp_path: Path) -> None:
    run = finished(tmp_path, listening)
    assert run.metadata["config"]["tracker"]["name"] == "listening"
    assert run.config.tracker == compose().tracker
    del run.metadata["config"]["tracker"]  # made before there were trackers
    assert lnjac.training.saved_run.Run.config.func(run).tracker == compose().tracker


def test_the_documented_tracker_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_member: Callable[..., str]
) -> None:
    text = (ROOT / "docs" / "tracking.md").read_text()
    (_, code), (settings,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "watch.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = finished(tmp_path / "run", compose(*SMALL, *WATCHED, f"tracker={add_member('tracker', settings)}"))
    lines = pd.read_json(tmp_path / "run" / "live.jsonl", lines=True)
    drawn = lines[lines["train_loss_nats"].notna()]
    assert drawn["train_loss_nats"].tolist() == pytest.approx(run.curve["train_loss_nats"].dropna().tolist())
    shares = {(row.step, site): x for row in lines.itertuples() if isinstance(row.radial_share, dict)
              for site, x in row.radial_share.items()}  # fmt: skip
    rows = run.layers.set_index(["step", "site"])["radial_share"]
    assert shares == pytest.approx(rows.to_dict())
    sys.modules.pop("watch")
