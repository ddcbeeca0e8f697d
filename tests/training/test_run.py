"""A run end to end: rows against plain formulas, reproducibility, losses, and what a plain reference learns."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support import reference
from support.commands import TINY
from support.paths import ROOT
from support.small import SMALL, corpus, finished
from torch import Tensor, nn

from lnjac.columns import VOLATILE
from lnjac.config.compose import compose
from lnjac.norms.probe import probe
from lnjac.runs.schema import FROZEN, with_role
from lnjac.training import loop
from lnjac.training import run as train


def plain_rows(model: nn.Module, idx: Tensor, targets: Tensor, at: str) -> dict[str, dict[str, float]]:
    """r_mean, r_radial, radial_share and cosines of each norm by the textbook formulas, through ordinary torch hooks."""
    seen: dict[str, dict[str, Tensor]] = {}

    def hook(name: str) -> Any:
        def on_forward(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = {"x": args[0].detach().double()}
            output.register_hook(lambda grad: seen[name].update(G=grad.double()))

        return on_forward

    names = [name for name, module in model.named_modules() if type(module).__name__ == "Norm"]
    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    model(idx, targets)[1].backward()
    for handle in handles:
        handle.remove()
    rows = {}
    for name in names:
        module = model.get_submodule(name)
        x, g = seen[name]["x"], seen[name]["G"]
        if at == "normalized":
            g = g * module.weight.detach().double()
        d = x.shape[-1]
        sigma = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        z = (x - x.mean(-1, keepdim=True)) / sigma
        mean = g.mean(-1, keepdim=True).expand_as(g)
        radial = z * (g * z).mean(-1, keepdim=True)
        true = (g - mean - radial) / sigma
        along = z / z.norm(dim=-1, keepdim=True)
        radial_energy = (g * along).sum(-1).square()

        def cos(a: Tensor, b: Tensor) -> float:
            return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())

        rows[name] = {
            "r_mean": float(mean.square().sum() / g.square().sum()),
            "r_radial": float(radial.square().sum() / g.square().sum()),
            "radial_share": float(radial_energy.sum() / (g.square().sum() - d * g.mean(-1).square().sum())),
            "sigma_mean": float(sigma.mean()),
            "sigma_std": float(sigma.std()),
            "cos_center_vs_true": cos((g - mean) / sigma, true),
            "cos_ste_vs_true": cos(g, true),
            "cos_center_vs_ste": cos((g - mean) / sigma, g),
            "flat_cos_projected": float((true * sigma * true).sum() / ((true * sigma).norm() * true.norm())),
            "gain_ste": float(g.norm() / true.norm()),
        }
    return rows


@pytest.mark.parametrize("at", ["normalized", "output"])
@pytest.mark.parametrize("method", ["bp", "fa", "dfa"])
def test_rows_can_be_recomputed_from_the_folder(tmp_path: Path, method: str, at: str) -> None:
    # three updates at a high rate move γ off one, so that the two places of reading differ
    run = finished(tmp_path, f"method={method}", f"diagnostics.grad_at={at}", "optimizer.lr=0.05", "precision=fp64")
    idx, targets = run.diagnostic_batch()
    expected = plain_rows(run.model(), idx[0], targets[0], at)
    layers = run.layers.set_index("site")
    assert list(layers.index) == list(expected)
    assert set(layers["diagnostics.grad_at"]) == {at}
    for site, values in expected.items():
        for column, value in values.items():
            assert layers.loc[site, column] == pytest.approx(value, rel=1e-8), (site, column)


def test_the_two_places_of_reading_differ(tmp_path: Path) -> None:
    pair = [
        finished(tmp_path / at, f"diagnostics.grad_at={at}", "optimizer.lr=0.05") for at in ("normalized", "output")
    ]
    assert pair[0].run["run_id"][0] == pair[1].run["run_id"][0]
    assert pair[0].layers["diag_id"][0] != pair[1].layers["diag_id"][0]
    assert (pair[0].layers["r_mean"] - pair[1].layers["r_mean"]).abs().min() > 1e-6


def test_the_same_run_twice_gives_the_same_science(tmp_path: Path) -> None:
    one, other = (finished(tmp_path / name, "model.dropout=0.1") for name in "ab")
    pd.testing.assert_frame_equal(one.layers, other.layers)
    pd.testing.assert_frame_equal(one.curve, other.curve)
    volatile = [name for name in with_role(VOLATILE, FROZEN["runs"]) if name in one.run]
    pd.testing.assert_frame_equal(one.run.drop(columns=volatile), other.run.drop(columns=volatile))
    for name, value in one.model().state_dict().items():
        assert torch.equal(value, other.model().state_dict()[name])


@pytest.mark.parametrize("override", ["attn_mode=sigmoid", "ln_backward=ste"])
def test_runs_of_one_seed_share_init_feedback_batches_and_diagnostic_batch(override: str) -> None:
    one, other = (loop.Training(compose(*SMALL, *more), corpus()) for more in ([], [override]))
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert any("feedback" in name for name in one.model.state_dict())
    for a, b in zip(one.diagnostic_batches(), other.diagnostic_batches(), strict=True):
        assert torch.equal(a[0], b[0])
    for _ in range(3):
        assert torch.equal(one.batches.next()[0], other.batches.next()[0])


def test_measuring_along_the_way_does_not_change_the_run(tmp_path: Path) -> None:
    plain = finished(tmp_path / "plain", "model.dropout=0.1")
    watched = finished(tmp_path / "watched", "model.dropout=0.1", "diagnostics=trajectory")
    for name, value in plain.model().state_dict().items():
        assert torch.equal(value, watched.model().state_dict()[name])


def test_micro_batches_of_the_diagnostic_add_up(tmp_path: Path) -> None:
    """Two batches' row equals the row of their union: sums are added, ratios never averaged."""
    run = finished(tmp_path, "diagnostics.batches=2", "precision=fp64")
    idx, targets = run.diagnostic_batch()
    assert idx.shape[0] == 2
    whole = (idx.flatten(0, 1), targets.flatten(0, 1))
    union = probe(run.model()).measure([whole], lambda m, b: (m(*b)[1], b[0].numel()))
    for (_, row), (_, stored) in zip(union.iterrows(), run.layers.iterrows(), strict=True):
        for column in ("r_mean", "radial_share", "flat_cos_ste", "gain_center", "sigma_q50", "sum_A", "sum_C_rstd2"):
            assert stored[column] == pytest.approx(row[column], rel=1e-9), column


