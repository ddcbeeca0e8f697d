"""A method's gradient against bp's, in float64: explicit gradients, a control made by hand, draws of feedback."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small import SMALL, corpus
from torch import Tensor, nn

from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig, check
from lnjac.diagnostics.alignment import TENSORS, AgainstBackprop, Alignment
from lnjac.diagnostics.base import measure
from lnjac.diagnostics.draws import over_draws
from lnjac.gpt import credit
from lnjac.gpt import model as gpt
from lnjac.norms.capture import capture
from lnjac.norms.layers import norms
from lnjac.norms.probe import fresh_grads, probe
from lnjac.runs import folder as runs
from lnjac.training import run as train
from lnjac.training.loop import Training

pytestmark = pytest.mark.slow

VOCAB = 11
Batch = tuple[Tensor, Tensor]


@functools.cache
def config_of(*overrides: str) -> RunConfig:
    return compose(*SMALL, "precision=fp64", "seed=5", *overrides)


def trained(config: RunConfig, updates: int = 3) -> Training:
    training = Training(config, corpus())
    for _ in range(updates):
        training.update()
    training.model.eval()
    return training


def batch(n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (n, 8), generator=generator), torch.randint(VOCAB, (n, 8), generator=generator)


BATCHES = [batch(3), batch(1, seed=1)]


def rows_of(training: Training, batches: list[Batch] = BATCHES) -> dict[tuple[str, str], dict[str, Any]]:
    training.diagnostic_batches = lambda: batches
    return {(row["kind"], row["name"]): row for row in measure([Alignment()], training)["tensors"]}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0, eps=0))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def as_bp(training: Training) -> nn.Module:
    """A model of the same weights that is built for backprop with exact norms."""
    model = gpt.build(config_of("method=bp"), VOCAB)
    state = training.model.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def gradients(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Of the mean loss over all tokens of the batches together."""
    model.zero_grad()
    tokens = sum(targets.numel() for _, targets in batches)
    for idx, targets in batches:
        (model(idx, targets)[1] * (targets.numel() / tokens)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["fa", "dfa", "frsf", "kp"])
@pytest.mark.parametrize("ln_backward", ["exact", "center_scale"])
def test_parameters_against_two_models_gradients(method: str, ln_backward: str) -> None:
    training = trained(config_of(f"method={method}", f"ln_backward={ln_backward}"))
    rows, own, true = rows_of(training), gradients(training.model, BATCHES), gradients(as_bp(training), BATCHES)
    own = {name: own[name] for name in true}
    parts = {("parameter", name): (own[name], true[name]) for name in true}
    parts["model", "all"] = (torch.cat([g.flatten() for g in side.values()]) for side in (own, true))
    assert {key for key in rows if not key[0].startswith("norm")} == set(parts)
    for key, (a, b) in parts.items():
        row = rows[key]
        assert row["interpretable"]
        assert row["cos"] == pytest.approx(cosine(a, b), rel=1e-9, abs=1e-12)
        assert row["norm"] == pytest.approx(float(a.norm()), rel=1e-9)
        assert row["bp_norm"] == pytest.approx(float(b.norm()), rel=1e-9)
        assert row["norm_ratio"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-9)
        assert row["n_entries"] == a.numel()
    assert rows["model", "all"]["cos"] < 0.999


def pulled_back(name: str, x: Tensor, g: Tensor, eps: float) -> Tensor:
    """The backward of a LayerNorm without its affine part, spelt out."""
    centred = x - x.mean(-1, keepdim=True)
    sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    z = centred / sigma
    mean, radial = g.mean(-1, keepdim=True), z * (g * z).mean(-1, keepdim=True)
    return {"exact": (g - mean - radial) / sigma, "center_scale": (g - mean) / sigma, "ste": g}[name]


