"""Configuration: typed schemas, and one check that lists every problem.

The yaml files under `conf/` hold every value, so no field here has a default: what is missing is reported, not guessed.
A group whose members bring their own code (attention mode, method, LayerNorm backward, optimizer, corpus, tracker)
names a dataclass by `_target_`; that dataclass is its schema, its config columns and its behaviour. Such a class may define
`resolve(config)`, to replace values that depend on the rest, and `problems(config)`, to reject what it cannot do.
Its field `name` is the label that rows carry: the member that was chosen, which is the name of its yaml file.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lnjac.errors import ConfigError
from lnjac.norms.formulas import GradAt

if TYPE_CHECKING:
    from omegaconf import DictConfig

SWEEP = ("sweep", "retry_failed", "dry_run", "report")
"""What a whole sweep is told, no part of any run's config."""


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class NormKind(str, Enum):
    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Placement(str, Enum):
    pre = "pre"
    post = "post"


class Split(str, Enum):
    train = "train"
    val = "val"


class Schedule(str, Enum):
    none = "none"
    final = "final"
    linear = "linear"
    log = "log"
    list = "list"


class Parts(str, Enum):
    """How finely a replaced backward is compared with the exact one: each level adds rows to those before it."""

    model = "model"
    block = "block"
    tensor = "tensor"


@dataclass
class Model:
    """Shape of the GPT (conf/model)."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    dropout: float
    bias: bool
    norm: NormKind
    placement: Placement
    affine: bool
    eps: float
    qk_norm: bool
    tie: bool

    def problems(self, config: "RunConfig") -> Iterator[str]:
        for field in ("n_layer", "n_head", "n_embd", "block_size"):
            if (value := getattr(self, field)) < 1:
                yield f"model.{field}={value} must be at least 1"
        if self.n_head >= 1 and self.n_embd >= 1 and self.n_embd % self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            tries = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            yield f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}: try n_embd={tries}"
        if not 0 <= self.dropout < 1:
            yield f"model.dropout={self.dropout} must lie in [0, 1)"
        if not 0 <= self.eps < math.inf:
            yield f"model.eps={self.eps} must not be negative or infinite: LayerNorm's usual value is 1e-5"


@dataclass
class Diagnostics:
    """What is measured, when, and on how much (conf/diagnostics)."""

    name: str
    schedule: Schedule
    every: int
    steps: list[int]
    batches: int
    batch_size: int
    split: Split
    grad_at: GradAt
    distributions: bool
    position_bins: int
    alignment: bool
    feedback_draws: int
    attention: bool
    swap: bool
    swap_parts: Parts
    more: Any = dataclasses.field(default_factory=dict)
    """Further diagnostics by name, each of a file conf/diagnostic/NAME.yaml; not hashed where there are none."""

    def at(self, last: int) -> list[int]:
        """The steps (numbers of updates done) at which the norms are analysed; the last one is always among them."""
        match self.schedule:
            case Schedule.none:
                return []
            case Schedule.final:
                chosen: list[int] = []
            case Schedule.linear:
                chosen = list(range(0, last, self.every))
            case Schedule.log:
                chosen = [0] + [2**k for k in range(last.bit_length())]
            case Schedule.list:
                chosen = list(self.steps)
        return sorted({step for step in chosen if step < last} | {last})

    def problems(self, config: "RunConfig") -> Iterator[str]:
        for field in ("batches", "batch_size", "every", "position_bins"):
            if (value := getattr(self, field)) < 1:
                yield f"diagnostics.{field}={value} must be at least 1"
        if self.feedback_draws < 0:
            yield f"diagnostics.feedback_draws={self.feedback_draws} must not be negative: 0 draws none"
        if self.steps and self.schedule is not Schedule.list:
            yield (
                f"diagnostics.steps={self.steps} is not used by diagnostics.schedule={self.schedule.value}: "
                "set diagnostics.schedule=list, or leave steps out"
            )
        if self.schedule is Schedule.none:
            for field in ("distributions", "alignment", "feedback_draws", "attention", "swap", "more"):
                if value := getattr(self, field):
                    value = list(value) if field == "more" else value
                    yield (
                        f"diagnostics.{field}={value} measures nothing with diagnostics.schedule=none: "
                        "choose a schedule, such as final"
                    )
        for step in self.steps:
            if not 0 <= step <= config.steps:
                yield f"diagnostics.steps holds {step}, outside the run's 0 to {config.steps}: drop it or raise steps"
        for diagnostic in self.more.values():
            if hasattr(diagnostic, "problems"):
                yield from diagnostic.problems(config)


@dataclass
class Evaluation:
    """Validation loss: `every` updates (null: only at the end), on the first `tokens` of the split (null: all)."""

    every: int | None
    tokens: int | None
    batch_size: int

    def problems(self, config: "RunConfig") -> Iterator[str]:
        for field in ("every", "tokens", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"eval.{field}={value} must be at least 1" + ("" if field == "batch_size" else ", or null")


@dataclass
class Checkpoints:
    """How often a run saves what it needs to go on after an interruption, in seconds (null: never)."""

    every: float | None

    def problems(self, config: "RunConfig") -> Iterator[str]:
        if self.every is not None and not self.every >= 0:
            yield f"checkpoint.every={self.every} must be 0 seconds or more, or null for no checkpoints"


@dataclass
class RunConfig:
    """One run: everything that `conf/` decides, as plain typed values."""

    model: Model
    attn_mode: Any
    method: Any
    ln_backward: Any
    optimizer: Any
    diagnostics: Diagnostics
    data: Any
    eval: Evaluation
    seed: int
    steps: int
    batch_size: int
    precision: Precision
    device: Device
    deterministic: bool
    threads: int | None
    save_model: bool
    checkpoint: Checkpoints
    tracker: Any

    def parts(self) -> dict[str, Any]:
        """The config groups by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if is_group(f)}


