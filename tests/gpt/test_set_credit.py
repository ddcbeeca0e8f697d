"""set_credit on models that are not ours: gradients by explicit matrices, what is refused, and what is left behind."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gradients import LAYERWISE, assert_close, assert_equal, build, feedback, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lnjac
from lnjac.gpt.methods import DirectFeedback, FeedbackMethod, Policy, Transpose

SIZES = (5, 7, 6, 3)


class MLP(nn.Module):
    """Three layers with tanh between them."""

    def __init__(self, checkpointed: bool | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = (nn.Linear(a, b) for a, b in pairwise(SIZES))
        self.checkpointed, self.drop = checkpointed, nn.Dropout(dropout)

    def middle(self, h: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.fc2(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        if self.checkpointed is None:
            return self.head(self.middle(h))
        return self.head(checkpoint(self.middle, h, use_reentrant=self.checkpointed))


def mlp(dtype: torch.dtype = torch.float64, **options: Any) -> MLP:
    torch.manual_seed(0)
    return MLP(**options).to(dtype)


X = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def backward(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    """The gradients of half the squared error by parameter, and by `x`."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    error(model(x), y).backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


def error(out: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (out - y.to(out.dtype)).pow(2).sum()


def by_hand(model: MLP, b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by explicit matrices: δ at each layer, passed back by B."""
    x, y = X.reshape(-1, 5), Y.reshape(-1, 3)
    w = {name: p.detach() for name, p in model.named_parameters()}
    h1 = torch.tanh(x @ w["fc1.weight"].T + w["fc1.bias"])
    h2 = torch.tanh(h1 @ w["fc2.weight"].T + w["fc2.bias"])
    d3 = h2 @ w["head.weight"].T + w["head.bias"] - y
    d2 = (d3 @ b["head"]) * (1 - h2**2)
    d1 = (d2 @ b["fc2"]) * (1 - h1**2)
    found = {"x": (d1 @ b["fc1"]).reshape(X.shape)}
    for name, delta, into in (("fc1", d1, x), ("fc2", d2, h1), ("head", d3, h2)):
        found |= {f"{name}.weight": delta.T @ into, f"{name}.bias": delta.sum(0)}
    return found


def b_of(method: str, model: nn.Module, credit: Any) -> dict[str, Tensor]:
    """Each layer's B from what is stored, as docs/methods.md has it."""
    b = {name: model.get_submodule(name).weight.detach().clone() for name in ("fc1", "fc2", "head")}
    for name in credit.layers:
        m = credit.state_dict()[f"{name}.feedback"].clone()
        b[name] = m if method in ("fa", "kp") else m.abs() * b[name].sign()
    return b


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("skip", [[], ["head"], ["fc*"]], ids=str)
def test_gradients_are_those_of_explicit_matrices(method: str, skip: list[str]) -> None:
    model = mlp()
    true, out = backward(model), model(X)
    with lnjac.set_credit(model, method, skip=skip, seed=1) as credit:
        assert credit.layers == [n for n in ("fc1", "fc2", "head") if not any(s.strip("*") in n for s in skip)]
        torch.testing.assert_close(model(X), out, rtol=1e-14, atol=1e-14)
        for _ in range(2):  # with the canary, and after it
            found = backward(model)
            assert_close(found, by_hand(model, b_of(method, model, credit)))
        assert not torch.allclose(found["x"], true["x"], rtol=0.1)
        with credit.backprop():
            assert_close(backward(model), true)


def stored(credit: Any) -> dict[str, Tensor]:
    return {name: m for name, m in credit.state_dict().items() if name.endswith(".feedback")}


@pytest.mark.parametrize("method", LAYERWISE)
def test_our_own_gpt_gets_what_its_config_gives_it(method: str) -> None:
    """One code path: a bp model given feedback has bit for bit the gradients and the feedback of method=…"""
    ours, given = build(f"method={method}", "seed=3"), build("method=bp", "seed=3")
    true, keys = gradients(given), given.state_dict().keys()
    with lnjac.set_credit(given, method, seed=3) as credit:
        assert_equal(stored(credit), feedback(ours))
        assert given.state_dict().keys() == keys
        assert_equal(gradients(given), gradients(ours))
    assert_equal(gradients(given), true)
    with pytest.raises(ValueError, match="has feedback already: undo it first"):
        lnjac.set_credit(ours, method)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_feedback_has_the_spread_of_the_weights(distribution: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 300))
    credit = lnjac.set_credit(model, distribution=distribution, scale=3.0, seed=1)
    for layer, b in zip(model, (credit.state_dict()[f"{i}.feedback"] for i in (0, 1)), strict=True):
        assert b.std().item() == pytest.approx(3 * layer.weight.std().item(), rel=0.02)
        assert (b.abs().max() <= 3 * layer.weight.std() * 3**0.5 * 1.02).item() == (distribution == "uniform")


def test_feedback_follows_the_seed_and_the_layers_name_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, again, few, other = (
        stored(lnjac.set_credit(mlp(), "fa", only=only, seed=seed))
        for only, seed in (("all", 1), ("all", 1), ("head", 1), ("all", 2))
    )
    assert_equal(one, again)
    assert torch.equal(few["head.feedback"], one["head.feedback"])
    assert not any(torch.equal(one[name], other[name]) for name in one)
    torch.set_rng_state(before)
    lnjac.set_credit(mlp(), "fa", seed=1)
    torch.manual_seed(0)
    MLP()
    expected = torch.get_rng_state()
    model = mlp()
    backward(lnjac.set_credit(model, "fa", seed=1).model)
    assert torch.equal(torch.get_rng_state(), expected)


# Models of others


class Conv1D(nn.Module):
    """As transformers has it: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize("method", LAYERWISE)
def test_conv1d_is_the_linear_layer_that_it_computes(method: str) -> None:
    plain, other = mlp(), mlp()
    for name in ("fc1", "head"):
        linear = other.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features).double()
        layer.weight.data, layer.bias.data = linear.weight.data.t().contiguous(), linear.bias.data
        other.set_submodule(name, layer)
    credits = [lnjac.set_credit(model, method, seed=1, decay=4.0) for model in (plain, other)]
    optimizers = [torch.optim.SGD(credit.groups(), lr=0.01) for credit in credits]
    for _ in range(3):
        found = []
        for model, credit, optimizer in zip((plain, other), credits, optimizers, strict=True):
            found.append(backward(model))
            credit.before_update()
            optimizer.step()
        for name in ("fc1.weight", "head.weight"):
            found[1][name] = found[1][name].t()
        assert_close(found[1], found[0])
        assert_close(*(credit.state_dict() for credit in reversed(credits)))
    credits[1].undo()
    assert type(other.fc1) is Conv1D


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


def test_encoder_has_the_gradients_of_a_detaching_oracle() -> None:
    model, twin = encoder(), encoder()
    x, y = (torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    credit = lnjac.set_credit(model, "fa", skip="out_proj", seed=1)
    assert credit.layers == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    for name in credit.layers:
        one, b = twin.get_submodule(name), credit.state_dict()[f"{name}.feedback"]

        def forward(x: Tensor, one: Any = one, b: Tensor = b) -> Tensor:
            return F.linear(x.detach(), one.weight, one.bias) + F.linear(x - x.detach(), b)

        one.forward = forward
    expected = backward(twin, x, y)
    assert_close(backward(model, x, y), expected)
    assert not torch.allclose(backward(encoder(), x, y)["x"], expected["x"], rtol=0.1)


def test_attention_of_torch_that_does_not_call_its_projection_is_named() -> None:
    model = encoder()
    lnjac.set_credit(model, "fa", seed=1)
    with pytest.raises(
        ValueError, match=r"self_attn\.out_proj: its weight's gradient is not gᵀ·x .*skip=\['out_proj'\]"
    ):
        model(torch.randn(2, 4, 8).double()).sum().backward()


# The canary


def bypasses() -> list[Any]:
    """What keeps errors from going through a layer's feedback, each done to a model with feedback."""

    def raw(model: MLP) -> None:
        """The layer is never called."""
        model.forward = lambda x: model.head(F.linear(F.linear(x, model.fc1.weight), model.fc2.weight))

    def beside(model: MLP) -> None:
        """The layer is called, and its weight is used beside it."""
        model.forward = lambda x: model.head(model.middle(torch.tanh(model.fc1(x)))) + (model.fc1.weight**2).sum()

    def wrapped(model: MLP) -> None:
        """Another library's wrapper calls the class's own forward."""
        model.fc2.forward = lambda x: nn.Linear.forward(model.fc2, x)

    return [pytest.param(bypass, id=bypass.__name__) for bypass in (raw, beside, wrapped)]


@pytest.mark.parametrize("bypass", bypasses())
def test_first_backward_refuses_a_bypass(bypass: Callable[[MLP], None]) -> None:
    model = mlp()
    credit = lnjac.set_credit(model, "fa", seed=1)
    bypass(model)
    with pytest.raises(
        ValueError, match=r"^fc[12]: its weight's gradient is not gᵀ·x of the layer's calls, [^\n]*skip=\['fc[12]'\]$"
    ):
        backward(model)
    credit.undo()


def test_first_backward_refuses_another_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the Function gave plain backprop, which it did under torch.compile once."""
    model = mlp()
    credit = lnjac.set_credit(model, "fa", seed=1)
    monkeypatch.setattr(type(model.fc2), "output", lambda self, x, weight, bias, back: F.linear(x, weight, bias))
    with pytest.raises(ValueError, match=r"^fc2: its input's gradient is not g·B"):
        backward(model)
    credit.undo()


def test_hooks_that_clip_a_weights_gradient_are_no_bypass() -> None:
    model = mlp()
    model.fc2.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    credit = lnjac.set_credit(model, "fa", seed=1)
    found = backward(model)
    expected = by_hand(model, b_of("fa", model, credit))
    expected["fc2.weight"] = expected["fc2.weight"].clamp(-0.01, 0.01)
    assert_close(found, expected)
    assert watched(credit) == []


def watched(credit: Any) -> list[str]:
    return [name for name, layer in credit.given if layer.canary is not None]


def test_canary_leaves_once_it_has_proof() -> None:
    model = mlp()
    credit = lnjac.set_credit(model, "fa", seed=1)
    with torch.no_grad():
        model(X)
    assert watched(credit) == ["fc1", "fc2", "head"]
    for g in (0.0, float("inf")):  # neither proves anything
        (model(X).sum() * g).backward()
        assert watched(credit) == ["fc1", "fc2", "head"]
    with credit.backprop():  # nor does another way back
        backward(model)
    assert watched(credit) == ["fc1", "fc2", "head"]
    model.head(torch.ones(2, 6).double()).sum().backward()
    assert watched(credit) == ["fc1", "fc2"]
    backward(model)
    assert watched(credit) == []
    assert all(not p._backward_hooks for p in model.parameters())


def test_calls_of_one_layer_add_up_and_frozen_layers_are_proven_by_their_input() -> None:
    model = mlp()
    model.forward = lambda x: (
        model.head(model.middle(torch.tanh(model.fc1(x)))) + model.head(torch.tanh(model.fc1(-x))[..., :6])
    )
    for p in model.fc2.parameters():
        p.requires_grad_(False)
    credit = lnjac.set_credit(model, "fa", seed=1)
    error(model(X), Y).backward()
    assert model.fc2.weight.grad is None
    assert watched(credit) == []


# How it is trained


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    found = []
    for checkpointed in (None, reentrant):
        model = mlp(checkpointed=checkpointed, dropout=0.2)
        credit = lnjac.set_credit(model, "frsf", seed=1)
        for _ in range(2):
            torch.manual_seed(5)
            found.append(backward(model))
        assert watched(credit) == []
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_methods_gradients_in_float32(dtype: torch.dtype) -> None:
    model, plain = mlp(torch.float32), mlp(torch.float32)
    expected = backward(lnjac.set_credit(plain, "fa", seed=1).model, X.float())
    credit = lnjac.set_credit(model, "fa", seed=1)
    with torch.autocast("cpu", dtype=dtype):
        found = backward(model, X.float())
    assert watched(credit) == []
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.05 * expected[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["compiled before", "compiled after"])
def test_compiled_models_have_the_same_gradients_and_lose_them(before: bool) -> None:
    torch._dynamo.reset()
    model, plain = mlp(), mlp()
    true = backward(plain)
    credit = lnjac.set_credit(plain, "frsf", seed=1)
    expected = backward(plain)
    compiled = torch.compile(model, backend="aot_eager")
    if before:
        assert_close(backward(compiled), {n if n == "x" else f"_orig_mod.{n}": g for n, g in true.items()})
    credit = lnjac.set_credit(compiled if before else model, "frsf", seed=1)
    for _ in range(3):
        found = {name.removeprefix("_orig_mod."): grad for name, grad in backward(compiled).items()}
        assert_close(found, expected)
    assert watched(credit) == []
    torch._dynamo.utils.counters.clear()
    backward(compiled)
    assert not torch._dynamo.utils.counters["graph_break"]  # it is one graph once the first pass is proven
    credit.undo()
    assert_close({name.removeprefix("_orig_mod."): grad for name, grad in backward(compiled).items()}, true)


def trained(method: str, updates: int, optimizer: Callable[[Any], torch.optim.Optimizer], scaled: bool = False) -> Any:
    """A model of float32 with its credit, updated in train mode, and the largest |W − B| of each update."""
    model = mlp(torch.float32, dropout=0.1).train()
    credit = lnjac.set_credit(model, method, seed=1, decay=5.0)
    steps = optimizer(credit.groups(weight_decay=0.01))
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    seen = []
    for _ in range(updates):
        state = credit.state_dict()
        seen.append({n: model.get_submodule(n).weight.detach() - state[f"{n}.feedback"] for n in credit.layers})
        steps.zero_grad()
        scaler.scale(error(model(X.float()), Y.float())).backward()
        credit.before_update()
        scaler.step(steps)
        scaler.update()
    return model, credit, seen


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("foreach", [False, True])
def test_kp_shrinks_the_gap_by_its_decay(foreach: bool, scaled: bool) -> None:
    _, _, gaps = trained("kp", 5, lambda groups: torch.optim.AdamW(groups, lr=0.02, foreach=foreach), scaled)
    for before, after in pairwise(gaps):
        assert_close(after, {name: gap * (1 - 0.02 * 5.0) for name, gap in before.items()}, tol=1e-4)


def test_kp_makes_the_same_updates_under_a_gradscaler() -> None:
    plain, scaled = (trained("kp", 3, lambda groups: torch.optim.SGD(groups, lr=0.02), on)[0] for on in (False, True))
    assert_close(dict(scaled.named_parameters()), dict(plain.named_parameters()), tol=1e-5)


def test_groups_hold_every_parameter_once() -> None:
    model = mlp()
    credit = lnjac.set_credit(model, "kp", skip="head", decay=4.0)
    mine, rest = credit.groups(weight_decay=0.25)
    b = [credit.state_dict()[f"{name}.feedback"] for name in ("fc1", "fc2")]
    assert list(map(id, mine["params"])) == list(
        map(id, [model.fc1.weight, model.fc2.weight, model.fc1.feedback, model.fc2.feedback])
    )
    assert all(torch.equal(one, other) for one, other in zip(mine["params"][2:], b, strict=True))
    assert (mine["weight_decay"], rest["weight_decay"]) == (4.0, 0.25)
    held = {id(p) for p in (*mine["params"], *rest["params"])}
    assert {id(p) for p in model.parameters()} < held
    assert len(held) == len(mine["params"]) + len(rest["params"]) == 8


@pytest.mark.parametrize("method", LAYERWISE)
def test_feedback_changes_where_the_method_changes_it(method: str) -> None:
    start, after = (stored(trained(method, updates, torch.optim.AdamW)[1]) for updates in (0, 2))
    assert {torch.equal(after[name], start[name]) for name in after} == {method not in ("brsf", "kp")}


@pytest.mark.parametrize("method", ["brsf", "kp"])
def test_forgotten_updates_of_feedback_are_refused(method: str) -> None:
    model = mlp()
    lnjac.set_credit(model, method, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    backward(model)  # two passes of one update
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"fc1 changed and its feedback did not: call credit\.before_update\(\) before"
    ):
        backward(model)


def test_kp_refuses_an_optimizer_without_its_feedback() -> None:
    model = mlp()
    credit = lnjac.set_credit(model, "kp", seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model)
    credit.before_update()
    optimizer.step()
    with pytest.raises(ValueError, match=r"make the optimizer of credit\.groups\(\)"):
        backward(model)


@pytest.mark.parametrize("method", ["brsf", "kp"])
def test_saved_feedback_goes_on(method: str) -> None:
    def step(model: MLP, credit: Any) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(credit.groups(), lr=0.1)
        found = backward(model)
        credit.before_update()
        optimizer.step()
        return found

    model, credit, _ = trained(method, 2, lambda groups: torch.optim.SGD(groups, lr=0.1))
    again = MLP()
    again.load_state_dict(model.state_dict())
    resumed = lnjac.set_credit(again, method, seed=1, decay=5.0)
    with pytest.raises(ValueError, match=r"does not fit at fc1\.feedback"):
        lnjac.set_credit(mlp(), method, only="head").load_state_dict(credit.state_dict())
    resumed.load_state_dict(credit.state_dict())
    for one in (model, again):
        one.double().eval()
    for _ in range(2):
        assert_equal(step(again, resumed), step(model, credit))


# What is left behind


def description(model: nn.Module) -> list[Any]:
    return [(type(m), set(vars(m)), set(m._buffers), set(m._non_persistent_buffers_set)) for m in model.modules()]


def test_undone_after_the_context_and_after_exceptions() -> None:
    model = mlp()
    true, before = backward(model), description(model)
    with pytest.raises(RuntimeError, match="shapes"), lnjac.set_credit(model, "kp", seed=1):
        backward(model, X[..., :2])
    assert description(model) == before
    assert_equal(backward(model), true)
    credit = lnjac.set_credit(model, "fa", seed=1)
    credit.undo()
    credit.undo()
    assert description(model) == before
    assert all(not p._backward_hooks for p in model.parameters())


def test_a_method_that_fails_leaves_the_model_as_it_was() -> None:
    class Failing(FeedbackMethod):
        def draw_feedback(self, layer: Any, generator: Any) -> Tensor:
            if layer.matrix.shape[0] == 3:
                raise RuntimeError("no draw")
            return super().draw_feedback(layer, generator)

    model = mlp()
    before = description(model)
    with pytest.raises(RuntimeError, match="no draw"):
        lnjac.set_credit(model, Failing("failing", Policy(*[Transpose.random] * 5), "normal", 1.0))
    assert description(model) == before


def test_state_dict_stays_the_authors_and_feedback_moves_with_the_model() -> None:
    model, keys = mlp(torch.float32), mlp().state_dict().keys()
    credit = lnjac.set_credit(model, "fa", seed=1)
    assert model.state_dict().keys() == keys
    assert len(list(model.parameters())) == 6
    model.load_state_dict(mlp().state_dict())
    model.double()
    assert_close(backward(model), by_hand(model, b_of("fa", model, credit)), tol=1e-9)
    twin = copy.deepcopy(model)
    assert_equal(backward(twin), backward(model))


def test_two_methods_share_a_model() -> None:
    model = mlp()
    fa, usf = lnjac.set_credit(model, "fa", only="head", seed=1), lnjac.set_credit(model, "usf", only=["fc*"], seed=1)
    b = b_of("usf", model, usf) | {"head": b_of("fa", model, fa)["head"]}
    assert_close(backward(model), by_hand(model, b))
    fa.undo()
    b["head"] = model.head.weight.detach()
    assert_close(backward(model), by_hand(model, b))


# What is refused


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Affine(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum()


def tied() -> nn.Module:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    return nn.ModuleDict({"wte": embedding, "fc": nn.Linear(4, 4), "head": head})


def forwarded() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    return nn.Sequential(layer)


REFUSED = {
    "tied": (
        tied,
        r"^head \(Linear\) shares one matrix as wte\.weight and head\.weight, .*: untie them, or .*skip=\['head'\]$",
    ),
    "subclass": (lambda: nn.Sequential(Scaled(3, 3)), r"^0 \(Scaled\) has a forward of its own: .*skip=\['0'\]$"),
    "wrapped": (forwarded, r"^0 \(Linear\) has a forward of its own"),
    "like Conv1D": (lambda: nn.Sequential(Affine(3, 3)), r"^0 \(Affine\) does not compute x·W \+ b"),
    "zeros": (lambda: nn.Sequential(nn.utils.skip_init(nn.Linear, 3, 3).requires_grad_(False)), None),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"^0 \(LazyLinear\) has no values yet"),
    "meta": (lambda: nn.Sequential(nn.Linear(3, 3, device="meta")), r"^0 \(Linear\) has no values yet"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
        "computes its weight from other",
    ),
    "none": (lambda: nn.Sequential(nn.LayerNorm(3)), r"no linear layer is called 'all': the model has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_have_feedback_are_named(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    if case == "zeros":
        nn.init.zeros_(model[0].weight)
        message = r"^0 \(Linear\) has a weight of zeros"
    before = description(model)
    with pytest.raises(ValueError, match=message) as found:
        lnjac.set_credit(model, "fa")
    assert "\n" not in str(found.value)
    assert description(model) == before


def test_tied_head_can_be_left_out() -> None:
    assert lnjac.set_credit(tied(), "fa", skip=["head"]).layers == ["fc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dfa"}, "no method of feedback is called 'dfa': choose one of fa, usf, frsf, brsf, kp"),
        ({"skip": ["lm_head"]}, "no linear layer is called 'lm_head': the model has fc1, fc2, head"),
        ({"only": "fc1", "skip": "fc1"}, "no linear layer is left"),
        ({"scale": 0.0}, "scale=0.0 must be positive and finite"),
        ({"method": "kp", "decay": -1.0}, "decay=-1.0 must be positive"),
        ({"distribution": "cauchy"}, "distribution='cauchy' is unknown: choose one of normal, uniform"),
        (
            {"method": DirectFeedback("dfa", Policy(*[Transpose.true] * 5), "normal", 1.0, "block", "logits", True)},
            "DirectFeedback is not feedback of layers alone",
        ),
    ],
)
def test_arguments_are_checked_before_anything_changes(arguments: dict[str, Any], message: str) -> None:
    model = mlp()
    before = description(model)
    with pytest.raises(ValueError, match=message):
        lnjac.set_credit(model, **arguments)
    assert description(model) == before
