"""Compare runs at the levels of a config column (docs/comparing.md).

Everything is computed on one number per seed (`lnjac.comparing.study`), tested by `lnjac.comparing.intervals`, and returned
as data frames with notes that say what a reader must know: what was paired, what is missing, what diverged.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lnjac.comparing import intervals as stats
from lnjac.comparing.intervals import STUDENT, Inference
from lnjac.comparing.study import LAST_NORM, Study, Values, gather, named, word
from lnjac.errors import ConfigError
from lnjac.text import listed

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]


Integers = npt.NDArray[np.int64]


Booleans = npt.NDArray[np.bool_]


LAYER_METRICS = ("radial_share", "cos_center_vs_true", "flat_cos_ste", "sigma_mean")


RUN_METRICS = ("val_loss_nats", "train_loss_nats")


LOSS = "val_loss_nats"


EXACT = "exact"


FEW = 3
"""Seeds below which an interval says next to nothing."""


@dataclass(frozen=True)
class Comparison:
    """A row for each comparison, the numbers of every seed behind it, and notes on both.

    `rows`: the cell's columns, metric, site, the levels `a` and `b`, `mean_a` and `mean_b` over the seeds compared,
    `difference` = a − b with its interval `low` to `high`, `p`, `p_adjusted` (Holm's, over the `family` p values of this
    metric in this cell), `effect`, `agreement` ("identical" or "the same in every seed": no p then), `n`, `paired`,
    `missing` (seeds that only one of the levels has), `diverged_a` of `runs_a`, `diverged_b` of `runs_b`; `moving`, the
    columns that are not the same at both levels.
    `by` is the column compared, `cells` names the cell's, null where the column is not the same at both levels. `a`, `b`:
    (rows, seeds), NaN where a level has no number; `seed`: (seeds,).
    """

    rows: "pd.DataFrame"
    by: str
    cells: list[str]
    seed: npt.NDArray[np.int64]
    a: Array
    b: Array
    notes: list[str]

    def seeds(self) -> "pd.DataFrame":
        """A line for each seed of each row: the row's key, `seed`, `value_a`, `value_b`, and their difference if paired."""
        row, slot = np.nonzero(~(np.isnan(self.a) & np.isnan(self.b)))
        key = [name for name in self.rows if name in ("metric", "site", "a", "b") or name in self.cells]
        a, b = self.a[row, slot], self.b[row, slot]
        lines = self.rows[key].iloc[row]  # the index is the number of the row
        difference = np.where(self.rows["paired"].to_numpy()[row], a - b, np.nan)
        return lines.assign(seed=self.seed[slot], value_a=a, value_b=b, difference=difference)

    def headline(self) -> Booleans:
        """Mark the rows to name first: LAST_NORM, and the norm with the largest difference of each comparison.

        All rows where there are no norms. Which norm is the largest is chosen after the fact: `p_adjusted` allows for that,
        the interval does not.
        """
        rows = self.rows
        if "site" not in rows:
            return np.ones(len(rows), bool)
        key = [name for name in rows if name in ("metric", "a", "b") or name in self.cells]
        sizes = rows["difference"].abs()
        largest = rows[sizes == sizes.groupby([rows[name] for name in key], dropna=False).transform("max")]
        return np.asarray((rows["site"] == LAST_NORM) | rows.index.isin(largest.drop_duplicates(key).index))


Levels = tuple[int, ...]
"""A level of each column compared, by its number."""


Moving = list[tuple[str, tuple[str, ...]]]
"""Of each compared column that some move with: its name and theirs."""


class Contrast(NamedTuple):
    """Two levels to compare, and more columns for their rows.

    A side is the runs of one level, or those of a first minus those of a second: the cost of a backward.
    """

    more: dict[str, Any]
    a: tuple[Any, Sequence[Levels]]
    b: tuple[Any, Sequence[Levels]]

    @property
    def name(self) -> str:
        return " ".join([*map(str, self.more.values()), f"{word(self.a[0])} − {word(self.b[0])}"])


