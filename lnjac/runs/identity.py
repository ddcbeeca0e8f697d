"""Turn anybody's plain config into a run's identity and its typed columns. Without torch, Hydra or a schema."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from lnjac.columns import Column
from lnjac.errors import ConfigError
from lnjac.files import digest
from lnjac.norms import formulas
from lnjac.runs.schema import MEASURED_AT, RUNS
from lnjac.text import listed

DTYPES = {bool: "bool", int: "int64", float: "float64", str: "string", type(None): "string"}


class Identified(NamedTuple):
    """A run's identity, as `record` writes it, and the config that it is made of."""

    identity: dict[str, str]
    """run_id and diag_id."""
    columns: list[tuple[Column, Any]]
    config: dict[str, Any]
    """The plain config that is hashed, `seed` included, without the execution keys."""
    execution: dict[str, Any]
    """The execution keys and their values, by dotted name."""


def identify(config: Mapping[str, Any], *, seed: int | None = None, execution: Collection[str] = ()) -> Identified:
    """Return the identity of a run, which changes with every value of its config but those that `execution` names.

    Args:
        config: Plain values, which may be nested: `model.width` is a column of the run's rows. A DictConfig will do.
        seed: The run's seed, if it is not config["seed"].
        execution: Dotted keys that do not belong to the run's science, such as paths, device and workers. The name of a
            group leaves out all below it.

    Raises:
        ConfigError: With a line for each problem: there is no seed, a value is not plain, a key is called as another
            column is, an absolute path is not named by `execution`, or `execution` names a key that is not there.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"config is a {type(config).__name__}, which is no mapping: give a dict, such as vars(args) or "
            "dataclasses.asdict(config)"
        )
    execution = [execution] if isinstance(execution, str) else list(execution)
    given = plain(config)
    if seed is not None:
        given.setdefault("seed", seed)
    found, left_out = _without(given, execution)
    columns = list(_columns(found))
    problems = [
        *_seed_problems(found, left_out, seed),
        *_execution_problems(left_out, execution, given),
        *(problem for column, value in columns if (problem := _not_plain(column, value))),
        *_key_problems(found),
        *_clashes([column.name for column, _ in columns]),
        *_path_problems(columns),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    typed = [(column, _shown(value)) for column, value in columns]
    return Identified({"run_id": digest(found), "diag_id": digest({})}, typed, found, left_out)


def plain(value: Any) -> Any:
    """Return a value with its mappings as dicts and its sequences as lists, of whatever class they were."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(inner) for inner in value]
    return value


def _without(
    given: Mapping[str, Any], names: Collection[str], prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config without the named keys, and those keys with their values."""
    kept, left_out = dict[str, Any](), dict[str, Any]()
    for key, value in given.items():
        if (name := f"{prefix}{key}") in names:
            left_out[name] = value
        elif isinstance(value, dict):
            kept[key], inner = _without(value, names, f"{name}.")
            left_out |= inner
        else:
            kept[key] = value
    return kept, left_out


def _columns(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[Column, Any]]:
    """Yield a column and its value for each value that is no mapping, by its dotted name."""
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _columns(value, f"{name}.")
        else:
            yield Column(name, DTYPES.get(type(value), "string"), "", f"config value {name}"), value


def _shown(value: Any) -> Any:
    """Return the value in its column: a list is joined by `+`, or is JSON if it holds lists or mappings."""
    if not isinstance(value, list):
        return value
    flat = not any(isinstance(item, (list, dict)) for item in value)
    return "+".join(map(str, value)) if flat else json.dumps(value, sort_keys=True)


# Problems


def _seed_problems(found: Mapping[str, Any], left_out: Mapping[str, Any], seed: int | None) -> Iterator[str]:
    if "seed" in left_out:
        yield "execution names seed, which pairs the runs: take it out of there"
    elif "seed" not in found:
        yield "the config has no seed: give record(…, seed=1), or a key `seed`; runs of one seed are compared in pairs"
    elif type(found["seed"]) is not int:
        yield f"seed={found['seed']!r} is no whole number: give one, such as seed=1"
    elif seed is not None and found["seed"] != seed:
        yield f"seed={seed}, but config has seed={found['seed']}: give one of them"


def _execution_problems(
    left_out: Mapping[str, Any], execution: Sequence[str], given: Mapping[str, Any]
) -> Iterator[str]:
    if unknown := [name for name in execution if name not in left_out and not _inside(name, left_out)]:
        yield f"execution names {', '.join(unknown)}, which the config does not have: its keys are {listed(list(given))}"


def _inside(name: str, left_out: Mapping[str, Any]) -> bool:
    """Whether a key lies in a group that is named too."""
    return any(name.startswith(f"{group}.") for group in left_out)


def _not_plain(column: Column, value: Any) -> str:
    if _is_plain(value):
        return ""
    remedy = f", or name it in execution=({column.name!r},)" if isinstance(value, PurePath) else ""
    return f"config value {column.name}={value!r} is not plain: give text, a number, a bool, None or a list of such{remedy}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return type(value) in DTYPES and not (type(value) is int and abs(value) >= 2**63)


def _key_problems(found: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in found.items():
        if not isinstance(key, str):
            yield f"the config's key {prefix}{key!r} is no text: write it as {str(key)!r}"
        elif isinstance(value, dict):
            yield from _key_problems(value, f"{prefix}{key}.")


def _clashes(names: Sequence[str]) -> Iterator[str]:
    """A line for the keys that are called as another column is."""
    counts, taken = Counter(names), {column.name for column in (*MEASURED_AT, *formulas.columns(), *RUNS)}
    if clash := [name for name, n in counts.items() if n > 1 or name in taken]:
        yield f"the config has {', '.join(clash)}, as another column is called too: rename this key, or name it in execution"


def _path_problems(columns: Sequence[tuple[Column, Any]]) -> Iterator[str]:
    """One line for all absolute paths: they differ between machines, and the identity with them."""
    paths = [(column.name, text) for column, value in columns for text in _texts(value) if is_absolute(text)]
    if paths:
        names = ", ".join(map(repr, dict(paths)))
        yield (
            f"the config has absolute paths ({listed(['='.join(each) for each in paths])}), by which a run would have "
            f"another identity on another machine: name them by execution=[{names}], or give relative paths"
        )


def _texts(value: Any) -> Iterator[str]:
    """Yield the value if it is a text, and each text in a list."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def is_absolute(text: str) -> bool:
    """Return whether a text is an absolute path, of this system or another."""
    home = text == "~" or text.startswith("~/")
    return home or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
