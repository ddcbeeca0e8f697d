"""What makes a comparison across merged runs doubtful: mixed commits, corpora and columns, missing seeds."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa

from lnjac.runs.schema import TABLES

if TYPE_CHECKING:
    import pandas as pd


def warnings(table: pa.Table, schemas: Iterable[pa.Schema]) -> list[str]:
    """What makes a comparison across these runs doubtful; `table` is the merged table of runs, `schemas` its sources'."""
    frame = table.to_pandas()
    found = []
    for column, what in (("commit", "commits"), ("numerics_version", "numerics versions")):
        counts = Counter(str(value) for value in table[column].to_pylist())
        if len(counts) > 1:
            found.append(f"mixed {what}: " + ", ".join(f"{value} ({n} runs)" for value, n in sorted(counts.items())))
    if dirty := table["dirty"].to_pylist().count(True):
        found.append(f"{dirty} runs were made by code with uncommitted changes")
    if "data" in frame:
        for data, shas in frame.groupby("data")["data_sha256"].unique().items():
            if len(shas) > 1:
                found.append(f"data={data} is not one corpus, its data_sha256 are {', '.join(sorted(map(str, shas)))}")
    names = [set(schema.names) for schema in schemas]
    partial = [name for name in table.column_names if not all(name in known for known in names)]
    if partial := [name for name in partial if not _is_of_members(frame, name)]:
        found.append(f"mixed schema: only some sources have {', '.join(partial)}; null in the others")
    return found + _missing_seeds(frame)


def _is_of_members(frame: "pd.DataFrame", name: str) -> bool:
    """Whether a column is a parameter that some members of its group have and others lack, as `attn_mode.bias` is."""
    group = name.partition(".")[0]
    if group == name or group not in frame:
        return False
    there = frame[name].notna()
    return set(frame[group][there]).isdisjoint(frame[group][~there])


def _missing_seeds(frame: "pd.DataFrame") -> list[str]:
    """One line for each config that lacks a seed which another config has."""
    declared = {column.name for column in TABLES["runs"]}
    names: list[str] = []  # the fewest columns that tell the configs apart; group names, which have no dot, first
    n_groups = 1
    swept = [str(column) for column in frame if column not in declared and column != "seed"]
    swept = [column for column in swept if frame[column].nunique(dropna=False) > 1]  # a group-by of each is dear
    for column in sorted(swept, key=lambda column: "." in column):
        if (n := frame.groupby([*names, column], dropna=False).ngroups) > n_groups:
            names, n_groups = [*names, column], n
    if not names or "seed" not in frame or frame["seed"].isna().any():
        return []
    every, found = set(frame["seed"]), []
    for values, group in frame.groupby(names, dropna=False):
        if missing := sorted(every - set(group["seed"])):
            shown = ("null" if value != value else value for value in values)  # only NaN differs from itself
            config = " ".join(map("{}={}".format, names, shown))
            found.append(f"missing seeds: {config} lacks {', '.join(map(str, missing))}")
    return found
