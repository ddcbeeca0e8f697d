"""Compose configs: all of Hydra and OmegaConf that is not a sweep's."""

import copy
import dataclasses
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.config.schema import CONF, MISSING, NAMED_GROUPS, SWEEP, RunConfig, build, first_line, folder_of
from lnjac.errors import ConfigError
from lnjac.escape import visible

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


def compose(*overrides: str) -> RunConfig:
    """Return the config that `python run.py OVERRIDES` would run.

    Args:
        overrides: words of that command, such as "seed=2", "attn_mode=sigmoid" or "optimizer.lr=3e-4".

    Returns:
        The typed config: `config.seed`, `config.model.n_embd`, …. `lnjac.run(config, folder)` trains and analyses it.

    Raises:
        ConfigError: a line for each unknown, missing or ill-typed value, or for a list in place of words.
        hydra.errors.HydraException: for a member that no file in conf/ has, or a word that Hydra cannot read.

    Example:
        >>> config = lnjac.compose("model=tiny", "attn_mode=sigmoid", "seed=2")
        >>> config.model.n_embd
        32
    """
    if odd := [word for word in overrides if not isinstance(word, str)]:
        raise ConfigError(f'compose takes words such as "seed=1", not {odd[0]!r}: of a list, call compose(*words)')
    changed_ns = max(path.stat().st_mtime_ns for path in (CONF, *CONF.rglob("*")))
    return _composer(CONF, changed_ns).compose(overrides).build()


def file_of(group: str, name: str) -> Path:
    """Return the yaml file of a group's member."""
    return CONF / folder_of(group) / f"{name}.yaml"


@lru_cache(1)
def _composer(folder: Path, changed_ns: int) -> "RunComposer":
    """Return the composer of a folder's files as they were at that time: an edited, new or deleted file needs another."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        loader = GlobalHydra.instance().config_loader()
    return RunComposer(loader, lambda words: loader.load_configuration("config", words, RunMode.RUN))


NOT_OURS = ("hydra", *SWEEP)
"""Keys of a composed config that are no part of a run's."""

TEXTS = ("sweep", "reuse", "hydra.run.dir", "hydra.sweep.dir", "data.dir", "data.source", "data.files")
"""Keys whose values are text, because they name files and folders."""


