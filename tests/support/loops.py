"""What tests of training loops share: a small residual network of three kinds of norm, its batches, its loss, its truth."""

import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, T, CLASSES = 8, 5, 7
SITES = ["blocks.0.ln", "blocks.1.ln", "ln_f"]
Batch = tuple[Tensor, Tensor]


class OwnRMSNorm(nn.Module):
    """An RMSNorm of no class of torch's, computed in float32 at least, as Llama's is."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(d)), 1e-5

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        h = hidden_states.to(torch.promote_types(dtype, torch.float32))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(dtype)


class Plain(nn.Module):
    """Not named a norm: it holds the parameters of F.layer_norm, which the block calls itself."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "nn.LayerNorm": nn.LayerNorm,
    "own RMSNorm": OwnRMSNorm,
    "functional": Plain,
}


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.ln, self.fc = KINDS[kind](D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (D,), self.ln.weight, self.ln.bias) if isinstance(self.ln, Plain) else self.ln(x)
        past = h.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return x + torch.tanh(self.fc(past))


class Net(nn.Module):
    """x: (n, T, 4) -> logits: (n, T, CLASSES). checkpointed: None, or use_reentrant."""

    def __init__(self, kind: str = "nn.LayerNorm", checkpointed: bool | None = None) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed, self.blocks = nn.Linear(4, D), nn.ModuleList(Block(kind) for _ in range(2))
        self.ln_f, self.head = nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        out: Tensor = self.head(self.ln_f(x))
        return out


def net(kind: str = "nn.LayerNorm", *, checkpointed: bool | None = None, dtype: torch.dtype = torch.float64) -> Net:
    """The network from one seed, its norms' parameters away from 1 and 0."""
    torch.manual_seed(0)
    model = Net(kind, checkpointed).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln" in name:
                p += torch.randn_like(p) / 3
    return model.to(dtype)


def batch(n: int = 8, dtype: torch.dtype = torch.float64) -> Batch:
    """x: (n, T, 4) of varying size, so that σ varies; targets: (n, T)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, T, 4, generator=generator, dtype=torch.float64)
    size = 3 * torch.rand(n, T, 1, generator=generator, dtype=torch.float64)
    return (x * size).to(dtype), torch.randint(CLASSES, (n, T), generator=generator)


def loss(model: nn.Module, one: Batch) -> tuple[Tensor, int]:
    """The mean cross-entropy over the targets that are not -100, and how many they are."""
    logits, targets = model(one[0]).flatten(0, 1), one[1].flatten()
    return F.cross_entropy(logits, targets), int((targets >= 0).sum())


def halves(one: Batch, k: int = 2) -> list[Batch]:
    """The batch as k micro-batches of equal size."""
    return list(zip(one[0].chunk(k), one[1].chunk(k), strict=True))


RESIDUALS = ("jacobian_residual", "forward_residual")


def assert_rows_equal(found: pd.DataFrame, expected: pd.DataFrame, rel: float = 1e-6) -> None:
    """Require equal rows in every column but the residuals, which are rounding errors."""
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected) > 0
    for name in set(expected.columns) - set(RESIDUALS):
        if expected[name].dtype == "float64":
            tolerance = rel * max(1e-12, float(expected[name].abs().max()))
            values = pytest.approx(expected[name].tolist(), rel=rel, abs=tolerance * 1e-3, nan_ok=True)
            assert found[name].tolist() == values, name
        else:
            pd.testing.assert_series_equal(found[name], expected[name])


def vectors(x: Tensor, grad: Tensor, gamma: Tensor, eps: float, *, rms: bool) -> dict[str, float]:
    """Some of a row's numbers, by explicit vectors per token. x: (…, d), the input; grad: (…, d), of the summed loss."""
    x, g = (a.detach().double().reshape(-1, a.shape[-1]) for a in (x, grad * gamma))
    leaf = x.clone().requires_grad_()
    y = F.rms_norm(leaf, x.shape[-1:], None, eps) if rms else F.layer_norm(leaf, x.shape[-1:], None, None, eps)
    (t,) = torch.autograd.grad(y, leaf, g)
    h, gc = (x, g) if rms else (x - x.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True))
    sigma = (h.square().mean(-1) + eps).sqrt()
    radial = (gc * h).sum(-1).square() / h.square().sum(-1)
    return {
        "radial_share": float(radial.sum() / gc.square().sum()),
        "r_mean": math.nan if rms else float((g - gc).square().sum() / g.square().sum()),
        "cos_center_vs_true": float(F.cosine_similarity(gc, t, dim=-1, eps=0).mean()),
        "flat_cos_ste": float((g * t).sum() / (g.norm() * t.norm())),
        "gain_center": float(gc.norm() / t.norm()),
        "sigma_mean": float(sigma.mean()),
        "sigma_q50": float(sigma.quantile(0.5)),
        "sum_B": float(radial.sum()),
        "n_tokens": len(x),
    }


def assert_row(row: pd.Series, expected: dict[str, float], rel: float = 1e-8) -> None:
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=rel, nan_ok=True), name
