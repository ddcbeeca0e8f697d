"""Choose the best value of settings for each level on some seeds, so that levels are compared at their best on the others.

Every arm, which is a level in a cell, gets the value with the lowest mean validation loss over the tuning seeds: the lower
half of all sorted seeds. Losses of the seeds that chose are optimistic, so only the other seeds are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd

from lnjac.comparing.experiment import LOSS, cell_columns, factors, labelled, numbered, varying, words
from lnjac.comparing.filter import Where, require_column
from lnjac.comparing.notes import capped
from lnjac.comparing.tables import Choices, MergedTables
from lnjac.errors import ConfigError
from lnjac.runs.folder import DONE
from lnjac.text import listed, word

FEWEST = 3
"""Seeds without which nothing can be tuned and compared: one chooses, and two have an interval."""


@dataclass(frozen=True)
class Tuned(MergedTables):
    """Merged tables of the runs at the chosen values, of the seeds that chose none; the tuned columns are gone."""

    kept: frozenset[str] = field(default=frozenset(), repr=False)

    def columns(self, table: str) -> list[str]:
        assert self.choices is not None
        found = super().columns(table)
        return [name for name in found if name not in self.choices.keys] if table == "runs" else found

    def frame(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        assert self.choices is not None
        if table != "runs":
            return super().frame(table, columns)
        every = super().frame(table)
        left = every[every["run_id"].isin(self.kept)].drop(columns=self.choices.keys).reset_index(drop=True)
        return left if columns is None else left[list(columns)]


def tuned(tables: MergedTables, keys: Sequence[str], *, by: Sequence[str] = (), where: str | None = None) -> Tuned:
    """Return the tables of the runs at each arm's best value, of the seeds that did not choose it.

    A value at which a tuning seed diverged, or which lacks one, is never chosen. Of equal means the first value in order is.

    Args:
        tables: The merged tables.
        keys: The columns to tune, such as optimizer.lr; of several, the best of the combinations that were run.
        by: The columns that are compared.
        where: Only runs for which this holds. It is applied here, and not to be applied again.

    Raises:
        ConfigError: A column does not exist, there are too few seeds, or there is nothing to choose.
    """
    every, known = tables.frame("runs"), tables.described("runs")
    _require(every, keys, by)
    for key in keys:
        require_column(key, factors(every, known), "--tune: runs are not told apart by")
    if where is not None:
        condition = Where(where)
        if of_norms := [name for name in condition.columns if name not in every and name in tables.columns("layers")]:
            raise ConfigError(f"--where names {', '.join(of_norms)}, of norms, but --tune chooses runs: leave it out")
        every = every[condition.holds(every)]
    runs = every.drop_duplicates("run_id").reset_index(drop=True)
    for key in keys:
        if runs[key].nunique(dropna=False) < 2:
            value = f" have {key}={word(runs[key].iloc[0])}" if len(runs) else ""
            raise ConfigError(f"all {len(runs)} runs chosen{value}: there is nothing to tune")
    seeds = sorted(runs["seed"].unique().tolist())
    if len(seeds) < FEWEST:
        raise ConfigError(
            f"--tune needs at least {FEWEST} seeds, of which one chooses and two are compared: the runs chosen have "
            f"seed {listed(seeds)}"
        )
    tuning, rest = seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]
    arms, arm = _arms(runs, keys, [name for name in by if name in runs], varying(runs, known))
    chosen, notes = _choose(runs, keys, arms, arm, tuning)
    if chosen["tried"].max() < 2:
        raise ConfigError(f"each level was run at one {' '.join(keys)}: there is nothing to tune")
    best = runs[list(keys)].assign(arm=arm).merge(chosen[[*keys, "arm"]].assign(best=True), "left", on=[*keys, "arm"])
    kept = runs[best["best"].eq(True).to_numpy() & runs["seed"].isin(rest).to_numpy()]
    lacking = [
        f"{_named(arms, number, chosen.loc[number], keys)} lacks seed {listed(missing)}"
        for number in chosen.index
        if (missing := sorted({*rest} - {*kept["seed"][arm[kept.index] == number]}))
    ]
    notes += capped("chosen values that were not run on every compared seed", lacking)
    rows = arms.loc[chosen.index].join(chosen.drop(columns="arm")).reset_index(drop=True)
    choices = Choices(list(keys), list(map(str, arms)), tuning, rest, rows)
    said = [_named(arms, number, chosen.loc[number], keys) for number in chosen.index]
    how = (
        f"{', '.join(keys)} chosen by the mean {LOSS} of seeds {listed(tuning)} (the lower half), "
        f"compared on seeds {listed(rest)}"
    )
    own = {each.name: getattr(tables, each.name) for each in fields(MergedTables)}
    own |= {"choices": choices, "warnings": [*capped(how, said), *notes, *tables.warnings]}
    return Tuned(**own, kept=frozenset(kept["run_id"]))


def _require(every: pd.DataFrame, keys: Sequence[str], by: Sequence[str]) -> None:
    if not keys:
        raise ConfigError("--tune names no column: give one that was swept, such as optimizer.lr")
    if both := [name for name in keys if name in by]:
        raise ConfigError(f"--tune {', '.join(both)} is compared: tune another column")
    if missing := [name for name in (LOSS, "seed") if name not in every]:
        raise ConfigError(f"--tune chooses by {LOSS} on some seeds, but these runs have no {', '.join(missing)}")


def _arms(
    runs: pd.DataFrame, keys: Sequence[str], by: Sequence[str], vary: Sequence[str]
) -> "tuple[pd.DataFrame, pd.Series[int]]":
    """Return the columns that tell arms apart, a row for each arm, and the number of each run's arm."""
    bare = runs.drop(columns=list(keys))
    bare = bare.assign(**{name: labelled(bare, name) for name in {"ln_backward", *by} if name in bare})
    others = [name for name in vary if name in bare and name != "ln_backward.sites"]
    others = [name for name in others if not name.startswith("diagnostics.")]
    names = [*by, *cell_columns(bare, by, [name for name in others if name not in by])]
    arm = numbered(bare[names])
    return bare.loc[~arm.duplicated(), names].set_axis(arm.unique()).sort_index(), arm


