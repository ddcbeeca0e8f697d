"""Typed configuration: every bad value is said, with its remedy; the run identity means what it says."""

import dataclasses
import json
import math
import re
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Optional

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from support.paths import ROOT

from lnjac.config import compose as config_compose
from lnjac.config import identity, schema
from lnjac.config.compose import compose
from lnjac.config.identity import columns, diag_id, run_id, to_dict
from lnjac.config.schema import build, check
from lnjac.errors import ConfigError
from lnjac.gpt import products
from lnjac.gpt.attention import Softmax
from lnjac.runs import folder as runs
from lnjac.training import run as train


def problems(*overrides: str) -> str:
    """What a user would read for these overrides."""
    try:
        return "\n".join(check(compose(*overrides)))
    except ConfigError as error:
        return str(error)


def test_bare_default_is_the_original_run() -> None:
    c = compose()
    m = c.model
    assert (m.n_layer, m.n_head, m.n_embd, m.block_size, m.dropout) == (4, 4, 128, 64, 0.0)
    assert (c.batch_size, c.steps, c.seed, c.precision) == (32, 250, 1337, "fp32")
    assert (c.method.name, c.attn_mode.name, c.data.name, c.ln_backward.name) == ("fa", "softmax", "play", "exact")
    assert (c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay) == ("adamw", 1e-3, 0.01)
    assert check(c) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=abc"], "seed=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (["steps=2.5"], "steps=2.5"),
        ([r"seed='\${x}'"], "seed=${x}: Interpolation key 'x' not found"),
        (["ln_backward.sites=[ln_1,'???']"], "ln_backward.sites=['ln_1', '???']: Missing mandatory value: 1"),
        (["model.n_embd=130"], "try n_embd=128 or 132"),
        (["steps=-1"], "steps=0 analyses the model at initialisation"),
        (["batch_size=0"], "batch_size=0 must be at least 1"),
        (["+foo=1"], "foo is not a setting"),
        (["+attn_mode.bais=1", "attn_mode=sigmoid"], "did you mean bias?"),
        (["device=gpu"], "expected one of [auto, cpu, cuda]"),
        (["precision=fp16"], "expected one of [fp32, bf16, fp64]"),
        (["model.norm=batchnorm"], "names no file conf/model/norm/batchnorm.yaml: write one, or choose dyt or layer"),
        (["data=nanogpt"], "data.dir has no value"),
        (["method=dfa", "method.policy.head=random"], "use method=fa"),
        (["method=fa", "model.tie=true"], "use model.tie=false"),
        (["method.policy={qkv:true,attn_proj:true,fc:true,mlp_proj:true,head:true}"], "use method=bp"),
        (["method=kp", "method.decay=0"], "use method=fa"),
        (["method=kp", "optimizer=sgd"], "must stay below 1"),
        (["method.scale=-1"], "method.scale=-1.0 must be positive"),
        (["method=usf", "method.redraw=true"], "use method=brsf"),
        (["optimizer.lr=0"], "optimizer.lr=0.0 must be positive"),
        (["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"], "set optimizer.momentum=0.9"),
        (["diagnostics.schedule=list", "diagnostics.steps=[0,300]"], "drop it or raise steps"),
        (["eval.every=0"], "or null"),
        (["model.dropout=1.0"], "[0, 1)"),
        (["threads=0"], "null for torch's own choice"),
        (["diagnostics.steps=[0,2]"], "set diagnostics.schedule=list"),
        (["ln_backward.center=false"], "use ln_backward=radial_scale"),
        (["model.eps=nan"], "usual value is 1e-5"),
        (["seed=9223372036854775808"], "2^63"),
        (["seed=-1"], "seed=-1 must lie between 0"),
        (["attn_mode=sigmoid", "attn_mode.bias=inf"], "must be finite"),
        (["method.policy.qkv=maybe"], "expected one of [random, true]"),
    ],
)
def test_a_bad_value_is_one_readable_line(overrides: list[str], said: str) -> None:
    text = problems(*overrides)
    assert said in text
    assert "Traceback" not in text


