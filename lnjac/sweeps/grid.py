"""The grid of a sweep: the words of each job, and commands that work in place of one that cannot."""

import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.override_parser.types import FloatRange, Override, RangeSweep
from hydra.errors import CompactHydraException

if TYPE_CHECKING:
    from lnjac.config.compose import Composer


def grid(
    words: Sequence[str], composer: "Composer", whole: Collection[str] = (), zipped: Sequence[Mapping[str, Any]] = ()
) -> list[list[str]]:
    """Return each job's words: the cartesian product of all swept values, but for keys of the `whole` sweep.

    Args:
        words: those of the command.
        composer: by which they are read.
        whole: keys that cannot take several values.
        zipped: values that move together, one mapping for each place; they are one more factor of the product.

    Raises:
        CompactHydraException: there is no such product, or it is empty.
    """
    values: dict[str, list[str]] = {}
    for override in composer.read(words):
        key = override.get_key_element()
        values[key] = [f"{key}={value}" for value in _values(override, whole)]
    if not all(values.values()):
        raise CompactHydraException("the sweep has no jobs: does a glob() or range() in it match nothing?")
    given = {key.lstrip("+~") for key in values}
    for name in zipped[0] if zipped else ():
        if name in whole:
            raise CompactHydraException(_of_whole(name))
        if name in given:
            raise CompactHydraException(f"{name} is given among the zipped values and by itself: give it in one place")
    places = [_together(place, composer) for place in zipped] or [[]]
    return [[*job, *place] for job in product(*values.values()) for place in places]


def _together(place: Mapping[str, Any], composer: "Composer") -> list[str]:
    from lnjac.config.command import text

    return composer.as_typed([f"{key}={text(value)}" for key, value in place.items()])


def require_zipped(given: Any, key: str) -> list[dict[str, Any]]:
    """Return the values that move together, a mapping for each place; none if none are given.

    Raises:
        CompactHydraException: they are no list of mappings, all with the same keys.
    """
    if given is None:
        return []
    shape = f"write {key}=[{{A:1,B:2}},{{A:3,B:4}}], with an entry for each pair of values"
    if not isinstance(given, list) or not given or not all(isinstance(place, dict) and place for place in given):
        raise CompactHydraException(f"{key}={given} is no list of mappings: {shape}")
    for number, place in enumerate(given, 1):
        if place.keys() != given[0].keys():
            one, other = (", ".join(map(str, keys)) for keys in (given[0], place))
            raise CompactHydraException(
                f"entry {number} of {key} gives {other}, the first gives {one}: give the same keys in each"
            )
    return given


def _of_whole(key: str) -> str:
    return f"{key} belongs to the sweep as a whole and cannot take several values: run one sweep for each value"


def _values(override: Override, whole: Collection[str]) -> Iterator[str]:
    if not override.is_sweep_override():
        yield override.get_value_element_as_str()
        return
    key = override.get_key_element().lstrip("+")
    if key in whole:
        raise CompactHydraException(_of_whole(key))
    if override.is_interval_sweep():
        raise CompactHydraException(f"{key} is swept over an interval: use choice(), range() or a list of values")
    if isinstance(swept := override.value(), RangeSweep) and isinstance(swept.range(), FloatRange):
        # with the decimals that were typed: Hydra counts in binary, and 0.1 + 0.1 + 0.1 would not be 0.3
        for name in ("start", "stop", "step"):
            setattr(swept, name, Decimal(str(getattr(swept, name))))
    yield from override.sweep_string_iterator()


class Checked(NamedTuple):
    """What is known of a job after its check: the member chosen of each group, and its problems as text."""

    choices: Mapping[str, str]
    problems: str


def advice(typed: Sequence[str], jobs: Sequence[Checked], composer: "Composer", sweep: str) -> list[str]:
    """Return commands that fill one sweep together, each of which gives a key only to members that have it.

    Args:
        typed: the words of the command.
        jobs: those that could be composed.
        composer: by which the words were read.
        sweep: the key of the sweep's name.

    Returns:
        Nothing unless some members lack a typed key that others have.
    """
    as_read = composer.typed
    lacked = [_lacked(typed, job.problems) for job in jobs]
    by_all = set.intersection(*lacked) if lacked else set()
    alike: dict[frozenset[str], list[Mapping[str, str]]] = {}  # the jobs' choices, by the words that only they lack
    for job, words in zip(jobs, lacked, strict=True):
        alike.setdefault(frozenset(words - by_all), []).append(job.choices)
    if len(alike) < 2:
        return []
    some = sorted({_key(word) for lacking in alike for word in lacking})
    lines = [
        f"only some of the members have {', '.join(some)}: fill one sweep by several commands, each with what it has:"
    ]
    program = Path(sys.argv[0]).name
    script = f"python {program}" if program.endswith(".py") else program
    groups = [name for name in jobs[0].choices if len({choices.get(name) for choices, _ in jobs}) > 1]
    for lacking, members in alike.items():
        kept = [as_read(word) for word in typed if word not in lacking and _key(as_read(word)) not in groups]
        chosen = [f"{name}={','.join(dict.fromkeys(choices[name] for choices in members))}" for name in groups]
        name = [] if any(_key(word) == sweep for word in typed) else [f"{sweep}=NAME"]
        lines.append(f"  {script} -m {shlex.join([*kept, *chosen, *name])}")
    return lines


def _lacked(typed: Sequence[str], problems: str) -> set[str]:
    """Return the typed words whose key, or one within it, is unknown to the job that has these problems."""
    found = re.findall(r"^(\S+) is not a setting|Could not override '(\S+)'", problems, re.MULTILINE)
    unknown = [ours or hydras for ours, hydras in found]
    return {word for word in typed if any(f"{_key(word)}.".startswith(f"{key}.") for key in unknown)}


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
