"""The schema of a run's config, and one check that lists every problem.

The yaml files under `conf/` hold every value, so no field here has a default: a missing value is reported, not guessed.
A group whose members bring their own code (attention mode, method, LayerNorm backward, optimizer, corpus, tracker)
names a dataclass by `_target_`. That dataclass is the member's schema, its config columns and its behaviour. It may define
`resolve(config)`, to replace values that depend on the rest, and `problems(config)`, to refuse a config that it cannot run.
Its field `name` is the label that rows carry: the chosen member, which is the name of its yaml file.

Some of a model's values are members too, such as model.norm. They are given by name, and looked up in conf/model/norm.
"""

import copy
import dataclasses
import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lnjac.diagnostics.settings import Diagnostics
from lnjac.errors import ConfigError
from lnjac.gpt.settings import Model, Precision

SWEEP = ("sweep", "retry_failed", "stop_on_failure", "dry_run", "report", "zip", "reuse")
"""The keys of a whole command, which are no part of a run's config."""

MISSING = "???"
"""The value by which a yaml file asks for one."""

AS_BEFORE = {"keep_state": False}
"""Keys that were added later, and their values in the configs of finished runs that lack them."""

CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
CONF = CHECKOUT if (CHECKOUT / "config.yaml").is_file() else CHECKOUT.parent / "lnjac" / "conf"
"""The folder of the config groups: the checkout's, else the one inside the installed package."""


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


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
    """Seconds between the checkpoints from which an interrupted run is resumed (null: none)."""

    every: float | None

    def problems(self, config: "RunConfig") -> Iterator[str]:
        if self.every is not None and not self.every >= 0:
            yield f"checkpoint.every={self.every} must be 0 seconds or more, or null for no checkpoints"


@dataclass
class RunConfig:
    """One run: every value that `conf/` decides, typed."""

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
    keep_state: bool
    checkpoint: Checkpoints
    tracker: Any

    def parts(self) -> dict[str, Any]:
        """Return the values that are dataclasses, by name, and the members among the model's values."""
        names = [f.name for f in dataclasses.fields(self) if is_group(f)]
        return {name: attrgetter(name)(self) for name in (*names, *NAMED_GROUPS)}


class Plugin(NamedTuple):
    """A group whose members bring their own code.

    `offers` is the class whose methods a member must have. `hashed_as` is the module that is hashed for lnjac's own
    classes, wherever they live; their bare names are unique in it.
    """

    offers: str
    hashed_as: str


PLUGIN_GROUPS = {
    "attn_mode": Plugin("lnjac.gpt.attention.Attention", "lnjac.attention"),
    "method": Plugin("lnjac.gpt.methods.Method", "lnjac.credit"),
    "ln_backward": Plugin("lnjac.norms.layers.Surrogate", "lnjac.norm"),
    "optimizer": Plugin("lnjac.gpt.optimizers.Optimizer", "lnjac.optim"),
    "data": Plugin("lnjac.data.corpus.Source", "lnjac.data"),
    "tracker": Plugin("lnjac.trackers.Tracker", "lnjac.tracking"),
    "model.norm": Plugin("lnjac.gpt.norms.Kind", "lnjac.norm_kind"),
    "model.placement": Plugin("lnjac.gpt.norms.Placement", "lnjac.placement"),
}

NAMED_GROUPS = tuple(group for group in PLUGIN_GROUPS if "." in group)
"""The groups whose member is a value within another group's: its name, or a mapping with its name and its keys."""

DIAGNOSTIC = "lnjac.diagnostics.base.Diagnostic"
"""The class that a member of `diagnostics.more` derives from."""

GROUPS = ("model", "diagnostics", *PLUGIN_GROUPS)
"""The groups with members: one yaml file for each in conf/GROUP."""


class Hooks(Protocol):
    """Methods that a member of any group may have; each gets the whole config."""

    def resolve(self, config: RunConfig) -> None:
        """Replace values that depend on the rest of the config."""

    def problems(self, config: RunConfig) -> Iterable[str]:
        """Yield a line, with its remedy, for each reason why the config cannot be run."""

    def warnings(self, config: RunConfig) -> Iterable[str]:
        """Yield a line for each property of a sound config that its user should know."""


