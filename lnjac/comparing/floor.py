"""Compare runs with the floor: the loss of a body that never learns, or of a bigram model, which says less."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import EXACT, LOSS, compare
from lnjac.comparing.experiment import cell_columns, labelled, varying
from lnjac.comparing.filter import Where
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.tables import MergedTables, Sources, open_tables
from lnjac.errors import ConfigError
from lnjac.runs.folder import DONE

FROZEN, BIGRAM = "frozen", "bigram"
"""The kinds of floor: runs of the method `frozen`, whose blocks keep their initial weights; the corpus's `bigram_nats`."""


TASK = ("data", "data_sha256", "numerics_version", "model", "steps", "batch_size", "eval")
"""Columns in which frozen runs must agree with a run to be its floor, as in the settings of these: a floor is of one task."""


@dataclass(frozen=True)
class Floor:
    """Validation losses minus the floor, in nats: what training the body has earned, if it is below 0.

    Attributes:
        kind: FROZEN or BIGRAM.
        exact: Whether the runs are those of the exact backward alone, because the backward varies.
        rows: A row for each cell: its columns, `method` where runs have one, the mean loss `mean_a`, the floor `mean_b`, and
            `difference`, `low`, `high`, `p_adjusted`, `agreement`, `n`, `paired` and `moving` as in `Differences`.
        cells: The columns that make cells, of which `method` is one where methods differ.
        how: The kind of interval.
    """

    kind: str
    exact: bool
    rows: pd.DataFrame
    cells: list[str]
    how: Inference


def floor(sources: Sources, *, where: str | None = None, how: Inference = STUDENT) -> Floor | None:
    """Compare the reference level with the floor: the runs of the exact backward, or all runs if the backward does not vary.

    Runs of the method `frozen` are the floor of runs of the same task, whether or not `where` chooses them, and are paired
    with them by seed. Otherwise the floor is the loss of the corpus's bigram model, which each run's row holds.

    Args:
        sources: A path, or several: of merged tables, sweeps and runs; or tables opened by `open_tables`.
        where: Only runs for which this holds, such as `"method == 'fa'"`.
        how: The kind of interval and its confidence.

    Returns:
        The comparison; None if the table has neither floor, or no validation loss.

    Raises:
        ConfigError: A source or a column does not exist.
    """
    tables = open_tables(sources)
    every = tables.frame("runs")
    if not {LOSS, "seed"} <= set(every):
        return None
    chosen = every[Where(where).holds(every)] if where is not None else every
    trained = chosen[chosen["method"] != FROZEN] if "method" in chosen else chosen
    exact = False
    if "ln_backward" in trained and (trained["ln_backward"] == EXACT).any():
        exact = trained["ln_backward"].nunique() > 1
        trained = trained[trained["ln_backward"] == EXACT]
    trained = trained[trained["status"] == DONE]
    trained = trained[np.isfinite(trained[LOSS].astype(float))]
    if trained.empty:
        return None
    if "method" in every and (every["method"] == FROZEN).any():
        conditions = [f"({where}) or method == '{FROZEN}'"] * (where is not None)
        conditions += [f"ln_backward == '{EXACT}'"] * exact
        both = " and ".join(f"({one})" for one in conditions) or None
        rows = _against_frozen(tables, both, how)
        if len(rows):
            columns = list(map(str, rows.columns[: rows.columns.get_loc("metric")]))
            several = trained["method"].nunique() > 1
            return Floor(FROZEN, exact, rows, ["method"] * several + columns, how)
    return _above_bigram(trained, varying(trained, tables.described("runs")), exact, how)


def _against_frozen(tables: MergedTables, where: str | None, how: Inference) -> pd.DataFrame:
    """Return the differences from the frozen runs of the same task, which may be none; `method` names the other side."""
    try:
        found = compare(tables, "method", metrics=[LOSS], table="runs", where=where, reference=FROZEN, how=how).rows
    except ConfigError:  # no run of both, or runs that cannot be told apart
        return pd.DataFrame()
    kept = found[(found["n"] > 0) & found["moving"].map(_same_task).astype(bool)]
    return kept.rename(columns={"a": "method"}).reset_index(drop=True)


def _same_task(moving: str) -> bool:
    """Return whether none of the columns that move with the method is of TASK."""
    return not any(name.split(".")[0] in TASK for name in moving.split(", "))


def _above_bigram(trained: pd.DataFrame, vary: list[str], exact: bool, how: Inference) -> Floor | None:
    """Return the losses minus the corpus's bigram loss, by cell; None where there is no number to compare."""
    if "bigram_nats" not in trained or trained["bigram_nats"].isna().all():
        return None
    known = trained[trained["bigram_nats"].notna()].drop_duplicates("run_id")
    known = known.assign(**{name: labelled(known, name) for name in {"ln_backward", "method"} & set(known)})
    cells = cell_columns(known, [], [name for name in vary if name != "ln_backward.sites"])
    named = [name for name in ("method",) if name in known and name not in cells]
    rows = []
    for level, runs in known.groupby(cells, dropna=False, sort=False) if cells else [((), known)]:
        found = stats.paired((runs[LOSS] - runs["bigram_nats"]).to_numpy(), how, runs[LOSS].to_numpy())
        means = {"mean_a": runs[LOSS].mean(), "mean_b": runs["bigram_nats"].mean()}
        values = {name: value.item() for name, value in found._asdict().items()}
        of_cell = dict(zip(cells, level, strict=True)) | {name: runs[name].iloc[0] for name in named}
        rows.append(of_cell | means | values)
    if not rows:
        return None
    frame = pd.DataFrame(rows).rename(columns={"estimate": "difference"})
    # one cell has one p value of this metric: a family of its own
    return Floor(BIGRAM, exact, frame.assign(p_adjusted=frame["p"], paired=False, moving=""), cells, how)