class Side(NamedTuple):
    """One level of a comparison: data (metric, site, cell, seed); which runs there are and which diverged (cell, seed).

    `size` is the largest magnitude among the stored numbers that the data were made of.
    """

    name: Any
    data: Array
    size: Array
    there: Booleans
    diverged: Booleans


class Pair(NamedTuple):
    """The two sides of a contrast, and in each cell the arms it is made of and the columns that move with a level."""

    contrast: Contrast
    a: Side
    b: Side
    arms: list[list[int]]
    moving: list[Moving]


def compare(
    study: Study,
    by: str,
    *,
    metrics: Sequence[str] = (),
    table: str = "layers",
    at: int | None = None,
    where: str | None = None,
    reference: str | None = None,
    how: Inference = STUDENT,
) -> Comparison:
    """The levels of one config column against each other, within each cell of all others that vary.

    All pairs of levels, the later in order minus the earlier; each against one level if `reference` names it, and for
    ln_backward against exact. The p values of one metric in one cell, of all norms and all pairs, are one family, adjusted by
    Holm's method; nothing is adjusted over metrics or cells.
    """
    chosen = metrics or (LAYER_METRICS if table == "layers" else RUN_METRICS)
    values = gather(study, [by], chosen, table=table, at=at, where=where)
    names = values.levels[0]
    contrasts = [Contrast({}, *((names[k], [(k,)]) for k in pair)) for pair in pairs_of(names, by, reference)]
    return compared_rows(values, contrasts, how)


def pairs_of(levels: Sequence[Any], by: str, reference: str | None) -> list[tuple[int, int]]:
    """Which levels to compare: all pairs, later minus earlier; or each minus the reference."""
    names = [word(level) for level in levels]
    if reference is None and by == "ln_backward" and EXACT in names:
        reference = EXACT
    if reference is None:
        return [(later, earlier) for earlier, later in combinations(range(len(names)), 2)]
    if reference not in names:
        raise ConfigError(f"no run chosen has {by}={reference}, only {listed(names)}")
    at = names.index(reference)
    return [(i, at) for i in range(len(names)) if i != at]


def _matched(values: Values, contrasts: Sequence[Contrast]) -> "tuple[list[Pair], pd.DataFrame]":
    """The sides of every contrast, cell by cell, and the cells.

    Each contrast is matched by its own runs alone. A cell is named by the columns in which its runs agree: those that
    move with a level are null in its name.
    """
    met = [values.met([*contrast.a[1], *contrast.b[1]]) for contrast in contrasts]
    names = values.settings[:, [values.others.index(str(name)) for name in values.cells]]  # (arm, column of cells)
    found: dict[tuple[int, ...], int] = {}  # the first of the cells that it is made of, by its name

    def key(contrast: Contrast, at: Sequence[int]) -> tuple[int, ...]:
        codes = names[_arms(values, contrast, at)]
        return tuple(np.where((codes == codes[0]).all(0), codes[0], -1).tolist())

    for contrast, meetings in zip(contrasts, met, strict=True):
        for at in meetings:
            found.setdefault(key(contrast, at), min(cell for cell in at if cell >= 0))
    order = sorted(found, key=lambda name: (found[name], name))
    cells = values.cells.iloc[[found[name] for name in order]].reset_index(drop=True)
    for column, codes in zip(cells, zip(*order, strict=True), strict=True):
        if -1 in codes:
            cells[column] = cells[column].where(np.array(codes) >= 0)
    pairs = []
    for contrast, meetings in zip(contrasts, met, strict=True):
        place = np.full((len(order), len(contrast.a[1]) + len(contrast.b[1])), -1)
        for meeting in meetings:
            place[order.index(key(contrast, meeting))] = meeting
        a, b = np.split(place, [len(contrast.a[1])], axis=1)
        arms = [_arms(values, contrast, cell) for cell in place.tolist()]
        moving = [_moving(values, contrast, cell) for cell in place.tolist()]
        pairs.append(Pair(contrast, _side(values, *contrast.a, a), _side(values, *contrast.b, b), arms, moving))
    return pairs, cells


