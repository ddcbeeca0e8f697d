"""Two processes that train one model, each on its half of a batch, find what one process finds on the whole batch."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from support.loops import KINDS, SITES, assert_rows_equal, batch, halves, loss, net
from support.paths import ROOT

from lnjac.norms.probe import probe

pytestmark = pytest.mark.rare


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], pd.DataFrame]:
    """The tables that the processes wrote, by name and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/support/ranked.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {(path.stem, int(path.suffix[1:])): pd.read_pickle(path) for path in folder.iterdir()}


Found = dict[tuple[str, int], pd.DataFrame]


@pytest.mark.parametrize("how", ["1", "2", "measured"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_pooled_rows_are_the_one_processs(found: Found, way: str, kind: str, how: str) -> None:
    """One or two micro-batches a rank; sites are named as in the plain model, σ's quantiles are of all tokens."""
    expected = probe(net(kind)).measure([batch()], loss)
    assert_rows_equal(found[f"{way} {kind} {how}", 0], expected)
    pd.testing.assert_frame_equal(found[f"{way} {kind} {how}", 0], found[f"{way} {kind} {how}", 1])
    assert set(expected["n_tokens"]) == {40}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_process_may_be_measured_alone(found: Found, way: str, kind: str) -> None:
    for rank, half in enumerate(halves(batch())):
        assert_rows_equal(found[f"{way} {kind} alone", rank], probe(net(kind)).measure([half], loss))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_training_goes_on_after_a_measurement(found: Found, way: str) -> None:
    """The update is of the gradient that the two watched steps left, not of what `measure` computed between."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss(model, batch())[0].backward()
    optimizer.step()
    assert_rows_equal(found[f"{way} stepped", 0], probe(model).measure([batch()], loss))


def test_a_site_that_one_rank_alone_called_is_kept(found: Found) -> None:
    for rank in (0, 1):
        table = found["routed", rank].set_index("site")
        assert sorted(table.index) == sorted([f"net.{site}" for site in SITES] + ["experts.0", "experts.1"])
        assert table["n_tokens"].to_dict() == {
            **{f"net.{site}": 40 for site in SITES},
            "experts.0": 20,
            "experts.1": 20,
        }
        states = found["routed", rank].attrs["coverage"]
        assert [states[f"experts.{i}"] for i in range(3)] == ["measured", "measured", "never called"]


def test_without_pooling_one_rank_may_measure_and_the_other_not(found: Found) -> None:
    assert_rows_equal(found["on one rank", 1], probe(net()).measure([halves(batch())[1]], loss))
    assert ("on one rank", 0) not in found
