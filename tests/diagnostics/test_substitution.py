"""Swaps against slow truths in float64: each replaced backward by a plain pass of its own; laws; a run's rows."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small import SMALL, corpus
from support.trained import config_of, perturb, tokens, trained
from torch import Tensor, nn

import lnjac
from lnjac.config.compose import compose
from lnjac.diagnostics import replacements
from lnjac.diagnostics import substitution as swap
from lnjac.diagnostics.settings import Parts
from lnjac.gpt import credit
from lnjac.gpt import optimizers as optim
from lnjac.norms import decompose as jacobian
from lnjac.norms.backward import set_backward
from lnjac.norms.formulas import EXACT, SURROGATES, Backward
from lnjac.norms.layers import Factors, matches, norms
from lnjac.runs import folder as runs
from lnjac.training import run as train
from lnjac.training.loop import Training

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]
ONE = [(tokens(3, 8), tokens(3, 8, seed=1))]
TWO = [*ONE, (tokens(2, 5, seed=2), tokens(2, 5, seed=3))]

CASES = {
    "bp": ("method=bp",),
    "fa, sigmoid, trained with ste": ("method=fa", "attn_mode=sigmoid", "ln_backward=ste"),
    "fa, rmsnorm": ("method=fa", "model.norm=rmsnorm"),
    "fa, linear, no affine": ("method=fa", "attn_mode=linear", "model.affine=false"),
    "bp, post-LN": ("method=bp", "model.placement=post"),
    "fa, peri-LN": ("method=fa", "model.placement=peri"),
    "bp, qk_norm, relu": ("method=bp", "attn_mode=relu", "model.qk_norm=true"),
    "bp, tied": ("method=bp", "model.tie=true"),
    "frozen": ("method=frozen",),
    "dfa": ("method=dfa",),
    "dfa, post-LN": ("method=dfa", "model.placement=post"),
    "dfa, sublayers, head's true gradient": ("method=dfa", "method.inject=sublayer", "method.cut_head=false"),
    "kp": ("method=kp",),
}
FAST = ("fa, rmsnorm", "dfa")


def subject(*overrides: str, updates: int = 2) -> Training:
    """A run after some updates, moved to where no gradient is near zero."""
    training = trained(config_of(*overrides), updates)
    perturb(training.model)
    training.model.eval()
    return training


def measured(training: Training, batches: Sequence[Any] = ONE, parts: Parts = Parts.tensor) -> Rows:
    training.diagnostic_batches = lambda: list(batches)
    return swap.measure(training, parts)


def row(rows: Rows, place: str, surrogate: str, part: str = "all", radial: float | None = None) -> dict[str, Any]:
    (found,) = [
        r
        for r in rows
        if (r["place"], r["surrogate"], r["part"]) == (place, surrogate, part) and radial in (None, r["radial"])
    ]
    return found


def gradients(training: Training, batches: Sequence[Any] = ONE) -> dict[str, Tensor]:
    """By plain backward passes, of the mean over all tokens, of what the method trains."""
    n = sum(targets.numel() for _, targets in batches)
    training.model.zero_grad()
    for idx, targets in batches:
        (training.model(idx, targets)[1] * (targets.numel() / n)).backward()
    named = {name: p for name, p in training.trained.items() if "feedback" not in name}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}


@dataclasses.dataclass
class Dose:
    """(g − ḡ − λ·z·m)/σ, written with detach."""

    radial: float
    sites: list[str]
    name: str = "dose"

    def surrogate(self, x: Tensor, eps: float, *, rms: bool) -> Tensor:
        c = x.detach() if rms else x.detach() - x.detach().mean(-1, keepdim=True)
        sigma = (c.square().mean(-1, keepdim=True) + eps).sqrt()
        z = c / sigma
        mean = 0.0 if rms else x.mean(-1, keepdim=True)
        return (x - mean - self.radial * z * (x * z).mean(-1, keepdim=True)) / sigma


def truths(training: Training, batches: Sequence[Any]) -> Iterator[tuple[str, str, float, dict[str, Tensor]]]:
    """Each place, surrogate and dose with its gradient, by a pass of its own."""
    model = training.model
    for place, sites in swap.places(model).items():
        for name, (center, radial, scale) in SURROGATES.items():
            with set_backward(model, Factors(name, sites, center, bool(radial), scale)):
                found = gradients(training, batches)
            yield place, name, radial, found
        for radial in (0.25, 0.5, 0.75):
            with set_backward(model, Dose(radial, sites)):
                found = gradients(training, batches)
            yield place, "partial_radial", radial, found


def flat(gradient: dict[str, Tensor], part: str = "all") -> Tensor:
    """Of the whole, a block or a tensor, by the names' beginnings."""
    starts = {"all": "", "embedding": ("wte.", "wpe.")}.get(part, part if part in gradient else f"{part}.")
    return torch.cat([g.flatten() for name, g in gradient.items() if name.startswith(starts)])


def cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(
    ("case", "batches"),
    [
        pytest.param(case, TWO if case in ("bp", "dfa") else ONE, marks=[pytest.mark.slow] * (case not in FAST))
        for case in CASES
    ],
)
def test_every_swap_is_the_gradient_of_a_pass_of_its_own(case: str, batches: Sequence[Any]) -> None:
    training = subject(*CASES[case])
    found = {(r["place"], r["surrogate"], r["radial"], r["part"]): r for r in measured(training, batches)}
    set_backward(training.model, Factors("exact", ["all"], True, True, True))
    exact = gradients(training, batches)
    parts = {part for *_, part in found}
    assert parts == {"all", *exact, *("embedding" if n[:3] in ("wte", "wpe") else swap.part_of(n) for n in exact)}
    seen = 0
    for place, surrogate, radial, truth in truths(training, batches):
        for part in parts:
            mine, hat, g = found[place, surrogate, radial, part], flat(truth, part), flat(exact, part)
            assert mine["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-9)
            if mine["interpretable"]:
                assert mine["grad_cos"] == pytest.approx(cos(hat, g), abs=1e-9), (place, surrogate, part)
                assert mine["grad_gain"] == pytest.approx(float(hat.norm() / g.norm()), rel=1e-9)
            seen += 1
    assert seen + len(parts) == len(found)  # and the rows of the exact backward


def test_a_shared_norm_is_one_site_of_several_calls() -> None:
    training = subject("method=fa", updates=0)
    training.model.blocks[1].ln_1 = training.model.blocks[0].ln_1
    training.trained = optim.trained(training.model, training.config.method)
    rows = measured(training)
    exact = flat(gradients(training))
    for place, surrogate, radial, truth in truths(training, ONE):
        assert row(rows, place, surrogate, radial=radial)["grad_cos"] == pytest.approx(
            cos(flat(truth), exact), abs=1e-9
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adamw", "optimizer.weight_decay=0.3"),
        ("optimizer=adamw", "optimizer.grad_clip=0.01"),
        ("optimizer=sgd", "optimizer.nesterov=true", "optimizer.weight_decay=0.3"),
    ],
)
def test_updates_are_those_of_a_copied_optimizer(overrides: tuple[str, ...]) -> None:
    training = subject("method=fa", *overrides)
    rows = measured(training)

    def update(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the optimizer's real step, weight decay switched off, from a copy of parameters and state."""
        copied = copy.deepcopy(training.optimizer)
        ours = [p for group in training.optimizer.param_groups for p in group["params"]]
        theirs = [p for group in copied.param_groups for p in group["params"]]
        names = {id(p): name for name, p in training.trained.items()}
        for group in copied.param_groups:
            group["weight_decay"] = 0.0
        for mine, p in zip(ours, theirs, strict=True):
            p.grad = gradient[names[id(mine)]].clone()
        if training.config.optimizer.grad_clip is not None:
            nn.utils.clip_grad_norm_(theirs, training.config.optimizer.grad_clip)
        copied.step()
        return {names[id(mine)]: (p - mine).detach() for mine, p in zip(ours, theirs, strict=True)}

    exact = update(gradients(training))
    for place, surrogate, radial, truth in truths(training, ONE):
        if place not in ("ln_f", "all"):
            continue
        hat = update(truth)
        for part in ("all", "blocks.0", "blocks.1.attn.qkv.weight", "ln_f.weight"):
            mine = row(rows, place, surrogate, part, radial)
            assert mine["update_cos"] == pytest.approx(cos(flat(hat, part), flat(exact, part)), abs=1e-9)
            gain = float(flat(hat, part).norm() / flat(exact, part).norm())
            assert mine["update_gain"] == pytest.approx(gain, rel=1e-7)


def test_adamws_preconditioner_by_hand() -> None:
    settings = config_of("optimizer=adamw", "optimizer.eps=1e-3").optimizer
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = settings.build([{"params": [p], "weight_decay": 0.0}])
    assert settings.preconditioner(optimizer, p) is None
    v = [0.0, 0.0, 0.0]
    for gradient in ([1.0, -2.0, 0.0], [0.5, 0.1, 0.0], [-3.0, 0.2, 0.0]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        v = [0.999 * old + 0.001 * g**2 for old, g in zip(v, gradient, strict=True)]
    expected = [1 / (math.sqrt(old / (1 - 0.999**3)) + 1e-3) for old in v]
    found = settings.preconditioner(optimizer, p)
    assert found is not None
    assert found.tolist() == pytest.approx([*expected[:2], 0.0], rel=1e-9)


@pytest.mark.parametrize("overrides", [("method=fa",), ("method=dfa", "optimizer=sgd")])
def test_preconditioned_rows_and_descent_by_plain_sums(overrides: tuple[str, ...]) -> None:
    training = subject(*overrides)
    rows, settings = measured(training), training.config.optimizer
    p = {n: settings.preconditioner(training.optimizer, x) for n, x in training.trained.items()}
    exact = gradients(training)
    with credit.backprop(training.model):
        true = flat(gradients(training))
    scale = flat(p)
    for place, surrogate, radial, truth in truths(training, ONE):
        mine, step = row(rows, place, surrogate, radial=radial), scale * flat(truth)
        assert mine["precond_cos"] == pytest.approx(cos(step, scale * flat(exact)), abs=1e-9)
        assert mine["precond_gain"] == pytest.approx(float(step.norm() / (scale * flat(exact)).norm()), rel=1e-9)
        assert mine["descent"] == pytest.approx(float(true @ step / (true @ (scale * true))), rel=1e-8)
        assert mine["predicted_nats"] == pytest.approx(settings.lr * float(true @ step), rel=1e-8)


@pytest.mark.parametrize("method", ["bp", "fa", "dfa"])
def test_small_steps_decrease_the_loss_as_predicted(method: str) -> None:
    training = subject(f"method={method}", "optimizer.eps=0.1")
    errors = []
    for lr in (1e-5, 1e-6):
        optimizer = dataclasses.replace(training.config.optimizer, lr=lr)
        training.config = dataclasses.replace(training.config, optimizer=optimizer)
        rows = measured(training)
        whole = [r for r in rows if r["part"] == "all" and r["decrease_nats"] is not None]
        assert {r["place"] for r in whole} == {"ln_1", "ln_2", "ln_f", "all"}
        errors.append([abs(r["decrease_nats"] - r["predicted_nats"]) / lr for r in whole])
    for larger, smaller in zip(*errors, strict=True):  # the second-order term falls as lr² does
        assert smaller < larger / 5 + 1e-6
    assert (row(rows, "all", "exact")["descent"] == pytest.approx(1)) == (method == "bp")


def test_before_the_first_update_adamw_has_no_preconditioner_but_updates() -> None:
    training = subject("method=bp", updates=0)
    for r in measured(training):
        assert [r[name] for name in ("precond_cos", "precond_gain", "descent", "predicted_nats", "decrease_nats")] == [
            None
        ] * 5
        assert not r["interpretable"] or -1 <= r["update_cos"] <= 1 + 1e-12


def test_ln_f_alone_is_exact_where_dfa_cuts_the_head() -> None:
    training = subject("method=dfa")
    for r in measured(training):
        if r["place"] == "ln_f" and r["interpretable"]:
            assert r["grad_cos"] == r["grad_gain"] == r["update_cos"] == 1


def test_a_vanished_gradient_is_not_compared() -> None:
    training = subject("method=bp")
    with torch.no_grad():
        training.model.blocks[1].mlp.proj.weight.zero_()
    rows = measured(training)
    dead = [r for r in rows if r["part"].startswith("blocks.1.mlp.fc")]
    assert dead
    for r in dead:
        assert r["interpretable"] is False
        assert all(math.isnan(r[name]) for name in ("grad_cos", "update_cos", "precond_gain", "descent"))
    assert row(rows, "all", "ste")["interpretable"] is True


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_rounding_noise_is_not_compared_in_any_precision(precision: str) -> None:
    """The bias of a norm of keys moves every score of a query alike, to which softmax is deaf."""
    training = trained(compose(*SMALL, "seed=5", "model.qk_norm=true", f"precision={precision}"), 3)
    rows = measured(training)
    for r in rows:
        if r["part"].endswith("k_norm.bias"):
            assert (r["interpretable"], math.isnan(r["grad_cos"])) == (False, True)
        elif r["level"] == "tensor":
            assert r["interpretable"]


def test_levels_are_as_fine_as_asked() -> None:
    training = subject("method=bp")
    levels = {parts: {r["level"] for r in measured(training, parts=parts)} for parts in Parts}
    assert levels == {
        Parts.model: {"model"},
        Parts.block: {"model", "block"},
        Parts.tensor: {"model", "block", "tensor"},
    }


def test_a_gradient_that_is_not_finite_gives_no_rows() -> None:
    training = subject("method=bp")
    with torch.no_grad():
        training.model.wte.weight.fill_(math.inf)
    assert measured(training) == []


# The parts


@pytest.mark.parametrize("rms", [False, True])
def test_pull_back_spans_the_eight_backwards_and_every_change_is_made_of_the_basis(rms: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    z, rstd = jacobian.normalise(x, 0.1, rms=rms)
    exact = jacobian.pull_back(g, z, rstd, rms=rms)
    torch.testing.assert_close(jacobian.pull_back(g, z, rstd, EXACT, rms=rms), exact)
    parts = replacements.basis(g, z, rstd, rms=rms)
    assert len(parts) == (3 if rms else 5)
    for name, switches in SURROGATES.items():
        found = jacobian.pull_back(g, z, rstd, SURROGATES[name], rms=rms)
        torch.testing.assert_close(found, jacobian.pull_back(g, z, rstd, switches, rms=rms))
    for doses in itertools.product([True, False], [0, 0.3, 1], [True, False]):
        change = jacobian.pull_back(g, z, rstd, Backward(*doses), rms=rms) - exact
        made = sum(
            c * part for c, part in zip(replacements.coefficients(Backward(*doses), rms=rms), parts, strict=True)
        )
        torch.testing.assert_close(made, change)


def test_doses_run_from_center_scale_to_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    g, z = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    rstd = torch.rand(4, 1, generator=generator, dtype=torch.float64)
    ends = [jacobian.pull_back(g, z, rstd, Backward(True, radial, True)) for radial in (0.0, 1.0)]
    assert torch.equal(ends[0], jacobian.pull_back(g, z, rstd, SURROGATES["center_scale"]))
    assert torch.equal(ends[1], jacobian.pull_back(g, z, rstd))
    half = jacobian.pull_back(g, z, rstd, Backward(True, 0.5, True))
    torch.testing.assert_close(half, (ends[0] + ends[1]) / 2)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2), ("fp64", 1e-12)])
