"""Compute the cost of each backward, which is its loss minus the exact one's, and how costs differ between levels."""

from collections.abc import Sequence
from dataclasses import dataclass

from lnjac.comparing.compare import EXACT, LOSS, Differences, compare, differences, pairs_of
from lnjac.comparing.experiment import arrange
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.pairing import Contrast
from lnjac.comparing.shown import Shown
from lnjac.comparing.tables import Sources, open_tables
from lnjac.comparing.tune import tuned
from lnjac.errors import ConfigError


@dataclass(frozen=True)
class Costs(Shown):
    """The cost of each backward, and how it differs between the levels of `by`.

    Attributes:
        by: The column between whose levels costs are compared; None if there is none.
        costs: A row for each backward in each cell: its loss minus the exact one's, in the loss's unit.
        differences: A row for each backward and pair of levels: the difference of its costs; None without `by`.
    """

    by: str | None
    costs: Differences
    differences: Differences | None


def cost(
    sources: Sources,
    *,
    by: str | None = None,
    metric: str = LOSS,
    where: str | None = None,
    reference: str | None = None,
    how: Inference = STUDENT,
    margin: float | None = None,
    tune: Sequence[str] = (),
) -> Costs:
    """Return the cost of each backward: its runs' loss minus the exact one's, paired by seed, within each cell.

    Within a cell the costs of all backwards are one family of Holm's adjustment, their differences another.

    Args:
        sources: A path, or several: of merged tables, sweeps and runs; or tables opened by `open_tables`.
        by: The column between whose levels costs are compared; attn_mode, if that varies, unless given.
        metric: The loss, a column of runs.
        where: Only runs for which this holds, such as `"method == 'fa'"`.
        reference: The level of `by` that each other is compared with, instead of all pairs.
        how: The kind of interval and its confidence.
        margin: The smallest cost or difference that would matter, in the loss's unit: each is then judged equivalent,
            different or undecided by two one-sided tests.

        tune: Columns of the config whose best value each backward gets at each level, as in `lnjac.compare`.

    Returns:
        The costs, and their differences between the levels of `by` (softmax − sigmoid).

    Raises:
        ConfigError: A source, column or level does not exist, or no run has the exact backward.

    Example:
        >>> found = lnjac.cost("all.parquet", where="method == 'fa'")
        >>> found.costs.rows[["attn_mode", "a", "difference", "low", "high", "n"]]
    """
    if by == "ln_backward":
        raise ConfigError(
            "--by ln_backward: each has its cost already; give the factor to compare costs by, as attn_mode"
        )
    tables = open_tables(sources)
    if "ln_backward" not in tables.columns("runs"):
        raise ConfigError(
            "these runs have no ln_backward, whose costs there could be: compare their losses by `lnjac compare --runs`"
        )
    if tune:
        tables, where = tuned(tables, tune, by=["ln_backward", *filter(None, [by])], where=where), None
    costs = compare(
        tables, "ln_backward", metrics=[metric], table="runs", where=where, reference=EXACT, how=how, margin=margin
    )
    if by is None and "attn_mode" in costs.cells:
        by = "attn_mode"
    if by is None:
        return Costs(None, costs, None)
    found = arrange(tables, ["ln_backward", by], [metric], table="runs", where=where)
    backwards, levels = found.levels.values()
    exact = backwards.index(EXACT)
    contrasts = [
        Contrast(levels[a], levels[b], [(number, a), (number, b), (exact, a), (exact, b)], {"ln_backward": backward})
        for number, backward in enumerate(backwards)
        if number != exact
        for a, b in pairs_of(levels, by, reference)
    ]
    return Costs(by, costs, differences(found, contrasts, how, margin))
