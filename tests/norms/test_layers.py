"""The switchable norms: the forward never moves, the input gradient is the closed form, the parameters' stay true."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lnjac.norms.backward import set_backward
from lnjac.norms.formulas import SURROGATES
from lnjac.norms.layers import Factors, Norm, matches, norms, unmatched

laws = settings(deadline=None, max_examples=40, derandomize=True)

# name -> ∂L/∂x from g = ∂L/∂z, ḡ, z·m and σ: the table of docs/maths.md
CLOSED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "exact": lambda g, mean, zm, sigma: (g - mean - zm) / sigma,
    "center_scale": lambda g, mean, zm, sigma: (g - mean) / sigma,
    "projected": lambda g, mean, zm, sigma: g - mean - zm,
    "ste": lambda g, mean, zm, sigma: g,
    "scale": lambda g, mean, zm, sigma: g / sigma,
    "radial_scale": lambda g, mean, zm, sigma: (g - zm) / sigma,
    "center": lambda g, mean, zm, sigma: g - mean,
    "radial": lambda g, mean, zm, sigma: g - zm,
}
NAMES = sorted(CLOSED)


def rule(name: str, *sites: str) -> Factors:
    center, radial, scale = (True, True, True) if name == "exact" else SURROGATES[name]
    return Factors(name, list(sites), center, radial, scale)


def build(
    name: str, d: int, eps: float, *, rms: bool = False, affine: bool = False, seed: int = 0, bias: bool = True
) -> Norm:
    norm = Norm(d, eps=eps, rms=rms, affine=affine, bias=bias).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_(generator=generator)
    norm.backward_rule = rule(name)
    return norm


def plain(norm: Norm, x: Tensor) -> Tensor:
    """What torch itself gives for the exact norm."""
    if norm.rms:
        return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def pulled(name: str, norm: Norm, x: Tensor, grad: Tensor) -> Tensor:
    """The closed form of ∂L/∂x for grad = ∂L/∂y. x, grad: (…, d)."""
    g = grad if norm.weight is None else grad * norm.weight.detach()
    mu = torch.zeros_like(x[..., :1]) if norm.rms else x.mean(-1, keepdim=True)
    sigma = (((x - mu) ** 2).mean(-1, keepdim=True) + norm.eps).sqrt()
    z = (x - mu) / sigma
    mean = torch.zeros_like(mu) if norm.rms else g.mean(-1, keepdim=True)
    return CLOSED[name](g, mean, z * (g * z).mean(-1, keepdim=True), sigma)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (2 * x + 1).to(dtype), (grad + 0.5).to(dtype)


def close(found: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


kinds = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "d": st.integers(2, 12),
        "eps": st.sampled_from([1e-8, 1e-5, 0.1, 10.0]),
        "rms": st.booleans(),
        "affine": st.booleans(),
        "seed": st.integers(0, 2**31),
        "bias": st.booleans(),
    }
)


# values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_forward_is_bit_identical_to_torchs(rms: bool, affine: bool, dtype: torch.dtype) -> None:
    for d in (7, 64):
        x, _ = draw(1, 5, 9, d, dtype=dtype)
        for name in NAMES:
            norm = build(name, d, 1e-5, rms=rms, affine=affine).to(dtype)
            y = norm(x)
            assert y.dtype == dtype
            assert torch.equal(y, plain(norm, x)), (name, d, float((y - plain(norm, x)).abs().max()))


def test_without_a_rule_the_norm_is_torchs_own() -> None:
    x, grad = draw(2, 4, 6)
    for ours, theirs in (
        (Norm(6, eps=1e-5), nn.LayerNorm(6, eps=1e-5)),
        (Norm(6, eps=1e-5, bias=False), nn.LayerNorm(6, eps=1e-5, bias=False)),
        (Norm(6, eps=1e-3, affine=False), nn.LayerNorm(6, eps=1e-3, elementwise_affine=False)),
        (Norm(6, eps=1e-5, rms=True), nn.RMSNorm(6, eps=1e-5)),
        (Norm(6, eps=1e-5, rms=True, affine=False), nn.RMSNorm(6, eps=1e-5, elementwise_affine=False)),
    ):
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (ours.double(), theirs.double()):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, *torch.autograd.grad(y, [leaf, *module.parameters()], grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# gradients


@laws
@given(kinds)
def test_input_gradient_is_the_closed_form(kind: dict) -> None:
    name, norm = kind["name"], build(**kind)
    x, grad = draw(kind["seed"], 2, 3, kind["d"])
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(norm(leaf), leaf, grad)[0], pulled(name, norm, x, grad))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rms", [False, True])
def test_every_name_with_and_without_affine(name: str, rms: bool) -> None:
    x, grad = draw(3, 4, 8)
    for affine in (False, True):
        for eps in (1e-5, 1.0):
            norm = build(name, 8, eps, rms=rms, affine=affine)
            leaf = x.clone().requires_grad_()
            close(torch.autograd.grad(norm(leaf), leaf, grad)[0], pulled(name, norm, x, grad))


@pytest.mark.parametrize("rms", [False, True])
def test_exact_is_autograds_own(rms: bool) -> None:
    x, grad = draw(4, 4, 8)
    norm = build("exact", 8, 0.1, rms=rms, affine=True)
    results = []
    for call in (norm, lambda leaf: plain(norm, leaf)):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(call(leaf), [leaf, *norm.parameters()], grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@laws
@given(kinds)
def test_parameter_gradients_stay_true(kind: dict) -> None:
    norm = build(**{**kind, "affine": True})
    x, grad = draw(kind["seed"], 5, kind["d"])
    found = torch.autograd.grad(norm(x.requires_grad_()), list(norm.parameters()), grad)
    expected = torch.autograd.grad(plain(norm, x), list(norm.parameters()), grad)
    assert len(found) == (1 if norm.rms or not kind["bias"] else 2)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_eight_names_are_eight_layernorms_and_four_rmsnorms() -> None:
    x, grad = draw(5, 4, 8)

    def gradients(rms: bool) -> dict[str, Tensor]:
        found = {}
        for name in NAMES:
            leaf = x.clone().requires_grad_()
            found[name] = torch.autograd.grad(build(name, 8, 0.1, rms=rms)(leaf), leaf, grad)[0]
        return found

    def distinct(found: dict[str, Tensor]) -> int:
        kept: list[Tensor] = []
        for g in found.values():
            if not any(torch.allclose(g, other, rtol=1e-12) for other in kept):
                kept.append(g)
        return len(kept)

    assert distinct(gradients(rms=False)) == 8
    found = gradients(rms=True)
    assert distinct(found) == 4
    for pair in (("exact", "radial_scale"), ("center_scale", "scale"), ("projected", "radial"), ("ste", "center")):
        close(found[pair[0]], found[pair[1]], 1e-12)


def test_the_surrogates_compose_through_a_network() -> None:
    """Two norms in a row, by hand: the chain rule sees the surrogate's gradient, the values do not."""
    x, grad = draw(6, 3, 6)
    first, second = build("ste", 6, 0.1, affine=True), build("center", 6, 0.1, affine=True, seed=1)
    leaf = x.clone().requires_grad_()
    found = torch.autograd.grad(second(torch.tanh(first(leaf))), leaf, grad)[0]
    y = plain(first, x).detach()
    middle = pulled("center", second, torch.tanh(y), grad) * (1 - torch.tanh(y) ** 2)
    close(found, pulled("ste", first, x, middle))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_large_offset_in_float32_is_finite_and_right(name: str, rms: bool) -> None:
    """μ/σ = 1e4: mean(x²) − μ² has lost every digit there."""
    x, grad = draw(7, 16, 64, dtype=torch.float32)
    x = x / 2 + 1e4
    norm = build(name, 64, 1e-5, rms=rms).float()
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    found = torch.autograd.grad(y, leaf, grad)[0]
    assert y.isfinite().all()
    expected = pulled(name, norm, x.double(), grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().mean()))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_under_autocast(name: str) -> None:
    norm = build(name, 16, 1e-5, affine=True).float()
    x, grad = draw(8, 4, 16, dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(leaf)
    found = torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]
    expected = pulled(name, norm, x.double(), grad.double())
    assert (found.double() - expected).norm() < 3e-2 * expected.norm()