def _choose(
    runs: pd.DataFrame, keys: Sequence[str], arms: pd.DataFrame, arm: "pd.Series[int]", tuning: Sequence[Any]
) -> tuple[pd.DataFrame, list[str]]:
    """Return the best value of each arm that has one, and notes on the values that could not be chosen."""
    sound = (runs["status"] == DONE) & np.isfinite(runs[LOSS].astype(float))
    found: dict[int, dict[str, Any]] = {}
    diverged, missing, none, edges = [], [], [], []
    for number, of_arm in runs.assign(sound=sound).groupby(arm):
        means: dict[int, float] = {}
        values = of_arm[list(keys)].drop_duplicates().sort_values(list(keys), ignore_index=True)
        for at in range(len(values)):
            value = values.iloc[at]
            one = of_arm[(of_arm[list(keys)].eq(value) | of_arm[list(keys)].isna() & value.isna()).all(axis=1)]
            chooses = one[one["seed"].isin(tuning)]
            if bad := sorted(chooses["seed"][~chooses["sound"]]):
                diverged.append(f"{_named(arms, number, value, keys)} (seed {listed(bad)})")
            elif lacks := sorted({*tuning} - {*chooses["seed"]}):
                missing.append(f"{_named(arms, number, value, keys)} lacks seed {listed(lacks)}")
            else:
                means[at] = float(chooses[LOSS].mean())
        if not means:
            none.append(words(arms, number) or "the only level")
            continue
        best = min(means, key=means.__getitem__)
        ends = _ends(values, keys, best)
        edges += [f"{_named(arms, number, values.iloc[best], keys)} is the {which}" for which in ends.values()]
        found[int(str(number))] = {
            **{key: values[key].iloc[best] for key in keys},
            LOSS: means[best],
            "tried": len(values),
            "edge": ", ".join(f"{key} {which}" for key, which in ends.items()),
            "arm": number,
        }
    notes = [
        *capped("warning: the best value is at the edge of those that were run, so run further ones", edges),
        *capped("never chosen, as a tuning seed diverged", diverged),
        *capped("not chosen, as not every tuning seed was run", missing),
        *capped("left out, as no value can be chosen", none),
    ]
    if not found:
        raise ConfigError("; ".join(["--tune: no value can be chosen", *notes]))
    return pd.DataFrame.from_dict(found, orient="index"), notes


def _ends(values: pd.DataFrame, keys: Sequence[str], best: int) -> dict[str, str]:
    """Return the columns whose best value is the lowest or the highest that was run."""
    found: dict[str, str] = {}
    for key in keys:
        known, value = values[key].dropna(), values[key].iloc[best]
        if known.nunique() > 1 and known.dtype.kind in "if" and value in (known.min(), known.max()):
            found[key] = "lowest" if value == known.min() else "highest"
    return found


def _named(arms: pd.DataFrame, number: Any, value: "pd.Series[Any]", keys: Sequence[str]) -> str:
    return " ".join([*filter(None, [words(arms, number)]), *(f"{key}={word(value[key])}" for key in keys)])
