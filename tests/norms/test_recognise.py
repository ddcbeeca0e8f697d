"""Norms by what they compute: modules of many classes against autograd in float64 through their own forward."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.loops import assert_row, vectors
from support.walking import walk
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lnjac.norms.capture import capture
from lnjac.norms.probe import probe
from lnjac.norms.recognise import Layer, Rms, Unrecognised, candidates, is_candidate, recognise

D = 8


class OnePlusRMSNorm(nn.RMSNorm):
    """γ = 1 + weight, as Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class OnePlusLayerNorm(nn.LayerNorm):
    """γ = weight + 1, as Nemotron's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OwnRMSNorm(nn.Module):
    """An RMSNorm of no class of torch's, which upcasts, as Llama's and T5's do."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.scale, self.variance_epsilon = nn.Parameter(torch.ones(d)), 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float() if hidden.dtype != torch.float64 else hidden
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.scale * wide.to(hidden.dtype)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Normalises the second of four axes, as ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ActivatedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class DoubledLayerNorm(nn.LayerNorm):
    """Adds what it is given to its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class ClippedNorm(nn.LayerNorm):
    """Is a LayerNorm on small inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=0.5) if x.shape[0] > 1 and x.abs().max() < 10 else x)


class ConditionalNorm(nn.LayerNorm):
    """Scales by another input, as AdaLN does."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x) * (1 + condition)


class TwoNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class WithResidual(nn.LayerNorm):
    """Normalises its input and a residual together."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(x + residual)


class OwnActivatedRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class OwnDoubledRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class OwnConditionalRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (1 + condition)


