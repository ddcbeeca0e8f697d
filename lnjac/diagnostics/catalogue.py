"""The diagnostics that lnjac brings, and those that a config switches on."""

from typing import Any

from lnjac.columns import Column
from lnjac.diagnostics.alignment import Alignment
from lnjac.diagnostics.attention import Mechanism
from lnjac.diagnostics.base import Diagnostic
from lnjac.diagnostics.distributions import Distributions
from lnjac.diagnostics.draws import FeedbackDraws
from lnjac.diagnostics.substitution import Substitution
from lnjac.norms import formulas
from lnjac.runs.schema import CURVES, MEASURED_AT, RUNS

BUILT_IN: tuple[type[Diagnostic], ...] = (Distributions, Substitution, Alignment, Mechanism, FeedbackDraws)


def columns() -> dict[str, list[Column]]:
    """Return the columns of each table that a run may have, a user's own diagnostics left out."""
    core = {"layers": [*MEASURED_AT, *formulas.columns()], "runs": RUNS, "curves": CURVES}
    return core | {each.table: [*MEASURED_AT, *each.columns] for each in BUILT_IN}


def chosen(settings: Any) -> list[Diagnostic]:
    """Return the diagnostics that are switched on; the one that takes the most memory begins first."""
    switches: list[tuple[object, Diagnostic]] = [
        (settings.swap, Substitution(settings.swap_parts)),
        (settings.distributions, Distributions(settings.position_bins)),
        (settings.alignment, Alignment()),
        (settings.attention, Mechanism()),
        (settings.feedback_draws, FeedbackDraws(settings.feedback_draws)),
        *((True, diagnostic) for diagnostic in settings.more.values()),
    ]
    return [diagnostic for on, diagnostic in switches if on]
