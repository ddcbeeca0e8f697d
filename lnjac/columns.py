"""Columns that explain themselves: name, type, unit, meaning, role, and how the rows of one norm are pooled.

A pooling is a text, so that a file can carry it: empty (the value where all rows agree, else missing), `sum`, `minimum`,
`mean weighted by …`, or a formula over pooled columns, such as `sum_B / (sum_B + sum_C)`. Formulas are arithmetic with
`sqrt`, `maximum`, `where`, `nan` and `==`; nothing else is evaluated, as they may come from a stranger's file.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

ROLES = KEY, VALUE, VOLATILE = "key", "value", "volatile"
SUM, MINIMUM, MEAN = "sum", "minimum", "mean weighted by "
MOST = 500
"""Characters of the longest formula that is evaluated."""


class Column(NamedTuple):
    """One column: dtype is int64, float64, string or bool; unit is empty for a pure number.

    The values of a table's `key` columns name a row. `volatile` columns may differ between two measurements of one run.
    """

    name: str
    dtype: str
    unit: str
    meaning: str
    role: str = VALUE
    pool: str = ""

    @property
    def weight(self) -> str:
        """The formula of the weights where the pooling is a weighted mean, else an empty text."""
        return self.pool.removeprefix(MEAN) if self.pool.startswith(MEAN) else ""

    @property
    def formula(self) -> str:
        """The pooling where it is a formula over other columns, else an empty text."""
        return "" if self.pool in (SUM, MINIMUM) or self.weight else self.pool

    @property
    def reads(self) -> list[str]:
        """The columns that pooling this one reads beside it. Raises ValueError if the pooling cannot be understood."""
        return names(self.formula or self.weight or "0")


def evaluate(formula: str, values: Mapping[str, Any]) -> Any:
    """Evaluate a formula over floats, arrays or pandas Series of one shape; a quotient by 0 is NaN.

    Args:
        formula: An arithmetic expression (see the module).
        values: The value of each name in it.

    Returns:
        A number, or an array of the values' shape.

    Raises:
        ValueError: The text is no formula, or a value is no number.
    """
    try:
        with np.errstate(all="ignore"):
            return _value(_parsed(formula), values)
    except TypeError as error:
        raise ValueError(f"{formula[:80]!r} cannot be evaluated: {error}") from None


def names(formula: str) -> list[str]:
    """Return the names that a formula reads. Raises ValueError if the text is no formula."""
    found = (node.id for node in ast.walk(_parsed(formula)) if isinstance(node, ast.Name))
    return [name for name in dict.fromkeys(found) if name not in (*_FUNCTIONS, "nan")]


def _divide(above: Any, below: Any) -> Any:
    return np.where(np.equal(below, 0), np.nan, np.divide(above, below))


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"sqrt": np.sqrt, "maximum": np.maximum, "where": np.where}


@lru_cache(maxsize=1024)
def _parsed(formula: str) -> ast.expr:
    try:
        if len(formula) > MOST:
            raise ValueError("it is too long")
        tree = ast.parse(formula, mode="eval").body
        compared = [node.comparators[0] for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        texts = [node for node in compared if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for node in ast.walk(tree):
            if not (_allowed(node) or node in texts):
                raise ValueError(f"{type(node).__name__} is not arithmetic")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{formula[:80]!r} is no formula: {error}") from None
    return tree


def _allowed(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, (int, float)) and float(value) < np.inf  # raises for an int that is too large
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in _FUNCTIONS
        case ast.Compare(comparators=[_]) | ast.BinOp() | ast.UnaryOp() | ast.Name() | ast.Load():
            return True
    return type(node) in _OPERATORS


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return float(value) if isinstance(value, (int, float)) else value
        case ast.Name(id=name):
            return np.nan if name == "nan" else values[name]
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(each, values) for each in arguments))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return _OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_value(operand, values))
    raise AssertionError(node)
