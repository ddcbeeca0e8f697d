"""The formulas that pool a column: arithmetic, and nothing else, whatever a file holds."""

import numpy as np
import pandas as pd
import pytest

from lnjac.columns import Column, evaluate, names


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a - 2 * b / (a + b)", [1 - 4 / 3, 2 - 8 / 6, -2]),
        ("sqrt(maximum(a - 1, 0)) + -b", [-2, -3, -0.5]),
        ("where(k == 'x', nan, d * b)", [np.nan, 20, np.nan]),
        ("a / (b - 0.5)", [1 / 1.5, 2 / 3.5, np.nan]),
        ("sqrt(a - 2)", [np.nan, 0, np.nan]),
        ("d", [5, 5, 5]),
    ],
)
def test_a_formula_is_of_numbers_arrays_and_series_alike(formula: str, expected: list[float]) -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, 0.0], "b": [2.0, 4.0, 0.5], "k": ["x", "y", "x"], "d": 5})
    np.testing.assert_allclose(evaluate(formula, frame), expected)
    np.testing.assert_allclose(evaluate(formula, {name: frame[name].to_numpy() for name in frame}), expected)
    for row, value in zip(frame.to_dict("records"), expected, strict=True):
        np.testing.assert_allclose(float(evaluate(formula, row)), value)


def test_the_names_that_a_pooling_reads() -> None:
    assert names("where(norm == 'rmsnorm', nan, sum_A / (sum_A + sqrt(d)))") == ["norm", "sum_A", "d"]
    reads = {"": [], "sum": [], "minimum": [], "mean weighted by n - m": ["n", "m"], "a / b": ["a", "b"]}
    assert {pool: Column("x", "float64", "", "", pool=pool).reads for pool in reads} == reads


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "a.b",
        "a[0]",
        "[a for a in b]",
        "lambda: a",
        "sqrt(a=1)",
        "9 ** 9 ** 9",
        "a if b else c",
        "(a := 1)",
        "a < b < c",
        "a and b",
        "True",
        "1j",
        "f'{a}'",
        "a b",
        "",
        "a\0",
        "(" * 400 + "a" + ")" * 400,
        "a" + " + a" * 999,
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    for refused in (lambda: names(text), lambda: evaluate(text, {"a": 1.0, "b": 2.0})):
        with pytest.raises(ValueError, match="is no formula"):
            refused()