def _side(values: Values, name: Any, corners: Sequence[Levels], at: Integers) -> Side:
    """The runs of these levels, each in its cell (cell of the comparison, level), −1 where it has none."""

    def taken(whole: Any, axis: int, which: int) -> Any:
        """Of one corner, its levels chosen: what stands at −1 is empty."""
        front = range(1 + len(corners[which]))
        part = np.moveaxis(whole, [axis + i for i in front], front)[(at[:, which], *corners[which])]
        gap = at[:, which].reshape(-1, *[1] * (part.ndim - 1)) < 0
        return np.moveaxis(np.where(gap, np.nan if whole.dtype.kind == "f" else False, part), 0, axis)

    each = range(len(corners))
    there = np.logical_and.reduce([taken(values.there, 0, i) for i in each])
    diverged = np.logical_or.reduce([taken(values.diverged, 0, i) for i in each])
    data = [taken(values.data, 2, i) for i in each]
    size = np.maximum.reduce([np.abs(part) for part in data])
    return Side(name, data[0] - data[1] if len(data) > 1 else data[0], size, there, there & diverged)


def _arms(values: Values, contrast: Contrast, at: Sequence[int]) -> list[int]:
    """The arms of a contrast's corners, left out where a corner has no cell."""
    corners = [*contrast.a[1], *contrast.b[1]]
    return [int(values.arm[cell, *levels]) for cell, levels in zip(at, corners, strict=True) if cell >= 0]


def _moving(values: Values, contrast: Contrast, at: Sequence[int]) -> Moving:
    """The columns that move with the level of each compared column, if all corners are there."""
    arms = _arms(values, contrast, at)
    if len(arms) < len(at):
        return []
    if len(arms) == 2:
        found = {values.by[-1]: values.moving(arms)}
    else:  # backward and exact of a, backward and exact of b
        a, exact_a, b, exact_b = arms
        along = {values.by[0]: [(a, exact_a), (b, exact_b)], values.by[-1]: [(a, b), (exact_a, exact_b)]}
        found = {
            by: tuple(dict.fromkeys(name for two in sides for name in values.moving(two)))
            for by, sides in along.items()
        }
    return [(by, names) for by, names in found.items() if names]


