"""Backwards given to norms of any model: outputs stay, input gradients are the formula's, parameters' the exact ones."""

import copy
import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.decomposed import NAMES
from support.loops import KINDS, SITES, D, OwnRMSNorm, assert_rows_equal, batch, loss, net
from torch import Tensor, nn

import lnjac.norms.backward as module_under_test
from lnjac.norms.backward import set_backward
from lnjac.norms.layers import Factors, Norm
from lnjac.norms.probe import probe

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EPS = 1e-3


class Gemma(nn.RMSNorm):
    """γ = 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class ChannelsFirst(nn.LayerNorm):
    """Normalises the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Calling(nn.Module):
    """Calls F.layer_norm, or F.rms_norm, under a name that is no norm's."""

    def __init__(self, rms: bool) -> None:
        super().__init__()
        self.rms, self.weight, self.bias = rms, nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, (D,), self.weight, EPS) + self.bias
        return F.layer_norm(x, (D,), self.weight, self.bias, EPS)


class Named(nn.Module):
    """Passes its input by name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(input=x)
        return out


class HeadNorm(nn.Module):
    """γ differs by head, the second last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4, D)), EPS

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.layer_norm(x, (D,), eps=self.eps)


def own() -> OwnRMSNorm:
    norm = OwnRMSNorm(D)
    norm.variance_epsilon = EPS
    return norm


NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "nn.LayerNorm": (lambda: nn.LayerNorm(D, eps=EPS), False),
    "nn.LayerNorm without affine": (lambda: nn.LayerNorm(D, eps=EPS, elementwise_affine=False), False),
    "by name": (lambda: Named(nn.LayerNorm(D, eps=EPS)), False),
    "nn.RMSNorm": (lambda: nn.RMSNorm(D, eps=EPS), True),
    "Gemma": (lambda: Gemma(D, eps=EPS), True),
    "channels first": (lambda: ChannelsFirst(D, eps=EPS), False),
    "own": (own, True),
    "by head": (HeadNorm, False),
    "F.layer_norm": (lambda: Calling(rms=False), False),
    "F.rms_norm": (lambda: Calling(rms=True), True),
    "Norm": (lambda: Norm(D, eps=EPS), False),
    "Norm, rms": (lambda: Norm(D, eps=EPS, rms=True), True),
}
"""The norms of models, and whether each is an RMSNorm."""


def around(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The norm behind an identity, its parameters away from 1 and 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), NORMS[kind][0]()).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) / 3
    return model