def as_typed(words: Sequence[str]) -> list[str]:
    """Mark a command's words so that Hydra reads names as they are typed (`spelled`), and leaves unknown keys to the schema.

    A value's key gets the prefix `++`. Without it, Hydra compares the key with the default members before any job is
    composed, and refuses a key that only other members have, with the advice to add it by `+`, which no schema allows.
    """
    known = (
        {field.name for field in dataclasses.fields(RunConfig)} | set(SWEEP) | {path.name for path in CONF.iterdir()}
    )
    own_config = any(word.startswith(("-c", "--config")) for word in words)  # which may have groups of its own
    marked = []
    for word in spelled(words):
        if found := re.fullmatch(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", word, re.DOTALL):
            plus, key, value = found.groups()
            unknown = not (plus or own_config or key in known)
            if not key.startswith("hydra.") and ("." in key or unknown):
                plus = "++"
            word = f"{plus}{key}={value}"
        marked.append(word)
    return marked


class Composer:
    """Composes configs as Hydra does, but asks Hydra, which takes 0.1 s, once for all that differ in plain values alone.

    `loader` is Hydra's, and `load` has it make a config from override words. `repository` is where it looks for members.
    """

    whole: Collection[str] = ()
    """Keys that belong to a sweep as a whole, so that they cannot be swept."""

    def __init__(self, loader: Any, load: "Callable[[list[str]], DictConfig]") -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.repository, self._load = loader.repository, load
        self._parser = OverridesParser.create(config_loader=loader)
        self._words: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}
        self._bases: dict[tuple[str, ...], Base] = {}

    def read(self, words: Sequence[str]) -> "list[Override]":
        """Read a command's words. Raises ConfigError or a HydraException if they cannot be read."""
        if new := [word for word in words if word not in self._words]:
            self._words |= zip(new, self._parser.parse_overrides(self.spelled(new)), strict=True)
        return [self._words[word] for word in words]

    def compose(self, words: Sequence[str]) -> "Composed":
        """Compose a command's words. Raises ConfigError or a HydraException if they cannot be read or name no member."""
        read = self.read(words)
        plain = self.plain(read)
        return Composed(self, self.base([override for override in read if override not in plain]), read, plain)

    def base(self, overrides: "Iterable[Override]") -> "Base":
        """Return the config that Hydra composes by these words."""
        from omegaconf import OmegaConf

        words = tuple(str(override.input_line) for override in overrides)
        if words not in self._bases:
            config = self.load(words)
            values: Any = OmegaConf.to_container(config)
            choices = values.pop("hydra")["runtime"]["choices"]
            self._bases[words] = Base(config, values, choices, folders(config.hydra.runtime))
        return self._bases[words]

    def load(self, words: Iterable[str]) -> "DictConfig":
        with broken_yaml():
            return self._load(list(words))

    def plain(self, overrides: "Sequence[Override]") -> "list[Override]":
        """Return those that only give keys values, so that they can be put into a config that Hydra composed without them.

        None of them if another word removes a key or gives a group values, as then their order matters.
        """
        given = [override for override in overrides if not self._chooses(override)]
        groups = [override for override in overrides if override not in given and not override.is_hydra_override()]
        if any(o.is_delete() or isinstance(o.value(), dict) for o in groups):
            return []
        return [] if any(o.is_delete() or o.package is not None for o in given) else given

    def _chooses(self, override: "Override") -> bool:
        """Return whether it chooses a group's member, or is about Hydra's own part."""
        if (key := override.key_or_group) not in self._groups:
            self._groups[key] = self.repository.group_exists(key)
        return self._groups[key] or override.is_hydra_override()

    def put(self, overrides: "Sequence[Override]", config: "DictConfig") -> None:
        """Give keys of a config values. Raises a HydraException for those that Hydra refuses."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)

    # Words of a command, by the rules of the script

    def spelled(self, words: Sequence[str]) -> list[str]:
        """Return words as Hydra is to read them."""
        return list(words)

    def as_typed(self, words: Sequence[str]) -> list[str]:
        """Return words of a yaml file as Hydra would get them from a command."""
        return list(words)

    def typed(self, word: str) -> str:
        """Return a word as its user typed it."""
        return word

    def in_words(self, words: Sequence[str]) -> str:
        """Return a job's words as its user typed them, in one line."""
        return visible(" ".join(map(self.typed, words)))


def searched(loader: Any, master: "DictConfig") -> Any:
    """Return where Hydra looks for the members of groups for a sweep's jobs: in hydra.searchpath, too."""
    words = list(master.hydra.overrides.hydra)
    return loader._parse_overrides_and_create_caching_repo(master.hydra.job.config_name, words)[1]