@pytest.mark.parametrize("ln_backward", ["exact", "center_scale", "ste"])
def test_norms_before_and_after(ln_backward: str) -> None:
    training = trained(config_of("method=fa", f"ln_backward={ln_backward}"))
    rows, sides = rows_of(training), []
    tokens = sum(targets.numel() for _, targets in BATCHES)
    for model, name in ((training.model, ln_backward), (as_bp(training), "exact")):
        found: dict[tuple[str, str], list[Tensor]] = {}
        for part in BATCHES:
            with capture(model) as calls:
                model(*part)[1].backward()
            for call in calls:
                grad = call.grad * (part[1].numel() / tokens)
                found.setdefault(("norm_output", call.site), []).append(grad)
                below = pulled_back(name, call.x, grad * call.weight, call.eps)
                found.setdefault(("norm_input", call.site), []).append(below)
        sides.append({key: torch.cat([t.flatten() for t in parts]) for key, parts in found.items()})
    own, true = sides
    assert [key for key in rows if key[0].startswith("norm")] == list(own)
    for key in own:
        assert rows[key]["cos"] == pytest.approx(cosine(own[key], true[key]), rel=1e-9, abs=1e-12)
        assert rows[key]["norm"] == pytest.approx(float(own[key].norm()), rel=1e-9)
        assert rows[key]["bp_norm"] == pytest.approx(float(true[key].norm()), rel=1e-9)


def test_bp_is_itself() -> None:
    for row in rows_of(trained(config_of("method=bp"))).values():
        assert (row["cos"], row["norm_ratio"], row["control_cos"]) == (1.0, 1.0, 1.0)
        assert row["feedback_cos"] is None


def test_feedback_that_is_the_weight_is_bp() -> None:
    training = trained(config_of("method=fa"))
    for _, layer in credit.linears(training.model):
        layer.feedback.copy_(layer.weight.detach())
    rows = rows_of(training)
    assert {row["cos"] for row in rows.values()} == {1.0}
    angles = [row["feedback_angle_deg"] for row in rows.values() if row["feedback_cos"] is not None]
    assert len(angles) == 9
    assert angles == pytest.approx([0.0] * 9, abs=1e-5)


def test_feedback_angles() -> None:
    training = trained(config_of("method=usf", "method.policy.head=true"))
    rows = rows_of(training)
    for name, p in training.model.named_parameters():
        row = rows["parameter", name]
        if name.startswith("blocks.") and name.rsplit(".", 2)[1] in ("qkv", "proj", "fc") and name.endswith("weight"):
            expected = float(p.detach().abs().sum() / p.detach().norm()) / math.sqrt(p.numel())  # cos(sign(W), W)
            assert row["feedback_cos"] == pytest.approx(expected, rel=1e-12)
            assert math.cos(math.radians(row["feedback_angle_deg"])) == pytest.approx(expected, rel=1e-9)
        else:
            assert (row["feedback_cos"], row["feedback_angle_deg"]) == (None, None)


# The control


@pytest.mark.parametrize("method", ["fa", "kp", "frsf", "dfa"])
def test_control_is_the_model_with_its_first_blocks(method: str) -> None:
    training = trained(config_of(f"method={method}"))
    before = weights(training.model)
    rows = rows_of(training)
    after = weights(training.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    first = gpt.build(training.config, VOCAB).state_dict()
    blocks = {name: v for name, v in first.items() if name.startswith("blocks.") and not credit.is_feedback(name)}
    training.model.load_state_dict({**before, **blocks})
    by_hand = rows_of(training)
    assert any(abs(row["cos"] - row["control_cos"]) > 1e-3 for row in rows.values())
    for key, row in rows.items():
        assert row["control_cos"] == pytest.approx(by_hand[key]["cos"], rel=1e-9, abs=1e-12)
        assert by_hand[key]["control_cos"] == by_hand[key]["cos"]


def test_control_of_a_surrogate_keeps_it() -> None:
    training = trained(config_of("method=bp", "ln_backward=ste"))
    row = rows_of(training)["model", "all"]
    assert row["control_cos"] < 0.999
    assert row["control_cos"] != row["cos"]


@pytest.mark.parametrize(("method", "updates"), [("fa", 0), ("frozen", 3)])
def test_control_is_the_comparison_where_blocks_never_moved(method: str, updates: int) -> None:
    for row in rows_of(trained(config_of(f"method={method}"), updates)).values():
        assert row["control_cos"] == row["cos"]


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("method", ["fa", "kp", "frsf"])
def test_one_forward_pass_serves_both(method: str, precision: str) -> None:
    training = trained(compose(*SMALL, f"precision={precision}", f"method={method}", "model.qk_norm=true"))
    at_once, apart = (AgainstBackprop(training.model, training.loss) for _ in range(2))
    for part in BATCHES:
        at_once.make(part)
        with fresh_grads(training.model):
            with apart.watch():
                value, tokens = training.loss(training.model, part)
                value.backward()
            apart.passed(part, tokens)
    expected, found = apart.pairs(), at_once.pairs()
    assert list(found) == list(expected)
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair, rel=1e-5, abs=1e-9), key
    assert all(layer.route is None for _, layer in credit.linears(training.model))