def test_the_forward_value_is_the_ordinary_one_to_the_last_bit_and_the_gradient_is_close(
    precision: str, tolerance: float
) -> None:
    config = compose("model=tiny", "model.qk_norm=true", f"precision={precision}", "method=fa")
    training = Training(config, corpus())
    batch = training.diagnostic_batches()[0]
    rules = [module.backward_rule for _, module in norms(training.model)]
    plain = training.loss(training.model, batch)[0]
    with replacements.recording(training.model) as calls:
        recorded = training.loss(training.model, batch)[0]
    assert torch.equal(plain, recorded)
    assert len(calls) == len(norms(training.model))
    assert [module.backward_rule for _, module in norms(training.model)] == rules
    parameters = list(training.trained.values())
    expected = torch.autograd.grad(plain, parameters)
    exact = replacements.Graph(training.model, batch, training.loss, parameters, batch[1].numel()).exact
    off = sum((a - b).square().sum() for a, b in zip(exact, expected, strict=True))
    assert float(off) < tolerance**2 * float(sum(g.square().sum() for g in expected))


@pytest.mark.parametrize(
    ("case", "layers_below"),
    [
        (("method=bp",), {"blocks.0.ln_1": 0, "blocks.1.ln_1": 4, "ln_f": 8, "*.ln_1": 4}),
        (("method=bp", "model.tie=true"), {"*.ln_1": 4}),
        (("method=bp", "model.qk_norm=true"), {"*.q_norm": 5}),
        (("method=dfa",), {"*.ln_1": 0, "*.ln_2": 4}),  # each block's own attention
    ],
)
def test_a_swap_costs_at_most_the_layers_below_it(
    monkeypatch: pytest.MonkeyPatch, case: tuple[str, ...], layers_below: dict[str, int]
) -> None:
    training = subject(*case)
    graph = replacements.Graph(training.model, ONE[0], training.loss, list(training.trained.values()), 24)
    passed: list[int] = []
    outer = credit._outer
    monkeypatch.setattr(credit, "_outer", lambda g, x: passed.append(1) or outer(g, x))  # once for each linear layer
    swaps = list(SURROGATES.values())
    for pattern, layers in layers_below.items():
        sites = [site for site, _ in norms(training.model) if matches(site, [pattern])]
        passed.clear()
        assert len(list(graph.swapped(sites, swaps))) == len(swaps)
        assert len(passed) == (len(swaps) if len(sites) > 1 else 5) * layers


