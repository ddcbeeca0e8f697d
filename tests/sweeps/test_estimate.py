"""The time that a sweep still needs, by finished runs of its jobs' shape."""

from pathlib import Path

import pandas as pd
import pytest

from lnjac.errors import ConfigError
from lnjac.sweeps import estimate

FINISHED = pd.DataFrame({
    "run_id": ["a", "b", "c", "d"], "status": ["done", "done", "done", "failed"], "steps_done": [100, 200, 100, 0],
    "train_s": [10.0, 40.0, 7.0, 0.0], "eval_s": 1.0, "diagnostics_s": 2.0, "wall_s": [9.0, 8.0, 7.0, 6.0],
    "seed": [1, 2, 1, 1], "steps": [100, 200, 100, 100], "model.n_embd": [64, 64, 32, 32],
    "optimizer.lr": [0.1, 0.2, 0.1, 0.1], "attn_mode": "softmax", "method.scale": [2.0, 2.0, float("nan"), float("nan")],
})  # fmt: skip
"""As a merged table is read: `method.scale`, a whole number, is null for a method that has none."""


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> pd.DataFrame:
        if path.name != "all.runs.parquet":
            raise ConfigError("not a merged table")
        return FINISHED

    monkeypatch.setattr(estimate, "load", load)


def test_a_run_takes_as_long_as_those_that_differ_in_seed_steps_and_learning_rate() -> None:
    row = {"seed": 9, "steps": 1000, "model.n_embd": 64, "optimizer.lr": 0.3, "attn_mode": "softmax", "method.scale": 2}
    tables = [Path("all.runs.parquet"), Path("broken.runs.parquet")]
    assert estimate.seconds([(row, 0)], tables) == (pytest.approx(1000 * (0.1 + 0.2) / 2 + 3), 1)
    assert estimate.seconds([(row, 900), (row, 1000)], tables) == (pytest.approx(100 * (0.1 + 0.2) / 2 + 3 + 3), 2)
    small = {name: value for name, value in row.items() if name != "method.scale"} | {"model.n_embd": 32}
    todo = [(row, 0), (small, 0), (small | {"method.scale": None}, 0)]
    assert estimate.seconds(todo, tables) == (pytest.approx(153 + 2 * 73), 3)


def test_a_run_of_a_new_shape_is_not_covered() -> None:
    row = {"steps": 10, "model.n_embd": 128, "attn_mode": "softmax"}
    assert estimate.seconds([(row, 0)], [Path("all.runs.parquet")]) == (0, 0)


@pytest.mark.parametrize(("seconds", "said"), [(52.4, "0 min 52 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")])
def test_a_time_in_words(seconds: float, said: str) -> None:
    assert estimate.in_words(seconds) == said