# Gates


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_what_vanishes_in_exact_arithmetic_is_not_interpreted(precision: str) -> None:
    """Softmax does not see a vector added to every key."""
    training = trained(compose(*SMALL, f"precision={precision}", "model.qk_norm=true"))
    rows = rows_of(training)
    noise = {key for key, row in rows.items() if not row["interpretable"]}
    assert noise == {("parameter", f"blocks.{i}.attn.k_norm.bias") for i in (0, 1)}
    for key in noise:
        assert math.isnan(rows[key]["cos"])
        assert math.isnan(rows[key]["control_cos"])


def test_a_gradient_that_does_not_come_is_zero() -> None:
    training = trained(config_of("method=fa"))
    training.model.head.feedback.zero_()
    rows = rows_of(training)
    assert rows["parameter", "head.weight"]["cos"] == 1.0
    assert math.isnan(rows["parameter", "head.weight"]["feedback_cos"])
    assert math.isnan(rows["parameter", "head.weight"]["feedback_angle_deg"])
    assert math.isnan(training.diagnose()["layers"]["rstd_cv"][0])
    below = rows["norm_output", "blocks.0.ln_1"]
    assert (below["norm"], below["interpretable"]) == (0.0, False)
    assert below["bp_norm"] > 0


# Draws of the feedback


def draws(config: RunConfig, n: int) -> list[dict[str, Tensor]]:
    return [gpt.feedback(dataclasses.replace(config, seed=seed), VOCAB) for seed in range(100, 100 + n)]


def test_random_feedback_is_as_radial_as_chance() -> None:
    config = compose(*SMALL, "model.n_embd=16", "method=fa", "ln_backward=exact", "precision=fp64")
    training = trained(config, updates=0)
    before = weights(training.model)
    rows = over_draws(training.model, draws(config, 60), [batch(8)], training.loss)
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    found = {(row["place"], row["quantity"]): row["value"] for row in rows}
    assert {row["n"] for row in rows} == {60}
    assert {row["place"] for row in rows} == {site for site, _ in norms(training.model)}
    for (place, quantity), value in found.items():
        if quantity in ("enrichment_radial_share_over_draws", "enrichment_mean_over_draws"):
            error = found[place, f"{quantity}_stderr"]
            assert 0 < error < 0.3
            assert abs(value - 1) < 4 * error


def test_mean_and_standard_error_over_draws() -> None:
    config = config_of("method=dfa")
    training = trained(config, updates=0)
    values = []
    for draw in draws(config, 3):
        with gpt.replaced(training.model, draw):
            table = probe(training.model).measure(BATCHES, training.loss)
            values.append(table["enrichment_radial_share"][0])
    rows = over_draws(training.model, draws(config, 3), BATCHES, training.loss)
    found = {(row["place"], row["quantity"]): row["value"] for row in rows}
    mean = sum(values) / 3
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
    assert found["blocks.0.ln_1", "enrichment_radial_share_over_draws"] == pytest.approx(mean)
    assert found["blocks.0.ln_1", "enrichment_radial_share_over_draws_stderr"] == pytest.approx(error)


