"""The original script's table, one line per norm, as plain text."""

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
"""The table's columns of numbers: name in `lnjac.runs.schema`, heading."""

AVERAGE = "AVG: the plain mean of the norms, as the original script printed it"


def layer_table(rows: "Sequence[Mapping[str, Any]] | pd.DataFrame") -> str:
    """Format the layer rows of one step: a header, a line for each site (or call of it), and the original's last line.

    That line, AVG, is the plain mean of the lines above it. It repeats the original script and means no more: norms differ
    in how much of the gradient's energy they hold, so nothing is tested or concluded from it. A value that is missing in a
    row is missing in the mean too: both are shown as `-`.
    """
    records = _records(rows)
    calls = Counter(row["site"] for row in records)
    lines = [["name", *HEADINGS.values()]]
    for row in records:
        name = f"{row['site']} [{row['call']}]" if calls[row["site"]] > 1 else str(row["site"])
        lines.append([name, *(number(row[column]) for column in HEADINGS)])
    if records:
        lines.append(["AVG", *(number(_mean([row[column] for row in records])) for column in HEADINGS)])
    return aligned(lines) + f"\n{AVERAGE}" * bool(records)


def number(value: float | None) -> str:
    """Four decimals; three significant digits where those would hide a small or a huge value; `-` for none or NaN."""
    if value is None or math.isnan(value):
        return "-"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6) and math.isfinite(value):
        return f"{value:.2e}"
    return f"{value:.4f}"


def exact(value: float) -> str:
    """Six significant digits, or as many as tell the number from every other: no two levels look alike."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def listed(names: Sequence[Any], most: int = 10) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _records(rows: "Sequence[Mapping[str, Any]] | pd.DataFrame") -> Sequence[Mapping[str, Any]]:
    if isinstance(rows, Sequence):
        return rows
    return cast("list[Mapping[str, Any]]", rows.to_dict("records"))


def _mean(values: Sequence[float | None]) -> float:
    return math.fsum(math.nan if value is None else value for value in values) / len(values)


def aligned(lines: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Columns two spaces apart, the first `labels` of them to the left, numbers to the right."""
    lines = [[visible(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * labels + [str.rjust] * (len(widths) - labels)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    )
