"""Kinds of norm and placements as members: how they are named, refused and stored, and norms of another kind."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.small import SMALL, corpus, finished
from torch import nn

import lnjac
from lnjac.config.compose import compose
from lnjac.config.identity import column_values, to_dict
from lnjac.config.schema import build, check
from lnjac.errors import ConfigError
from lnjac.gpt import model as gpt
from lnjac.gpt.norms import DyT, Kind, LayerNorm, PeriLN, Pointwise, PreLN
from lnjac.gpt.settings import Model
from lnjac.norms.layers import OtherNorm
from lnjac.runs import folder as runs
from lnjac.training import run as train


def refusal(*overrides: str) -> str:
    try:
        train.admit(compose(*SMALL, *overrides))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("words", [
    ["model.norm=dyt", "model.norm.alpha=0.3"], ["model.norm.alpha=0.3", "model.norm=dyt"],
    ["model.norm={name:dyt,alpha:0.3}"], ["model.norm=rmsnorm", "model.norm=dyt", "model.norm.alpha=0.3"],
    ["model.norm='dyt'", "model.norm.alpha=${eval.batch_size}", "model.norm.alpha=0.3"],
])  # fmt: skip
def test_a_member_is_named_and_its_keys_are_set_beside_the_name(words: list[str]) -> None:
    config = compose(*words)
    assert config.model.norm == DyT("dyt", 0.3)
    assert config.model.placement == PreLN("pre")
    assert {key: value for key, value in column_values(config).items() if key.startswith("model.norm")} == {
        "model.norm": "dyt",
        "model.norm.alpha": 0.3,
    }
    assert build(to_dict(config)) == config


def test_a_member_of_ours_without_keys_is_stored_as_its_name_alone() -> None:
    stored = to_dict(compose("model.placement=peri"))["model"]
    assert (stored["norm"], stored["placement"]) == ("layernorm", "peri")
    with_key = to_dict(compose("model.norm=dyt"))["model"]["norm"]
    assert with_key == {"_target_": "lnjac.norm_kind.DyT", "name": "dyt", "alpha": 0.5}


def test_a_yaml_file_of_a_model_names_its_norm_with_or_without_keys(add_member: Any) -> None:
    for text, alpha in (("dyt", 0.5), ("{name: dyt, alpha: 0.7}", 0.7)):
        add_member("model", f"defaults: [tiny]\nnorm: {text}\nplacement: peri\n", "mine")
        config = compose("model=mine")
        assert (config.model.norm, config.model.placement) == (DyT("dyt", alpha), PeriLN("peri"))
    assert compose("model=mine", "model.norm.alpha=0.2").model.norm == DyT("dyt", 0.2)


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("", ["model.norm.alpha=1"], "model.norm.alpha has no member: choose one by model.norm=NAME, of a file conf/model/"),
        ("", ["model.norm=rmsnorm", "model.norm.alpha=1"], "model.norm.alpha is not a setting: known: name"),
        ("", ["model.norm=dyt", "model.norm.alpha=nan"], "model.norm.alpha=nan must be finite"),
        ("", ["model.placement=mid"], "conf/model/placement/mid.yaml: write one, or choose peri or post or pre"),
        ("", ["model.norm=[dyt]"], "model.norm=['dyt'] is no member: choose one by model.norm=NAME"),
        ("", ["model.norm=null"], "names no file conf/model/norm/null.yaml"),
        ("", ["model.norm._target_=x.Y"], "name this class in a file conf/model/norm/NAME.yaml"),
        ("norm: {_target_: lnjac.gpt.norms.RMSNorm, name: layernorm}", [], "rows would carry the label of another class"),
        ("norm: 3", [], "model.norm=3 is no member"),
    ],
)  # fmt: skip
def test_a_name_or_a_key_that_is_none_is_one_line(add_member: Any, text: str, words: list[str], said: str) -> None:
    add_member("model", f"defaults: [tiny]\n{text}\n", "mine")
    try:
        found = "\n".join(check(compose("model=mine", *words)))
    except ConfigError as error:
        found = str(error)
    assert said in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_target_: lnjac.gpt.norms.Nope\n", "names no class of lnjac.gpt.norms"),
        ("_target_: lnjac.gpt.norms.PreLN\n", "PreLN has no method make(d, model)"),
        ("_target_: lnjac.gpt.norms.Pointwise\n", "is abstract: define value"),
        ("_target_: lnjac.gpt.norms.RMSNorm\nname: layernorm\n", "labelled by the chosen member, mine"),
        ("- a\n", "is no member: choose one by model.norm=NAME, of a file conf/model/norm/NAME.yaml with `key: value`"),
    ],
)
def test_a_yaml_file_that_names_no_kind_is_refused(add_member: Any, text: str, said: str) -> None:
    add_member("model/norm", text, "mine")
    with pytest.raises(ConfigError) as refused:
        compose("model.norm=mine")
    assert said in str(refused.value)


@dataclass
class Bare(Kind):
    """A LayerNorm of torch's, which the probe knows and the diagnostics do not."""

    def make(self, d: int, model: Model) -> Any:
        return nn.LayerNorm(d)


@dataclass
class Erf(Pointwise):
    """erf(x + shift)"""

    shift: float

    def learned(self) -> dict[str, float]:
        return {"shift": self.shift}

    def value(self, x: torch.Tensor, learned: Any) -> torch.Tensor:
        return torch.special.erf(x + learned["shift"])