def build(
    values: Mapping[str, Any], choices: Mapping[str, Any] | None = None, folders: Sequence[Path] = (CONF,)
) -> RunConfig:
    """Turn a config's plain values into dataclasses.

    Args:
        values: from `compose.plain`, or from `identity.to_dict`, which include the labels.
        choices: the chosen member of each group, by which rows are labelled; None if `values` include the labels.
        folders: those of yaml files, in which members that `values` only name are looked up.

    Raises:
        ConfigError: a line for each unknown, missing or ill-typed value, and for each class that its group cannot use.
    """
    problems: list[str] = []
    values = values if choices is not None else AS_BEFORE | dict(values)
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for group in GROUPS if choices is not None else ():
        if isinstance(value := values.get(group), Mapping):
            values[group] = _labelled(group, value, (choices or {}).get(group), problems)
    for group in PLUGIN_GROUPS:
        holder, key = held(values, group)
        if holder.get(key, MISSING) != MISSING:
            finished = choices is None and isinstance(holder[key], Mapping)
            if group in NAMED_GROUPS and not finished:
                holder[key] = _named_member(group, holder[key], folders, problems)
            else:
                holder[key] = _member(group, holder[key], problems)
    config: RunConfig = _fill(RunConfig, values, "", problems)
    if not problems:
        nodes = _diagnostics(config.diagnostics.more or {}, folders, problems)
        config.diagnostics.more = {
            name: _made("diagnostic", f"diagnostics.more={name}: ", f"diagnostic.{name}.", node, DIAGNOSTIC, problems)
            for name, node in nodes.items()
        }
    if not problems:
        for part in config.parts().values():
            if hasattr(part, "resolve"):
                part.resolve(config)
        for group, plugin in PLUGIN_GROUPS.items():  # after `resolve`, which may replace a member
            part = attrgetter(group)(config)
            problems += [
                f"{group}={part.name}: {said}" for said in _unfit(part.__class__, _named(plugin.offers), required=True)
            ]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def held(values: dict[str, Any], group: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds a group's member, and the key there: an empty one where there is no such mapping."""
    outer, _, key = group.rpartition(".")
    holder = values.get(outer) if outer else values
    return (holder if isinstance(holder, dict) else {}), key


def _diagnostics(named: Any, folders: Sequence[Path], problems: list[str]) -> Mapping[str, Any]:
    """Return the yaml files' values by the names that `diagnostics.more` lists; what is no list has them already."""
    if isinstance(named, Mapping):
        return named
    names = [named] if isinstance(named, str) else named
    nodes = {name: _file("diagnostics.more", "diagnostic", name, folders, problems) for name in names}
    return {name: node for name, node in nodes.items() if node is not None}


def _named_member(group: str, given: Any, folders: Sequence[Path], problems: list[str]) -> Any:
    """Make the dataclass of a name's yaml file, with the keys given beside the name; None if that is not possible."""
    keys = dict(given) if isinstance(given, Mapping) else {"name": given}
    if "_target_" in keys:
        problems.append(
            f"{group}._target_={keys['_target_']}: rows would carry the label of another class: name this class in a file "
            f"conf/{folder_of(group)}/NAME.yaml and choose it by {group}=NAME"
        )
        return None
    if not isinstance(name := keys.pop("name", None), str):
        said = (
            f"{', '.join(f'{group}.{key}' for key in keys)} has no member" if keys else f"{group}={name} is no member"
        )
        problems.append(f"{said}: choose one by {group}=NAME, of a file conf/{folder_of(group)}/NAME.yaml")
        return None
    node = _file(group, folder_of(group), name, folders, problems)
    if isinstance(node, Mapping):
        node = _labelled(group, {**node, **keys}, name, problems)
    return None if node is None else _member(group, node, problems)


def named_alone(group: str, member: Any) -> bool:
    """Return whether a member's name is enough to make it again: one of our classes without keys, by a file of ours."""
    cls = type(member)
    node = _file(group, folder_of(group), member.name, (CONF,), [])
    ours = cls.__module__.startswith("lnjac.") and [field.name for field in dataclasses.fields(cls)] == ["name"]
    return ours and node == {"_target_": f"{cls.__module__}.{cls.__qualname__}"}


def _file(key: str, folder: str, name: str, folders: Sequence[Path], problems: list[str]) -> Any:
    """Return the values of folder/NAME.yaml in the first of the folders that has it; None, with a problem, if none has."""
    for file in (root / folder / f"{name}.yaml" for root in folders):
        if file.is_file():
            return copy.deepcopy(_loaded(file, file.stat().st_mtime_ns))
    known = sorted({file.stem for root in folders for file in (root / folder).glob("*.yaml")})
    other = f"choose {' or '.join(known)}" if known else "leave it out"
    problems.append(f"{key}={name} names no file conf/{folder}/{name}.yaml: write one, or {other}")
    return None


@lru_cache
def _loaded(file: Path, changed_ns: int) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(file), resolve=True)


