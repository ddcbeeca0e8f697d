"""Write the notes under a table: what a reader must know of the runs behind it."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from lnjac.comparing.experiment import Measurements, words
from lnjac.text import listed, word

FEW = 3
"""Seeds below which an interval says next to nothing."""

Moving = list[tuple[str, list[str]]]
"""For each compared column with which others move: its name and theirs."""


def capped(start: str, parts: Sequence[str], most: int = 5) -> list[str]:
    """Return one note with the first of its parts and how many more there are; none where there are no parts."""
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return [f"{start}: " + "; ".join(parts[:most]) + more] if parts else []


def few_seeds(n: "pd.Series[int]") -> list[str]:
    """Return a note if rows have too few seeds, given the number of seeds in each row."""
    few = int((n < FEW).sum())
    return [f"{few} of {len(n)} rows have fewer than {FEW} seeds: their intervals say next to nothing"] if few else []


def confounded(compared: Sequence[tuple[str, str, Moving]]) -> list[str]:
    """Return a note on each set of columns that move with a level, given each comparison's name, cell and moving columns.

    The note names the comparisons in which they move, unless they do in all.
    """
    places: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {}
    for name, cell, moving in compared:
        for by, names in moving:
            places.setdefault((by, tuple(names)), []).append((name, cell))
    known = Counter(name for name, *_ in compared)
    notes = []
    for (by, columns), where in places.items():
        change = "changes" if len(columns) == 1 else "change"
        start = f"{listed(columns)} {change} together with {by}, so their effects cannot be told apart"
        whole = [name for name, n in Counter(name for name, _ in where).items() if n == known[name]]
        parts = [" at ".join(filter(None, (name, cell))) for name, cell in where if name not in whole]
        notes += [start] if len(where) == len(compared) else capped(start, [*whole, *parts])
    return notes


def about(found: Measurements) -> list[str]:
    """Return notes on the cells, on the runs that diverged, and on what was left out."""
    notes = []
    if len(found.cells.columns):
        names = ", ".join(map(str, found.cells))
        notes.append(f"within each of {len(found.cells)} cells of {names}, which also vary")
    diverged = found.runs.groupby("arm")["diverged"].agg(["sum", "size"])
    parts, arms = [], found.arms.to_dict("index")
    for arm, (n, of) in diverged[diverged["sum"] > 0].iterrows():
        place = arms[arm]
        levels = " ".join(f"{name}={word(found.levels[name][place[name]])}" for name in found.by)
        parts.append(f"{words(found.cells, place['cell'])} {levels} {n} of {of}".strip())
    notes += capped(f"{diverged['sum'].sum()} runs diverged, left out of every mean", parts)
    return notes + found.notes