@dataclass
class Same(LayerNorm):
    """LayerNorm by a stranger's name."""


def test_a_strangers_module_is_refused_before_the_run_unless_it_derives_from_ours(
    add_member: Any, tmp_path: Path
) -> None:
    add_member("model/norm", f"_target_: {__name__}.Bare\n", "mine")
    said = refusal("model.norm=mine", f"data.dir={tmp_path}/play")
    assert said.startswith("model.norm=mine makes a LayerNorm, which diagnostics do not know: derive it from Norm or")
    assert "\n" not in said


@pytest.mark.parametrize(("cls", "keys"), [("Same", ""), ("Erf", "shift: 0.25\n")])
def test_a_strangers_kind_trains_and_is_opened_only_when_trusted(
    add_member: Any, tmp_path: Path, cls: str, keys: str
) -> None:
    add_member("model/norm", f"_target_: {__name__}.{cls}\n{keys}", "mine")
    run = finished(tmp_path / "run", "model.norm=mine")
    assert bool(len(run.layers)) == (cls == "Same")
    with pytest.raises(ConfigError, match=f"names code outside lnjac .*{cls}.*trust=True"):
        _ = run.config
    again = lnjac.load_run(tmp_path / "run", trust=True)
    assert type(again.config.model.norm).__qualname__ == cls
    assert again.run["model.norm"].tolist() == ["mine"]
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    assert again.model()(idx)[0].isfinite().all()


def test_dyt_begins_as_the_paper_has_it_and_learns_alpha(tmp_path: Path) -> None:
    config = compose(*SMALL, "model.norm=dyt", "method=bp")
    at = [n for n, m in gpt.build(config, 11).named_modules() if isinstance(m, OtherNorm)]
    assert at == [*(f"blocks.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)), "ln_f"]
    before = dict(gpt.build(config, 11).named_parameters())
    after = dict(finished(tmp_path, "model.norm=dyt", "method=bp").model().named_parameters())
    for site in at:
        assert before[f"{site}.learned.alpha"].item() == 0.5
        assert before[f"{site}.weight"].eq(1).all()
        assert before[f"{site}.bias"].eq(0).all()
        assert after[f"{site}.learned.alpha"].item() != 0.5


def test_a_run_of_dyt_has_no_rows_of_norms_says_so_and_merges_with_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished(tmp_path / "dyt", "model.norm=dyt", "diagnostics=alignment", "diagnostics.attention=true")
    assert "model.norm=dyt has a diagonal Jacobian, without the three parts: layers has no rows of it" in caplog.text
    assert len(run.layers) == 0
    note = json.loads(runs.read_table(tmp_path / "dyt" / "layers.parquet").schema.metadata[b"lnjac"])
    assert note["coverage"] == {"other kind of norm": [*(f"blocks.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)), "ln_f"]}
    assert set(run.table("tensors")["kind"]) == {"model", "parameter"}
    mechanism = run.table("mechanism")
    assert not mechanism["quantity"].str.startswith("gz").any()
    branches = mechanism[mechanism["quantity"] == "branch_sq"]
    assert branches["place"].tolist() == [*(f"blocks.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)), "ln_f"]
    assert (branches["value"] > 0).all()
    finished(tmp_path / "ln", "model.placement=peri")
    lnjac.merge([tmp_path / "dyt", tmp_path / "ln"], tmp_path / "all.parquet")
    assert pd.read_parquet(tmp_path / "all.parquet")["model.norm"].unique().tolist() == ["layernorm"]
    both = pd.read_parquet(tmp_path / "all.runs.parquet").set_index("model.norm")["model.norm.alpha"]
    assert both["dyt"] == 0.5
    assert np.isnan(both["layernorm"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ln_backward=ste"], "ln_backward=ste replaces parts of a norm's backward"),
        (["ln_backward=ste", "ln_backward.sites=[ln_f]"], "use ln_backward=exact, or model.norm=layernorm"),
        (["diagnostics.swap=true"], "set diagnostics.swap=false"),
        (["diagnostics.distributions=true"], "set diagnostics.distributions=false"),
        (["diagnostics.feedback_draws=2"], "set diagnostics.feedback_draws=0"),
        ([], ""),
        (["ln_backward=exact", "ln_backward.sites=[ln_f]", "diagnostics.alignment=true"], ""),
    ],
)
def test_what_needs_a_norms_parts_is_refused_in_one_line_with_dyt(tmp_path: Path, words: list[str], said: str) -> None:
    found = refusal("model.norm=dyt", f"data.dir={tmp_path}/play", *words)
    assert said in found
    assert bool(found) == bool(said)
    assert "\n" not in found
    assert not refusal("model.norm=layernorm", f"data.dir={tmp_path}/play", *words)


def test_the_probe_lists_dyt_as_another_kind() -> None:
    model = gpt.build(compose(*SMALL, "model.norm=dyt", "method=bp"), 11)
    idx, targets = (
        torch.from_numpy(corpus().train[:16].astype(np.int64)).view(2, 8),
        torch.zeros(2, 8, dtype=torch.int64),
    )
    probe = lnjac.probe(model)
    table = probe.measure([(idx, targets)], lambda model, batch: (model(*batch)[1], 16))
    assert table.empty
    assert set(table.attrs["coverage"].values()) == {"other kind of norm"}
    assert set(probe.plan()["kind"]) == {"other kind of norm"}
    with pytest.raises(ValueError, match="no norm is called"):
        lnjac.set_backward(model, "ste", sites="ln_f")