def folder_of(group: str) -> str:
    """Return the folder of a group's members, in conf/."""
    return group.replace(".", "/")


def _labelled(group: str, value: Mapping[str, Any], member: Any, problems: list[str]) -> dict[str, Any]:
    """Return a group's values with its label, the chosen member; a group without one, or with another, is a problem."""
    labelled = {"name": member, **value}
    if not isinstance(member, str):
        problems.append(
            f"{group} has no chosen member to label its rows by: choose one by {group}=NAME, "
            f"of a file conf/{folder_of(group)}/NAME.yaml"
        )
    elif labelled["name"] != member:
        problems.append(
            f"{group}.name={labelled['name']}: rows are labelled by the chosen member, {member}: "
            f"leave the key name out of conf/{folder_of(group)}/{member}.yaml and of the command"
        )
    return labelled


def _member(group: str, value: Any, problems: list[str]) -> Any:
    """Make the dataclass that a group's values name by `_target_`; None if that is not possible."""
    if not isinstance(value, Mapping):
        problems.append(
            f"{group}={value} is no member: choose one by {group}=NAME, "
            f"of a file conf/{folder_of(group)}/NAME.yaml with `key: value` lines"
        )
        return None
    return _made(group, f"{group}={value.get('name')}: ", f"{group}.", value, None, problems)


def _made(group: str, label: str, prefix: str, node: Mapping[str, Any], parent: str | None, problems: list[str]) -> Any:
    """Make the dataclass that a node names by `_target_`, a subclass of `parent` if given; None if that is not possible."""
    try:
        cls = _class(group, str(node.get("_target_", "")))
        base = Hooks if parent is None else _named(parent)
        if parent is not None and not issubclass(cls, base):
            raise ConfigError(f"{cls.__qualname__} is no {parent}: derive it")
    except ConfigError as error:
        problems.append(f"{label}{error}")
        return None
    made = _fill(cls, {key: value for key, value in node.items() if key != "_target_"}, prefix, problems)
    problems += [f"{label}{said}" for said in _unfit(cls, base, required=parent is not None)]
    return made


def check(config: RunConfig) -> list[str]:
    """Return a line, with its remedy, for each value that cannot be run with the others; none for a sound config."""
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
    """Return a line for each split of the corpus, of n_train and n_val tokens, that is shorter than a sequence."""
    need = config.model.block_size + 1
    return [
        f"the {split} split has {n} tokens, too few for model.block_size={config.model.block_size}: "
        f"choose block_size <= {n - 1} or a longer corpus"
        for split, n in (("training", n_train), ("validation", n_val))
        if n < need
    ]


@lru_cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the type of each field, without `| None`."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            given = [arg for arg in typing.get_args(hint) if arg is not type(None)]
            hint = given[0] if len(given) == 1 else hint
        found[name] = hint
    return found


def is_group(field: "dataclasses.Field[Any]") -> bool:
    return field.type is Any or dataclasses.is_dataclass(field.type)


def _class(group: str, target: str) -> type:
    """Return the dataclass of that dotted name. Raises ConfigError if it cannot be imported, made or checked against."""
    module, _, name = target.rpartition(".")
    if group in PLUGIN_GROUPS and module == PLUGIN_GROUPS[group].hashed_as:  # of a finished run
        target = f"{PLUGIN_GROUPS[group].offers.rpartition('.')[0]}.{name}"
    try:
        cls = _named(target)
        if not dataclasses.is_dataclass(cls):
            raise ConfigError("is not a dataclass, so its values cannot be checked: decorate the class with @dataclass")
        if abstract := getattr(cls, "__abstractmethods__", None):
            raise ConfigError(f"is abstract: define {', '.join(sorted(abstract))}, or name a subclass")
        if group in GROUPS and "name" not in (fields := [field.name for field in dataclasses.fields(cls)]):
            raise ConfigError(f"has no field for its label, only {', '.join(fields) or 'none'}: add `name: str`")
    except ConfigError as error:
        raise ConfigError(f"{group}._target_={target!r} {error}") from None
    return typing.cast(type, cls)