class RunComposer(Composer):
    """Composes our own runs' configs, 2.5 ms each: the schema checks their keys and values, in place of OmegaConf."""

    whole = (*SWEEP, "experiment")

    def plain(self, overrides: "Sequence[Override]") -> "list[Override]":
        return [o for o in overrides if not (o.is_delete() or o.package is not None or self._chooses(o))]

    def compose(self, words: Sequence[str]) -> "RunComposed":
        return RunComposed(*super().compose(words))

    def put(self, overrides: "Sequence[Override]", config: "DictConfig") -> None:
        """Give any keys values: `build` refuses those that the schema lacks."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            for override in overrides:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException:
            super().put(overrides, config)  # its error names the override
            raise

    def spelled(self, words: Sequence[str]) -> list[str]:
        return spelled(words)

    def as_typed(self, words: Sequence[str]) -> list[str]:
        return as_typed(words)

    def typed(self, word: str) -> str:
        return typed(word)


class Base(NamedTuple):
    """A config that Hydra composed, in which jobs put plain values of their own.

    `values` are those of the script's own keys, with interpolations as they are written; `choices` the member of each
    group; `folders` are those of the yaml files.
    """

    config: "DictConfig"
    values: dict[str, Any]
    choices: dict[str, Any]
    folders: list[Path]


class Composed(NamedTuple):
    """One job's config, in a form of which a sweep can hold thousands; `plain` are the overrides that `base` lacks."""

    composer: Composer
    base: Base
    overrides: "Sequence[Override]"
    plain: "Sequence[Override]"

    @property
    def choices(self) -> dict[str, Any]:
        """The chosen member of each group."""
        return self.base.choices

    @property
    def words(self) -> list[str]:
        """The overrides of the script's own keys and groups, as their user typed them."""
        return [self.composer.typed(str(override.input_line)) for override in self._own]

    @property
    def _own(self) -> "list[Override]":
        return [override for override in self.overrides if not override.is_hydra_override()]

    def value(self, key: str) -> Any:
        """Return what the config has by this key of its first level; None if it has no such key."""
        from omegaconf import OmegaConf

        given = [override.value() for override in self.plain if override.key_or_group == key]
        written = given[-1] if given else self.base.values.get(key)
        return OmegaConf.select(self.full(), key) if isinstance(written, str) and "${" in written else written

    def full(self) -> "DictConfig":
        """Return the config as Hydra composes it, with Hydra's own part. Raises a HydraException for what it refuses."""
        from hydra._internal.config_loader_impl import get_overrides_dirname

        config = copy.deepcopy(self.base.config)
        self.composer.put(self.plain, config)
        config.hydra.overrides.task = self.words
        names = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            overrides=self._own, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
        )
        return config


class RunComposed(Composed):
    """One of our own runs' configs."""

    @property
    def choices(self) -> dict[str, Any]:
        """The chosen member of each group, by which rows are labelled."""
        named = {f"{group}.name": group for group in NAMED_GROUPS}
        given = {named[o.key_or_group]: str(o.value()) for o in self.plain if o.key_or_group in named}
        return self.base.choices | given

    def build(self) -> RunConfig:
        """Return the typed config. Raises ConfigError for values that the schema refuses."""
        given = [(o.key_or_group, o.value()) for o in self.plain if o.key_or_group not in SWEEP]
        values = {key: value for key, value in self.base.values.items() if key not in SWEEP}
        if "${" not in repr((values, given)):
            values = copy.deepcopy(values)
            if all(_put(values, key, value) for key, value in given):
                return build(values, self.choices, self.base.folders)
        return build(plain(self.full()), self.choices, self.base.folders)


def folders(runtime: Any) -> list[Path]:
    """Return the folders that Hydra composed from, of `hydra.runtime`."""
    return [Path(source["path"]) for source in runtime.config_sources if source["schema"] == "file"]


def _put(values: dict[str, Any], key: str, value: Any) -> bool:
    """Put a value at a dotted key; False if that takes OmegaConf's own rules: a mapping, a place in a list."""
    *folders, name = key.split(".")
    for folder in folders:
        if isinstance(values.get(folder), list):
            return False
        if not isinstance(values.get(folder), dict):
            values[folder] = {}  # as OmegaConf does
        values = values[folder]
    scalars = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, (bool, int, float, str)) for item in scalars):
        return False
    if not name.isidentifier() or isinstance(values.get(name), dict):
        return False
    values[name] = value
    return True


