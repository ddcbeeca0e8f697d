"""Find the words of the command that makes a finished run again, from its config."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lnjac.config.compose import compose, file_of
from lnjac.config.identity import EXECUTION, to_dict
from lnjac.config.schema import GROUPS, RunConfig, folder_of, held
from lnjac.errors import ConfigError

LABELS = ("name", "_target_")
"""Keys of a member that its own file gives, never a command."""


class Again(NamedTuple):
    """The words that make a run again, and the config that they compose to here.

    Attributes:
        words: Overrides of the defaults, such as `seed=2`.
        config: What the words compose to; None if they cannot be composed here.
        problems: A line, with its remedy, for each reason why they cannot.
    """

    words: list[str]
    config: RunConfig | None
    problems: list[str]


def again(config: Mapping[str, Any]) -> Again:
    """Return the words by which a config differs from the defaults here.

    A word is left out if the run is the same without it, as a value that follows from others is. Execution settings are no
    part of a run, and are left out too.

    Args:
        config: Plain values, as `identity.to_dict` gives them and as a run's files hold them.
    """
    members = {group: _member(config, group) for group in GROUPS if group not in EXECUTION}
    default = to_dict(compose())
    chosen = {group: name for group, name in members.items() if _member(default, group) != name}
    missing = [group for group, name in chosen.items() if not file_of(group, name).is_file()]
    words = [f"{group}={text(name)}" for group, name in chosen.items()]
    here, _ = _composed([word for group, word in zip(chosen, words, strict=True) if group not in missing])
    known = dict(_leaves(to_dict(here))) if here else {}  # a member whose values are required is nothing by itself
    words += [f"{key}={text(value)}" for key, value in _leaves(config) if key not in known or known[key] != value]
    if missing:
        return Again(words, None, [_absent(config, group, members[group]) for group in missing])
    made, problems = _composed(words)
    wanted = _science(to_dict(made)) if made else {}
    for word in list(words) if made else ():
        fewer = [other for other in words if other != word]
        if word.partition("=")[0] not in chosen and (one := _composed(fewer)[0]) and _science(to_dict(one)) == wanted:
            words, made = fewer, one
    return Again(words, made, problems)


def text(value: Any) -> str:
    """Return a plain value as a command's word gives it to Hydra, which reads the same value from it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if not isinstance(value, str):
        return repr(value)
    if value.isidentifier() and value.isascii() and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def _member(config: Mapping[str, Any], group: str) -> str:
    """Return the name of a group's member."""
    holder, key = held(dict(config), group)
    member = holder[key]
    return str(member["name"] if isinstance(member, Mapping) else member)


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each setting that a command can give, without execution settings."""
    for key, value in config.items():
        if key in EXECUTION:
            continue
        if key == "diagnostics":
            more = value.get("more", {})
            value = {name: inner for name, inner in value.items() if name != "more"} | (
                {"more": [*more]} if more else {}
            )
        yield from _within(key, value, member=key in GROUPS)


def _within(key: str, value: Any, *, member: bool) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        if key not in GROUPS:
            yield key, value
        return
    for name, inner in value.items():
        if not (member and name in LABELS):
            yield from _within(f"{key}.{name}", inner, member=f"{key}.{name}" in GROUPS)


def _composed(words: list[str]) -> tuple[RunConfig | None, list[str]]:
    """Return the config that the words make here, or the reasons why they make none."""
    try:
        return compose(*words), []
    except ConfigError as error:
        return None, str(error).split("\n")
    except Exception as error:  # of Hydra or OmegaConf
        return None, [f"the words cannot be composed here: {' '.join(str(error).split())[:300]}"]


def _science(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in EXECUTION}


def _absent(config: Mapping[str, Any], group: str, name: str) -> str:
    holder, key = held(dict(config), group)
    target = holder[key].get("_target_", "") if isinstance(holder[key], Mapping) else ""
    return (
        f"conf/{folder_of(group)}/{name}.yaml is not here: write it, with `_target_: {target}`, or name the folder that "
        "has it by --config-dir"
    )