def _named(target: str) -> Any:
    """Return the object of that dotted name. Raises ConfigError, which names the part that cannot be found."""
    module, _, name = target.rpartition(".")
    if not module or not name:
        raise ConfigError("names no class: write package.module.Class")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                f"names a module that is not there, {missing}: correct the name, or put the module's folder on PYTHONPATH"
            ) from None
        raise ConfigError(
            f"names a module that cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from None
    if not hasattr(found, name):
        close = difflib.get_close_matches(name, vars(found), 1)
        raise ConfigError(
            f"names no class of {module}" + (f": did you mean {close[0]}?" if close else ": correct the name")
        )
    return getattr(found, name)


@lru_cache
def _unfit(cls: type, base: type, *, required: bool) -> list[str]:
    """Return a line for each method of `base` that a class lacks, if it is required, or that takes other arguments."""
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
    """Return whether a class's method can be called with these arguments, by place unless they are keyword-only."""
    by_name = [parameter.name for parameter in asked if parameter.kind is parameter.KEYWORD_ONLY]
    by_place = [None] * (len(asked) - len(by_name))
    try:
        inspect.signature(getattr(object.__new__(cls), name)).bind(*by_place, **dict.fromkeys(by_name))
    except TypeError:
        return False
    return True


def _fill(cls: type, given: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Make a dataclass from plain values key by key, so that one bad value does not hide the next; None if one is bad."""
    before = len(problems)
    try:
        fields = _fields(cls)
    except Exception as error:  # of a stranger's annotations
        problems.append(f"{prefix.rstrip('.')}: {cls.__qualname__} cannot be a schema: {first_line(error)}")
        return None
    plain = {str(key): value for key, value in given.items()}
    for name, field in fields.items():
        plain.setdefault(name, field.default())
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            problems.append(f"{prefix}{key} is not a setting: {hint}")
        elif dataclasses.is_dataclass(fields[key].type) and isinstance(value, Mapping):
            values[key] = _fill(fields[key].type, value, f"{prefix}{key}.", problems)
        elif dataclasses.is_dataclass(value):  # the member of a group, made before
            values[key] = value
        elif value != MISSING:
            value = fields[key].respelled(value)
            try:
                values[key] = fields[key].convert(value)
            except ConfigError as error:
                problems.append(f"{prefix}{key}={value}{error}")
    problems += [f"{prefix}{key} has no value: give {prefix}{key}=..." for key in fields if plain[key] == MISSING]
    if len(problems) > before:
        return None
    try:
        made = cls(**{key: value for key, value in values.items() if fields[key].init})
        for key in values:
            if not fields[key].init:
                setattr(made, key, values[key])
        return made
    except Exception as error:  # of a stranger's __post_init__
        problems.append(f"{prefix.rstrip('.')}: {type(error).__name__}: {first_line(error)}")
        return None


class _Field:
    """The schema of one field of a dataclass, which converts plain values to the field's type as OmegaConf does."""

    def __init__(self, cls: type, field: "dataclasses.Field[Any]") -> None:
        from omegaconf import OmegaConf

        self.name, self.init, self.type = field.name, field.init, field_types(cls)[field.name]
        self._field = field
        alone = [(field.name, typing.get_type_hints(cls)[field.name])]
        self._schema = OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, alone))
        self._converted: dict[str, Any] = {}  # by the plain value's text: the jobs of a sweep share most values

    def default(self) -> Any:
        """Return the value of a config that does not give one: MISSING where the class has no default."""
        if self._field.default_factory is not dataclasses.MISSING:
            return self._field.default_factory()
        return MISSING if self._field.default is dataclasses.MISSING else self._field.default

    def respelled(self, value: Any) -> Any:
        """Return the value as it was meant: one name as a list of names, and a boolean as the member of that name."""
        if typing.get_origin(self.type) is list and isinstance(value, str):
            return [value]
        if isinstance(value, bool) and isinstance(self.type, type) and issubclass(self.type, Enum):
            return str(value).lower()  # yaml and Hydra read a member called `true` as a boolean
        return value

    def convert(self, value: Any) -> Any:
        """Convert a plain value. Raises ConfigError, whose text begins after the value, for one of another type."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if (text := repr(value)) not in self._converted:
            try:
                self._schema[self.name] = value
                found = self._schema[self.name]
                found = OmegaConf.to_object(found) if OmegaConf.is_config(found) else found
            except OmegaConfBaseException as error:
                raise ConfigError(f": {first_line(error)}") from None
            if isinstance(found, int) and abs(found) >= 2**63:
                raise ConfigError(" does not fit into 64 bits: it must lie between -2^63 and 2^63 - 1")
            self._converted[text] = found
        return copy.deepcopy(self._converted[text])


@lru_cache
def _fields(cls: type) -> dict[str, _Field]:
    """Return the schemas of a dataclass's fields by name. Raises OmegaConf's errors for types that it does not know."""
    from omegaconf import OmegaConf

    OmegaConf.structured(cls)
    return {field.name: _Field(cls, field) for field in dataclasses.fields(cls)}


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
