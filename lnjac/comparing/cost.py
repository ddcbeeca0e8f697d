"""The cost of each backward: loss above the exact one's, and differences of costs between levels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lnjac.comparing.compare import EXACT, LOSS, Comparison, Contrast, compare, compared_rows, pairs_of
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.study import Study, gather
from lnjac.errors import ConfigError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Costs:
    """The cost of each backward (loss minus the exact one's), and how it differs between the levels of `by`."""

    by: str | None
    costs: Comparison
    differences: Comparison | None


def cost(
    study: Study,
    *,
    by: str | None = None,
    metric: str = LOSS,
    where: str | None = None,
    reference: str | None = None,
    how: Inference = STUDENT,
) -> Costs:
    """What each backward costs: its runs' loss minus the exact one's, paired by seed, within each cell of all else.

    And the differences of these costs between the levels of `by` (attn_mode where that varies, unless given): softmax −
    sigmoid. Within a cell the costs of all backwards are one family of Holm's adjustment, the differences another.
    """
    if by == "ln_backward":
        raise ConfigError(
            "--by ln_backward: each has its cost already; give the factor to compare costs by, as attn_mode"
        )
    costs = compare(study, "ln_backward", metrics=[metric], table="runs", where=where, reference=EXACT, how=how)
    if by is None and "attn_mode" in costs.cells:
        by = "attn_mode"
    if by is None:
        return Costs(None, costs, None)
    values = gather(study, ["ln_backward", by], [metric], table="runs", where=where)
    backwards, levels = values.levels
    exact = backwards.index(EXACT)

    contrasts = [
        Contrast({"ln_backward": name}, *((levels[k], [(backward, k), (exact, k)]) for k in pair))
        for backward, name in enumerate(backwards)
        if backward != exact
        for pair in pairs_of(levels, by, reference)
    ]
    return Costs(by, costs, compared_rows(values, contrasts, how))
