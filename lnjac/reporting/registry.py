"""The registry of charts: a chart is a function of a view, with a name, a title and the columns that it needs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from lnjac.errors import ConfigError
from lnjac.reporting import marks
from lnjac.reporting.view import View


class Drawing(NamedTuple):
    """A chart with its caption, its numbers and notes.

    `table` holds the numbers, of which a page shows the first of those that are chosen; `seeds` those of every seed. The
    values in `choices` are what a reader may choose among, by the parameter of their name.
    """

    picture: marks.Picture
    caption: str
    table: pd.DataFrame
    notes: Sequence[str] = ()
    choices: Mapping[str, Sequence[str]] = {}
    seeds: pd.DataFrame | None = None


class Need(NamedTuple):
    """Columns of a table of which a chart needs one, with at least so many different values.

    `level` is, of runs, the level of the compared column. `otherwise` names what is lacking and the command that gives it.
    """

    table: str
    columns: Sequence[str]
    least: int
    otherwise: str

    def met(self, view: View) -> bool:
        """Return whether the view has such a column."""
        held = list(view.runs) if self.table == "runs" else view.merged.columns(self.table)
        known = [name for name in self.columns if name in held]
        frame = view.runs if self.table == "runs" else view.merged.frame(self.table, known)
        return any(frame[name].nunique() >= self.least for name in known)

    def lacking(self, view: View) -> str:
        """Return what is lacking; the command that gives it is one of lnjac's own trainer."""
        held = list(view.runs) if self.table == "runs" else view.merged.columns(self.table)
        if view.ours:
            return self.otherwise
        there = {*self.columns} & {*held}
        return self.otherwise.partition(": ")[0] if there else f"these runs have no column {' or '.join(self.columns)}"


class Chart(NamedTuple):
    """A kind of chart that merged tables may have.

    `title` heads the section of a page, which charts of one title share; `summary` tells one line of what is drawn.
    """

    name: str
    title: str
    summary: str
    needs: Sequence[Need]
    function: Callable[..., Drawing]

    def draw(self, view: View, metric: str | None = None) -> Drawing:
        """Draw one metric, or all that belong together, among which a reader may choose.

        Raises:
            ConfigError: If the view has not all that the chart needs.
        """
        for need in self.needs:
            if not need.met(view):
                raise ConfigError(need.lacking(view))
        return self.function(view, metric)

    def lacking(self, view: View) -> str | None:
        """Return the reason for which the chart cannot be drawn; None if it can."""
        try:
            self.draw(view)
        except ConfigError as error:
            return str(error)
        return None


CHARTS: dict[str, Chart] = {}
"""Every chart by its name, in the order of a page."""

Function = Callable[..., Drawing]


def chart(name: str, title: str, *, needs: Sequence[Need] = (), **options: Any) -> Callable[[Function], Function]:
    """Register a function of a view and a metric, or None, as a chart; further options are passed to it."""

    def register(function: Function) -> Function:
        summary = (function.__doc__ or "").partition("\n")[0]
        CHARTS[name] = Chart(name, title, summary, needs, partial(function, **options))
        return function

    return register
