"""The part that trackers share which draw numbers over steps: which numbers of a run, and by what names."""

import fnmatch
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lnjac.norms.formulas import COLUMNS

MEASURED = [column.name for column in COLUMNS if column.dtype == "float64"]
"""The columns of layers that can be drawn as curves."""

USUAL = ("radial_share", "r_mean", "cos_center_vs_true", "flat_cos_*", "sigma_mean")


@dataclass
class Curves(ABC):
    """Draw `curve/NAME` for each scalar and `COLUMN/SITE` for these columns of layers; "*" stands for all of them.

    A subclass defines `packages`, `start`, `draw` and `end`.
    """

    name: str
    columns: list[str] = field(default_factory=lambda: list(USUAL))

    def problems(self, config: Any) -> Iterator[str]:
        """Yield a line for a missing package, and for each pattern of `columns` that matches nothing."""
        for package in self.packages():
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:  # a folder ./wandb of W&B's files looks like a package without code
                yield f"tracker={self.name} needs the package {package}: pip install 'lnjac[track]'"
        for pattern in self.columns:
            if not fnmatch.filter(MEASURED, pattern):
                yield f"tracker.columns={pattern} matches no number of a layer row: docs/columns.md names them"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._draw(step, {f"curve/{name}": value for name, value in values.items()})

    def layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        shown = sorted({name for pattern in self.columns for name in fnmatch.filter(MEASURED, pattern)})
        self._draw(step, {f"{name}/{_place(row)}": row[name] for row in rows for name in shown})

    def _draw(self, step: int, values: Mapping[str, float | None]) -> None:
        self.draw(step, {name: x for name, x in values.items() if x is not None and not math.isnan(x)})

    @abstractmethod
    def packages(self) -> list[str]:
        """Return the packages that these settings need."""

    @abstractmethod
    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Draw a point of each curve."""


def known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that are not None."""
    return {name: value for name, value in config.items() if value is not None}


def _place(row: Mapping[str, Any]) -> str:
    """Return the site, with the call's number where that is not the first."""
    return f"{row['site']}[{row['call']}]" if row["call"] else str(row["site"])
