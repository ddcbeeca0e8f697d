"""Choose rows by an expression over columns, such as `method == 'fa' and model.n_embd in [64, 128]`.

The text is parsed as Python and never run as such: what it may consist of is listed here, and is computed on columns. A
column with a dot or a space in its name is written as it is, `model.n_embd`, or in backticks.

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
from typing import TYPE_CHECKING, Any

from lnjac.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 2000
"""Characters; far below where a deeply nested text would exhaust the parser's stack."""

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_LOGIC: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}


class Where:
    """A parsed expression: the columns it names, and the rows it holds for."""

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
        """Raise ConfigError if the expression names none of these columns."""
        for name in self.columns:
            known_column(name, columns, f"no column for --where (text is in quotes: '{name}') is called")

    def holds(self, frame: "pd.DataFrame") -> "pd.Series[bool]":
        """Which rows of the frame to keep. Raises ConfigError for an unknown column or types that do not compare."""
        self.require(list(map(str, frame)))
        try:
            found = self._value(self.tree, frame)
        except ConfigError:
            raise
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise self._wrong(
                f"{str(error) or type(error).__name__}: compare text with text, numbers with numbers"
            ) from None
        rows: pd.Series[bool] = self._truth(found, self.tree)
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

    def _value(self, node: ast.AST, frame: "pd.DataFrame") -> Any:
        """A column, a plain value, or what an allowed operation makes of them."""
        match node:
            case ast.Constant(value=str() | bool() | int() | float() | None):
                return node.value
            case ast.Name() | ast.Attribute():
                return frame[self._name(node)]
            case ast.BoolOp(op=op, values=values):
                parts = [self._truth(self._value(value, frame), value) for value in values]
                return reduce(_LOGIC[type(op)], parts)
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as op, right=right):
                sides = [self._truth(self._value(side, frame), side) for side in (left, right)]
                return _LOGIC[type(op)](*sides)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self._number(left, frame), self._number(right, frame))
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return ~self._truth(self._value(operand, frame), operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand, frame)
            case ast.Compare(left=left, ops=ops, comparators=others):
                links = zip([left, *others[:-1]], ops, others, strict=True)
                return reduce(operator.and_, [self._compared(one, op, other, frame) for one, op, other in links])
        raise self._not_allowed(node)

    def _compared(self, left: ast.AST, op: ast.cmpop, right: ast.AST, frame: "pd.DataFrame") -> Any:
        import pandas as pd

        one = self._value(left, frame)
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple, ast.Set)) or not isinstance(one, pd.Series):
                raise self._wrong("`in` wants a column before it and a list after it: steps in [100, 250]")
            items = [self._constant(item) for item in right.elts]
            inside = one.isin([item for item in items if item is not None])
            if None in items:
                inside |= one.isna()
            return inside if isinstance(op, ast.In) else ~inside
        other = self._value(right, frame)
        if type(op) not in _COMPARE:
            raise self._not_allowed(op)
        if isinstance(op, (ast.Eq, ast.NotEq)) and (one is None or other is None):
            column = other if one is None else one
            if isinstance(column, pd.Series):
                return column.isna() if isinstance(op, ast.Eq) else column.notna()
        return _COMPARE[type(op)](one, other)

    def _constant(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=str() | bool() | int() | float() | None):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
        raise self._not_allowed(node)

    def _number(self, node: ast.AST, frame: "pd.DataFrame") -> Any:
        """An operand of arithmetic: numbers only (text times a number is a way to fill the memory), whole ones as floats."""
        import pandas as pd

        value = self._value(node, frame)
        if isinstance(value, pd.Series) and pd.api.types.is_numeric_dtype(value):
            return value
        if isinstance(value, (int, float)):
            return float(value)
        raise self._wrong(f"`{ast.unparse(node)}` is no number")

    def _truth(self, value: Any, node: ast.AST) -> Any:
        import pandas as pd

        if isinstance(value, pd.Series) and pd.api.types.is_bool_dtype(value):
            return value
        raise self._wrong(
            f"`{ast.unparse(node)}` does not say of each row whether it is meant: compare it with something"
        )

    def _not_allowed(self, node: ast.AST) -> ConfigError:
        kind = type(node).__name__
        return self._wrong(
            f"{kind} is not allowed: compare columns with values by == != < <= > >= in, and or not, + - * / %"
        )

    def _wrong(self, why: str) -> ConfigError:
        text = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return ConfigError(" ".join(f"--where {text!r}: {why}".split()))


def known_column(name: str, columns: list[str], said: str) -> None:
    """Raise ConfigError, with the nearest name there is, if `name` is none of the columns."""
    if name not in columns:
        close = [column for column in columns if column.startswith(name)][:1] or get_close_matches(name, columns, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(columns[:10])}, …"
        raise ConfigError(f"{said} {name}: {hint}")