def test_every_bad_value_is_said_at_once() -> None:
    text = problems("seed=x", "steps=y", "optimizer.lr=z")
    assert all(f"{key}=" in text for key in ("seed", "steps", "optimizer.lr"))
    text = problems("steps=-1", "batch_size=0", "model.n_embd=130")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize("overrides", [
    (), ("method=kp", "attn_mode=sigmoid", "attn_mode.bias=-2.0"), ("steps=${batch_size}", "model.n_embd=64"),
    ("+experiment=original", "data=text", "data.files=[a,b]"), ("model=tiny", "ln_backward=ste", "ln_backward.sites=ln_f"),
    ("eval={every:2}", "eval.every=3", "threads=null"), ("ln_backward.sites.0=ln_1", "optimizer.lr=-0.0", "optimizer.lr=0.0"),
    ("model.norm=rmsnorm", "model.placement=post"), ("model.norm={name:rmsnorm}", "++model.placement.name=post"),
    ("sweep=A", "method.policy={qkv:true}", "method.policy.fc=true", "seed=1", "seed=2"), ("eval.every=${steps}", "steps=7"),
])  # fmt: skip
def test_configs_are_composed_as_hydra_composes_them(overrides: tuple[str, ...]) -> None:
    for _ in range(2):  # the second time from what is known
        ours = compose(*overrides)
        with initialize_config_dir(version_base="1.3", config_dir=str(config_compose.CONF)):
            full = hydra_compose("config", list(overrides), return_hydra_config=True)
        assert ours == build(config_compose.plain(full), full.hydra.runtime.choices)
        ours.batch_size = -1  # the next config must not see it, nor this:
        ours.ln_backward.sites.append("ln_9")


def test_a_sweep_asks_hydra_once_a_member_and_holds_thousands_of_jobs() -> None:
    known = config_compose._composer(config_compose.CONF, 0)
    asked: list[list[str]] = []
    with initialize_config_dir(version_base="1.3", config_dir=str(config_compose.CONF)):
        loader = GlobalHydra.instance().config_loader()
    composer = config_compose.RunComposer(loader, lambda words: asked.append(words) or known._load(words))
    words = [[f"attn_mode={mode}", f"optimizer.lr={lr}"] for mode in ("softmax", "sigmoid") for lr in (0.1, 0.2)]
    made = [composer.compose(own).build() for own in words]
    assert len({run_id(c, "d") for c in made}) == 4
    assert asked == [["attn_mode=softmax"], ["attn_mode=sigmoid"]]
    tracemalloc.start()
    try:
        jobs = [(job := composer.compose([*own, f"seed={seed}"]), job.build()) for seed in range(50) for own in words]
        assert tracemalloc.get_traced_memory()[0] / len(jobs) < 20_000
    finally:
        tracemalloc.stop()
    assert len(asked) == 2


def test_an_edited_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = shutil.copytree(config_compose.CONF, tmp_path / "conf")
    monkeypatch.setattr(config_compose, "CONF", conf)
    assert compose("optimizer=sgd").optimizer.momentum != 0.25
    file = conf / "optimizer" / "sgd.yaml"
    file.write_text(re.sub("momentum: .*", "momentum: 0.25", file.read_text()))
    assert compose("optimizer=sgd").optimizer.momentum == 0.25
    shutil.copy(file, conf / "optimizer" / "mine.yaml")
    assert compose("optimizer=mine").optimizer.momentum == 0.25


def test_a_member_that_is_not_there_is_refused_by_hydra() -> None:
    with pytest.raises(HydraException, match="softmx"):
        compose("attn_mode=softmx")


@pytest.mark.parametrize(("override", "said"), [
    ("attn_mod=softmax", "attn_mod is not a setting: did you mean attn_mode?"),
    ("attn_mode.bias=1", "attn_mode.bias is not a setting: known: name"),
    ("+attn_mode.bias=1", "attn_mode.bias is not a setting: known: name"),
    ("++method.policy.tail=true", "method.policy.tail is not a setting: known: qkv, attn_proj, fc, mlp_proj, head"),
])  # fmt: skip
def test_an_unknown_key_is_refused_by_the_schema_however_it_is_typed(override: str, said: str) -> None:
    assert problems(override) == said


