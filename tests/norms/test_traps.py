"""Models of one's own with a trap each: every norm's rows are the oracle's numbers, or it is refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.walking import walk
from torch import Tensor, nn

import lnjac

D = 8


class OwnLayerNorm(nn.Module):
    """A LayerNorm with an optional bias that calls the function itself, as nanoGPT's."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class UpcastingRMSNorm(nn.Module):
    """An RMSNorm that computes in float32 whatever its input's dtype, as Llama's."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(d)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class PerHeadLayerNorm(nn.Module):
    """A LayerNorm over the last axis whose γ has an entry for each head too, as Cohere's of queries: (…, 2, D / 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, D // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.layer_norm(x, (D // 2,))


class Standardise(nn.Module):
    """A LayerNorm by its arithmetic alone: neither its name nor its attributes show it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = PerHeadLayerNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(-1, (2, D // 2))).flatten(-2)


class Gated(nn.Module):
    """An RMSNorm of its input times another's, as Mamba2's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = GatedRMSNorm(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.gate(x))


class GatedRMSNorm(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(D)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x * F.silu(gate))


class Residual(nn.Module):
    """Adds the stream to the norm's input within the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = AddingNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x), x)


class AddingNorm(nn.LayerNorm):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(x + residual)


class Conditional(nn.Module):
    """Scale and shift come from another input, as a diffusion transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.condition = AdaLayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, *self.condition(x.mean(1, keepdim=True)).chunk(2, dim=-1))


class AdaLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x) * (1 + scale) + shift


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = TwoNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        y, skip = self.norm(x)
        return y + skip


class TwoNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class GELUNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class Unnamed(nn.Module):
    """Calls F.layer_norm in the midst of other work, so that no module is the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(F.layer_norm(self.first(x), (D,))))


class Experts(nn.Module):
    """Two experts, each with its norm; the second gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return torch.cat([self.norms[0](flat), self.norms[1](flat[:0])]).view_as(x)


def around(inside: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), inside, nn.Linear(D, D)).double()
    with torch.no_grad():
        for p in model[1].parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).tanh().square().mean(), x[..., 0].numel()


X = torch.randn(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "inside",
    [
        OwnLayerNorm,
        UpcastingRMSNorm,
        Heads,
        Unnamed,
        Experts,
    ],
)
def test_each_norm_is_measured_with_the_true_numbers(inside: Callable[[], nn.Module]) -> None:
    seen = walk(around(inside()), X, loss)
    assert seen.faults == []
    assert seen.measured
    assert not seen.refused


@pytest.mark.parametrize("inside", [Gated, Residual, Conditional, Pair, lambda: GELUNorm(D)])
def test_of_what_is_no_norm_of_its_input_alone_the_function_is_measured(inside: Callable[[], nn.Module]) -> None:
    model = around(inside())
    seen = walk(model, X, loss)
    assert seen.faults == []
    assert set(seen.measured) == {"functional"}


def test_a_norm_that_nothing_shows_is_measured_by_an_adapter() -> None:
    model = around(Standardise())
    with pytest.raises(ValueError, match="has no LayerNorm or RMSNorm: give an adapter"):
        lnjac.probe(model).measure([X], loss)
    found = lnjac.probe(model, adapters={Standardise: lnjac.Layer(eps=1e-5)}).measure([X], loss)
    same = around(nn.LayerNorm(D, elementwise_affine=False))
    expected = lnjac.probe(same).measure([X], loss)
    columns = ["radial_share", "r_mean", "sigma_mean", "cos_center_vs_true"]
    assert found[columns].iloc[0].tolist() == pytest.approx(expected[columns].iloc[0].tolist(), rel=1e-9)


def test_the_oracle_knows_norms_from_other_modules() -> None:
    """A slower truth that cannot tell a LayerNorm from a GELU would pass everything."""

    def call_of(module: nn.Module, x: Tensor, *args: Tensor) -> oracle.Call:
        return oracle.Call("", 0, module, x, args, {}, "Tensor", same_shape=True)

    assert oracle.fit(call_of(nn.LayerNorm(D), X)).rms is False
    assert oracle.fit(call_of(nn.RMSNorm(D, eps=1e-6), X)).rms is True
    assert oracle.fit(call_of(nn.LayerNorm((5, D)), X)).dims == 2
    assert oracle.fit(call_of(AdaLayerNorm(D), X, torch.randn_like(X), X)).conditional
    for module in (nn.Identity(), nn.Linear(D, D), nn.GELU(), nn.Softmax(-1), nn.BatchNorm1d(5), GELUNorm(D)):
        assert oracle.fit(call_of(module, X)) is None


def test_a_walk_finds_a_wrong_number_and_a_missing_norm() -> None:
    """The probe is given another loss than the oracle, or one without the norm."""

    def then(later: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], tuple[Tensor, int]]:
        losses = iter([lambda model, x: loss(model, x)[0]])
        return lambda model, x: (next(losses, later)(model, x), 15)

    model = around(nn.LayerNorm(D))
    assert walk(model, X, then(lambda model, x: loss(model, x)[0])).faults == []
    assert walk(model, X, then(lambda model, x: model(x).sin().mean())).wrong
    assert walk(model, X, then(lambda model, x: model[2](model[0](x)).mean())).missing == ["1 (LayerNorm)"]
