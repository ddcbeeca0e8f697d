"""Take the rows of one table as they come in, each value in its column's type, or refuse them at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lnjac.columns import KEY, ROLES, Column
from lnjac.errors import ConfigError
from lnjac.runs.schema import CORE, DTYPES
from lnjac.text import listed

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]


class Taken:
    """The rows of a table, and its columns.

    An `extensible` one takes columns that nobody declared: they get the type of their values and no pooling, and are null
    in rows without them.
    """

    def __init__(
        self, name: str, columns: Iterable[Column], reserved: Collection[str] = (), *, extensible: bool = False
    ) -> None:
        self.name, self.reserved, self.extensible = name, frozenset(reserved), extensible
        self.declared = {column.name: column for column in columns}
        self.more: dict[str, Column] = {}
        self.rows: list[Row] = []

    @property
    def columns(self) -> list[Column]:
        return [*self.declared.values(), *self.more.values()]

    def complete(self, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
        """Return rows with typed values, each with all declared columns.

        Raises:
            ConfigError: A row lacks a declared column, or as in `typed`.
        """
        rows = list(rows)
        self._require({name for row in rows for name in self.declared.keys() - row.keys()})
        return self.typed(rows)

    def typed(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Return rows with typed values.

        Raises:
            ConfigError: A row has a column that the table does not take, or a value of another type.
        """
        more = dict.fromkeys(name for row in rows for name in row if name not in self.declared)
        self._require({name for name in more if not self.extensible or name in self.reserved})
        for name in more:
            self._admit(name, [row[name] for row in rows if name in row])
        known = {column.name: column for column in self.columns}
        return [{name: _typed(self.name, known[name], row[name]) for name in row if name in known} for row in rows]

    def _require(self, wrong: Collection[str]) -> None:
        if wrong:
            raise ConfigError(
                f"rows of {self.name} and its columns differ in {listed(sorted(wrong))}: make them the same"
                + ", or rename what is called as a key of the config is" * bool(self.reserved & {*wrong})
            )

    def written(self) -> list[Row]:
        """Return the rows, each with every column."""
        return [dict.fromkeys(self.more) | row for row in self.rows] if self.more else self.rows

    def _admit(self, name: str, values: Sequence[Any]) -> None:
        """Give an undeclared column the type of its values."""
        found = {_KINDS[type(value)] for value in map(_scalar, values) if type(value) in _KINDS}
        if name not in self.more and found:
            dtype = next(dtype for dtype in ("string", "bool", "float64", "int64") if dtype in found)
            self.more[name] = Column(name, dtype, "", "")
        elif found == {"float64"} and self.more[name].dtype == "int64":
            self.more[name] = Column(name, "float64", "", "")


def _typed(table: str, column: Column, value: Any) -> Any:
    typed = None if (value := _scalar(value)) is None else _TYPES[column.dtype](value)
    if typed is None and value is not None:
        raise ConfigError(f"{column.name}={value!r} in a row of {table} is no {column.dtype}: give one, or None")
    return typed


def plain(rows: Rows | pd.DataFrame) -> Rows:
    """Return rows as dicts: a frame's missing values are None, but in a column of floats, where NaN is a number."""
    if isinstance(rows, Sequence):
        return rows
    import pandas as pd

    columns = {}
    for name, values in rows.items():
        keep = pd.api.types.is_float_dtype(values) and not pd.api.types.is_extension_array_dtype(values)
        columns[str(name)] = [value if keep or not pd.isna(value) else None for value in values.tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def whole(step: Any) -> int:
    """Return a step as Python's int. Raises ConfigError if it is no whole number."""
    found = _whole(_scalar(step))
    if found is None:
        raise ConfigError(f"step={step!r} is no whole number: give the number of updates done")
    return found


def column_problems(table: str, columns: Sequence[Column], known: Collection[str]) -> Iterator[str]:
    """Yield a line for each of a stranger's columns that cannot be one of a table, which has the columns `known` beside."""
    names = [column.name for column in columns]
    for column in columns:
        of = f"the column {column.name} of {table}"
        if column.name in known or names.count(column.name) > 1:
            yield f"{of} is called as another column is: rename it"
        if column.dtype not in DTYPES:
            yield f"{of} has the type {column.dtype!r}: choose one of {', '.join(DTYPES)}"
        if column.role not in ROLES or (column.role == KEY and table in CORE):
            yield f"{of} has the role {column.role!r}: choose value, or volatile if equal runs may differ in it"
        try:
            missing = [name for name in column.reads if name not in {*names, *known}]
        except ValueError as error:
            yield f"{of} has a pooling that cannot be understood: {error}"
            continue
        if missing:
            yield f"{of} is pooled by {', '.join(missing)}, which {table} does not have: declare it, or name another"


_KINDS: dict[type, str] = {bool: "bool", int: "int64", float: "float64", str: "string"}


def _scalar(value: Any) -> Any:
    """Return a scalar of numpy or torch as Python's."""
    if type(value) in _KINDS or value is None:
        return value
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):  # no array, or one of several numbers
        return value


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if abs(number) < 2**63 else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


_TYPES: dict[str, Callable[[Any], Any]] = {
    "int64": _whole,
    "float64": _number,
    "string": lambda value: value if isinstance(value, str) else None,
    "bool": lambda value: value if isinstance(value, bool) else None,
}
