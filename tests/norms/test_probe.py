"""Rows of torch's own transformer, recomputed by plain formulas from what ordinary module hooks see."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lnjac.norms.formulas import COLUMNS
from lnjac.norms.layers import Factors, Norm
from lnjac.norms.probe import probe

D, T, CLASSES, EPS = 12, 5, 7, 1e-2
SITES = [f"encoder.layers.{i}.{norm}" for i in range(2) for norm in ("norm1", "norm2")] + ["encoder.norm"]
MEASURED = {column.name for column in COLUMNS}


class Encoder(nn.Module):
    """nn.TransformerEncoder between two linear layers, its norms' parameters away from 1 and 0."""

    def __init__(self, *, norm_first: bool, eps: float = EPS) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            D, 3, 2 * D, dropout=0.0, batch_first=True, norm_first=norm_first, layer_norm_eps=eps
        )
        self.embed = nn.Linear(4, D)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D, eps=eps), enable_nested_tensor=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x)))
        return out


class Ours(nn.Module):
    """Two of the project's norms around a linear layer."""

    def __init__(self, *, rms: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Linear(4, D), nn.Linear(D, D), nn.Linear(D, CLASSES)
        self.ln_1 = Norm(D, eps=EPS, rms=rms)
        self.ln_f = self.ln_1 if tied else Norm(D, eps=EPS, rms=rms)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out: Tensor = self.head(self.ln_f(x + torch.tanh(self.fc(self.ln_1(x)))))
        return out


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, Norm)):
                for p in module.parameters():
                    p.add_(torch.randn_like(p) / 2)
    return model


Batch = tuple[Tensor, Tensor]


def batch(n: int, dtype: torch.dtype = torch.float64) -> Batch:
    """x: (n, T, 4) of varying size, so that σ varies; targets: (n, T)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, T, 4, generator=generator, dtype=torch.float64)
    size = torch.rand(n, T, 1, generator=generator, dtype=torch.float64) * 3
    return (x * size).to(dtype), torch.randint(CLASSES, (n, T), generator=generator)


def loss(model: nn.Module, one: Batch) -> tuple[Tensor, int]:
    x, targets = one
    return F.cross_entropy(model(x).flatten(0, 1), targets.flatten()), targets.numel()


def hooked(model: nn.Module, one: Batch) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """(site, norm, x: (n, d), ∂L/∂y: (n, d)) of each norm, L the summed loss, by torch's module hooks."""
    inputs: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    handles = []
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm, Norm))}
    for name, module in modules.items():
        handles += [
            module.register_forward_hook(lambda _, args, __, n=name: inputs.update({n: args[0].detach()})),
            module.register_full_backward_hook(lambda _, __, grad, n=name: grads.update({n: grad[0].detach()})),
        ]
    value, tokens = loss(model, one)
    (value * tokens).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [(n, m, inputs[n].reshape(-1, D), grads[n].reshape(-1, D)) for n, m in modules.items()]


