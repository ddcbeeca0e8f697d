"""Format numbers, names and tables as plain text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lnjac.escape import visible

if TYPE_CHECKING:
    import pandas as pd

HEADINGS = {
    "r_mean": "r_mean",
    "r_radial": "r_rad",
    "sigma_mean": "σ_μ",
    "cos_center_vs_true": "cos_c/t",
    "cos_ste_vs_true": "cos_s/t",
}
"""The columns of numbers in the table of norms, by name in `lnjac.runs.schema`, with their headings."""

AVERAGE = "AVG: the plain mean of the norms, as the original script printed it"


def layer_table(rows: "Sequence[Mapping[str, Any]] | pd.DataFrame") -> str:
    """Format the rows of one step as a table, a line for each norm or call of one, as the original script printed it.

    The last line, AVG, is the plain mean of the lines above. It repeats the original script; nothing is concluded from it,
    as norms differ in their part of the gradient's energy. Where a row lacks a value, the mean has none either.

    Args:
        rows: layer rows, by column name.

    Returns:
        The lines, with `-` for each missing value.
    """
    records = rows if isinstance(rows, Sequence) else cast("list[Mapping[str, Any]]", rows.to_dict("records"))
    calls = Counter(row["site"] for row in records)
    lines = [["name", *HEADINGS.values()]]
    for row in records:
        name = f"{row['site']} [{row['call']}]" if calls[row["site"]] > 1 else str(row["site"])
        lines.append([name, *(number(row[column]) for column in HEADINGS)])
    if records:
        columns = [[math.nan if row[column] is None else row[column] for row in records] for column in HEADINGS]
        lines.append(["AVG", *(number(math.fsum(column) / len(column)) for column in columns)])
    return aligned(lines) + f"\n{AVERAGE}" * bool(records)


def number(value: float | None) -> str:
    """Format with four decimals, a small or a huge value with three significant digits, and None or NaN as `-`."""
    if value is None or math.isnan(value):
        return "-"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6) and math.isfinite(value):
        return f"{value:.2e}"
    return f"{value:.4f}"


def exact(value: float) -> str:
    """Format with six significant digits, or with as many as tell the number from every other."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def word(level: Any) -> str:
    """Return a level in words: `null` where it is missing, which is where it is None or not equal to itself."""
    if level is None or level != level:
        return "null"
    return exact(level) if isinstance(level, float) else str(level)


def listed(names: Sequence[Any], most: int = 10) -> str:
    """Join the first `most` names, with the number of further ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def aligned(lines: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Lay out lines of cells in columns, the first `labels` of them to the left, the others to the right."""
    lines = [[visible(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * labels + [str.rjust] * (len(widths) - labels)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    )
