"""Settings of the diagnostics (conf/diagnostics). Imports no torch, so that a config is composed fast."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lnjac.norms.formulas import GradAt


class Split(str, Enum):
    train = "train"
    val = "val"


class Schedule(str, Enum):
    none = "none"
    final = "final"
    linear = "linear"
    log = "log"
    list = "list"


class Parts(str, Enum):
    """How finely a replaced backward is compared with the exact one: each level adds rows to those before it."""

    model = "model"
    block = "block"
    tensor = "tensor"


@dataclass
class Diagnostics:
    """What is measured, when, and on how much (conf/diagnostics)."""

    name: str
    schedule: Schedule
    every: int
    steps: list[int]
    batches: int
    batch_size: int
    split: Split
    grad_at: GradAt
    distributions: bool
    position_bins: int
    alignment: bool
    feedback_draws: int
    attention: bool
    swap: bool
    swap_parts: Parts
    more: Any = field(default_factory=dict)
    """Further diagnostics by name, each of a file conf/diagnostic/NAME.yaml; not hashed if there are none."""

    def at(self, last: int) -> list[int]:
        """The steps (numbers of updates done) at which the norms are analysed; the last one is always among them."""
        match self.schedule:
            case Schedule.none:
                return []
            case Schedule.final:
                chosen: list[int] = []
            case Schedule.linear:
                chosen = list(range(0, last, self.every))
            case Schedule.log:
                chosen = [0] + [2**k for k in range(last.bit_length())]
            case Schedule.list:
                chosen = list(self.steps)
        return sorted({step for step in chosen if step < last} | {last})

    def problems(self, config: Any) -> Iterator[str]:
        for name in ("batches", "batch_size", "every", "position_bins"):
            if (value := getattr(self, name)) < 1:
                yield f"diagnostics.{name}={value} must be at least 1"
        if self.feedback_draws < 0:
            yield f"diagnostics.feedback_draws={self.feedback_draws} must not be negative: 0 draws none"
        if self.steps and self.schedule is not Schedule.list:
            yield (
                f"diagnostics.steps={self.steps} is not used by diagnostics.schedule={self.schedule.value}: "
                "set diagnostics.schedule=list, or leave steps out"
            )
        if self.schedule is Schedule.none:
            for name in ("distributions", "alignment", "feedback_draws", "attention", "swap", "more"):
                if value := getattr(self, name):
                    value = list(value) if name == "more" else value
                    yield (
                        f"diagnostics.{name}={value} measures nothing with diagnostics.schedule=none: "
                        "choose a schedule, such as final"
                    )
        for step in self.steps:
            if not 0 <= step <= config.steps:
                yield f"diagnostics.steps holds {step}, outside the run's 0 to {config.steps}: drop it or raise steps"
        for diagnostic in self.more.values():
            if hasattr(diagnostic, "problems"):
                yield from diagnostic.problems(config)