def measured(model: nn.Module, batches: Any, loss: Any = loss, **more: Any) -> list[dict[str, Any]]:
    """The probe's table as rows of plain values."""
    rows = probe(model, **more).measure(batches, loss).to_dict("records")
    return [{name: None if value is pd.NA else value for name, value in row.items()} for row in rows]


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def plain_row(module: Any, x: Tensor, grad: Tensor, *, at: str, rms: bool = False) -> dict[str, float]:
    """Every measured number of a row, by its own formula. x, grad: (n, d), grad = ∂L/∂y of the summed loss."""
    d, eps = x.shape[-1], module.eps
    g = grad * module.weight.detach() if at == "normalized" else grad
    mu = torch.zeros_like(x[:, :1]) if rms else x.mean(-1, keepdim=True)
    v = ((x - mu) ** 2).mean(-1, keepdim=True)
    sigma = (v + eps).sqrt()
    z, rho = (x - mu) / sigma, v / (v + eps)
    mean = torch.zeros_like(g) if rms else g.mean(-1, keepdim=True).expand_as(g)
    radial = z * (g * z).mean(-1, keepdim=True)
    along_z = z * (g * z).sum(-1, keepdim=True) / (z * z).sum(-1, keepdim=True)
    leaf = x.clone().requires_grad_()
    y = F.rms_norm(leaf, (d,), None, eps) if rms else F.layer_norm(leaf, (d,), None, None, eps)
    t = torch.autograd.grad(y, leaf, g)[0]
    vectors = {
        "center_scale": (g - mean) / sigma,
        "projected": g - mean - radial,
        "ste": g,
        "scale": g / sigma,
        "radial_scale": (g - radial) / sigma,
        "center": g - mean,
        "radial": g - radial,
    }
    g_sq = float((g * g).sum())
    a, b, c = (float((e * e).sum()) for e in (mean, along_z, g - mean - along_z))
    s = sigma.squeeze(-1)
    nan_for_rms = math.nan if rms else 1.0
    row = {
        "r_mean": a / g_sq * nan_for_rms,
        "r_radial": float((radial**2).sum()) / g_sq,
        "r_kept": float((vectors["projected"] ** 2).sum()) / g_sq,
        "share_mean": a / g_sq * nan_for_rms,
        "share_radial": b / g_sq,
        "share_kept": c / g_sq,
        "radial_share": b / (b + c),
        "enrichment_mean": d * a / g_sq * nan_for_rms,
        "enrichment_radial": d * float((radial**2).sum()) / g_sq,
        "enrichment_radial_share": (d if rms else d - 1) * b / (b + c),
        "sigma_mean": float(s.mean()),
        "sigma_std": float(s.std()),
        "rho_mean": float(rho.mean()),
        "cos_center_vs_true": float(cos(vectors["center_scale"], t).mean()),
        "cos_ste_vs_true": float(cos(g, t).mean()),
        "cos_center_vs_ste": float(cos(vectors["center_scale"], g).mean()) * nan_for_rms,
        "cos_projected_vs_true": 1.0,
        "cos_radial_vs_true": float(cos(vectors["radial_scale"], t).mean()),
        "n_tokens": len(x),
        "n_zero": 0,
        "d": d,
    }
    weight, rstd = vectors["projected"].square().sum(-1), 1 / s  # ‖u‖²
    average = (weight * rstd).sum() / weight.sum()
    row["rstd_cv"] = float(((weight * (rstd - average) ** 2).sum() / weight.sum()).sqrt() / average)
    ordered = s.sort().values
    for q in (5, 25, 50, 75, 95):  # by linear interpolation between order statistics
        place = (len(s) - 1) * q / 100
        low = math.floor(place)
        high = min(low + 1, len(s) - 1)
        row[f"sigma_q{q:02d}"] = float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
    for name, vector in vectors.items():
        row[f"flat_cos_{name}"] = float(cos(vector.flatten(), t.flatten()))
        row[f"gain_{name}"] = float(vector.norm() / t.norm())
    energies = {
        "A": (mean**2).sum(-1),
        "B": (along_z**2).sum(-1),
        "C": ((g - mean - along_z) ** 2).sum(-1),
        "B1": ((1 - rho) * along_z**2).sum(-1),
        "B2": (((1 - rho) * along_z) ** 2).sum(-1),
    }
    for name, energy in energies.items():
        for power, suffix in enumerate(("", "_rstd", "_rstd2")):
            row[f"sum_{name}{suffix}"] = float((energy / s**power).sum())
    return row


def agree(row: dict[str, Any], expected: dict[str, float], tol: float = 1e-8) -> None:
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=tol, abs=1e-13, nan_ok=True), f"{row['site']} {name}"


# rows


