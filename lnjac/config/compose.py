"""Compose configs: all of Hydra and OmegaConf that is not a sweep's."""

import copy
import dataclasses
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.config.schema import SWEEP, RunConfig, build
from lnjac.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
CONF = CHECKOUT if (CHECKOUT / "config.yaml").is_file() else CHECKOUT.parent / "lnjac" / "conf"
"""The folder of the config groups: the checkout's, else the one inside the installed package."""


def compose(*overrides: str) -> RunConfig:
    """The config that `python run.py OVERRIDES` would run, for tests and notebooks."""
    files = max(path.stat().st_mtime_ns for path in (CONF, *CONF.rglob("*")))
    composer = _composer(CONF, files)
    return build(composer.compose(composer.parse(overrides)))


@lru_cache(1)
def _composer(folder: Path, changed_ns: int) -> "Composer":
    """The one for that folder's files as they are; a changed, new or deleted file asks for another."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import open_dict

    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        loader = GlobalHydra.instance().config_loader()

    def load(words: list[str]) -> "DictConfig":
        config = loader.load_configuration("config", words, RunMode.RUN)
        with open_dict(config):  # the rest is large to copy, and complete only once a job runs
            runtime = config.hydra.runtime
            config["hydra"] = {"runtime": {"choices": runtime.choices, "config_sources": runtime.config_sources}}
        return config

    return Composer(loader, load)


TEXTS = ("sweep", "hydra.run.dir", "hydra.sweep.dir", "data.dir", "data.play_dir", "data.source", "data.files")
"""Keys whose values name files and folders, and so are text."""


def as_typed(words: Sequence[str]) -> list[str]:
    """Mark a command's words so that Hydra reads names as they are typed, and leaves unknown keys to the schema.

    A number in the place of a name is quoted: `sweep=2026_11_26` would go to multirun/20261126. A value's key gets the
    prefix `++`: Hydra would compare it with the default members' keys before any job is composed, and refuse those that
    only other members have, with the advice to add them by `+`, which no schema allows.
    """
    known = (
        {field.name for field in dataclasses.fields(RunConfig)} | set(SWEEP) | {path.name for path in CONF.iterdir()}
    )
    own_config = any(word.startswith(("-c", "--config")) for word in words)  # it may have groups of its own
    marked = []
    for word in words:
        if found := re.fullmatch(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", word, re.DOTALL):
            plus, key, value = found.groups()
            if key in TEXTS and not re.search(r"['\"\\$]|range\(|interval\(", value):
                value = re.sub(r"[^,()\[\]{}]+", _quoted, value)
            unknown = not (plus or own_config or key in known)
            if not key.startswith("hydra.") and ("." in key or unknown):
                plus = "++"
            word = f"{plus}{key}={value}"
        marked.append(word)
    return marked


class Composer:
    """Composes configs as Hydra does, which takes 0.1 s each, but once for all that differ in plain values alone.

    `loader` is Hydra's, and `load` has it make a config from override words.
    """

    def __init__(self, loader: Any, load: "Callable[[list[str]], DictConfig]") -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self._load, self.repository = load, loader.repository
        self.parser = OverridesParser.create(config_loader=loader)
        self.known: dict[tuple[str, ...], DictConfig] = {}

    def load(self, words: list[str]) -> "DictConfig":
        with broken_yaml():
            return self._load(words)

    def parse(self, words: Sequence[str]) -> "list[Override]":
        return self.parser.parse_overrides(spelled(words))

    def compose(self, overrides: "Sequence[Override]") -> "DictConfig":
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        plain = [override for override in overrides if self._is_plain(override)]
        rest = tuple(str(override.input_line) for override in overrides if override not in plain)
        if rest not in self.known:
            self.known[rest] = self.load(list(rest))
        config = copy.deepcopy(self.known[rest])
        try:
            for override in plain:  # to any key: `build` refuses those that the schema lacks
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException:  # Hydra says in its own words what is wrong
            return self.load([str(override.input_line) for override in overrides])
        return config

    def _is_plain(self, override: "Override") -> bool:
        """Whether it gives a key of ours a value: it chooses no group's member and removes nothing."""
        changes = override.is_delete() or override.package is not None
        return not (changes or override.is_hydra_override() or self.repository.group_exists(override.key_or_group))


def spelled(words: Iterable[str]) -> list[str]:
    """Quote each member's name that Hydra would read as a number, a boolean or null: `attn_mode=1e3` names 1e3.yaml.

    Raises ConfigError for a class that is given apart from its member, whose label its rows would carry.
    """
    folders = "|".join(path.name for path in CONF.iterdir() if path.is_dir())
    found = []
    for word in words:
        if named := re.match(rf"[+~]*({folders})(\._target_\b|=\{{.*\b_target_\b)", word):
            raise ConfigError(
                f"{word}: rows would carry the label of another class: name this one in a file conf/{named[1]}/NAME.yaml "
                f"and choose it by {named[1]}=NAME"
            )
        chosen = re.fullmatch(rf"(\+?(?:{folders})(?:@[^=]*)?=)([^'\"\\]*)", word)
        if chosen and not re.search(r"\b(range|interval)\(", chosen[2]):
            word = chosen[1] + re.sub(r"[^,()\[\]{}\s=]+", _quoted, chosen[2])
        found.append(word)
    return found


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
        raise ConfigError(f"{where}: {error.problem or error.context}: mend this yaml file") from None
    except YAMLError as error:
        raise ConfigError(" ".join(str(error).split()) + ": mend this yaml file") from None
    except UnicodeDecodeError as error:
        calls = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "load_config"]
        if not calls:  # raised by a job
            raise
        path = calls[-1].f_locals["config_path"]  # the error itself does not know which file it was
        raise ConfigError(f"{path}.yaml is not UTF-8 ({error.reason}): save it as UTF-8") from None
