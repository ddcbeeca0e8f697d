"""The sweeper's settings, and the keys by which an app's user gives them: `hydra.sweeper.NAME`, or short words of its own."""

import re
from typing import Any

from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

NAMES = ("sweep", "retry_failed", "stop_on_failure", "dry_run", "report", "zip")


def key(config: DictConfig, name: str) -> str:
    """Return the key that gives a setting: `short` where hydra.sweeper has `${short}` for it."""
    return _short(config).get(name, f"hydra.sweeper.{name}")


def short_keys(config: DictConfig) -> tuple[str, ...]:
    """Return those keys of the app's own config that give a setting, and are therefore no part of a run."""
    return tuple(_short(config).values())


def require_heard(config: DictConfig) -> None:
    """Raise CompactHydraException for a typed short word that an experiment's own hydra.sweeper.NAME would silence."""
    short = _short(config)
    if not any(name == word for name, word in short.items()):  # of such an app the word may be a key of the script
        return
    for name in set(NAMES) - set(short):
        for word in config.hydra.overrides.task:
            if word.startswith(f"{name}="):
                raise CompactHydraException(
                    f"{word} has no effect, since hydra.sweeper.{name} is set too, perhaps by an experiment: "
                    f"write hydra.sweeper.{word}, or take the other out"
                )


def _short(config: DictConfig) -> dict[str, str]:
    """Return the short key of each setting that has one."""
    raw: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    found = {name: re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(name))) for name in NAMES}
    return {name: match[1] for name, match in found.items() if match and not match[1].startswith("hydra.")}