@pytest.mark.parametrize("at", ["normalized", "output"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_rows_of_torchs_transformer_encoder(norm_first: bool, at: str) -> None:
    model = seeded(lambda: Encoder(norm_first=norm_first))
    one = batch(9)
    rows = measured(model, [one], loss, grad_at=at)
    seen = hooked(model, one)
    assert sorted(row["site"] for row in rows) == sorted(SITES) == sorted(site for site, *_ in seen)
    by_site = {row["site"]: row for row in rows}
    for site, module, x, grad in seen:
        expected = plain_row(module, x, grad, at=at)
        agree(by_site[site], expected)
        assert by_site[site]["loss_nats"] == pytest.approx(loss(model, one)[0].item(), rel=1e-12)
        # every measured number was compared, and the rest is what the norm is
        described = ("site", "call", "block", "role", "norm", "site_backward", "n_backwards", "dtype", "n_nonfinite")
        assert expected.keys() == MEASURED - {*described, "jacobian_residual", "forward_residual", "loss_nats"}
        assert [by_site[site][name] for name in described] == [
            site,
            0,
            None if site == "encoder.norm" else int(site.split(".")[2]),
            site.split(".")[-1],
            "layernorm",
            "exact",
            8,
            "float64",
            0,
        ]


def test_grad_at_matters_where_the_norm_has_a_weight() -> None:
    model = seeded(lambda: Encoder(norm_first=True))
    normalized, output = (measured(model, [batch(4)], loss, grad_at=at) for at in ("normalized", "output"))
    assert all(abs(a["r_mean"] - b["r_mean"]) > 1e-3 for a, b in zip(normalized, output, strict=True))
    assert measured(model, [batch(4)], loss) == normalized


@pytest.mark.parametrize("at", ["normalized", "output"])
@pytest.mark.parametrize("rms", [False, True])
def test_rows_of_the_projects_norms(rms: bool, at: str) -> None:
    model = seeded(lambda: Ours(rms=rms))
    model.ln_f.backward_rule = Factors("scale", ["ln_f"], False, False, True)
    one = batch(6)
    rows = measured(model, [one], loss, grad_at=at)
    for row, (site, module, x, grad) in zip(rows, hooked(model, one), strict=True):
        assert row["site"] == row["role"] == site
        assert row["block"] is None
        agree(row, plain_row(module, x, grad, at=at, rms=rms))
        assert row["jacobian_residual"] < 1e-13  # of the exact backward, whatever the norm's own
        assert (row["norm"], row["n_backwards"]) == (("rmsnorm", 4) if rms else ("layernorm", 8))
    assert [row["site_backward"] for row in rows] == ["exact", "scale"]


def test_a_tied_norm_has_a_row_per_call() -> None:
    model = seeded(lambda: Ours(tied=True))
    one = batch(3)
    rows = measured(model, [one, one], loss)
    assert [(row["site"], row["call"], row["n_tokens"]) for row in rows] == [("ln_1", 0, 30), ("ln_1", 1, 30)]
    x = model.embed(one[0]).detach()
    sigmas = [x, x + torch.tanh(model.fc(model.ln_1(x))).detach()]
    for row, inputs in zip(rows, sigmas, strict=True):
        sigma = (inputs.var(-1, unbiased=False) + EPS).sqrt()
        assert row["sigma_mean"] == pytest.approx(float(sigma.mean()))


@pytest.mark.parametrize("build", [lambda: Encoder(norm_first=False), lambda: Ours(rms=True)], ids=["encoder", "rms"])
def test_a_row_is_the_declared_columns_and_nothing_else(build: Callable[[], nn.Module]) -> None:
    kinds = {"int64": int, "float64": float, "string": str}
    for row in measured(seeded(build), [batch(2)], loss):
        assert row.keys() == MEASURED
        for column in COLUMNS:
            if column.name in row and not (column.name == "block" and row["block"] is None):
                assert type(row[column.name]) is kinds[column.dtype], column.name


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float64, 1e-18, 1e-14), (torch.float32, 1e-9, 3e-6), (torch.bfloat16, 1e-9, 3e-6)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("at", ["normalized", "output"])
def test_jacobian_residual_is_of_the_dtypes_size(dtype: torch.dtype, low: float, high: float, at: str) -> None:
    model = seeded(lambda: Encoder(norm_first=True, eps=1e-5), dtype)
    rows = measured(model, [batch(4, dtype)], loss, grad_at=at)
    assert len(rows) == 5
    for row in rows:
        assert low < row["jacobian_residual"] < high, row["site"]
        assert row["dtype"] == str(dtype).split(".")[1]
        assert row["cos_projected_vs_true"] == pytest.approx(1.0, abs=high)


def test_lower_precision_estimates_the_same_rows() -> None:
    exact = measured(seeded(lambda: Encoder(norm_first=True)), [batch(9)], loss)
    single = measured(seeded(lambda: Encoder(norm_first=True), torch.float64).float(), [batch(9, torch.float32)], loss)
    for a, b in zip(exact, single, strict=True):
        for name in ("r_mean", "r_radial", "radial_share", "sigma_mean", "flat_cos_ste", "sum_C_rstd2"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


# micro-batches


@pytest.mark.parametrize("sizes", [(1, 8), (4, 3, 2), (9,)])
def test_unequal_micro_batches_equal_one_big_batch(sizes: tuple[int, ...]) -> None:
    model = seeded(lambda: Encoder(norm_first=True))
    x, targets = batch(9)
    whole = measured(model, [(x, targets)], loss)
    parts = measured(model, zip(x.split(sizes), targets.split(sizes), strict=True), loss)
    assert [row["site"] for row in parts] == [row["site"] for row in whole]
    for row, other in zip(parts, whole, strict=True):
        agree(
            row, {name: value for name, value in other.items() if isinstance(value, (int, float)) and "res" not in name}
        )
        assert row["jacobian_residual"] < 1e-14


def test_a_mean_of_means_would_weigh_small_batches_too_much() -> None:
    """So that the law above is not satisfied by chance: the micro-batches do differ."""
    model = seeded(lambda: Encoder(norm_first=True))
    x, targets = batch(9)
    (whole, *_), (one, *_), (rest, *_) = (
        measured(model, [(x[s], targets[s])], loss) for s in (slice(9), slice(1), slice(1, 9))
    )
    assert abs((one["r_radial"] + rest["r_radial"]) / 2 - whole["r_radial"]) > 1e-4


# the model afterwards, and refusals


def test_gradients_are_left_as_they_were_found() -> None:
    model = seeded(lambda: Encoder(norm_first=True))
    params = list(model.parameters())
    loss(model, batch(2))[0].backward()
    for p in params[::3]:
        p.grad = None
    before = [p.grad for p in params]
    values = [None if g is None else g.clone() for g in before]
    measured(model, [batch(3), batch(2)], loss)

    def failing(model: nn.Module, one: Batch) -> tuple[Tensor, int]:
        for p in params:
            p.grad = torch.ones_like(p)
        raise RuntimeError("loss failed")

    with pytest.raises(RuntimeError, match="loss failed"):
        measured(model, [batch(2)], failing)
    for p, grad, value in zip(params, before, values, strict=True):
        assert p.grad is grad
        assert (grad is None) == (value is None)
        assert grad is None or value is None or torch.equal(grad, value)
    assert not any(m._forward_hooks for m in model.modules())


def test_frozen_parameters_change_no_row() -> None:
    model = seeded(lambda: Encoder(norm_first=True))
    rows = measured(model, [batch(4)], loss)
    model.requires_grad_(False)
    assert measured(model, [batch(4)], loss) == rows
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("case", ["no batch", "another parameter's loss", "under no_grad", "detached"])
def test_no_gradient_is_refused(case: str) -> None:
    model = seeded(lambda: Encoder(norm_first=True))
    stray = torch.ones((), requires_grad=True)

    def lost(model: nn.Module, one: Batch) -> tuple[Tensor, int]:
        value, n = loss(model, one)
        return (stray * value.detach() if case == "another parameter's loss" else value.detach()), n

    with pytest.raises(ValueError, match="no gradient"), torch.set_grad_enabled(case != "under no_grad"):
        measured(model, [] if case == "no batch" else [batch(2)], loss if case == "under no_grad" else lost)


def test_a_model_without_norms_is_refused() -> None:
    model = nn.Linear(4, CLASSES).double()
    with pytest.raises(ValueError, match="has no LayerNorm or RMSNorm"):
        measured(model, [batch(2)], loss)


def test_an_unknown_place_for_the_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="input"):
        measured(seeded(lambda: Encoder(norm_first=True)), [batch(2)], loss, grad_at="input")