def given(kind: str) -> tuple[Tensor, Tensor]:
    """x and ∂L/∂y, of varying size: (6, D, 4) for channels first, else (6, 4, D)."""
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(6, 4, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * 2 * torch.rand(6, 4, 1, generator=generator, dtype=torch.float64) + 0.5
    grad = grad + x - 1
    return (x.movedim(-1, 1), grad.movedim(-1, 1)) if kind == "channels first" else (x, grad)


def run(model: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, ∂L/∂x and the parameters' gradients."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    slopes = torch.autograd.grad(y, [leaf, *model.parameters()], grad, retain_graph=False)
    return y.detach(), slopes[0], list(slopes[1:])


def formula(name: str, kind: str, model: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂x by the three switches of docs/maths.md."""
    rms, axis = NORMS[kind][1], 1 if kind == "channels first" else -1
    weight = next((p.detach() for n, p in model.named_parameters() if n.endswith("weight")), torch.ones(D).double())
    weight = 1 + weight if kind == "Gemma" else weight
    center, radial, scale = NAMES[name]
    x, g = x.movedim(axis, -1), grad.movedim(axis, -1) * weight
    mu = 0 if rms else x.mean(-1, keepdim=True)
    sigma = ((x - mu).square().mean(-1, keepdim=True) + EPS).sqrt()
    z = (x - mu) / sigma
    t = g
    if center and not rms:
        t = t - g.mean(-1, keepdim=True)
    if radial:
        t = t - z * (g * z).mean(-1, keepdim=True)
    return (t / sigma if scale else t).movedim(-1, axis)


def close(found: Iterable[Tensor], expected: Iterable[Tensor], tol: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def hooks_of(model: nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


# one norm


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", NORMS)
def test_the_input_gradient_is_the_formulas_and_all_else_the_exact_models(kind: str, name: str) -> None:
    model, (x, grad) = around(kind), given(kind)
    y, exact, slopes = run(model, x, grad)
    with set_backward(model, name):
        found = run(model, x, grad)
        with torch.no_grad():
            assert torch.equal(model(x), y)
    assert torch.equal(found[0], y)
    close([found[1]], [formula(name, kind, model, x, grad)])
    close(found[2], slopes)
    assert (found[1] - exact).abs().max() > 1e-3 or (NORMS[kind][1] and name == "radial_scale")
    close(run(model, x, grad)[1:2], [exact], 0)  # undone
    assert hooks_of(model) == 0


@pytest.mark.parametrize("kind", NORMS)
def test_exact_is_the_backward_that_there_was(kind: str) -> None:
    model, (x, grad) = around(kind), given(kind)
    expected = run(model, x, grad)
    with set_backward(model, "ste"), set_backward(model, "exact"):
        found = run(model, x, grad)
    assert torch.equal(found[0], expected[0])
    close([found[1], *found[2]], [expected[1], *expected[2]])


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", NORMS)
def test_outputs_stay_to_the_last_bit_and_gradients_to_rounding_in_low_precision(
    kind: str, dtype: torch.dtype, tol: float
) -> None:
    model, (x, grad) = around(kind, dtype), (t.to(dtype) for t in given(kind))
    y = model(x).detach()
    with set_backward(model, "center_scale"):
        found, slope, _ = run(model, x, grad)
    assert torch.equal(found, y)
    assert slope.dtype == dtype
    true = formula("center_scale", kind, model.double(), x.double(), grad.double())
    assert (slope.double() - true).norm() < tol * true.norm()


def test_autocast_keeps_the_output_and_its_dtype() -> None:
    model, (x, grad) = around("own", torch.float32), (t.float() for t in given("own"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x.bfloat16())
        with set_backward(model, "scale"):
            leaf = x.bfloat16().requires_grad_()
            found = model(leaf)
            (slope,) = torch.autograd.grad(found, leaf, grad.to(found.dtype))
    assert found.dtype == y.dtype
    assert torch.equal(found, y)
    true = formula("scale", "own", model.double(), x.bfloat16().double(), grad.double())
    assert (slope.double() - true).norm() < 2e-2 * true.norm()


def test_a_rule_of_ones_own() -> None:
    class Half:
        """Half of the identity."""

        name, sites = "half", ["all"]

        def surrogate(self, x: Tensor, eps: float, *, rms: bool) -> Tensor:
            return x / 2

    model, (x, grad) = around("nn.LayerNorm"), given("nn.LayerNorm")
    with set_backward(model, Half()):
        close([run(model, x, grad)[1]], [grad * model[1].weight.detach() / 2])


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own", "F.layer_norm", "channels first"])
def test_no_tokens_are_no_error(kind: str) -> None:
    model, (x, grad) = around(kind), given(kind)
    with set_backward(model, "ste"):
        _, slope, slopes = run(model, x[:0], grad[:0])
    assert slope.shape == x[:0].shape
    assert all(not s.any() for s in slopes)


# a model


@pytest.mark.parametrize("kind", KINDS)
def test_sites_choose_and_the_context_undoes(kind: str) -> None:
    sites = ["blocks.0.layer_norm_0", "blocks.1.layer_norm_0", "ln_f"] if kind == "functional" else SITES
    model, one = net(kind), batch()

    def slopes() -> list[Tensor]:
        return list(torch.autograd.grad(loss(model, one)[0], list(model.parameters())))

    exact = slopes()
    attributes = [sorted(vars(module)) for module in model.modules()]
    found = []
    for chosen in ([sites[0]], [sites[1]], ["ln_f"], sites, ["all"]):
        with set_backward(model, "ste", sites=chosen) as backwards:
            found.append(slopes())
            named = probe(model).measure([one], loss).set_index("site")["site_backward"].to_dict()
        assert named == {site: "ste" if site in chosen or chosen == ["all"] else "exact" for site in sites}
        assert backwards.sites == [site for site in chosen if "layer_norm" not in site and site != "all"] or chosen == [
            "all"
        ]
        close(slopes(), exact, 0)
        assert hooks_of(model) == 0
        assert [sorted(vars(module)) for module in model.modules()] == attributes
    close(found[3], found[4], 0)
    first = [next(p for p in some) for some in found]  # the embedding's gradient, which every norm's backward reaches
    for i in range(4):
        assert all((first[i] - other).abs().max() > 1e-6 for other in (exact[0], *first[:i]))


@pytest.mark.parametrize("how", ["with", "undo"])
def test_a_backward_is_undone_after_an_exception(how: str) -> None:
    model, (x, grad) = around("own"), given("own")
    exact = run(model, x, grad)[1]
    if how == "with":
        with pytest.raises(ArithmeticError), set_backward(model, "ste"):
            raise ArithmeticError
    else:
        backwards = set_backward(model, "ste")
        with pytest.raises(RuntimeError):  # the forward itself fails
            model(x[..., :3].clone().requires_grad_())
        close([run(model, x, grad)[1]], [formula("ste", "own", model, x, grad)])
        backwards.undo()
    close([run(model, x, grad)[1]], [exact], 0)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own", "F.layer_norm", "Norm"])
def test_of_nested_contexts_the_inner_is_in_force(kind: str) -> None:
    model, (x, grad) = around(kind), given(kind)

    def named() -> Any:
        measured = probe(model).measure([(x, grad)], lambda model, one: ((model(one[0]) * one[1]).sum() / 24, 24))
        return measured["site_backward"][0]

    with set_backward(model, "ste"):
        with set_backward(model, "center"):
            close([run(model, x, grad)[1]], [formula("center", kind, model, x, grad)])
            assert named() == "center"
        close([run(model, x, grad)[1]], [formula("ste", kind, model, x, grad)])
        assert named() == "ste"
    assert named() == "exact"


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own", "Norm"])
def test_backwards_may_be_undone_in_any_order(kind: str) -> None:
    model, (x, grad) = around(kind), given(kind)
    first, second = set_backward(model, "ste"), set_backward(model, "center")
    first.undo()
    close([run(model, x, grad)[1]], [formula("center", kind, model, x, grad)])
    second.undo()
    close([run(model, x, grad)[1]], [run(around(kind), x, grad)[1]], 0)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own", "Norm"])
def test_a_backward_stays_in_force_when_its_handle_is_dropped(kind: str) -> None:
    model, (x, grad) = around(kind), given(kind)
    set_backward(model, "ste")
    gc.collect()
    close([run(model, x, grad)[1]], [formula("ste", kind, model, x, grad)])


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own", "Norm"])
def test_a_copy_keeps_the_backward_of_its_own(kind: str) -> None:
    model, (x, grad) = around(kind), given(kind)
    with set_backward(model, "ste"):
        other = copy.deepcopy(model)
    expected = [formula("ste", kind, model, x, grad)]
    close([run(other, x, grad)[1]], expected)
    measured = probe(other).measure([x], lambda model, x: (model(x).square().mean(), 24))
    assert measured["site_backward"].tolist() == ["ste"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_recomputes_with_the_backward_given(kind: str, reentrant: bool) -> None:
    ends = []
    for checkpointed in (None, reentrant):
        model = net(kind, checkpointed=checkpointed)
        with set_backward(model, "center_scale"):
            loss(model, batch())[0].backward()
        ends.append([p.grad for p in model.parameters()])
    close(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nn.LayerNorm", pytest.param("own RMSNorm", marks=pytest.mark.rare)])
def test_a_compiled_model_gets_the_backward_and_loses_it(kind: str) -> None:
    model, sites = net(kind), ["ln", "ln_f"]
    compiled = torch.compile(model, backend="eager")

    def slope(running: nn.Module) -> Tensor:
        return torch.autograd.grad(loss(running, batch())[0], model.embed.weight)[0]

    try:
        exact = slope(compiled)
        with set_backward(compiled, "ste", sites=sites):
            found = slope(compiled)
        close([slope(compiled)], [exact])
    finally:
        torch._dynamo.reset()
    with set_backward(model, "ste", sites=sites):
        close([found], [slope(model)])
    assert (found - exact).abs().max() > 1e-6


def test_training_takes_another_way() -> None:
    """The first updates are those of a loop that replaces the gradient by hand."""

    def trained(model: nn.Module, steps: int = 3) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, batch())[0].backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    class Detached(nn.Module):
        """center_scale as Xu et al. 2019 write it: σ is detached."""

        def __init__(self, norm: nn.LayerNorm) -> None:
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x: Tensor) -> Tensor:
            h = x - x.mean(-1, keepdim=True)
            return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() * self.weight + self.bias

    model, plain, by_hand = net(), net(), net()
    with set_backward(model, "center_scale", sites="ln_f"):
        found = trained(model)
    by_hand.ln_f = Detached(by_hand.ln_f)
    expected = trained(by_hand)
    close(found, expected, 1e-9)
    assert max(float((a - b).abs().max()) for a, b in zip(found, trained(plain), strict=True)) > 1e-3


# the probe


@pytest.mark.parametrize("order", ["watch within", "set_backward within"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_says_and_verifies_the_backward_and_rows_are_of_the_exact_one(kind: str, order: str) -> None:
    """The gradient at ln_f, the last norm, is the exact model's; so are its numbers."""
    model, one = net(kind), batch()
    exact = probe(model).measure([one], loss)
    measuring = probe(model)

    def step() -> None:
        mean, tokens = loss(model, one)
        seen.tokens(tokens, mean)
        mean.backward()

    if order == "watch within":
        with set_backward(model, "center_scale"), measuring.watch() as seen:
            step()
    else:
        with measuring.watch() as seen, set_backward(model, "center_scale"):
            step()
    found = measuring.rows()
    assert set(found["site_backward"]) == {"center_scale"}
    assert set(measuring.coverage()["state"]) <= {"measured", "functional call"}
    assert (found["jacobian_residual"] < 1e-12).all()
    last = [
        table[table["site"] == "ln_f"].reset_index(drop=True).drop(columns="site_backward") for table in (found, exact)
    ]
    assert_rows_equal(*last, rel=1e-12)
    assert (found["radial_share"] / exact["radial_share"] - 1).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_declared_backward_that_gives_another_gradient_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module_under_test._with_gradient

    def broken(rule: Any, norm: Any, x: Tensor, output: Tensor) -> Tensor:
        return plain(rule, norm, x * 1.01 - 0.01 * x.detach(), output)

    monkeypatch.setattr(module_under_test, "_with_gradient", broken)
    model = net(kind)
    site = "blocks.1.layer_norm_0" if kind == "functional" else "blocks.1.ln"
    said = (
        rf"^{site} \(.*\) is not measured: its backward ste gives a gradient 0.01 of its size away from the formula's"
    )
    with set_backward(model, "ste", sites=site), pytest.raises(ValueError, match=said):
        probe(model).measure([batch()], loss)


def test_an_own_norm_whose_backward_is_not_its_rules_is_refused() -> None:
    class Wrong(Norm):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.backward_rule is None else y + 0.1 * (x - x.detach())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, D), Wrong(D, eps=EPS), nn.Linear(D, 7)).double()
    probe(model).measure([batch()], loss)
    with set_backward(model, "ste"), pytest.raises(ValueError, match=r"^1 \(Wrong\) is not measured: its backward ste"):
        probe(model).measure([batch()], loss)


# refusals


@pytest.mark.parametrize("pattern", ["ln_2", "blokcs.*", "block.0.layer_norm_0", "ln_g*", "rms_norm_x"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    model = net()
    with pytest.raises(
        ValueError, match=rf"^no norm is called '{pattern.replace('*', '.')}': the model has blocks.0.ln, "
    ):
        set_backward(model, "ste", sites=["ln_f", pattern])
    assert hooks_of(model) == 0


@pytest.mark.parametrize("pattern", ["blocks.1.layer_norm_3", "*.rms_norm_0", "layer_norm"])
def test_a_pattern_of_functional_calls_warns_if_none_came(pattern: str) -> None:
    model = net("functional")
    with (
        pytest.warns(UserWarning, match=rf"no norm called .*{pattern[1:]} was called: its backward was not replaced"),
        set_backward(model, "ste", sites=["ln_f", pattern]),
    ):
        loss(model, batch())[0].backward()


def test_a_functional_norm_that_ran_without_grad_alone_is_named() -> None:
    model = net("functional")
    with (
        pytest.warns(UserWarning, match=r"^blocks.0.layer_norm_0, blocks.1.layer_norm_0 ran without grad alone"),
        set_backward(model, "ste"),
        torch.no_grad(),
    ):
        loss(model, batch())


class ActivatedNorm(nn.Module):
    """No norm, whatever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.relu(x / x.norm(dim=-1, keepdim=True))


class ClippedNorm(nn.LayerNorm):
    """A LayerNorm of small inputs alone, which the chosen tokens do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=0.5) if x.abs().max() < 10 and x.shape[0] > 1 else x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [ActivatedNorm, lambda: ClippedNorm(D)])
def test_a_module_that_is_no_norm_is_refused_by_name_at_its_first_call(
    norm: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(D, D), "odd": norm()}).to(dtype)
    x = 3 * torch.randn(5, D, dtype=dtype)
    name = type(model["odd"]).__name__
    with (
        set_backward(model, "ste"),
        pytest.raises(ValueError, match=rf"^odd \({name}\) can have no other backward: .*$"),
    ):
        model["odd"](model["fc"](x))
    assert model["odd"](model["fc"](x)).isfinite().all()  # and runs as ever afterwards


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^no backward is called 'detach': choose one of exact, center_scale, "):
        set_backward(net(), "detach")
    assert set_backward(net(), Factors("ste", ["ln_f"], False, False, False)).sites == ["ln_f"]