@pytest.mark.parametrize(("word", "marked"), [
    ("sweep=2026_11_26", "sweep='2026_11_26'"),
    ("sweep=1e3", "sweep='1e3'"),
    ("sweep=010", "sweep='010'"),
    ("sweep=null", "sweep='null'"),
    ("sweep=", "sweep="),
    ("sweep='1 2'", "sweep='1 2'"),
    ("sweep=run 5", "sweep=run 5"),
    ("sweep=${seed}-1", "sweep=${seed}-1"),
    ("hydra.run.dir=2026_11_26", "hydra.run.dir='2026_11_26'"),
    ("data.files=[1e3,a]", "++data.files=['1e3',a]"),
    ("method.scale=2", "++method.scale=2"),
    ("+method.scale=1,2", "++method.scale=1,2"),
    ("sed=1", "++sed=1"),
    ("seed=1", "seed=1"),
    ("method=bp,fa", "method=bp,fa"),
    ("+experiment=original", "+experiment=original"),
    ("hydra/launcher=slurm", "hydra/launcher=slurm"),
    ("hydra.launcher.jobs=2", "hydra.launcher.jobs=2"),
    ("~method.scale", "~method.scale"),
    ("--multirun", "--multirun"),
])  # fmt: skip
def test_a_command_is_read_as_it_is_typed(word: str, marked: str) -> None:
    assert config_compose.as_typed([word]) == [marked]
    assert config_compose.as_typed([marked]) == [marked]


def test_a_primary_config_of_ones_own_may_have_groups_of_its_own() -> None:
    assert config_compose.as_typed(["-cn=mine", "preset=1"]) == ["-cn=mine", "preset=1"]


def test_a_pattern_without_a_site_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ln_backward.sites=ln_x matches no norm.*ln_f"):
        train.admit(compose("ln_backward=ste", "ln_backward.sites=ln_x"))


def test_too_long_a_block_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert schema.check_corpus(compose("model.block_size=10"), 11, 11) == []
    (said,) = schema.check_corpus(compose("model.block_size=11"), 1000, 11)
    assert "validation split has 11 tokens" in said
    assert "block_size <= 10" in said


@pytest.mark.parametrize(
    "override", ["seed=18446744073709551616", "steps=9223372036854775808", "eval.tokens=9223372036854775808"]
)
def test_a_number_too_large_for_a_table_is_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train.admit(compose(override))
    assert str(caught.value).startswith(f"{override} does not fit into 64 bits")
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------- members and their labels

SIGMOID = "_target_: lnjac.gpt.attention.Sigmoid\nbias: null\n"


@pytest.mark.parametrize("name", ["nan", "1e3", "1_0", "-inf", "007", "true", "NULL", "plain"])
def test_any_name_of_a_file_is_a_label(name: str, add_member: Callable[..., str]) -> None:
    add_member("attn_mode", SIGMOID, name)
    for word in (f"attn_mode={name}", f"attn_mode='{name}'"):
        assert compose(word).attn_mode.name == name


def test_a_label_is_the_chosen_members_name_and_never_typed(add_member: Callable[..., str]) -> None:
    add_member("attn_mode", SIGMOID, "mine")
    add_member("attn_mode", SIGMOID + "name: typed\n", "typed")
    assert compose("attn_mode=typed").attn_mode.name == "typed"
    add_member("attn_mode", SIGMOID + "name: softmax\n", "typed")
    said = "attn_mode.name=softmax: rows are labelled by the chosen member, typed: leave the key name out of conf"
    assert said in problems("attn_mode=typed")
    assert "labelled by the chosen member, mine" in problems("attn_mode=mine", "+attn_mode.name=softmax")
    with pytest.raises((ConfigError, HydraException)):
        compose("attn_mode=mine", "attn_mode.name=softmax")
    target = "attn_mode._target_=lnjac.gpt.attention.Sigmoid"
    assert "rows would carry the label of another class: name this class in a file conf/attn_mode" in problems(target)
    whole = ["~attn_mode", "+attn_mode.bias=0", "+attn_mode.name=softmax"]
    assert "attn_mode has no chosen member to label its rows by: choose one by attn_mode=NAME" in problems(*whole)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_target_: [\n", "mine.yaml, line 2: expected the node content, but found '<stream end>'"),
        ("bias: 1\nbias: 2\n", "mine.yaml, line 2: found duplicate key bias"),
        ("bias:\t1\n\tname: 1\n", "mine.yaml, line 1: found character"),
        ("bias: \x01\n", "mine.yaml"),
        ("bias: ${zzz}\n", "attn_mode: Interpolation key 'zzz' not found"),
        (
            "- a\n- b\n",
            "attn_mode=['a', 'b'] is no member: choose one by attn_mode=NAME, of a file conf/attn_mode/NAME.yaml with `key",
        ),
        ("", "attn_mode._target_='' names no class: write package.module.Class"),
    ],
)
def test_a_broken_yaml_is_one_line_that_names_it(text: str, said: str, add_member: Callable[..., str]) -> None:
    add_member("attn_mode", text, "mine")
    found = problems("attn_mode=mine")
    assert said in found
    assert len(found.splitlines()) == 1