@given(st.lists(st.floats(0, 2), min_size=7, max_size=7))
@settings(deadline=None, max_examples=30)
def test_shapley_shares_are_means_over_the_orders(costs: list[float]) -> None:
    damage = dict(zip(SURROGATES.values(), costs, strict=True)) | {EXACT: 0.0}
    expected = dict.fromkeys(Backward._fields, 0.0)
    for order in itertools.permutations(Backward._fields):
        now = EXACT
        for name in order:
            after = now._replace(**{name: False})
            expected[name] += (damage[after] - damage[now]) / 6
            now = after
    found = swap.shapley(damage)
    assert found == pytest.approx(expected, abs=1e-12)
    assert sum(found.values()) == pytest.approx(damage[SURROGATES["ste"]], abs=1e-12)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_compounding_and_shapley_belong_to_the_rows_they_are_of(norm: str) -> None:
    training = subject("method=bp", f"model.norm={norm}")
    rows = [r for r in measured(training) if r["level"] == "model"]
    damage = {(r["place"], r["surrogate"], r["radial"]): 1 - r["grad_cos"] for r in rows}
    for r in rows:
        key = (r["surrogate"], r["radial"])
        sites = swap.places(training.model)[r["place"]]
        if len(sites) == 1 or r["surrogate"] == "exact":
            assert r["compounding"] is None
        elif (alone := sum(damage[site, *key] for site in sites)) > 1e-9:
            assert r["compounding"] == pytest.approx(damage[r["place"], *key] / alone, rel=1e-6)
        shares = [r[f"shapley_{name}"] for name in Backward._fields]
        if r["surrogate"] == "ste":
            assert sum(shares) == pytest.approx(1 - r["grad_cos"], abs=1e-12)
            assert norm == "layernorm" or shares[0] == pytest.approx(0, abs=1e-12)
        else:
            assert shares == [None] * 3


