"""What every member of every config group must do: a newcomer's yaml file is tested unasked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.paths import ROOT
from support.small import SMALL, corpus, members

from lnjac.config.compose import compose
from lnjac.config.identity import columns, to_dict
from lnjac.config.schema import RunConfig, build, check
from lnjac.diagnostics.catalogue import chosen
from lnjac.errors import ConfigError
from lnjac.gpt import model as gpt
from lnjac.norms.layers import Norm, OtherNorm, norms
from lnjac.runs import folder as runs
from lnjac.training import loop
from lnjac.training import run as train

GROUPS = (
    "model",
    "model/norm",
    "model/placement",
    "attn_mode",
    "method",
    "ln_backward",
    "optimizer",
    "diagnostics",
)
SHAPES = ("model/norm", "model/placement")
CASES = [(group, name) for group in GROUPS for name in members(group)]


def small(group: str, name: str, *more: str) -> list[str]:
    """The smallest run with this member; a model member keeps its own shape but for its size."""
    return [f"{group.replace('/', '.')}={name}", *SMALL, *more]


@pytest.mark.parametrize("group", [*GROUPS, "data", "tracker"])
def test_no_file_types_its_label(group: str) -> None:
    for name in members(group):
        assert "name" not in yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CASES)
def test_a_run_writes_its_rows(group: str, name: str, tmp_path: Path) -> None:
    config = compose(*small(group, name))
    assert check(config) == []
    assert train.run(config, tmp_path, corpus()) == runs.DONE
    assert runs.read_status(tmp_path)["status"] == runs.DONE
    layers = runs.read_table(tmp_path / runs.FILES["layers"])
    steps = config.diagnostics.at(config.steps)
    measured = norms(gpt.build(config, 11))
    assert layers.num_rows == len(steps) * len(measured)
    assert set(layers["step"].to_pylist()) == (set(steps) if measured else set())
    run = runs.read_table(tmp_path / runs.FILES["runs"]).to_pylist()[0]
    assert run["status"] == "done"
    assert 0 < run["val_loss_nats"] < 10
    assert run[group.replace("/", ".")] == name
    if not measured:  # its norms say that they are of another kind
        assert set(json.loads(layers.schema.metadata[b"lnjac"])["coverage"]) == {"other kind of norm"}
    declared = {column.name for column, _ in columns(config)}
    assert declared <= set(layers.column_names)
    curve = runs.read_table(tmp_path / runs.FILES["curves"]).to_pylist()
    assert [row["step"] for row in curve] == [1, 2, 3]
    assert curve[-1]["val_loss_nats"] == run["val_loss_nats"]


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize(
    ("group", "name"), [case for case in CASES if case[0] in ("attn_mode", "method", "ln_backward", *SHAPES)]
)
def test_an_update_is_finite_in_every_precision(group: str, name: str, precision: str) -> None:
    training = loop.Training(compose(*small(group, name, f"precision={precision}")), corpus())
    dtype = torch.float64 if precision == "fp64" else torch.float32
    assert all(p.dtype == dtype for p in training.model.parameters())
    before = {n: p.detach().clone() for n, p in training.trained.items()}
    assert np.isfinite([training.update() for _ in range(2)]).all()
    assert all(p.isfinite().all() for p in training.model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in training.trained.items())


@pytest.mark.parametrize(("group", "name"), [case for case in CASES if case[0] in ("attn_mode", *SHAPES)])
def test_no_token_sees_a_later_one(group: str, name: str) -> None:
    config = compose(*small(group, name, "precision=fp64"))
    model = gpt.build(config, 11)
    idx = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = idx.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    one, other = model(idx)[0], model(changed)[0]
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.equal(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("options", [[], ["model.affine=false"], ["model.bias=false", "model.qk_norm=true"]])
@pytest.mark.parametrize(("group", "name"), [case for case in CASES if case[0] in SHAPES])
def test_a_norm_is_where_its_name_says_under_every_option(group: str, name: str, options: list[str]) -> None:
    """Norms have d entries; they are what the model trains with affine, have no bias without, and are opened again."""
    config = compose(*small(group, name, *options))
    assert build(to_dict(config)) == config
    model = gpt.build(config, 11)
    placement, found = config.model.placement, dict(model.named_modules())
    roles = [f"{norm}_{i}" for norm in placement.norms for i in (1, 2)]
    sites = [f"blocks.{b}.{role}" for b in range(2) for role in roles] + ["ln_e"] * placement.embedding
    for site in sites + ["ln_f"] * placement.final:
        norm = found[site]
        assert isinstance(norm, (Norm, OtherNorm)), site
        assert norm(torch.randn(2, 3, 8)).shape == (2, 3, 8)
        shapes = {key: tuple(p.shape) for key, p in norm.named_parameters() if key in ("weight", "bias")}
        assert ("weight" in shapes) == config.model.affine
        assert "bias" not in shapes or (config.model.affine and config.model.bias)
        assert set(shapes.values()) <= {(8,)}


def refusal(config: RunConfig) -> str:
    try:
        train.admit(config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("group", "name"), [case for case in CASES if case[0] in SHAPES])
def test_a_surrogate_is_every_norms_backward_or_is_refused_in_a_line(group: str, name: str, tmp_path: Path) -> None:
    config = compose(*small(group, name, "ln_backward=center_scale", f"data.dir={tmp_path}/play"))
    model, refused = gpt.build(config, 11), refusal(config)
    others = [module for module in model.modules() if isinstance(module, OtherNorm)]
    assert bool(refused) == bool(others)
    if refused:
        assert "\n" not in refused
        assert "use ln_backward=exact, or model.norm=layernorm" in refused
    assert {norm.backward_rule.name for _, norm in norms(model)} == ({"center_scale"} if not others else set())


@pytest.mark.slow
@pytest.mark.parametrize("diagnostics", ["alignment", "attention", "swap", "full"])
@pytest.mark.parametrize(("group", "name"), [case for case in CASES if case[0] in SHAPES])
def test_a_diagnostic_works_with_a_norm_or_is_refused_in_a_line_each(
    group: str, name: str, diagnostics: str, tmp_path: Path
) -> None:
    config = compose(*small(group, name, f"diagnostics={diagnostics}", f"data.dir={tmp_path}/play"))
    if refused := refusal(config):
        assert all(line.startswith("diagnostics.") and "set diagnostics." in line for line in refused.split("\n"))
        return
    assert train.run(config, tmp_path / "run", corpus()) == runs.DONE
    for table in {diagnostic.table for diagnostic in chosen(config.diagnostics)}:
        assert runs.read_table(tmp_path / "run" / runs.file_of(table)).num_rows


@pytest.mark.parametrize("name", members("method"))
def test_a_method_changes_gradients_not_values(name: str) -> None:
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = [
        gpt.build(compose(*small("method", method, "precision=fp64")), 11)(idx, idx)[1].item()
        for method in ("bp", name)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", members("experiment"))
def test_an_experiment_says_its_claim_and_command(name: str) -> None:
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert "# Claim:" in text
    assert f"python run.py +experiment={name}" in text
    assert check(compose(f"+experiment={name}", "data=play")) == []


@pytest.mark.parametrize("options", [
    ["model.norm=rmsnorm"], ["model.placement=post"], ["model.affine=false"], ["model.bias=false"],
    ["model.qk_norm=true"], ["model.dropout=0.1"], ["model.tie=true", "method=bp"],
    ["model.norm=rmsnorm", "model.placement=post", "model.affine=false", "ln_backward=radial"],
    ["method=dfa", "method.inject=sublayer", "method.error=hidden", "method.cut_head=false"],
    ["method=dfa", "model.affine=false", "model.placement=post"],
    ["optimizer.grad_clip=1.0", "method=kp"], ["diagnostics.batches=3", "diagnostics.split=val"],
    ["ln_backward=center_scale", "ln_backward.sites=ln_f"], ["steps=0"], ["eval.every=2"],
])  # fmt: skip
def test_options_run_and_write(options: list[str], tmp_path: Path) -> None:
    config = compose(*SMALL, *options)
    assert check(config) == []
    assert train.run(config, tmp_path, corpus()) == runs.DONE
    sites = [name for name, _ in norms(gpt.build(config, 11))]
    layers = runs.read_table(tmp_path / runs.FILES["layers"]).to_pylist()
    assert [row["site"] for row in layers] == sites
    expected = {"ln_backward=center_scale": {"ln_f": "center_scale"}}.get(options[0], {})
    for row in layers:
        assert row["jacobian_residual"] < 1e-5
        if not expected:
            continue
        assert row["site_backward"] == expected.get(row["site"], "exact")