def test_a_yaml_that_is_not_utf8_is_named(add_member: Callable[..., str]) -> None:
    add_member("attn_mode", SIGMOID, "mine")
    (config_compose.CONF / "attn_mode" / "mine.yaml").write_bytes(b"name: caf\xe9\n")
    assert problems("attn_mode=mine").startswith("attn_mode/mine.yaml is not UTF-8")


CODE = """
from dataclasses import dataclass
from lnjac.gpt.attention import Attention, Softmax
from lnjac.norms.layers import Surrogate

class Bare:
    name = "bare"

@dataclass
class Unnamed:
    bias: float = 1.0

@dataclass
class Unfinished(Attention):
    pass

@dataclass
class Silent(Surrogate):
    name: str

@dataclass
class Narrow(Attention):
    def weights(self, scores):
        return scores.softmax(-1)

@dataclass
class Duck:
    name: str
    def weights(self, scores, mask, block_size):
        return scores.softmax(-1)

@dataclass
class Strict(Softmax):
    def problems(self):
        yield "never"

@dataclass
class Raising(Softmax):
    def __post_init__(self):
        raise ValueError("bias and gain exclude each other")

@dataclass
class Odd(Softmax):
    path: complex

@dataclass
class Static(Attention):
    @staticmethod
    def weights(scores, mask, block_size):
        return scores.masked_fill(~mask, -1e9).softmax(-1)
"""


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "nomodule.X",
            "attn_mode._target_='nomodule.X' names a module that is not there, nomodule: correct the name, or put the",
        ),
        ("lnjac.nomodule.X", "names a module that is not there, lnjac.nomodule"),
        ("needy.X", "names a module that cannot be imported: ModuleNotFoundError: No module named 'nosuchpackage'"),
        ("slip.X", "names a module that cannot be imported: SyntaxError: "),
        ("lnjac.gpt.attention.Sofmax", "names no class of lnjac.gpt.attention: did you mean Softmax?"),
        ("Softmax", "names no class: write package.module.Class"),
        ("lnjac.gpt.attention.Attention", "is abstract: define weights, or name a subclass"),
        ("code.Unfinished", "is abstract: define weights"),
        ("code.Bare", "is not a dataclass"),
        ("code.Unnamed", "has no field for its label, only bias: add `name: str`"),
        (
            "code.Narrow",
            "attn_mode=mine: Narrow.weights(self, scores) cannot be called as weights(scores, mask, block_size)",
        ),
        ("code.Duck", "attn_mode=mine: Duck has no method attend(q, k, v, block_size, dropout)"),
        ("code.Strict", "attn_mode=mine: Strict.problems(self) cannot be called as problems(config)"),
        ("code.Raising", "attn_mode: ValueError: bias and gain exclude each other"),
        ("code.Odd", "attn_mode: Odd cannot be a schema: "),
    ],
)
def test_a_class_that_its_group_cannot_use_is_found_by_the_check(
    target: str, said: str, tmp_path: Path, add_member: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path, monkeypatch)
    add_member("attn_mode", f"_target_: {target.replace('code.', 'strangers_code.')}\n", "mine")
    found = problems("attn_mode=mine")
    assert said in found
    assert len(found.splitlines()) == 1


def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's modules on the path."""
    for name, text in {"strangers_code": CODE, "needy": "import nosuchpackage", "slip": "def ("}.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))


