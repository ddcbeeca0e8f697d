"""MLflow in a store of one file: it holds the run's curves once each, also after a resume, of several processes too."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import TINY, command
from support.pages import blocks
from support.small import SMALL, corpus, finished
from support.tracked import DRAWN, WATCHED, Points, cut, expected

import lnjac
from lnjac.config.compose import compose
from lnjac.config.identity import column_values
from lnjac.norms.formulas import columns
from lnjac.runs import folder as runs
from lnjac.trackers import MLflow
from lnjac.training import run as train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _mlflow() -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="needs the extra [track]: make test-track installs it")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of a store for the tests' experiments: to make its tables takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/m.db"


@pytest.fixture
def tracked(store: str, tmp_path: Path) -> tuple[str, ...]:
    of_test = (f"tracker.uri={store}", f"tracker.experiment={tmp_path.name}")
    return (*WATCHED, "tracker=mlflow", *of_test, f"tracker.columns=[{','.join(DRAWN)}]")


def kept(store: str, experiment: str) -> tuple[Any, list[Any]]:
    """Return a client of the store, and the experiment's runs."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def shown(client: Any, run: Any) -> Points:
    found: Points = {}
    for key in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, key):
            found.setdefault((key, point.step), []).append(point.value)
    return found


def test_mlflow_shows_what_the_tables_hold(store: str, tmp_path: Path, tracked: tuple[str, ...]) -> None:
    run = finished(tmp_path / "run", *tracked)
    client, (found,) = kept(store, tmp_path.name)
    assert shown(client, found) == expected(tmp_path / "run")
    assert (found.info.run_name, found.info.status) == ("softmax-fa-exact-seed1337", "FINISHED")
    assert found.data.tags["lnjac.run"] == "-".join(run.run.loc[0, ["run_id", "diag_id"]])
    known = {name: str(value) for name, value in column_values(run.config).items() if value is not None}
    assert found.data.params == known


@pytest.mark.parametrize("saved", [3, None])
def test_a_resumed_run_is_there_once(saved: int | None, store: str, tmp_path: Path, tracked: tuple[str, ...]) -> None:
    config = compose(*SMALL, *tracked, "steps=7", "checkpoint.every=0")
    cut(tmp_path / "run", config, saved)
    client, (found,) = kept(store, tmp_path.name)
    assert ("curve/train_loss_nats", 5) in shown(client, found)
    assert found.info.status == "KILLED"
    assert train.run(config, tmp_path / "run", corpus()) == runs.DONE
    client, (found,) = kept(store, tmp_path.name)
    assert shown(client, found) == expected(tmp_path / "run")
    assert found.info.status == "FINISHED"


def test_a_name_that_mlflow_refuses_is_spelled_otherwise(store: str, tmp_path: Path) -> None:
    tracker = MLflow(columns=["radial_share"], experiment=tmp_path.name, uri=store)
    with lnjac.record(tmp_path / "run", config={"a[0]": 1}, seed=1, tracker=tracker) as run:
        blank = {"string": "n", "float64": 0.5, "int64": 1, "bool": False}
        run.layers([{column.name: blank[column.dtype] for column in columns()}], 0)
        run.diverged(1)
    client, (found,) = kept(store, tmp_path.name)
    assert shown(client, found) == {("radial_share/n_1_", 0): [0.5]}
    assert found.data.params == {"a_0_": "1", "seed": "1"}
    assert found.data.tags["lnjac.status"] == "diverged"


def test_worker_processes_share_a_store(tmp_path: Path) -> None:
    done = command("-m", *TINY, "tracker=mlflow", "seed=1,2", "hydra.launcher.jobs=2", "sweep=A", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    _, found = kept(f"sqlite:///{tmp_path}/mlflow.db", "lnjac")
    assert sorted(run.data.params["seed"] for run in found) == ["1", "2"]
    assert {run.info.status for run in found} == {"FINISHED"}


def test_the_documented_loop_is_tracked(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    exec(blocks(root / "docs" / "tracking.md", "python")[0], {})
    client, (found,) = kept(store, "norms")
    assert {key[1]: value for key, value in shown(client, found).items()} == {step: [1 / step] for step in range(1, 11)}
    assert found.info.run_name == "a-seed1"