# transforms


class Several(nn.Module):
    """Norms with different backwards in one graph."""

    def __init__(self, d: int, names: list[str]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            build(n, d, 0.1, affine=True, rms=n == "radial", seed=i) for i, n in enumerate(names)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = torch.tanh(norm(x))
        return x


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("eager", NAMES),
        pytest.param("aot_eager", NAMES, marks=pytest.mark.slow),
        pytest.param("inductor", ["projected"], marks=pytest.mark.rare),
    ],
)
def test_compiled_gradients_are_the_eager_ones(backend: str, names: list[str]) -> None:
    torch._dynamo.reset()
    model = Several(8, names)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, grad = draw(9, 3, 8)
    results = []
    for call in (model, compiled):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *model.parameters()], grad)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rms", [False, True])
def test_per_example_gradients_by_vmap(name: str, rms: bool) -> None:
    norm = build(name, 6, 0.1, affine=True, rms=rms)
    x, cotangent = draw(10, 4, 3, 6)
    params = dict(norm.named_parameters())

    def value(params: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        return (torch.func.functional_call(norm, params, (x,)) * cotangent).sum()

    by_param, by_x = torch.func.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(None, 0, 0))(params, x, cotangent)
    close(by_x, pulled(name, norm, x, cotangent))
    for one in range(4):
        leaf = x[one].clone().requires_grad_()
        expected = torch.autograd.grad(plain(norm, leaf), list(params.values()), cotangent[one])
        for key, g in zip(params, expected, strict=True):
            close(by_param[key][one], g)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rms", [False, True])