def test_each_group_asks_for_its_own_methods(
    tmp_path: Path, add_member: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path, monkeypatch)
    for group, target, said in (
        ("ln_backward", "strangers_code.Silent", "is abstract: define surrogate"),
        ("optimizer", "lnjac.gpt.optimizers.Optimizer", "is abstract: define build"),
        ("method", "lnjac.trackers.Untracked", "Untracked has no method install(model, seed)"),
        ("tracker", "lnjac.gpt.attention.Softmax", "Softmax has no method start(run)"),
        ("data", "lnjac.gpt.attention.Softmax", "Softmax has no method load()"),
    ):
        add_member(group, f"_target_: {target}\n", "mine")
        assert said in problems(f"{group}=mine")
    add_member("attn_mode", "_target_: strangers_code.Static\n", "mine")
    assert compose("attn_mode=mine").attn_mode.name == "mine"


def test_a_config_survives_the_round_trip_through_plain_values() -> None:
    for overrides in ([], ["attn_mode=sigmoid", "method=dfa", "ln_backward=ste", "ln_backward.sites=[ln_1,ln_f]"]):
        c = compose(*overrides)
        assert build(to_dict(c)) == c


def test_sigmoid_bias_default_is_resolved_and_recorded() -> None:
    c = compose("attn_mode=sigmoid")
    assert c.attn_mode.bias == -math.log(64)
    assert {col.name: v for col, v in columns(c)}["attn_mode.bias"] == -math.log(64)
    explicit = compose("attn_mode=sigmoid", f"attn_mode.bias={-math.log(64)!r}")
    assert run_id(c, "d") == run_id(explicit, "d")


SCIENCE = ["seed=1", "steps=9", "attn_mode=sigmoid", "method=bp", "ln_backward=ste", "optimizer.lr=0.01",
           "model.n_embd=64", "precision=fp64", "batch_size=8", "eval.tokens=100"]  # fmt: skip
NOT_SCIENCE = ["device=cpu", "threads=1", "deterministic=true", "save_model=false", "data.dir=elsewhere",
               "diagnostics=trajectory", "diagnostics.grad_at=output"]  # fmt: skip


def test_run_id_changes_with_science_alone() -> None:
    bare = run_id(compose(), "data")
    assert all(run_id(compose(o), "data") != bare for o in SCIENCE)
    assert all(run_id(compose(o), "data") == bare for o in NOT_SCIENCE)
    assert run_id(compose(), "other data") != bare


