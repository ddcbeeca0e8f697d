"""Pair runs by seed: find the cells in which the levels of a contrast meet, and the runs of each comparison there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from lnjac.comparing.experiment import Measurements, numbered, telling_apart
from lnjac.text import word

CORNERS = ("a", "b", "exact_a", "exact_b")
"""The arms of a comparison. In a difference of costs the exact arms are subtracted from the others."""


class Contrast(NamedTuple):
    """Two levels to compare.

    `corners` are the levels of the arms that are needed, in the order of CORNERS: for each arm, the number of its level of
    each compared column. `label` holds further columns for the rows.
    """

    a: Any
    b: Any
    corners: list[tuple[int, ...]]
    label: dict[str, Any]

    @property
    def name(self) -> str:
        return " ".join([*map(str, self.label.values()), f"{word(self.a)} − {word(self.b)}"])


@dataclass(frozen=True)
class Pairing:
    """Comparisons, each of one contrast in one cell, and their runs.

    Attributes:
        corners: The corners that the contrasts have, of CORNERS.
        table: A row for each comparison: `contrast` and `cell` (numbers), the arm at each corner (NaN where there is none),
            `runs_a`, `diverged_a`, `runs_b` and `diverged_b` (how many), `paired` (whether a seed has both sides), `missing`
            (how many seeds then lack one).
        cells: A row for each comparison: the values of its cell, null in the columns that differ between its arms.
        runs: A row for each run of each comparison: `comparison`, `corner`, `run`, `seed`.
        there: A row for each comparison and seed: whether sides `a` and `b` have the runs that they need.
    """

    corners: list[str]
    table: pd.DataFrame
    cells: pd.DataFrame
    runs: pd.DataFrame
    there: pd.DataFrame


def corners_of(side: str, corners: Sequence[str]) -> list[str]:
    """Return the corners of side `a` or `b`: its arm, and the exact arm that is subtracted, if any."""
    return [corner for corner in corners if corner.endswith(side)]


def pair(found: Measurements, contrasts: Sequence[Contrast]) -> Pairing:
    """Return the comparisons of contrasts, in the order of contrasts and cells, and pair the runs of each by seed."""
    corners = list(CORNERS[: len(contrasts[0].corners)])
    met, cells = _in_cells(found, _met(found, contrasts, corners), corners)
    runs = met.reset_index().melt("comparison", corners, "corner", "arm").merge(found.runs, on="arm")
    twins = runs.pivot(index=["comparison", "seed"], columns="corner", values="diverged").reindex(columns=corners)
    seeds = pd.DataFrame(index=twins.index)
    for side in "ab":
        own = twins[corners_of(side, corners)]  # NaN where there is no run
        seeds[f"runs_{side}"] = own.notna().all(axis=1)
        seeds[f"diverged_{side}"] = seeds[f"runs_{side}"] & own.eq(True).any(axis=1)
    there = seeds[["runs_a", "runs_b"]].set_axis(["a", "b"], axis=1)
    counts = seeds.assign(paired=there.all(axis=1), missing=there["a"] ^ there["b"]).groupby("comparison").sum()
    counts["paired"] = counts["paired"] > 0
    counts["missing"] = counts["missing"].where(counts["paired"], 0)
    return Pairing(corners, met.join(counts), cells, runs, there)


def _met(found: Measurements, contrasts: Sequence[Contrast], corners: list[str]) -> pd.DataFrame:
    """Return the arms of each contrast that meet: `contrast`, and a column for each corner, NaN where there is no such arm.

    Each contrast is judged by its own arms alone: what varies among arms of other levels keeps none of these apart.
    """
    levels = [
        (number, corner, *level)
        for number, contrast in enumerate(contrasts)
        for corner, level in zip(corners, contrast.corners, strict=True)
    ]
    wanted = pd.DataFrame(levels, columns=["contrast", "corner", *found.by])
    parts = []
    for _, part in wanted.merge(found.arms.rename_axis("arm").reset_index(), on=found.by).groupby("contrast"):
        settings = found.settings.loc[part["arm"]].set_axis(part.index)
        parts.append(part.assign(at=numbered(settings[telling_apart(part["corner"], settings)])))
    met = pd.concat(parts).pivot(index=["contrast", "at"], columns="corner", values="arm")
    return met.reindex(columns=corners).reset_index("contrast").reset_index(drop=True)


def _in_cells(found: Measurements, met: pd.DataFrame, corners: Sequence[str]) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Return the comparisons in order, with the number of their cell; and the values of each one's cell."""
    settings: list[Any] = [found.settings.reindex(met[corner]).set_axis(met.index) for corner in corners]
    lowest, highest = reduce(np.fmin, settings), reduce(np.fmax, settings)  # of the arms that there are
    columns = list(map(str, found.cells))
    same = (lowest == highest)[columns]
    first = met[corners].apply(lambda arm: arm.map(found.arms["cell"])).min(axis=1)
    cells = found.cells.loc[first].set_axis(met.index).where(same)
    names = lowest[columns].where(same, -1)
    in_order = names.assign(first=first).sort_values(["first", *columns])[columns]
    met = met.assign(cell=numbered(in_order)).sort_values(["contrast", "cell"])
    return met.reset_index(drop=True).rename_axis("comparison"), cells.loc[met.index].reset_index(drop=True)


def families(arms: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Return a number for each comparison, equal for those that share an arm, be it through others.

    Within a cell all do. Where a column moves with the level, comparisons of one cell have names of their own, and are a
    family all the same.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    arm = len(arms) + arms.to_numpy(int)
    number = np.broadcast_to(np.arange(len(arms))[:, None], arm.shape)
    size = arm.max(initial=0) + 1
    edges = coo_array((np.ones(arm.size), (number.ravel(), arm.ravel())), shape=(size, size))
    return np.asarray(connected_components(edges, directed=False)[1][: len(arms)])