def plain(config: "DictConfig") -> dict[str, Any]:
    """Return our own keys of a composed config as plain values, which `schema.build` takes.

    Raises:
        ConfigError: for an interpolation that cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = {}
    try:
        for key in [key for key in map(str, config) if key not in NOT_OURS]:
            value = MISSING if OmegaConf.is_missing(config, key) else config[key]
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {first_line(error)}") from None
    return values


def task_config(config: "DictConfig") -> "DictConfig":
    """Return a copy of a composed config without Hydra's own part, as a script's task function gets it."""
    from omegaconf import open_dict, read_write

    own = copy.deepcopy(config)
    with read_write(own), open_dict(own):
        del own["hydra"]
    return own


def resolved(config: "DictConfig", left_out: Collection[str], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return a config's keys as plain values, and a line for each that is missing or cannot be resolved.

    Args:
        config: A script's config, without Hydra's part.
        left_out: Dotted keys that need no value: one that has none is None.
        prefix: The dotted name of this part of the config, with a dot at its end.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values: dict[str, Any] = {}
    problems: list[str] = []
    for key in config:
        name = f"{prefix}{key!s}"
        try:
            if OmegaConf.is_missing(config, key):
                problem = f"{name} is missing: give {name}=VALUE"
            elif isinstance(value := config[key], DictConfig) and name not in left_out:
                values[str(key)], inner = resolved(value, left_out, f"{name}.")
                problems += inner
                continue
            else:
                values[str(key)] = _unwrapped(value)
                continue
        except OmegaConfBaseException as error:
            problem = f"{name}: {first_line(error)}"
        if name in left_out:
            values[str(key)] = None
        else:
            problems.append(problem)
    return values, problems


def _unwrapped(value: Any) -> Any:
    """Return a value of a config without OmegaConf's classes; enum members by name, as a command gives them."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True, enum_to_str=True)
    return value.name if isinstance(value, Enum) else value


def spelled(words: Iterable[str]) -> list[str]:
    """Quote each name that Hydra would read as a number, a boolean or null, of a member, a file or a folder.

    So `attn_mode=1e3` chooses 1e3.yaml, and `sweep=2026_11_26` does not go to multirun/20261126. `model.norm=NAME` becomes
    `model.norm.name=NAME`, as Hydra would otherwise lose the name where a key of the member is given too.

    Raises:
        ConfigError: for a `_target_`, as rows would carry the chosen member's label for the code of another class.
    """
    named_groups = "|".join(map(re.escape, NAMED_GROUPS))
    folders = "|".join([*(path.name for path in CONF.iterdir() if path.is_dir()), named_groups])
    names = "|".join([folders, rf"(?:{named_groups})\.name", *map(re.escape, TEXTS)])
    found = []
    for word in words:
        word = re.sub(rf"^(\+*(?:{named_groups}))=(?!\s*\{{)", r"\1.name=", word)
        if named := re.match(rf"[+~]*({folders})(\._target_\b|=\{{.*\b_target_\b)", word):
            raise ConfigError(
                f"{word}: rows would carry the label of another class: name this class in a file "
                f"conf/{folder_of(named[1])}/NAME.yaml and choose it by {named[1]}=NAME"
            )
        name = re.fullmatch(rf"(\+*(?:{names})(?:@[^=]*)?=)([^'\"\\$]*)", word)
        if name and not re.search(r"\b(range|interval)\(", name[2]):
            word = name[1] + re.sub(r"[^,()\[\]{}]+", _quoted, name[2])
        found.append(word)
    return found


def typed(word: str) -> str:
    """Return a word that `as_typed` or `spelled` made as its user typed it."""
    return re.sub(rf"^\+*({'|'.join(map(re.escape, NAMED_GROUPS))})\.name=", r"\1=", word.removeprefix("++"))


def _quoted(found: "re.Match[str]") -> str:
    text = found[0].strip()
    try:
        float(text)
    except ValueError:
        if text.lower() not in ("true", "false", "null"):
            return found[0]
    return f"'{text}'"


@contextmanager
def broken_yaml() -> Iterator[None]:
    """Turn the error of a yaml file that cannot be read into a ConfigError of one line, which names the file."""
    from yaml import MarkedYAMLError, YAMLError

    try:
        yield
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a yaml file"
        raise ConfigError(f"{where}: {error.problem or error.context}: correct this yaml file") from None
    except YAMLError as error:
        raise ConfigError(" ".join(str(error).split()) + ": correct this yaml file") from None
    except UnicodeDecodeError as error:
        calls = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "load_config"]
        if not calls:  # raised by a job
            raise
        path = calls[-1].f_locals["config_path"]  # the error itself does not know which file it was
        raise ConfigError(f"{path}.yaml is not UTF-8 ({error.reason}): save it as UTF-8") from None