def test_run_id_depends_on_the_numerics_version(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = run_id(compose(), "data")
    monkeypatch.setattr(identity, "NUMERICS_VERSION", identity.NUMERICS_VERSION + 1)
    assert run_id(compose(), "data") != bare


def test_diag_id_changes_with_diagnostics_alone() -> None:
    bare = diag_id(compose())
    assert all(diag_id(compose(o)) == bare for o in SCIENCE)
    assert diag_id(compose("diagnostics.grad_at=output")) != bare


IDENTITIES = json.loads((ROOT / "tests" / "golden" / "identities.json").read_text())


@pytest.mark.parametrize("case", IDENTITIES, ids=lambda case: " ".join(case["overrides"]) or "bare")
def test_no_identity_ever_changes(case: dict[str, Any]) -> None:
    """The ids are those that finished runs have; only a new NUMERICS_VERSION may give others."""
    c = compose(*case["overrides"])
    assert (run_id(c, "0" * 64), diag_id(c)) == (case["run_id"], case["diag_id"])


def test_columns_are_typed_scalars_without_paths_or_execution() -> None:
    found = {col.name: (col.dtype, value) for col, value in columns(compose("ln_backward.sites=[ln_1,ln_f]"))}
    assert found["attn_mode"] == ("string", "softmax")
    assert found["model.n_embd"] == ("int64", 128)
    assert found["optimizer.lr"] == ("float64", 1e-3)
    assert found["ln_backward.sites"] == ("string", "ln_1+ln_f")
    assert found["method.policy.head"] == ("string", "random")
    assert found["optimizer.grad_clip"] == ("float64", None)
    assert found["precision"] == ("string", "fp32")
    kinds = {"string": str, "int64": int, "float64": float, "bool": bool}
    assert all(value is None or type(value) is kinds[dtype] for dtype, value in found.values())
    assert not {name for name in found if name in identity.EXECUTION or name.startswith("data.")}


@pytest.mark.parametrize(
    ("overrides", "last", "steps"),
    [
        (["schedule=none"], 10, []),
        (["schedule=final"], 10, [10]),
        (["schedule=linear", "every=4"], 10, [0, 4, 8, 10]),
        (["schedule=log"], 10, [0, 1, 2, 4, 8, 10]),
        (["schedule=log"], 0, [0]),
        (["schedule=list", "steps=[3,1]"], 10, [1, 3, 10]),
    ],
)
def test_diagnostic_schedules(overrides: list[str], last: int, steps: list[int]) -> None:
    assert compose(*(f"diagnostics.{o}" for o in overrides)).diagnostics.at(last) == steps


def test_values_live_in_conf() -> None:
    """A default in code would be a second, silent source: a corpus, which is also made by hand, may repeat conf's."""
    c = compose()
    for name, part in {"": c, **c.parts()}.items():
        for field in dataclasses.fields(part):
            said = getattr(part, field.name) if name == "data" else dataclasses.MISSING
            assert field.default in (dataclasses.MISSING, said), f"{type(part).__name__}.{field.name}"


# ---------------------------------------------------------------- a stranger's dataclass


class Kind(str, Enum):
    a = "alpha"
    b = "beta"


@dataclasses.dataclass
class Inner:
    name: str
    x: float


@dataclasses.dataclass
class Plugin(Softmax):
    """Everything a newcomer's schema may hold."""

    old_style: Optional[float]  # noqa: UP045
    kind: Kind
    maybe: Inner | None
    kinds: list[Kind]
    table: dict[str, float]
    given: int = 7


def plugin(**values: Any) -> schema.RunConfig:
    plain = to_dict(compose())
    target = {"_target_": f"{__name__}.Plugin", "name": "plugin"}
    filled = {"old_style": 1.5, "kind": "a", "maybe": None, "kinds": ["a", "b"], "table": {"p": 1.0}}
    plain["attn_mode"] = target | filled | values
    return build(plain)


def test_a_strangers_schema_gets_columns_and_survives_the_round_trip() -> None:
    for maybe in (None, {"name": "n", "x": 2.0}):
        c = plugin(maybe=maybe)
        assert build(to_dict(c)) == c
        found = {col.name: (col.dtype, value) for col, value in columns(c)}
        assert found["attn_mode.old_style"] == ("float64", 1.5)
        assert found["attn_mode.kind"] == ("string", "a")
        assert found["attn_mode.kinds"] == ("string", "a+b")
        assert found["attn_mode.table"] == ("string", '{"p": 1.0}')
        assert found["attn_mode.given"] == ("int64", 7)
        assert runs.table((), columns(c), [{}]).num_rows == 1
    assert found["attn_mode.maybe.name"] == ("string", "n")
    assert found["attn_mode.maybe.x"] == ("float64", 2.0)


def test_a_strangers_missing_value_is_said() -> None:
    plain = to_dict(plugin())
    del plain["attn_mode"]["old_style"], plain["attn_mode"]["given"]
    with pytest.raises(ConfigError, match=r"attn_mode\.old_style has no value") as caught:
        build(plain)
    assert "given" not in str(caught.value)


def test_a_list_in_place_of_words_is_one_line() -> None:
    words: Any = ["seed=1", "steps=2"]
    with pytest.raises(ConfigError, match=r"not \['seed=1', 'steps=2'\]: of a list, call compose\(\*words\)"):
        compose(words)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads=100000 is more than"):
        train.admit(compose("threads=100000"))


@pytest.mark.parametrize("by_fp32", [True, False])
def test_bf16_by_way_of_fp32_is_said_once(
    by_fp32: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(products, "multiplies_bf16", lambda: not by_fp32)
    train._warn.cache_clear()
    for seed in (1, 2):
        train.admit(compose("device=cpu", f"seed={seed}"))
    assert not caplog.records
    train.admit(compose("device=cpu", "precision=bf16"), here=False)
    assert not caplog.records
    for seed in (1, 2):
        train.admit(compose("device=cpu", "precision=bf16", f"seed={seed}"))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * by_fp32
    train._warn.cache_clear()


def test_sites_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"ln_backward\.sites is empty"):
        train.admit(compose("ln_backward=ste", "ln_backward.sites=[]"))


def test_what_cannot_be_stored_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    c = compose()
    monkeypatch.setattr(c.attn_mode, "name", object())
    with pytest.raises(ConfigError, match="cannot be stored in a table"):
        train.admit(c)
