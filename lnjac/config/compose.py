"""Compose configs: all of Hydra and OmegaConf that is not a sweep's."""

import copy
import dataclasses
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.config.schema import CONF, MISSING, NAMED_GROUPS, SWEEP, RunConfig, build, first_line, folder_of
from lnjac.errors import ConfigError

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
        ConfigError: a line for each unknown, missing or ill-typed value.
        hydra.errors.HydraException: for a member that no file in conf/ has, or a word that Hydra cannot read.

    Example:
        >>> config = lnjac.compose("model=tiny", "attn_mode=sigmoid", "seed=2")
        >>> config.model.n_embd
        32
    """
    changed_ns = max(path.stat().st_mtime_ns for path in (CONF, *CONF.rglob("*")))
    return _composer(CONF, changed_ns).compose(overrides).build()


@lru_cache(1)
def _composer(folder: Path, changed_ns: int) -> "Composer":
    """Return the composer of a folder's files as they were at that time: an edited, new or deleted file needs another."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        loader = GlobalHydra.instance().config_loader()
    return Composer(loader, lambda words: loader.load_configuration("config", words, RunMode.RUN))


NOT_OURS = ("hydra", *SWEEP)
"""Keys of a composed config that are no part of a run's."""

TEXTS = ("sweep", "hydra.run.dir", "hydra.sweep.dir", "data.dir", "data.source", "data.files")
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

    `loader` is Hydra's, and `load` has it make a config from override words.
    """

    def __init__(self, loader: Any, load: "Callable[[list[str]], DictConfig]") -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.loader, self._load = loader, load
        self._parser = OverridesParser.create(config_loader=loader)
        self._words: dict[str, tuple[Override, bool]] = {}
        self._bases: dict[tuple[str, ...], Base] = {}

    def compose(self, words: Sequence[str]) -> "Composed":
        """Compose a command's words. Raises ConfigError or a HydraException if they cannot be read or name no member."""
        from omegaconf import OmegaConf

        if new := [word for word in words if word not in self._words]:
            for word, override in zip(new, self._parser.parse_overrides(spelled(new)), strict=True):
                self._words[word] = override, self._is_plain(override)
        read = [self._words[word] for word in words]
        rest = tuple(str(override.input_line) for override, plain in read if not plain)
        if rest not in self._bases:
            config = self.load(rest)
            values: Any = OmegaConf.to_container(config)
            ours = {key: value for key, value in values.items() if key not in NOT_OURS}
            self._bases[rest] = Base(config, ours, values["hydra"]["runtime"]["choices"], folders(config.hydra.runtime))
        return Composed(self, self._bases[rest], [o for o, _ in read], [o for o, plain in read if plain])

    def load(self, words: Iterable[str]) -> "DictConfig":
        with broken_yaml():
            return self._load(list(words))

    def _is_plain(self, override: "Override") -> bool:
        """Return whether it gives a key of ours a value: it chooses no group's member and removes nothing."""
        changes = override.is_delete() or override.package is not None
        return not (
            changes or override.is_hydra_override() or self.loader.repository.group_exists(override.key_or_group)
        )


class Base(NamedTuple):
    """A config that Hydra composed, in which jobs put plain values of their own.

    `values` are those of our own keys, with interpolations as they are written; `choices` the member of each group;
    `folders` are those of the yaml files.
    """

    config: "DictConfig"
    values: dict[str, Any]
    choices: dict[str, Any]
    folders: list[Path]


@dataclass(frozen=True)
class Composed:
    """One job's config, in a form of which a sweep can hold thousands; `plain` are the overrides that `base` lacks."""

    composer: Composer
    base: Base
    overrides: "Sequence[Override]"
    plain: "Sequence[Override]"

    @property
    def choices(self) -> dict[str, Any]:
        """The chosen member of each group, by which rows are labelled."""
        named = {f"{group}.name": group for group in NAMED_GROUPS}
        given = {named[o.key_or_group]: str(o.value()) for o in self.plain if o.key_or_group in named}
        return self.base.choices | given

    def build(self) -> RunConfig:
        """Return the typed config. Raises ConfigError for values that the schema refuses."""
        given = [(o.key_or_group, o.value()) for o in self.plain if o.key_or_group not in SWEEP]
        if "${" not in repr((self.base.values, given)):
            values = copy.deepcopy(self.base.values)
            if all(_put(values, key, value) for key, value in given):
                return build(values, self.choices, self.base.folders)
        return build(plain(self.full()), self.choices, self.base.folders)

    def full(self) -> "DictConfig":
        """Return the config as Hydra composes it, with Hydra's own part."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        config = copy.deepcopy(self.base.config)
        try:
            for override in self.plain:  # to any key: `build` refuses those that the schema lacks
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException:  # Hydra's own error names the override
            return self.composer.load(str(override.input_line) for override in self.overrides)
        return config


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
