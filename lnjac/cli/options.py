"""Options that several commands share, and the values that their texts stand for."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lnjac.cli.tables import require_format
from lnjac.errors import ConfigError

if TYPE_CHECKING:
    from lnjac.comparing.intervals import Inference

IntervalKind = Literal["t", "signflip"]

Sources = Annotated[list[Path], typer.Argument(help="A merged table, or any mix of tables, sweeps and runs.")]
Metrics = Annotated[str, typer.Option("--metric", help="Columns, separated by commas.", show_default=False)]
At = Annotated[int | None, typer.Option(help="The measured step; each run's last unless given.")]
Where = Annotated[str | None, typer.Option(help="Only rows that meet this condition, such as \"method == 'fa'\".")]
OfRuns = Annotated[bool, typer.Option("--runs/--layers", help="Take metrics of whole runs (losses), or of each norm.")]
Reference = Annotated[
    str | None, typer.Option(help="The level that each other is compared with; all pairs unless given.")
]
Seeds = Annotated[bool, typer.Option("--seeds", help="Show every seed.")]
Kind = Annotated[IntervalKind, typer.Option("--interval", help="Student's t, or that with a sign-flip p.")]
Confidence = Annotated[float, typer.Option(min=0.5, max=0.9999, help="Confidence of the intervals.")]
Margin = Annotated[
    float | None,
    typer.Option(
        help="The smallest difference that would matter, in the metric's unit: judge each one equivalent, different or "
        "undecided by two one-sided tests.",
        show_default=False,
    ),
]
Tune = Annotated[
    str,
    typer.Option(
        help="Swept columns, separated by commas: give each level its best value of them, by the mean validation loss of "
        "the lower half of the seeds, and compare on the others.",
        show_default=False,
    ),
]
RTol = Annotated[float, typer.Option(min=0, help="Relative difference up to which numbers are equal.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        callback=require_format,
        help="Also write it: X.csv, X.parquet (of every seed with --seeds), X.md, X.tex.",
    ),
]

SEED = 0
"""Seed of the draws of a sign-flip p, so that the same table gives the same numbers."""


def names(text: str) -> list[str]:
    """Return the names in a text that separates them by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


POINTS = {"in": 72.0, "cm": 72 / 2.54, "mm": 7.2 / 2.54, "pt": 1.0}
"""Points of each unit of length."""
LONGEST = 100 * POINTS["in"]
"""Points beyond which a length is a slip, as 325in is."""


def length(text: str, option: str) -> float:
    """Return a length, such as 3.25in, in points, of which an inch has 72.

    Raises:
        ConfigError: If it is no number with a unit, or no length that a picture can have.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text)
    if found is None or found[2] not in POINTS:
        raise ConfigError(f"{option} {text} is no length: write a number and its unit, as 3.25in, 8.2cm, 82mm or 234pt")
    points = float(found[1]) * POINTS[found[2]]
    if not 0 < points <= LONGEST:
        raise ConfigError(f"{option} {text} is no length of a picture: write one of more than 0in, and at most 100in")
    return points


def inference(kind: IntervalKind, confidence: float) -> "Inference":
    """Return how intervals are made, as the options ask for it."""
    import numpy as np

    from lnjac.comparing.intervals import Inference

    return Inference(kind, confidence, np.random.default_rng(SEED))