# A run


def test_measuring_leaves_everything_as_it_was() -> None:
    training = subject("method=kp", "ln_backward=ste")
    gradients(training)
    model, optimizer = training.model, training.optimizer
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    held = {
        name: (p.data_ptr(), p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    rules = [module.backward_rule for _, module in norms(model)]
    generator, mode = torch.get_rng_state(), model.training
    assert measured(training)
    for name, p in model.named_parameters():
        where, grad, value = held[name]
        assert p.data_ptr() == where
        assert p.grad is grad
        assert value is None or torch.equal(value, p.grad)
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items())
    for i, moments in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][i][name]) for name, value in moments.items())
    assert [module.backward_rule for _, module in norms(model)] == rules
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training == mode


def finished(folder: Path, *overrides: str) -> lnjac.Run:
    assert train.run(compose(*SMALL, *overrides), folder, corpus()) == runs.DONE
    return lnjac.load_run(folder)


def test_a_run_with_swaps_trains_as_without_and_writes_their_table(tmp_path: Path) -> None:
    every = (
        "diagnostics.schedule=linear",
        "diagnostics.every=1",
        "eval.every=1",
        "model.dropout=0.1",
        "optimizer.grad_clip=1.0",
    )
    off = finished(tmp_path / "off", *every)
    on = finished(tmp_path / "on", *every, "diagnostics=swap")
    assert on.curve.equals(off.curve)
    for (name, mine), theirs in zip(on.model().state_dict().items(), off.model().state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    swaps = on.table("swaps")
    assert set(swaps["step"]) == set(on.layers["step"])
    assert not swaps.duplicated(["run_id", "diag_id", "step", "place", "surrogate", "radial", "part"]).any()
    assert set(swaps["surrogate"]) == {*SURROGATES, "partial_radial", "exact"}
    assert swaps["precond_cos"].notna().groupby(swaps["step"]).any().tolist() == [False, True, True, True]
    with pytest.raises(lnjac.errors.ConfigError, match="has no table swaps, but layers, runs, curves:"):
        off.table("swaps")
