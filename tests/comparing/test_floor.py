"""The floor: which runs are compared with it, and which floor it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tables import run, study

from lnjac.comparing.floor import BIGRAM, FROZEN, floor

LOSSES = (2.0, 2.1, 2.3)
BODY = (2.5, 2.4, 2.5)


def arm(losses: tuple[float, ...], **config: Any) -> list[dict[str, Any]]:
    return [run(seed, loss, **config) for seed, loss in enumerate(losses, 1)]


def test_frozen_runs_are_paired_by_seed(tmp_path: Path):
    found = floor(study(tmp_path, [*arm(LOSSES), *arm(BODY, method="frozen")]))
    assert found is not None
    (row,) = found.rows.to_dict("records")
    assert (found.kind, found.exact, found.cells) == (FROZEN, False, [])
    assert (row["method"], row["n"], row["paired"]) == ("fa", 3, True)
    assert row["difference"] == pytest.approx(np.subtract(LOSSES, BODY).mean())


def test_only_the_exact_backward_meets_the_floor(tmp_path: Path):
    surrogates = [*arm((9, 9, 9), ln_backward="ste"), *arm((8, 8, 8), ln_backward="ste", method="frozen")]
    rows = [*arm(LOSSES), *arm(BODY, method="frozen"), *surrogates]
    for where in (None, "method == 'fa'", "method != 'frozen'"):
        found = floor(study(tmp_path, rows), where=where)
        assert found is not None
        assert found.exact
        assert found.rows["mean_a"].tolist() == pytest.approx([np.mean(LOSSES)])
        assert found.rows["mean_b"].tolist() == pytest.approx([np.mean(BODY)])


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ({"data_sha256": "bb"}, BIGRAM),
        ({"steps": 9}, BIGRAM),
        ({"model__n_embd": 9}, BIGRAM),
        ({"precision": "bf16"}, FROZEN),
    ],
)
def test_frozen_runs_of_another_task_are_no_floor(tmp_path: Path, other: dict[str, Any], kind: str):
    plain = {"bigram_nats": 2.2, "precision": "fp32"}
    rows = [*arm(LOSSES, **plain), *arm(BODY, method="frozen", **plain | other)]
    found = floor(study(tmp_path, rows), where="method == 'fa'")
    assert found is not None
    assert found.kind == kind
    assert found.rows["moving"].tolist() == ["precision" * (kind == FROZEN)]


def test_the_bigram_is_the_floor_of_each_cell(tmp_path: Path):
    rows = [*arm(LOSSES, bigram_nats=2.2), *arm(BODY, bigram_nats=2.2, attn_mode="sigmoid")]
    found = floor(study(tmp_path, rows))
    assert found is not None
    assert (found.kind, found.cells) == (BIGRAM, ["attn_mode"])
    apart = dict(zip(found.rows["attn_mode"], found.rows["difference"], strict=True))
    assert apart == pytest.approx({"softmax": np.mean(LOSSES) - 2.2, "sigmoid": np.mean(BODY) - 2.2})
    assert found.rows["p_adjusted"].tolist() == found.rows["p"].tolist()


@pytest.mark.parametrize("missing", ["val_loss_nats", "bigram_nats"])
def test_a_table_without_losses_or_floor_has_none(tmp_path: Path, missing: str):
    rows = [{name: value for name, value in row.items() if name != missing} for row in arm(LOSSES, bigram_nats=2.2)]
    assert floor(study(tmp_path, rows)) is None


def test_diverged_runs_meet_no_floor(tmp_path: Path):
    rows = arm(LOSSES, bigram_nats=2.2)
    rows[0] |= {"status": "diverged", "val_loss_nats": float("nan")}
    found = floor(study(tmp_path, rows))
    assert found is not None
    assert found.rows["n"].tolist() == [2]
    assert floor(study(tmp_path, [row | {"status": "diverged"} for row in rows])) is None
