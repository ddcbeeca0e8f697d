"""A run's identity: the hash of its scientific config, its plain form, and its columns in tables."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from operator import attrgetter
from typing import Any

from lnjac.columns import Column
from lnjac.config.schema import NAMED_GROUPS, PLUGIN_GROUPS, RunConfig, field_types, held, is_group, named_alone
from lnjac.files import digest

NUMERICS_VERSION = 2
"""Part of every run's identity, raised whenever the same config would give other numbers than before."""

EXECUTION = ("device", "threads", "deterministic", "save_model", "keep_state", "checkpoint", "tracker")
"""How a run is executed: left out of its identity and of its config columns."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain JSON values, from which `build` makes it again."""
    plain: dict[str, Any] = _plain(config)
    for group in PLUGIN_GROUPS:
        holder, key = held(plain, group)
        member = attrgetter(group)(config)
        alone = group in NAMED_GROUPS and named_alone(group, member)
        holder[key] = member.name if alone else {"_target_": target(group, type(member)), **holder[key]}
    if not (more := config.diagnostics.more):  # as before there was such a key
        del plain["diagnostics"]["more"]
    for name, diagnostic in more.items():
        values = plain["diagnostics"]["more"][name]
        plain["diagnostics"]["more"][name] = {"_target_": target("diagnostic", type(diagnostic)), **values}
    return plain


def target(group: str, cls: type) -> str:
    """Return the text that stands for a member's class in hashes and files: it never changes for a class of ours."""
    ours = cls.__module__.partition(".")[0] == "lnjac" and group in PLUGIN_GROUPS
    return f"{PLUGIN_GROUPS[group].hashed_as if ours else cls.__module__}.{cls.__qualname__}"


def run_id(config: RunConfig, data_sha256: str) -> str:
    """Return the identity of a run's science, equal for two configs only if they train to the same weights and losses."""
    plain = to_dict(config)
    for key in (*EXECUTION, "diagnostics", "data"):
        del plain[key]
    return digest({"numerics": NUMERICS_VERSION, "data_sha256": data_sha256, **plain})


def diag_id(config: RunConfig) -> str:
    """Return the identity of a run's diagnostics, which does not depend on the rest of its config."""
    return digest({"numerics": NUMERICS_VERSION, **to_dict(config)["diagnostics"]})


def columns(config: RunConfig) -> list[tuple[Column, Any]]:
    """Return the config as typed columns and their values: `seed`, `attn_mode` (its name), `model.n_embd`, …

    Execution settings and the corpus's paths are left out, as a run's science does not depend on them.
    """
    plain, found = to_dict(config), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in EXECUTION:
            continue
        if not is_group(field):
            found.append((_column(RunConfig, field.name, field.name), plain[field.name]))
            continue
        if hasattr(value, "name"):
            found.append((Column(field.name, "string", "", f"which member of conf/{field.name}"), value.name))
        if field.name != "data":
            found += _leaves(value, _keys(plain[field.name]), f"{field.name}.")
    return found


def column_values(config: RunConfig) -> dict[str, Any]:
    """Return the config's columns by name."""
    return {column.name: value for column, value in columns(config)}


def _leaves(part: Any, plain: Mapping[str, Any], prefix: str) -> Iterator[tuple[Column, Any]]:
    """Yield a column and its value for each scalar; lists of scalars are joined by `+`, other lists and mappings are JSON."""
    for name, value in plain.items():
        inner = getattr(part, name)
        if prefix + name in NAMED_GROUPS:
            yield _column(type(part), name, prefix + name), inner.name
            value = {} if isinstance(value, str) else _keys(value)
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            yield from _leaves(inner, value, f"{prefix}{name}.")
            continue
        if isinstance(value, list) and not any(isinstance(item, (list, Mapping)) for item in value):
            value = "+".join(map(str, value))
        elif isinstance(value, (list, Mapping)):
            value = json.dumps(value, sort_keys=True)
        yield _column(type(part), name, prefix + name), value


def _keys(member: Mapping[str, Any]) -> dict[str, Any]:
    """Return a member's own values, without its label and its class."""
    return {key: value for key, value in member.items() if key not in ("name", "_target_")}


def _column(cls: type, field: str, name: str) -> Column:
    dtype = {bool: "bool", int: "int64", float: "float64"}.get(field_types(cls)[field], "string")
    return Column(name, dtype, "", f"config value {name}")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses as mappings, enum members by name, by which OmegaConf reads them again."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