def test_tied_embeddings_come_back(tmp_path: Path) -> None:
    model = finished(tmp_path, "method=bp", "model.tie=true").model()
    assert model.head.weight is model.wte.weight


def test_validation_loss_is_the_mean_over_the_whole_split(tmp_path: Path) -> None:
    run = finished(tmp_path, "eval.tokens=null", "eval.batch_size=3", "precision=fp64")
    val, t = torch.from_numpy(corpus().val.astype("int64")), run.config.model.block_size
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(val) - 1, t):
            window = val[start : start + t + 1]
            total += float(run.model()(window[None, :-1], window[None, 1:])[1]) * (len(window) - 1)
    assert run.run["val_loss_nats"][0] == pytest.approx(total / (len(val) - 1), rel=1e-12)


def test_evaluation_happens_when_asked(tmp_path: Path) -> None:
    curve = finished(tmp_path, "eval.every=2").curve
    assert curve["step"].tolist() == [0, 1, 2, 3]
    assert curve["val_loss_nats"].notna().tolist() == [True, False, True, True]


@pytest.mark.rare
def test_backprop_on_shakespeare_learns_what_a_plain_reference_learns(tmp_path: Path) -> None:
    """The bare bp run and a nanoGPT-style script of its own, from one start and on the same batches, 60 updates."""
    source = ROOT / "../shared/data/tinyshakespeare/input.txt"
    if not source.exists():
        pytest.skip("needs tiny Shakespeare in ../shared/data/tinyshakespeare")
    config = compose("method=bp", "data=shakespeare_char", f"data.source={source}", f"data.dir={tmp_path}")
    corpus = train.admit(config)
    ours = loop.Training(config, corpus)
    plain = reference.GPT(corpus.vocab_size, 4, 4, 128, 64)
    plain.load_state_dict(ours.model.state_dict())
    batches = iter(loop.Training(config, corpus).batches.next, None)
    reference.train(plain, batches, 60, lr=1e-3, weight_decay=0.01)
    while ours.updates < 60:
        ours.update()
    loss = reference.validation_loss(plain, corpus.val, 64)
    assert 2.5 < loss < 2.6
    assert ours.validation_loss() == pytest.approx(loss, abs=0.001)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_first_query_under_softmax_is_known_to_hold_rounding_errors(precision: str) -> None:
    """It attends to one key, whatever its value: its true gradient is zero, and its cosines would be those of noise."""
    settings = compose(*TINY, "model.qk_norm=true", f"precision={precision}", "method=bp", "steps=0")
    training = loop.Training(settings, settings.data.load())
    for row in training.diagnose()["layers"].to_dict("records"):
        sequences = settings.diagnostics.batch_size * settings.model.n_head
        assert row["n_zero"] == (sequences if row["role"] == "q_norm" else 0), row["site"]
