"""Choose rows by an expression over columns, such as `method == 'fa' and model.n_embd in [64, 128]`.

The text is parsed as Python and never run: only the nodes that are listed here are computed, on columns. A column with a dot
or a space in its name is written as it is, `model.n_embd`, or in backticks.

A value that is missing, null or NaN, equals None and nothing else, on either side and in lists: `attn_mode.bias == None`,
`None != attn_mode.bias`, `attn_mode.bias in [None, -4]`. It is neither smaller nor larger than anything. A text without an
expression is refused: a filter that a script left empty would choose everything without a word.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import reduce
from typing import Any

import pandas as pd

from lnjac.errors import ConfigError

LONGEST = 2000
"""Characters; far below where a deeply nested text would exhaust the parser's stack."""

_OPERATIONS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}


class Where:
    """A parsed expression, the columns that it names, and the rows for which it holds."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.quoted: list[str] = []
        if not text.strip():
            raise ConfigError("--where is empty: leave it out for all rows, or write it like \"method == 'fa'\"")
        if len(text) > LONGEST:
            raise ConfigError(f"--where is longer than {LONGEST} characters: shorten it")

        def stand_in(match: "re.Match[str]") -> str:
            self.quoted.append(match[1])
            return f"_{len(self.quoted) - 1}_quoted"

        try:
            self.tree = ast.parse(re.sub("`([^`]*)`", stand_in, text.strip()), mode="eval").body
            self.columns = sorted(set(self._names(self.tree)))
        except ConfigError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            why = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
            raise self._wrong(f"{why}: write it like \"method == 'fa' and steps >= 250\"") from None

    def require(self, columns: list[str]) -> None:
        """Raise ConfigError if the expression names a column that is none of these."""
        for name in self.columns:
            require_column(name, columns, f"no column for --where (text is in quotes: '{name}') is called")

    def holds(self, frame: pd.DataFrame) -> "pd.Series[bool]":
        """Return whether the expression holds for each row.

        Raises:
            ConfigError: A column is unknown, or types do not compare.
        """
        self.require(list(map(str, frame)))
        try:
            rows: pd.Series[bool] = self._truth(self.tree, frame)
        except ConfigError:
            raise
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            why = str(error) or type(error).__name__
            raise self._wrong(f"{why}: compare text with text, numbers with numbers") from None
        return rows

    def _names(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield self._name(node)
            return
        for inner in ast.iter_child_nodes(node):
            yield from self._names(inner)

    def _name(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            quoted = re.fullmatch(r"_(\d+)_quoted", node.id)
            return self.quoted[int(quoted[1])] if quoted and int(quoted[1]) < len(self.quoted) else node.id
        if isinstance(node, ast.Attribute):
            return f"{self._name(node.value)}.{node.attr}"
        raise self._not_allowed(node)

    def _value(self, node: ast.AST, frame: pd.DataFrame) -> Any:
        """Return a column, a plain value, or the result of an allowed operation on them."""
        match node:
            case ast.Constant(value=str() | bool() | int() | float() | None):
                return node.value
            case ast.Name() | ast.Attribute():
                return frame[self._name(node)]
            case ast.BoolOp(op=op, values=parts):
                return self._joined(op, parts, frame)
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as op, right=right):
                return self._joined(op, [left, right], frame)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](self._number(left, frame), self._number(right, frame))
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return ~self._truth(operand, frame)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand, frame)
            case ast.Compare(left=left, ops=ops, comparators=others):
                links = zip([left, *others[:-1]], ops, others, strict=True)
                return reduce(operator.and_, [self._compared(one, op, other, frame) for one, op, other in links])
        raise self._not_allowed(node)

    def _joined(self, op: ast.AST, parts: list[ast.expr], frame: pd.DataFrame) -> Any:
        return reduce(_OPERATIONS[type(op)], [self._truth(part, frame) for part in parts])

    def _compared(self, left: ast.AST, op: ast.cmpop, right: ast.AST, frame: pd.DataFrame) -> Any:
        one = self._value(left, frame)
        if isinstance(op, (ast.In, ast.NotIn)):
            return self._within(one, right, frame) ^ isinstance(op, ast.NotIn)
        other = self._value(right, frame)
        if type(op) not in _OPERATIONS:
            raise self._not_allowed(op)
        if isinstance(op, (ast.Eq, ast.NotEq)) and (one is None or other is None):
            column = other if one is None else one
            if isinstance(column, pd.Series):
                return column.isna() ^ isinstance(op, ast.NotEq)
        return _OPERATIONS[type(op)](one, other)

    def _within(self, column: Any, node: ast.AST, frame: pd.DataFrame) -> Any:
        """Return whether each value of a column is in a list."""
        if not isinstance(node, (ast.List, ast.Tuple, ast.Set)) or not isinstance(column, pd.Series):
            raise self._wrong("`in` wants a column before it and a list after it: steps in [100, 250]")
        items = [self._value(item, frame) for item in node.elts]
        if any(isinstance(item, pd.Series) for item in items):
            raise self._wrong("a list after `in` holds values, no columns: steps in [100, 250]")
        inside = column.isin([item for item in items if item is not None])
        return inside | column.isna() if None in items else inside

    def _number(self, node: ast.AST, frame: pd.DataFrame) -> Any:
        """Return an operand of arithmetic: numbers only (text times a number would fill the memory), integers as floats."""
        value = self._value(node, frame)
        if isinstance(value, pd.Series) and pd.api.types.is_numeric_dtype(value):
            return value
        if isinstance(value, (int, float)):
            return float(value)
        raise self._wrong(f"`{ast.unparse(node)}` is no number")

    def _truth(self, node: ast.AST, frame: pd.DataFrame) -> Any:
        value = self._value(node, frame)
        if isinstance(value, pd.Series) and pd.api.types.is_bool_dtype(value):
            return value
        raise self._wrong(f"`{ast.unparse(node)}` is neither true nor false of a row: compare it with something")

    def _not_allowed(self, node: ast.AST) -> ConfigError:
        kind = type(node).__name__
        return self._wrong(
            f"{kind} is not allowed: compare columns with values by == != < <= > >= in, and or not, + - * / %"
        )

    def _wrong(self, why: str) -> ConfigError:
        text = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return ConfigError(" ".join(f"--where {text!r}: {why}".split()))


def require_column(name: str, columns: list[str], start: str) -> None:
    """Raise ConfigError, beginning with `start` and with the nearest name that exists, if `name` is none of the columns."""
    if name not in columns:
        close = [column for column in columns if column.startswith(name)][:1] or get_close_matches(name, columns, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(columns[:10])}, …"
        raise ConfigError(f"{start} {name}: {hint}")
