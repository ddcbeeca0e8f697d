"""Pool the calls of one norm at one step: several rows become one, each column by the pooling that it declares."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lnjac.columns import MINIMUM, SUM, Column, evaluate
from lnjac.errors import ConfigError

NORM = ["run_id", "diag_id", "step", "site"]


def needed(metrics: Sequence[str], known: Mapping[str, Column]) -> list[str]:
    """Return the columns that `pooled` reads for these metrics, of those that are described."""
    reads = [name for metric in metrics if metric in known for name in known[metric].reads if name in known]
    return [*dict.fromkeys([*NORM, *metrics, *reads])]


def pooled(rows: pd.DataFrame, metrics: Sequence[str], known: Mapping[str, Column]) -> pd.DataFrame:
    """Return one row for each norm and step, with NORM and the metrics.

    Args:
        rows: Rows of `layers`, with the columns that are `needed`.
        metrics: Columns of them.
        known: The columns' descriptions. A column without one, or without a pooling (quantiles, spread, the residual), is
            missing where the rows of a norm differ in it.
    """
    keys = [rows[name] for name in NORM]
    groups = rows.groupby(NORM, sort=False)

    def together(name: str) -> Any:
        how = known[name].pool if name in known else ""
        if how == SUM:
            return groups[name].sum(min_count=1)
        if how == MINIMUM:
            return groups[name].min()
        return groups[name].first().where(groups[name].nunique() == 1)

    out = {}
    for metric in metrics:
        column = known.get(metric, Column(metric, "", "", ""))
        there = set(column.reads) <= set(rows)
        if column.formula and there:
            out[metric] = _evaluated(metric, column.formula, {name: together(name) for name in column.reads})
        elif column.weight and there:
            weight = pd.Series(
                _evaluated(metric, column.weight, {name: rows[name] for name in column.reads}), rows.index
            )
            above = (rows[metric] * weight).groupby(keys, sort=False).sum(min_count=1)
            out[metric] = above / weight.groupby(keys, sort=False).sum()
        else:
            out[metric] = together(metric)
    return pd.DataFrame(out, index=groups.size().index).reset_index()


def _evaluated(metric: str, formula: str, values: Mapping[str, Any]) -> Any:
    try:
        return evaluate(formula, values)
    except ValueError as error:
        raise ConfigError(f"the calls of a norm cannot be pooled by the description of {metric}: {error}") from None
