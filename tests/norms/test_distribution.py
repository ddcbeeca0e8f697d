"""Quantiles and position profiles against plain sorting, loops and explicit vectors, in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lnjac.config import compose
from lnjac.norms.decompose import decompose
from lnjac.norms.distribution import QUANTILES, Quantity, Statistic, profile, quantities, spread
from lnjac.norms.probe import probe
from lnjac.runs import folder as runs
from lnjac.training import run as train


def quantity(values: Tensor, weights: Tensor | None = None, counted: Tensor | None = None) -> Quantity:
    return Quantity("q", values, weights, torch.ones(len(values), dtype=torch.bool) if counted is None else counted)


def at(found: list[Statistic]) -> dict[float, float]:
    return {one.at: one.value for one in found}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_quantiles_are_those_of_the_sorted_values(values: list[float]) -> None:
    found = at(list(spread(quantity(torch.tensor(values, dtype=torch.float64)))))
    assert set(found) == set(QUANTILES)
    ordered = sorted(values)
    assert (found[0.0], found[1.0]) == (ordered[0], ordered[-1])
    for level, value in found.items():
        place = (len(ordered) - 1) * level
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        expected = ordered[low] + (place - low) * (ordered[high] - ordered[low])
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_token_that_does_not_count_moves_nothing() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, 5.0], dtype=torch.float64)
    counted = torch.tensor([True, False, True, True])
    assert {one.n_tokens for one in spread(quantity(values, counted=counted))} == {3}
    assert at(list(spread(quantity(values, counted=counted))))[0.5] == 3.0
    assert [
        (one.value, one.n_tokens) for one in profile(quantity(values, counted=counted), np.array([0, 1, 0, 1]), 2)
    ] == [
        (2.0, 2),
        (5.0, 1),
    ]


def test_no_token_gives_nan_and_no_error() -> None:
    none = quantity(torch.tensor([math.nan]), counted=torch.tensor([False]))
    assert all(math.isnan(one.value) and one.n_tokens == 0 for one in (*spread(none), *profile(none, np.array([0]), 4)))


@pytest.mark.parametrize(("length", "bins"), [(7, 3), (4, 4), (3, 8), (12, 1)])
def test_a_profile_is_the_weighted_mean_of_each_bin(length: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values, weights = (torch.rand(5 * length, generator=generator, dtype=torch.float64) for _ in range(2))
    found = list(profile(quantity(values, weights), np.arange(5 * length) % length, bins))
    starts = [int(one.at) for one in found]
    assert starts == sorted({k * length // min(bins, length) for k in range(min(bins, length))})
    for start, end, one in zip(starts, [*starts[1:], length], found, strict=True):
        inside = [i for i in range(len(values)) if start <= i % length < end]
        expected = sum(weights[i] * values[i] for i in inside) / sum(weights[i] for i in inside)
        assert one.value == pytest.approx(float(expected), rel=1e-12)
        assert one.n_tokens == len(inside)


def test_the_profile_of_the_radial_share_is_a_ratio_of_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    g[:, 1] *= 100  # tokens at one position weigh more
    tokens = decompose(x, g, 1e-5)
    share = next(q for q in quantities(tokens) if q.name == "radial_share")
    (whole,) = profile(share, np.arange(len(share.values)) % 4, 1)
    assert whole.value == pytest.approx(float(tokens.B.sum() / (tokens.B + tokens.C).sum()), rel=1e-12)
    assert abs(whole.value - float(share.values.mean())) > 1e-3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        return out


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().mean(), x.shape[0] * x.shape[1]


def distributions(model: nn.Module, batches: list[Tensor], bins: int) -> list[dict[str, Any]]:
    seen = probe(model, keep_tokens=True)
    seen.measure(batches, loss)
    return seen.distributions(bins).to_dict("records")


def test_distributions_need_the_tokens() -> None:
    seen = probe(Net())
    seen.measure([torch.randn(4, 5, 6)], loss)
    with pytest.raises(ValueError, match="keep_tokens=True"):
        seen.distributions(4)


def test_micro_batches_are_one_sample() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 5, 6, dtype=torch.float64)
    both = distributions(model, [x], 5)
    apart = distributions(model, [x[:1], x[1:]], 5)
    assert len(both) == 8 * (len(QUANTILES) + 5)
    for one, other in zip(both, apart, strict=True):
        assert {**one, "value": 0} == {**other, "value": 0}
        assert one["value"] == pytest.approx(other["value"], rel=1e-9)


def test_batches_of_unequal_length_meet_by_position() -> None:
    torch.manual_seed(0)
    model, long, short = Net().double(), torch.randn(3, 8, 6).double(), torch.randn(2, 5, 6).double()
    found = distributions(model, [long, short], 8)
    sigma = {r["at"]: r for r in found if (r["quantity"], r["statistic"]) == ("sigma", "position")}
    for at in range(8):
        tokens = torch.cat([x[:, at] for x in (long, short) if at < x.shape[1]])
        expected = (tokens.var(-1, correction=0) + model.norm.eps).sqrt().mean()
        assert sigma[at]["n_tokens"] == len(tokens)
        assert sigma[at]["value"] == pytest.approx(float(expected), rel=1e-12)


def test_a_run_writes_them_and_they_agree_with_its_layers(tmp_path: Path) -> None:
    short = ("model=tiny", "steps=2", "eval.tokens=100", "batch_size=2", f"data.dir={tmp_path}/play")
    settings = compose.compose(
        *short, "diagnostics.distributions=true", "diagnostics.schedule=linear", "diagnostics.every=1"
    )
    assert train.run(settings, tmp_path / "run") == "done"
    rows = runs.read_table(tmp_path / "run" / "distributions.parquet").to_pandas()
    layers = runs.read_table(tmp_path / "run" / "layers.parquet").to_pandas()
    assert set(rows["step"]) == {0, 1, 2}
    quantiles = rows[rows["statistic"] == "quantile"]
    for layer in layers.itertuples():
        mine: Any = quantiles[(quantiles["step"] == layer.step) & (quantiles["site"] == layer.site)]
        sigma = mine[mine["quantity"] == "sigma"].set_index("at")["value"]
        assert sigma[0.05] == layer.sigma_q05
        assert sigma[0.5] == layer.sigma_q50
    sizes = rows.groupby(["step", "site", "quantity", "statistic"]).size().unstack()
    assert (sizes["quantile"] == len(QUANTILES)).all()
    assert (sizes["position"] == 8).all()
    assert np.isfinite(rows["value"]).all()
