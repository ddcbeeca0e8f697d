"""Quantiles over tokens and profiles over positions of each norm's quantities."""

from dataclasses import dataclass
from typing import Any

from lnjac.diagnostics.base import Diagnostic, Rows, Subject
from lnjac.norms.distribution import COLUMNS
from lnjac.norms.probe import Pass, distributions


@dataclass
class Distributions(Diagnostic):
    """Measure the spread of each norm's per-token quantities over the tokens of all diagnostic batches."""

    table = "distributions"
    columns = COLUMNS
    cost = "no pass of its own"
    needs_optimizer = False
    needs_tokens = True

    bins: int

    def begin(self, subject: Subject) -> None:
        self.passes: list[Pass] = []

    def passed(self, batch: Any, seen: Pass) -> None:
        self.passes.append(seen)

    def rows(self) -> Rows:
        return distributions(self.passes, self.bins)