PLUGIN_GROUPS = {
    "attn_mode": "lnjac.gpt.attention.Attention",
    "method": "lnjac.gpt.methods.Method",
    "ln_backward": "lnjac.norms.layers.Surrogate",
    "optimizer": "lnjac.gpt.optimizers.Optimizer",
    "data": "lnjac.data.corpus.Source",
    "tracker": "lnjac.training.trackers.Tracker",
}
"""The groups whose members bring their own code, each with the class whose methods a member must offer."""


HASHED_AS = {
    "attn_mode": "lnjac.attention",
    "method": "lnjac.credit",
    "ln_backward": "lnjac.norm",
    "optimizer": "lnjac.optim",
    "data": "lnjac.data",
    "tracker": "lnjac.tracking",
}
"""The module that is hashed for lnjac's own classes of each group, wherever a class lives: its bare name is unique there."""


GROUPS = ("model", "diagnostics", *PLUGIN_GROUPS)
"""The groups with members: one yaml file for each in conf/GROUP."""


class Hooks(Protocol):
    """Methods that a member of any of these groups may have besides; each is given the whole config."""

    def resolve(self, config: RunConfig) -> None:
        """Replace values that depend on the rest of the config."""

    def problems(self, config: RunConfig) -> Iterable[str]:
        """Yield a line, with its remedy, for everything that the run cannot do."""

    def warnings(self, config: RunConfig) -> Iterable[str]:
        """Yield a line for everything that the run can do and its user should know."""