def compared_rows(values: Values, contrasts: Sequence[Contrast], how: Inference) -> Comparison:
    pairs, cells = _matched(values, contrasts)
    a, b = np.stack([pair.a.data for pair in pairs]), np.stack([pair.b.data for pair in pairs])
    size_a, size_b = np.stack([pair.a.size for pair in pairs]), np.stack([pair.b.size for pair in pairs])
    there_a, there_b = np.stack([pair.a.there for pair in pairs]), np.stack([pair.b.there for pair in pairs])
    diverged_a, diverged_b = (
        np.stack([pair.a.diverged for pair in pairs]),
        np.stack([pair.b.diverged for pair in pairs]),
    )
    # data is (pair, metric, site, cell, seed) from here on, what is known of the runs (pair, cell, seed)
    both: Booleans = np.asarray(there_a.any(-1) & there_b.any(-1))
    twins: Booleans = np.asarray((there_a & there_b).any(-1))
    as_pairs = twins[:, None, None, :, None]
    a, b = (np.where(as_pairs & np.isnan(a - b), np.nan, side) for side in (a, b))
    found = stats.paired(np.where(as_pairs, a - b, np.nan), how, np.fmax(size_a, size_b))
    if (both & ~twins).any():
        alone_a, alone_b = (np.where(as_pairs, np.nan, side) for side in (a, b))
        apart = stats.unpaired(alone_a, alone_b, how, (size_a, size_b))
        found = stats.either(as_pairs[..., 0], found, apart)
    by_pair = {
        "paired": twins,
        "missing": np.where(twins, (there_a ^ there_b).sum(-1), 0),
        "runs_a": there_a.sum(-1),
        "diverged_a": diverged_a.sum(-1),
        "runs_b": there_b.sum(-1),
        "diverged_b": diverged_b.sum(-1),
    }
    known = found.n > 0
    # a norm that these runs lack has no line; a comparison of which no norm has a number keeps them all, for its counts
    shown = both[:, None, None, :] & (known | ~known.any(2, keepdims=True))
    order = np.argwhere(shown.transpose(3, 1, 0, 2))  # by cell, metric, pair, site
    cell, metric, pair, site = order.T
    at = (pair, metric, site, cell)
    with warnings.catch_warnings(action="ignore"):  # the mean of nothing is NaN
        means = {"mean_a": np.nanmean(a[at], -1), "mean_b": np.nanmean(b[at], -1)}
    rows = row_key(values, cells, metric, site, cell).assign(
        **{name: [contrasts[i].more[name] for i in pair] for name in contrasts[0].more},
        a=[pairs[i].a.name for i in pair],
        b=[pairs[i].b.name for i in pair],
        **means,
        difference=found.estimate[at],
        low=found.low[at],
        high=found.high[at],
        p=found.p[at],
        p_adjusted=np.nan,
        family=0,
        effect=found.effect[at],
        agreement=found.agreement[at],
        n=found.n[at],
        **{name: part[pair, cell] for name, part in by_pair.items()},
        moving=[_names(pairs[i].moving[j]) for i, j in zip(pair, cell, strict=True)],
    )
    # every norm and pair of one metric in one cell
    for family in rows.groupby([_families(pairs, both)[pair, cell], metric]).indices.values():
        p = rows["p"].to_numpy()[family]
        rows.loc[family, "p_adjusted"] = stats.holm(p)
        rows.loc[family, "family"] = int((~np.isnan(p)).sum())
    notes = [
        *_how(values, rows, how),
        *confounded(
            [
                (pair.contrast.name, named(cells, number), pair.moving[number])
                for pair, compared in zip(pairs, both, strict=True)
                for number in np.flatnonzero(compared)
            ]
        ),
        *_lacking(values, cells, pairs, both, rows),
        *about(values),
    ]
    return Comparison(rows, values.by[-1], list(map(str, cells)), values.seeds, a[at], b[at], notes)


def _families(pairs: Sequence[Pair], both: Booleans) -> Integers:
    """(pair, cell): a number for each comparison, the same for those that share runs, be it through others.

    Within a cell all do, through the level that they have in common. Where a column moves with a level, comparisons of some
    of the cell's pairs have names of their own: they share its runs all the same.
    """
    first: dict[int, int] = {}  # of an arm: another one of its family, at the end itself

    def root(arm: int) -> int:
        while (before := first.setdefault(arm, arm)) != arm:
            arm = before
        return arm

    compared = np.argwhere(both).tolist()
    for pair, cell in compared:
        one, *others = pairs[pair].arms[cell]
        for other in others:
            first[root(other)] = root(one)
    found = np.full(both.shape, -1)
    for pair, cell in compared:
        found[pair, cell] = root(pairs[pair].arms[cell][0])
    return found


def _names(moving: Moving) -> str:
    """The columns that move, whatever with."""
    return ", ".join(dict.fromkeys(name for _, names in moving for name in names))


def row_key(values: Values, cells: "pd.DataFrame", metric: Integers, site: Integers, cell: Integers) -> "pd.DataFrame":
    key = cells.iloc[cell].reset_index(drop=True).assign(metric=np.array(values.metrics)[metric])
    return key if values.sites == [""] else key.assign(site=np.array(values.sites)[site])


def _how(values: Values, rows: "pd.DataFrame", how: Inference) -> list[str]:
    """What was computed."""
    found = []
    if not rows["paired"].all():
        found.append(f"unpaired (Welch) in {_of(~rows['paired'])}: no seed is at both levels")
    if rows["paired"].any():
        found.append(f"paired by seed, {interval_name(how)}")
    tested = rows[rows["p"].notna()]
    if len(tested):
        smallest, largest = tested["family"].min(), tested["family"].max()
        sizes = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
        what = "p value" if largest == 1 else "p values"
        of = "all norms, " * ("site" in rows) + "all backwards, " * (len(values.by) > 1) + "all pairs of levels"
        found.append(
            f"p adjusted by Holm's method over the {sizes} {what} of one metric in one cell ({of}); "
            "never over metrics or cells"
        )
    return found


