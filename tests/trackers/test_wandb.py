"""W&B offline: its files hold the run's curves once each, also after a resume, and cost the run nothing."""

import contextlib
import time
from pathlib import Path

import pytest
from support.small import SMALL, corpus, finished
from support.tracked import DRAWN, WATCHED, cut, expected
from support.wandb_files import history, messages

import lnjac
from lnjac.config.compose import compose
from lnjac.config.identity import column_values
from lnjac.config.schema import check
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.trackers import WandB
from lnjac.training import run as train

TRACKED = (*WATCHED, "tracker=wandb", f"tracker.columns=[{','.join(DRAWN)}]")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _wandb() -> None:
    pytest.importorskip("wandb", reason="needs the extra [track]: make test-track installs it")


def written(run: Path) -> Path:
    """Return the run's file, once W&B's own process has written the end of it."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    last = time.monotonic() + 60
    while time.monotonic() < last and all(record.WhichOneof("record_type") != "exit" for record in messages(file)):
        time.sleep(0.05)
    return file


def test_wandb_shows_what_the_tables_hold(tmp_path: Path) -> None:
    run = finished(tmp_path, *TRACKED)
    assert history(written(tmp_path)) == expected(tmp_path)
    kinds = {record.WhichOneof("record_type"): record for record in messages(written(tmp_path))}
    assert kinds["run"].run.run_id == "-".join(run.run.loc[0, ["run_id", "diag_id"]])
    assert (kinds["run"].run.project, kinds["run"].run.display_name) == ("lnjac", "softmax-fa-exact-seed1337")
    config = {item.key for item in kinds["run"].run.config.update}
    assert {name for name, value in column_values(run.config).items() if value is not None} <= config
    assert kinds["exit"].exit.exit_code == 0


@pytest.mark.parametrize("saved", [3, None])
def test_a_resumed_run_is_there_once(saved: int | None, tmp_path: Path) -> None:
    config = compose(*SMALL, *TRACKED, "steps=7", "checkpoint.every=0")
    cut(tmp_path, config, saved)
    assert ("curve/train_loss_nats", 5) in history(written(tmp_path))
    assert train.run(config, tmp_path, corpus()) == runs.DONE
    assert history(written(tmp_path)) == expected(tmp_path)


def test_a_strangers_loop_is_tracked_beside_a_run_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.chdir(tmp_path)
    mine = wandb.init(mode="offline", project="mine", dir=tmp_path, settings=wandb.Settings(silent=True))
    run = lnjac.record("run", config={"lr": 0.1}, seed=1, tracker=WandB(project="norms"))
    with contextlib.suppress(ZeroDivisionError), run:
        run.scalars(1, train_loss=2.0)
        run.scalars(2, train_loss=1.0 / 0)
    assert wandb.run is mine
    mine.finish()
    assert history(written(Path("run"))) == {("curve/train_loss_nats", 1): [2.0]}
    (ended,) = [record for record in messages(written(Path("run"))) if record.WhichOneof("record_type") == "exit"]
    assert ended.exit.exit_code == 1


def test_another_mode_is_refused(tmp_path: Path) -> None:
    said = "tracker.mode=cloud must be offline or online"
    assert check(compose("tracker=wandb", "tracker.mode=cloud")) == [said]
    with pytest.raises(ConfigError, match=said):
        lnjac.record(tmp_path / "run", config={}, seed=1, tracker=WandB(mode="cloud"))
    assert not (tmp_path / "run").exists()