def test_forward_mode_is_the_transpose_of_reverse_mode(name: str, rms: bool) -> None:
    """⟨cotangent, J·tangent⟩ = ⟨Jᵀ·cotangent, tangent⟩, with J the surrogate in either mode."""
    norm = build(name, 6, 0.1, affine=True, rms=rms)
    x, cotangent = draw(11, 3, 6)
    tangent = draw(12, 3, 6)[0]
    y, pushed = torch.func.jvp(norm, (x,), (tangent,))
    close(y, plain(norm, x))
    close((pushed * cotangent).sum(-1), (pulled(name, norm, x, cotangent) * tangent).sum(-1))


@pytest.mark.parametrize("name", NAMES)
def test_full_jacobian_in_either_mode(name: str) -> None:
    norm = build(name, 5, 0.1)
    x = draw(13, 5)[0]
    identity = torch.eye(5, dtype=torch.float64)
    expected = torch.stack([pulled(name, norm, x, row) for row in identity])
    close(torch.func.jacrev(norm)(x), expected)
    close(torch.func.jacfwd(norm)(x), expected)


def test_no_grad_and_inference_mode_still_give_the_value() -> None:
    x, _ = draw(14, 3, 6)
    norm = build("projected", 6, 0.1)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = norm(x)
        assert not y.requires_grad
        assert torch.equal(y, plain(norm, x))


# sites


def gpt_like() -> nn.Module:
    block = lambda: nn.ModuleDict({"ln_1": Norm(4, eps=1e-5), "fc": nn.Linear(4, 4), "ln_2": Norm(4, eps=1e-5)})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(11)), "ln_f": Norm(4, eps=1e-5)})


BLOCKS = [f"blocks.{i}.{role}" for i in range(11) for role in ("ln_1", "ln_2")]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["all"], [*BLOCKS, "ln_f"]),
        (["ln_f"], ["ln_f"]),
        (["ln_1"], BLOCKS[::2]),
        (["blocks.*"], BLOCKS),
        (["blocks.1.*"], ["blocks.1.ln_1", "blocks.1.ln_2"]),
        (["blocks.1.ln_2"], ["blocks.1.ln_2"]),
        (["ln_?"], [*BLOCKS, "ln_f"]),
        (["*.ln_2", "ln_f"], [*BLOCKS[1::2], "ln_f"]),
        (["blocks.[02].ln_1", "blocks.10.*"], ["blocks.0.ln_1", "blocks.2.ln_1", "blocks.10.ln_1", "blocks.10.ln_2"]),
        (["blocks.1"], []),
        (["LN_F"], []),
        (["ln"], []),
        ([], []),
    ],
)
def test_patterns_mean_sites(patterns: list[str], expected: list[str]) -> None:
    model = gpt_like()
    assert [name for name, _ in norms(model)] == [*BLOCKS, "ln_f"]
    if unmatched([*BLOCKS, "ln_f"], rule("ste", *patterns)):
        with pytest.raises(ValueError, match=f"no norm is called {patterns[0]!r}: the model has blocks.0.ln_1"):
            set_backward(model, rule("ste", *patterns))
    else:
        assert set_backward(model, rule("ste", *patterns)).sites == expected
    assert [name for name, norm in norms(model) if norm.backward_rule is not None] == expected
    assert [site for site in [*BLOCKS, "ln_f"] if matches(site, patterns)] == expected


def test_a_second_rule_replaces_the_first_where_it_matches_until_it_is_undone() -> None:
    model = gpt_like()

    def named() -> dict[str, str]:
        return {name: n.backward_rule.name for name, n in norms(model) if n.backward_rule is not None}

    first = set_backward(model, rule("ste", "ln_1"))
    with set_backward(model, "center", sites=["ln_f", "blocks.0.*"]):
        assert named() == {"blocks.0.ln_1": "center", "blocks.0.ln_2": "center", "ln_f": "center"} | {
            name: "ste" for name in BLOCKS if name.endswith("ln_1") and not name.startswith("blocks.0")
        }
    assert named() == {name: "ste" for name in BLOCKS if name.endswith("ln_1")}
    first.undo()
    assert named() == {}
    x, grad = draw(15, 2, 4)
    norm = dict(norms(model.double()))["blocks.0.ln_1"]
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(norm(leaf), leaf, grad)[0], pulled("exact", norm, x, grad))


def test_unmatched_patterns_are_named() -> None:
    sites = [name for name, _ in norms(gpt_like())]
    assert unmatched(sites, rule("ste", "all", "ln_1", "blocks.*")) == []
    assert unmatched(sites, rule("ste", "ln_3", "ln_f", "block.*", "blocks.11.*")) == ["ln_3", "block.*", "blocks.11.*"]
