"""The sweeper's settings, and the keys by which an app's user gives them: `hydra.sweeper.NAME`, or short words of its own."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

NAMES = ("sweep", "retry_failed", "stop_on_failure", "dry_run", "report", "zip")


def key(config: DictConfig, name: str) -> str:
    """Return the key that gives a setting: `short` where hydra.sweeper has `${short}` for it."""
    raw: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    short = re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(name)))
    return short[1] if short else f"hydra.sweeper.{name}"


def short_keys(config: DictConfig) -> tuple[str, ...]:
    """Return those keys of the app's own config that give a setting, and are therefore no part of a run."""
    keys = [key(config, name) for name in NAMES]
    return tuple(found for found in keys if not found.startswith("hydra."))