def confounded(compared: Sequence[tuple[str, str, Moving]]) -> list[str]:
    """Which columns move with the level; and in which comparisons (by name and cell), unless in all."""
    places: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {}
    for name, cell, moving in compared:
        for by_columns in moving:
            places.setdefault(by_columns, []).append((name, cell))
    known = Counter(name for name, *_ in compared)
    found = []
    for (by, columns), where in places.items():
        change = "changes" if len(columns) == 1 else "change"
        said = f"{listed(columns)} {change} together with {by}, so their effects cannot be told apart"
        whole = [name for name, n in Counter(name for name, _ in where).items() if n == known[name]]
        parts = [" at ".join(filter(None, (name, cell))) for name, cell in where if name not in whole]
        found += [said] if len(where) == len(compared) else capped(said, [*whole, *parts])
    return found


def _lacking(
    values: Values, cells: "pd.DataFrame", pairs: Sequence[Pair], both: Booleans, rows: "pd.DataFrame"
) -> list[str]:
    """What there are too few of."""
    found = []
    few = rows["n"] < FEW
    if few.any():
        found.append(few_seeds(int(few.sum()), len(rows)))
    by = values.by[-1]
    single = {
        " ".join(
            [named(cells, cell), *map(str, pair.contrast.more.values()), f"has no {by}={word(absent.name)}"]
        ).strip()
        for number, pair in enumerate(pairs)
        for cell in np.flatnonzero(~both[number])
        for absent in (pair.a, pair.b)
        if not absent.there[cell].any() and (pair.a.there[cell].any() or pair.b.there[cell].any())
    }
    found += capped("not compared", sorted(single))
    missing = {
        f"{named(cells, cell)} {by}={word(side.name)} lacks seed {listed(values.seeds[lacks].tolist())}"
        for pair in pairs
        for side, other in ((pair.a, pair.b), (pair.b, pair.a))
        for cell in np.flatnonzero((other.there & ~side.there).any(-1) & side.there.any(-1))
        for lacks in [other.there[cell] & ~side.there[cell]]
    }
    return found + capped("missing pairs", sorted(line.strip() for line in missing))


def about(values: Values) -> list[str]:
    """Where, over what, and with which runs."""
    found = []
    if len(values.cells.columns):
        found.append(
            f"within each of {len(values.cells)} cells of {', '.join(map(str, values.cells))}, which also vary"
        )
    if n := int(values.diverged.sum()):
        lines = []
        for at in np.argwhere(values.diverged.any(-1)):
            levels = " ".join(
                f"{b}={word(known[i])}" for b, known, i in zip(values.by, values.levels, at[1:], strict=True)
            )
            counts = values.diverged[tuple(at)].sum(), values.there[tuple(at)].sum()
            lines.append(f"{named(values.cells, at[0])} {levels} {counts[0]} of {counts[1]}".strip())
        found += capped(f"{n} runs diverged, left out of every mean", lines)
    return found + values.doubts


def few_seeds(few: int, rows: int) -> str:
    return f"{few} of {rows} rows have fewer than {FEW} seeds: their intervals say next to nothing"


def interval_name(how: Inference) -> str:
    kind = {
        "t": "t interval",
        "signflip": "t interval and sign-flip p",
    }[how.method]
    return f"{100 * how.confidence:g}% {kind}"


def capped(what: str, lines: Sequence[str], most: int = 5) -> list[str]:
    if not lines:
        return []
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return [f"{what}: " + "; ".join(lines[:most]) + more]


def _of(mask: "pd.Series[bool]") -> str:
    return f"{int(mask.sum())} of {len(mask)} rows"