class OwnTwoRMSNorm(OwnRMSNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


RMS = (OnePlusRMSNorm, OwnRMSNorm, nn.RMSNorm)


class Around(nn.Module):
    """A norm between two maps; channels lie second where the input has four axes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(D, D), norm, nn.Linear(D, D)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        channels_first = x.dim() == 4
        h = self.before(x)
        h = h.permute(0, 3, 1, 2) if channels_first else h
        h = self.norm(h, *more)
        h = h[0] if isinstance(h, tuple) else h
        return self.after(h.permute(0, 2, 3, 1) if channels_first else h).tanh().square().mean()


def around(norm: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Around:
    torch.manual_seed(seed)
    model = Around(norm).to(dtype)
    with torch.no_grad():
        for p in model.norm.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    return model(*batch), batch[0][..., 0].numel()


MEASURED = [
    (nn.LayerNorm(D), (3, 5)),
    (nn.LayerNorm(D, bias=False), (3, 5)),
    (nn.RMSNorm(D), (3, 5)),
    (nn.RMSNorm(D, eps=1e-5), (3, 5)),
    (OnePlusRMSNorm(D, eps=1e-6), (3, 5)),
    (OnePlusLayerNorm(D), (3, 5)),
    (OwnRMSNorm(), (3, 5)),
    (ChannelsFirstLayerNorm(D), (2, 4, 6)),
    (ChannelsFirstLayerNorm(D), (2, D, D)),
]


@pytest.mark.parametrize(
    ("norm", "shape"), MEASURED, ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else ""
)
def test_rows_are_the_truth_whatever_the_class(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = around(norm)
    x = torch.randn(*shape, D, dtype=torch.float64)
    seen = walk(model, (x,), loss)
    assert seen.faults == []
    assert seen.measured == {type(norm).__name__: 1}
    row = probe(model).measure([(x,)], loss).set_index("site").loc["norm"]
    assert row["norm"] == ("rmsnorm" if isinstance(norm, RMS) else "layernorm")
    assert row["jacobian_residual"] < 1e-6


REFUSED = [
    (ClippedNorm(D), (), "away from a LayerNorm's"),
    (OwnActivatedRMSNorm(), (), "constant added|away from"),
    (OwnDoubledRMSNorm(), (), "constant added|away from"),
    (OwnConditionalRMSNorm(), (torch.randn(3, 5, D, dtype=torch.float64),), "chosen tokens"),
    (OwnTwoRMSNorm(), (), "returns tuple"),
]


@pytest.mark.parametrize(("norm", "more", "said"), REFUSED, ids=lambda value: type(value).__name__)
def test_a_module_that_computes_something_else_is_refused_by_name(
    norm: nn.Module, more: tuple[Tensor, ...], said: str
) -> None:
    model, x = around(norm), torch.randn(3, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^norm \({type(norm).__name__}\) is not measured: .*({said})"):
        probe(model).measure([(x, *more)], loss)
    skipping = probe(model, unknown="skip")
    with pytest.raises(ValueError, match=r"no gradient arrived at any norm.*\(norm: refused\)"):
        skipping.measure([(x, *more)], loss)
    ((site, name, state, reason),) = skipping.coverage().itertuples(index=False)
    assert (site, name, state) == ("norm", type(norm).__name__, "refused")
    assert re.search(said, reason)


def functional_truth(model: Around, *batch: Tensor) -> dict[str, float]:
    """The radial share, and σ's mean, of the one F.layer_norm that the model calls."""
    seen: list[tuple[Tensor, Tensor, Any]] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = func(*args, **(kwargs or {}))
            if func is F.layer_norm:
                y.retain_grad()
                seen.append((args[0].detach(), y, kwargs["weight"]))
            return y

    with Watching():
        model(*batch).backward()
    model.zero_grad()
    ((h, y, weight),) = seen
    g = (y.grad * weight.detach()).reshape(-1, D)
    g, centred = (a - a.mean(-1, keepdim=True) for a in (g, h.reshape(-1, D)))
    radial = (g * centred / centred.norm(dim=-1, keepdim=True)).sum(-1).square()
    sigma = (centred.square().mean(-1) + 1e-5).sqrt().mean()
    return {"radial_share": float(radial.sum() / g.square().sum()), "sigma_mean": float(sigma)}


@pytest.mark.parametrize(
    ("norm", "more"),
    [
        (ActivatedLayerNorm(D), ()),
        (DoubledLayerNorm(D), ()),
        (ConditionalNorm(D), (torch.randn(3, 5, D, dtype=torch.float64),)),
        (TwoNorm(D), ()),
        (WithResidual(D), (torch.randn(3, 5, D, dtype=torch.float64),)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_function_within_a_module_that_is_no_norm_is_measured_in_its_place(
    norm: nn.Module, more: tuple[Tensor, ...]
) -> None:
    model, x = around(norm), torch.randn(3, 5, D, dtype=torch.float64)
    measuring = probe(model)
    row = measuring.measure([(x, *more)], loss).set_index("site").loc["norm.layer_norm_0"]
    for name, value in functional_truth(model, x, *more).items():
        assert row[name] == pytest.approx(value, rel=1e-9)
    states = measuring.coverage().set_index("site")["state"].to_dict()
    assert states == {"norm": "functional call", "norm.layer_norm_0": "functional call"}


def test_the_other_norms_are_measured_where_the_user_says_so() -> None:
    model = nn.Sequential(OwnActivatedRMSNorm(), nn.LayerNorm(D), nn.Linear(D, 1)).double()
    x = torch.randn(4, D, dtype=torch.float64)
    with capture(model, unknown="skip") as calls:
        model(x).sum().backward()
    assert [call.site for call in calls] == ["1"]
    with pytest.warns(UserWarning, match="0 \\(OwnActivatedRMSNorm\\) is not measured"), capture(model, unknown="warn"):
        model(x).sum().backward()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_constants_are_found_from_outputs_alone(kind: type, eps: float) -> None:
    class Nameless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind(7, eps=eps, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    module = Nameless()
    with torch.no_grad():
        module.inner.weight.copy_(torch.randn(7))
    found = recognise(module, torch.randn(3, 7, dtype=torch.float64))
    assert (found.rms, found.axis, found.dims) == (kind is nn.RMSNorm, -1, 1)
    assert found.eps == pytest.approx(eps, rel=1e-6, abs=1e-15)
    assert torch.allclose(found.weight, module.inner.weight.detach(), rtol=1e-6)


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Linear(D, D), nn.Tanh(), nn.Softmax(-1), nn.GroupNorm(2, D)], ids=repr
)
def test_what_is_no_norm_is_not_recognised(module: nn.Module) -> None:
    with pytest.raises(Unrecognised):
        recognise(module, torch.randn(3, D))


def test_candidates_are_told_by_class_or_name() -> None:
    assert all(map(is_candidate, [nn.LayerNorm(D), nn.RMSNorm(D), OwnRMSNorm(), ActivatedLayerNorm(D)]))
    assert not any(map(is_candidate, [nn.GroupNorm(2, D), nn.BatchNorm1d(D), nn.InstanceNorm1d(D), nn.Linear(D, D)]))

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inside = nn.LayerNorm(D), nn.Linear(D, D)

    assert list(candidates(nn.ModuleDict({"a": PreNorm(), "b": OwnRMSNorm()}))) == ["a.norm", "b"]


def test_an_input_changed_in_place_after_an_upcast_is_read_as_it_was() -> None:
    """A norm that casts keeps no reference to its input, so that autograd does not notice the change."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.after = nn.Linear(D, D), OwnRMSNorm(), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            y = self.norm(h)
            with torch.no_grad():
                h += 5
            return self.after(y).square().mean()

    model, x = InPlace().bfloat16(), torch.randn(6, D).bfloat16()
    with capture(model) as calls:
        model(x).backward()
    assert torch.equal(calls[0].x, model.embed(x).detach())


def test_a_forward_put_in_a_known_modules_place_is_measured_as_it_computes() -> None:
    norm = nn.LayerNorm(D)
    model, x = around(norm), torch.randn(3, 5, D, dtype=torch.float64)
    norm.forward = lambda h: F.layer_norm(h, (D,), norm.weight + 1, norm.bias, norm.eps)  # type: ignore[method-assign]
    row = probe(model).measure([(x,)], loss).iloc[0]
    expected = probe(around(OnePlusLayerNorm(D))).measure([(x,)], loss).iloc[0]
    for name in ("radial_share", "r_mean", "sum_A", "cos_center_vs_true", "sigma_mean"):
        assert row[name] == pytest.approx(expected[name], rel=1e-9)


# adapters and the plan


class Sized(nn.LayerNorm):
    """Is a norm of inputs of one size alone, so that chosen tokens do not show it: γ = 2·weight."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.square().mean() < 100
        return F.layer_norm(x, self.normalized_shape, 2 * self.weight, self.bias, self.eps)


class SizedRMSNorm(nn.Module):
    """The same of an RMSNorm over the second axis, its parameters under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.delta = nn.Parameter(torch.ones(D)), 1e-4

    def forward(self, x: Tensor) -> Tensor:
        assert x.square().mean() < 100
        h = x.movedim(1, -1)
        h = h / (h.square().mean(-1, keepdim=True) + self.delta).sqrt() * self.gain
        return h.movedim(-1, 1)


SIZED = Layer(gamma=lambda m: 2 * m.weight)
SECOND = Rms(axis=1, eps=lambda m: m.delta, gamma=lambda m: m.gain)


def seen_truth(model: Around, x: Tensor, gamma: Tensor, eps: float, axis: int, *, rms: bool) -> dict[str, float]:
    """The norm's numbers by explicit vectors, from what torch's hooks see in the summed loss."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        y.retain_grad()
        seen.extend((args[0], y))

    model.norm.register_forward_hook(keep)
    (x[..., 0].numel() * model(x)).backward()
    given, y = seen
    assert y.grad is not None
    return vectors(given.movedim(axis, -1), y.grad.movedim(axis, -1), gamma, eps, rms=rms)


@pytest.mark.parametrize("key", [Sized, "Sized", nn.LayerNorm, "LayerNorm"], ids=str)
def test_an_adapter_by_class_or_name_measures_what_outputs_cannot_show(key: Any) -> None:
    model, x = around(Sized(D)), torch.randn(3, 5, D, dtype=torch.float64)
    assert probe(model).measure([(x,)], loss)["site"].tolist() == ["norm.layer_norm_0"]  # the function within
    row = probe(model, adapters={key: SIZED}).measure([(x,)], loss).iloc[0]
    assert_row(row, seen_truth(model, x, 2 * model.norm.weight, 1e-5, -1, rms=False))
    assert (row["site"], row["norm"]) == ("norm", "layernorm")


def test_an_adapter_says_along_which_axis() -> None:
    """Of (2, D, D, D), in which no size shows the axis."""
    model, x = around(SizedRMSNorm()), torch.randn(2, D, D, D, dtype=torch.float64)
    row = probe(model, adapters={SizedRMSNorm: SECOND}).measure([(x,)], loss).iloc[0]
    assert_row(row, seen_truth(model, x, model.norm.gain, 1e-4, 1, rms=True))


WRONG = [
    (Layer(), "its output is .* of its size away from a LayerNorm's"),
    (Layer(gamma=lambda m: 2.01 * m.weight), "its output is .* away"),
    (Layer(gamma=lambda m: 2 * m.weight, eps=1e-2), "its output is .* away"),
    (Layer(gamma=lambda m: 2 * m.weight, beta=lambda m: None), "its output is .* away"),
    (Rms(gamma=lambda m: 2 * m.weight), "its output is .* away from a RMSNorm's"),
]


@pytest.mark.parametrize(("adapter", "said"), WRONG)
def test_a_wrong_adapter_is_refused(adapter: Layer, said: str) -> None:
    model, x = around(Sized(D)), torch.randn(3, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^norm \(Sized\) is not measured: {said}"):
        probe(model, adapters={"Sized": adapter}).measure([(x,)], loss)


def test_an_adapter_of_another_axis_or_without_an_eps_is_refused_in_one_line() -> None:
    model, x = around(SizedRMSNorm()), torch.randn(2, D, D, D, dtype=torch.float64)
    for wrong in (Rms(eps=1e-4, gamma=lambda m: m.gain), Rms(axis=2, eps=1e-4, gamma=lambda m: m.gain)):
        with pytest.raises(ValueError, match=r"^norm \(SizedRMSNorm\) is not measured: its output is .* away"):
            probe(model, adapters={SizedRMSNorm: wrong}).measure([(x,)], loss)
    with pytest.raises(ValueError, match=r"^norm .*: it has no attribute eps, .*: give eps in its adapter\n"):
        probe(model, adapters={SizedRMSNorm: Rms(axis=1)}).measure([(x,)], loss)
    unfit = [
        (Rms(axis=7, eps=1e-4), "its adapter gives axis 7 for an input of 4 axes"),
        (Rms(axis=1, eps=1e-4, gamma=lambda m: m.gain[:3]), "its adapter gives 3 entries of γ for vectors of 8"),
        (Rms(axis=1, eps=1e-4, gamma=lambda m: m.weight), "its adapter raises AttributeError: .*no attribute 'weight'"),
    ]
    for wrong, said in unfit:
        with pytest.raises(ValueError, match=rf"^norm \(SizedRMSNorm\) is not measured: {said}\n"):
            probe(model, adapters={SizedRMSNorm: wrong}).measure([(x,)], loss)


def test_an_adapter_makes_a_norm_of_a_module_of_any_name() -> None:
    model, x = around(Sizer()), torch.randn(3, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="has no LayerNorm or RMSNorm: give an adapter"):
        probe(model).measure([(x,)], loss)
    row = probe(model, adapters={"Sizer": Rms(gamma=lambda m: m.gain, eps=1e-6)}).measure([(x,)], loss).iloc[0]
    h = model.before(x).detach()
    assert row["sigma_mean"] == pytest.approx(float((h.square().mean(-1) + 1e-6).sqrt().mean()), rel=1e-12)


class Sizer(nn.Module):
    """An RMSNorm under a name that does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def test_the_plan_has_a_row_for_each_norm_like_module_with_its_check_or_the_reason() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "known": nn.LayerNorm(D),
            "rms": nn.RMSNorm(D),
            "plus": OnePlusRMSNorm(D),
            "own": OwnRMSNorm(),
            "first": ChannelsFirstLayerNorm(D),
            "bare": nn.RMSNorm(D, elementwise_affine=False),
            "sized": Sized(D),
            "odd": OwnActivatedRMSNorm(),
            "condition": ConditionalNorm(D),
            "group": nn.GroupNorm(2, D),
            "batch": nn.BatchNorm1d(D),
            "fc": nn.Linear(D, D),
        }
    )
    before = torch.get_rng_state()
    plan = probe(model, adapters={"Sized": SIZED}).plan().set_index("site")
    assert torch.equal(torch.get_rng_state(), before)
    kinds = {
        "known": "layernorm",
        "rms": "rmsnorm",
        "plus": "rmsnorm",
        "own": "rmsnorm",
        "first": "layernorm",
        "bare": "rmsnorm",
        "sized": "layernorm",
        "odd": "refused",
        "condition": "refused",
        "group": "other kind of norm",
        "batch": "other kind of norm",
    }
    assert plan["kind"].to_dict() == kinds
    assert plan["class"].to_dict() == {site: type(model[site]).__name__ for site in kinds}
    begins = {
        "known": "its class's attributes",
        "own": "its outputs on chosen tokens",
        "sized": "its adapter",
        "group": "",
    }
    for site, check in begins.items():
        assert plan["check"][site].startswith(check)
    assert (plan["reason"] != "").to_dict() == {site: kind == "refused" for site, kind in kinds.items()}
    assert "missing 1 required positional argument" in plan["reason"]["condition"]


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e-39, 1e-43])
def test_a_gradient_among_the_smallest_numbers_refuses_no_norm(scale: float) -> None:
    """Those of a run that is about to diverge: float32 holds few of their digits, or none."""
    norm = nn.LayerNorm(8)
    x = (500 * torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    factors = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
    with capture(norm) as calls:
        (norm(x) * (factors * scale)).sum().backward()
    assert len(calls) == 1


def test_unknown_is_one_of_three() -> None:
    with pytest.raises(ValueError, match=r"""^unknown='ignore': choose "raise", "warn" or "skip"$"""):
        probe(nn.LayerNorm(D), unknown="ignore")  # type: ignore[arg-type]