def build(node: "Mapping[str, Any] | DictConfig", runtime: Any = None) -> RunConfig:
    """Turn a composed config (or the plain mapping that `to_dict` gave, with its labels) into dataclasses.

    Args:
        node: with Hydra's own part, or without it as in a job's task.
        runtime: `hydra.runtime`, with the member chosen of each group and the folders that members are in; read from `node`
            where Hydra's part is in it.

    Raises:
        ConfigError: a line for every unknown, missing or ill-typed value, and for a class that its group cannot use.
    """
    from omegaconf import DictConfig, OmegaConf  # 0.1 s that commands which only read tables do without
    from omegaconf.errors import OmegaConfBaseException

    problems: list[str] = []
    values: dict[str, Any] = {}
    try:
        for key in map(str, node):
            if key == "hydra":  # Hydra's own part is complete only once a job runs
                runtime = node[key]["runtime"]
                continue
            if key in SWEEP:
                continue
            value = "???" if isinstance(node, DictConfig) and OmegaConf.is_missing(node, key) else node[key]
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from None
    if runtime is not None:
        problems += _label(values, runtime["choices"])
    parts: dict[str, Any] = {}
    for group in PLUGIN_GROUPS:
        if isinstance(value := values.get(group), Mapping):
            try:
                parts[group] = _fill(cls := _class(group, value), value, f"{group}.", problems)
                problems += [f"{group}={value.get('name')}: {said}" for said in _unfit(cls, Hooks, required=False)]
            except ConfigError as error:
                problems.append(str(error))
            values[group] = None
        elif group in values and value != "???":
            problems.append(
                f"{group}={value}: give {group}=NAME, of a file conf/{group}/NAME.yaml with `key: value` lines"
            )
            values[group] = None
    config: RunConfig = _fill(RunConfig, values, "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    config.diagnostics.more = _more(config.diagnostics.more, runtime or {}, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    for group, part in parts.items():
        setattr(config, group, part)
    for part in parts.values():
        if hasattr(part, "resolve"):
            part.resolve(config)
    for group, base in PLUGIN_GROUPS.items():  # of what `resolve` has put there
        part = getattr(config, group)
        problems += [f"{group}={part.name}: {said}" for said in _unfit(part.__class__, _named(base), required=True)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _label(values: Mapping[str, Any], choices: Mapping[str, Any]) -> Iterator[str]:
    """Fill in each group's label, the member that was chosen; yields a line for a group that has none or another one."""
    for group in GROUPS:
        if not isinstance(value := values.get(group), dict):
            continue
        if not isinstance(member := choices.get(group), str):
            yield f"{group} has no chosen member to label its rows by: give {group}=NAME, of a file conf/{group}/NAME.yaml"
        elif value.setdefault("name", member) != member:
            said = f"{group}.name={value['name']}: rows are labelled by the chosen member, {member}"
            yield f"{said}: leave the key name out of conf/{group}/{member}.yaml and of the command"


def _more(more: Any, runtime: Any, problems: list[str]) -> dict[str, Any]:
    """Build the diagnostics of `diagnostics.more`: names of yaml files, or from a finished run their values by name."""
    from omegaconf import OmegaConf

    nodes = dict(more) if isinstance(more, Mapping) else {}
    folders = [Path(source["path"]) for source in runtime.get("config_sources", ()) if source["schema"] == "file"]
    for name in [more] if isinstance(more, str) else [] if nodes else more:
        files = [file for folder in folders if (file := folder / "diagnostic" / f"{name}.yaml").is_file()]
        if files:
            nodes[name] = OmegaConf.to_container(OmegaConf.load(files[0]), resolve=True)
        else:
            problems.append(
                f"diagnostics.more={name} names no file conf/diagnostic/{name}.yaml: write one, or leave it out"
            )
    found = {}
    for name, node in nodes.items():
        try:
            cls = _class("diagnostic", node)
        except ConfigError as error:
            problems.append(f"diagnostics.more={name}: {error}")
            continue
        base = _named("lnjac.diagnostics.base.Diagnostic")
        if issubclass(cls, base):
            problems += [f"diagnostics.more={name}: {said}" for said in _unfit(cls, base, required=True)]
            found[name] = _fill(cls, node, f"diagnostic.{name}.", problems)
        else:
            problems.append(
                f"diagnostics.more={name}: {cls.__qualname__} is no lnjac.diagnostics.base.Diagnostic: derive it"
            )
    return found


def check(config: RunConfig) -> list[str]:
    """Every cross-field impossibility, each with its remedy; an empty list for a sound config."""
    found: list[str] = []
    if not 0 <= config.seed < 2**63:
        found.append(f"seed={config.seed} must lie between 0 and 2^63 - 1")
    if config.steps < 0:
        found.append(f"steps={config.steps} must not be negative: steps=0 analyses the model at initialisation")
    if config.batch_size < 1:
        found.append(f"batch_size={config.batch_size} must be at least 1")
    if config.threads is not None and config.threads < 1:
        found.append(f"threads={config.threads} must be at least 1, or null for torch's own choice")
    for part in config.parts().values():
        if hasattr(part, "problems"):
            found += part.problems(config)
    return found


def check_corpus(config: RunConfig, n_train: int, n_val: int) -> list[str]:
    """What the corpus is too short for; n_train and n_val are its splits' lengths in tokens."""
    need = config.model.block_size + 1
    return [
        f"the {split} split has {n} tokens, too few for model.block_size={config.model.block_size}: "
        f"choose block_size <= {n - 1} or a longer corpus"
        for split, n in (("training", n_train), ("validation", n_val))
        if n < need
    ]


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field, without `| None`."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            given = [arg for arg in typing.get_args(hint) if arg is not type(None)]
            hint = given[0] if len(given) == 1 else hint
        found[name] = hint
    return found


def is_group(field: "dataclasses.Field[Any]") -> bool:
    return field.type is Any or dataclasses.is_dataclass(field.type)


def _class(group: str, node: Mapping[str, Any]) -> type:
    """The dataclass that a member names. Raises ConfigError for one that cannot be imported, made or checked against."""
    target = str(node.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if module == HASHED_AS.get(group):  # of a finished run
        target = f"{PLUGIN_GROUPS[group].rpartition('.')[0]}.{name}"
    try:
        cls = _named(target)
        if not dataclasses.is_dataclass(cls):
            raise ConfigError("is not a dataclass, so it has no schema to check against: decorate it by @dataclass")
        if abstract := getattr(cls, "__abstractmethods__", None):
            raise ConfigError(f"is abstract: define {', '.join(sorted(abstract))}, or name a subclass")
        if group in GROUPS and "name" not in (fields := [field.name for field in dataclasses.fields(cls)]):
            raise ConfigError(f"has no field for its label, only {', '.join(fields) or 'none'}: add `name: str`")
    except ConfigError as error:
        raise ConfigError(f"{group}._target_={target!r} {error}") from None
    return typing.cast(type, cls)


def _named(target: str) -> Any:
    """The object that a dotted name means. Raises ConfigError, which says what of the name cannot be found."""
    module, _, name = target.rpartition(".")
    if not module or not name:
        raise ConfigError("names no class: write package.module.Class")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                f"names a module that is not there, {missing}: correct it, or put its folder on PYTHONPATH"
            ) from None
        raise ConfigError(
            f"names a module that cannot be imported: {type(error).__name__}: {_first_line(error)}"
        ) from None
    if not hasattr(found, name):
        close = difflib.get_close_matches(name, vars(found), 1)
        raise ConfigError(f"names no class of {module}" + (f": did you mean {close[0]}?" if close else ": correct it"))
    return getattr(found, name)


@lru_cache
def _unfit(cls: type, base: type, *, required: bool) -> list[str]:
    """A line for each method of `base` that a member's class has not, if it is required, or that takes other arguments."""
    found = []
    for name, declared in inspect.getmembers(base, inspect.isfunction):
        if name.startswith("_") or not (required or hasattr(cls, name)):
            continue
        asked = list(inspect.signature(declared).parameters.values())[1:]
        call = f"{name}({', '.join(parameter.name for parameter in asked)})"
        if not callable(own := getattr(cls, name, None)):
            found.append(f"{cls.__qualname__} has no method {call}")
        elif not _takes(cls, name, asked):
            found.append(f"{cls.__qualname__}.{name}{inspect.signature(own)} cannot be called as {call}")
    return found


def _takes(cls: type, name: str, asked: Sequence[inspect.Parameter]) -> bool:
    """Whether a class's method can be called with these arguments: by place, but for those that have only a name."""
    bound = isinstance(inspect.getattr_static(cls, name), (staticmethod, classmethod))
    by_name = [parameter.name for parameter in asked if parameter.kind is parameter.KEYWORD_ONLY]
    by_place = len(asked) - len(by_name) + (not bound)
    try:
        inspect.signature(getattr(cls, name)).bind(*[None] * by_place, **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


def _fill(cls: type, node: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Fill cls's schema from node key by key, so that one bad value does not hide the next."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        schema, hints = OmegaConf.structured(cls), field_types(cls)
    except Exception as error:  # of a stranger's annotations
        problems.append(f"{prefix.rstrip('.')}: {cls.__qualname__} cannot be a schema: {_first_line(error)}")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    before = len(problems)
    given = {str(key): value for key, value in node.items() if key != "_target_"}
    for key, value in given.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            problems.append(f"{prefix}{key} is not a setting: {hint}")
            continue
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            value = _fill(typing.cast(type, hint), value, f"{prefix}{key}.", problems)
            if value is None:
                continue
        if typing.get_origin(hint) is list and isinstance(value, str):
            value = [value]
        if isinstance(value, bool) and isinstance(hint, type) and issubclass(hint, Enum):
            value = str(value).lower()  # yaml and Hydra read a member called `true` as a boolean
        try:
            schema[key] = value
        except OmegaConfBaseException as error:
            problems.append(f"{prefix}{key}={value}: {_first_line(error)}")
            continue
        if not OmegaConf.is_missing(schema, key) and isinstance(schema[key], int) and abs(schema[key]) >= 2**63:
            problems.append(f"{prefix}{key}={value} does not fit into 64 bits: it must lie between -2^63 and 2^63 - 1")
    problems += [
        f"{prefix}{key} has no value: give {prefix}{key}=..."
        for key, field in fields.items()
        if given.get(key) == "???" or (key not in given and _required(field))
    ]
    if len(problems) > before:
        return None
    try:
        return OmegaConf.to_object(schema)
    except Exception as error:  # of a stranger's __post_init__
        problems.append(f"{prefix.rstrip('.')}: {type(error).__name__}: {_first_line(error)}")
        return None


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