@pytest.mark.parametrize("method", ["bp", "usf", "frozen"])
def test_no_random_feedback_no_draws(method: str) -> None:
    config = config_of(f"method={method}")
    assert over_draws(trained(config, 0).model, draws(config, 2), BATCHES, trained(config, 0).loss) == []


@pytest.mark.parametrize("schedule", ["final", "linear"])
def test_draws_are_made_at_step_0_whatever_the_schedule_and_are_not_the_runs_own(tmp_path: Path, schedule: str) -> None:
    words = ("method=fa", "steps=1", "eval.tokens=100", f"diagnostics.schedule={schedule}", f"data.dir={tmp_path}/play")
    assert train.run(config_of("diagnostics.feedback_draws=2", *words), tmp_path / "run") == "done"
    rows = runs.read_table(tmp_path / "run" / "mechanism.parquet").to_pandas()
    assert (set(rows["step"]), set(rows["n"])) == ({0}, {2})
    own = trained(config_of("method=fa"), updates=0).diagnose()["layers"]
    mine = own.set_index("site").loc["ln_f", "enrichment_radial"]
    drawn = rows[(rows["place"] == "ln_f") & (rows["quantity"] == "enrichment_radial_over_draws")]["value"]
    assert drawn.item() != pytest.approx(mine)


def test_no_draws_no_table(tmp_path: Path) -> None:
    words = ("method=bp", "steps=1", "eval.tokens=100", "diagnostics.feedback_draws=2", f"data.dir={tmp_path}/play")
    assert train.run(config_of(*words), tmp_path / "run") == "done"
    assert not (tmp_path / "run" / "mechanism.parquet").exists()


@pytest.mark.parametrize(
    "switch", ["distributions=true", "alignment=true", "feedback_draws=2", "attention=true", "swap=true"]
)
def test_switches_without_an_analysis_are_refused(switch: str) -> None:
    (problem,) = check(compose(*SMALL, "diagnostics=off", f"diagnostics.{switch}"))
    assert "diagnostics.schedule=none" in problem


def test_negative_draws_are_refused() -> None:
    assert "feedback_draws" in check(compose(*SMALL, "diagnostics.feedback_draws=-1"))[0]


# What is left behind


@pytest.mark.parametrize("method", ["fa", "kp", "brsf", "dfa"])
def test_training_does_not_notice(method: str) -> None:
    quiet = compose(*SMALL, f"method={method}", "model.dropout=0.1", "diagnostics=off")
    watched = compose(
        *SMALL, f"method={method}", "model.dropout=0.1", "diagnostics=alignment", "diagnostics.attention=true"
    )
    outcomes = []
    for config in (quiet, watched):
        torch.manual_seed(0)
        training, losses = Training(config, corpus()), []
        for _ in range(4):
            if config is watched:
                rows = training.diagnose()
                assert set(rows) == {"layers", "tensors", "mechanism"}
            losses.append(training.update())
        outcomes.append((losses, weights(training.model)))
    assert outcomes[0][0] == outcomes[1][0]
    for name, value in outcomes[0][1].items():
        assert torch.equal(value, outcomes[1][1][name]), name


def test_grads_and_rules_are_left_as_they_were() -> None:
    training = trained(config_of("method=fa", "ln_backward=ste"))
    grads = {name: (p.grad, p.grad.clone()) for name, p in training.model.named_parameters()}
    rows_of(training)
    for name, p in training.model.named_parameters():
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])
    assert all(module.backward_rule.name == "ste" for _, module in norms(training.model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in training.model.modules())


def test_rows_fit_their_table() -> None:
    training = trained(config_of("method=fa"))
    table = runs.table(TENSORS, (), list(rows_of(training).values()))
    assert table["block"].to_pylist()[:4] == [None, None, None, 0]
    assert table["call"].null_count == 0
