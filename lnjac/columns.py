"""The description of a table's column: what every part of lnjac that computes one declares."""

from typing import NamedTuple


class Column(NamedTuple):
    """One column: dtype is int64, float64, string or bool; unit is empty for a pure number."""

    name: str
    dtype: str
    unit: str
    meaning: str
