"""Merge runs, sweeps and earlier merges into one set of typed tables, and load one of them.

Suspiciously: a file that is broken or foreign is named and skipped, the same run found twice must agree with itself, and
what makes a comparison doubtful (mixed commits, missing seeds) is a warning. docs/merging.md has the rules.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from lnjac.errors import ConfigError
from lnjac.escape import visible
from lnjac.runs import folder as runs
from lnjac.runs.combine import Combined, Stacked, combine
from lnjac.runs.configs import CONFIGS
from lnjac.runs.merged import companion, finish, layers_file, replacing, report_file
from lnjac.runs.parallel import read_all
from lnjac.runs.read import Skip, Unfit, read_noted, search
from lnjac.runs.schema import OWNER, Known, describe, described

if TYPE_CHECKING:
    import pandas as pd

RTOL = 1e-6
"""Relative difference up to which two measurements of the same run count as equal."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; runs are counted in `found` = `merged` + len(`skipped`) + `duplicates["runs"]`.

    It stands for the merged table wherever a path does.
    """

    output: str
    sources: list[str]
    found: int
    merged: int
    skipped: list[Skip]
    duplicates: dict[str, int]
    rows: dict[str, int]
    warnings: list[str]

    def __fspath__(self) -> str:
        return self.output

    def lines(self) -> list[str]:
        """The report for a reader; skipped ones are all named in `to_json` only, where there are very many."""
        rows = ", ".join(f"{n} rows of {name}" for name, n in self.rows.items() if name != CONFIGS)
        found = [f"{self.output}: {self.merged} of {self.found} runs found, {rows}"]
        if any(self.duplicates.values()):
            rows = ", ".join(f"{n} rows of {name}" for name, n in self.duplicates.items() if name != CONFIGS)
            found.append(f"duplicates: {rows} were there already with equal science; the earlier run is kept")
        found += [f"skipped {line}" for line in by_reason(self.skipped)]
        return list(map(visible, found + [f"warning: {text}" for text in self.warnings]))

    def to_json(self) -> str:
        plain = dataclasses.asdict(self) | {"skipped": [skip._asdict() for skip in self.skipped]}
        return json.dumps(plain, indent=1) + "\n"


def by_reason(skipped: Iterable[Skip], most: int = 20) -> list[str]:
    """A line for each path and its reason, but at most so many for one reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in skipped:
        paths.setdefault(reason, []).append(path)
    lines = []
    for reason, same in paths.items():
        lines += [f"{path}: {reason}" for path in same[:most]]
        if len(same) > most:
            lines.append(f"and {len(same) - most} more: {reason}")
    return lines


def merge(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    strict: bool = False,
    rtol: float = RTOL,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge run folders, sweep folders and earlier merges into X.parquet and its companions, in one step.

    Args:
        sources: What to merge, in any mix.
        output: X.parquet, for the rows of layers. Beside it are written X.runs.parquet, X.curves.parquet, X.configs.parquet,
            X.NAME.parquet for each table in long form that has rows, and X.merge.json, the report.
        strict: Whether no run may be skipped.
        rtol: The relative difference up to which two measurements of a run are equal.
        progress: Called as progress(done, total) while sources are read.

    Returns:
        The report.

    Raises:
        ConfigError: No run is found, none can be merged, or one cannot if `strict`; or two runs contradict each other.
            Whatever is at `output` then stays.
    """
    paths = [Path(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    output = Path(output)
    _check_output(output)
    found = search(paths)
    if not found.sources:
        raise ConfigError(
            "\n".join(
                [
                    f"no runs in {', '.join(map(str, paths))}: name run folders, sweep folders or merged files",
                    *by_reason(found.skipped),
                ]
            )
        )
    stacked, unfit = read_all(found.sources, progress)
    skipped = [*found.skipped, *unfit]
    if skipped and (strict or not stacked.sources):
        why = "strict: no run may be skipped" if strict else "none of the runs found can be merged"
        raise ConfigError("\n".join([why, *by_reason(skipped)]))
    _require_one_trainer(stacked)
    combined = combine(stacked, rtol)
    schemas = [kind.schemas["runs"] for kind in stacked.kinds.values()]
    report = MergeReport(
        output=str(output),
        sources=[str(path) for path in paths],
        found=len(stacked.sources) + len(skipped),
        merged=combined.tables["runs"].num_rows,
        skipped=skipped,
        duplicates=combined.duplicates,
        rows={name: table.num_rows for name, table in combined.tables.items()},
        warnings=[*found.notes, *warnings(combined.tables["runs"], combined.known["runs"], schemas)],
    )
    with replacing(output) as layers:
        _write(combined, report, layers)
    return report


def load(path: str | Path, columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """Load one merged table as a data frame, its checksums verified.

    Args:
        path: X.parquet, X.runs.parquet or another table of a merge; or a folder with an all.parquet.
        columns: The columns to read, if not all.

    Returns:
        The rows; NaN stands for null in numbers. The columns' descriptions are in its attrs, so that `lnjac.compare` and
        its like take the frame, or a part of it, in place of the file.

    Raises:
        ConfigError: It is no merged table, it cannot be read, or it lacks one of the columns.
    """
    from lnjac.runs.frames import attach

    path = Path(path) / "all.parquet" if Path(path).is_dir() else Path(path)
    finish(layers_file(path))
    try:
        data, note = read_noted(path, columns=columns)
    except Unfit as error:
        raise ConfigError(f"{path}: {error}") from None
    if not note.get("merged"):
        raise ConfigError(f"{path} is not a merged table: make one with `lnjac merge FOLDER -o all.parquet`")
    if missing := [name for name in columns or () if name not in data.column_names]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}")
    return attach(data.to_pandas(), note["table"], described(note["table"], note))


def _require_one_trainer(found: Stacked) -> None:
    """Raise ConfigError if runs of lnjac's trainer, which have a version of its numerics, are among those of other loops."""
    runs = found.tables["runs"]
    if "numerics_version" not in runs.column_names:
        return
    ours = runs["numerics_version"].is_valid().to_pylist()
    if any(ours) and not all(ours):
        one, other = (found.sources[found.numbers["runs"][ours.index(kind)]].path for kind in (True, False))
        raise ConfigError(
            f"{sum(ours)} runs are of lnjac's own trainer, such as {one}, and {len(ours) - sum(ours)} of another loop, "
            f"such as {other}: their configs have nothing in common to compare by; merge them apart"
        )


# Writing


def _check_output(output: Path) -> None:
    if output.suffix != ".parquet":
        raise ConfigError(f"the output {output} must end in .parquet: try {output.name}.parquet")
    if output.name in runs.FILES.values() or layers_file(output) != output:
        raise ConfigError(f"the output must not be called {output.name}, which means something else: try all.parquet")
    if output.is_dir():
        raise ConfigError(f"the output {output} is a folder: try {output / 'all.parquet'}")


def _write(combined: Combined, report: MergeReport, layers: Path) -> None:
    identity = combined.tables["runs"].select([*OWNER, "started_at"]).to_pylist()
    note = {
        "merged": True,
        "merge_id": hashlib.sha256(json.dumps([identity, report.rows]).encode()).hexdigest()[:16],
        "rows": report.rows,
    }
    for name, table in combined.tables.items():
        columns = describe(combined.known[name].values())
        runs.write_table(companion(layers, name), table, {"table": name, **note, "columns": columns})
    report_file(layers).write_text(report.to_json(), encoding="utf-8")


# Warnings


def warnings(table: pa.Table, known: Known, schemas: Sequence[pa.Schema]) -> list[str]:
    """Return what makes a comparison across these runs doubtful.

    Args:
        table: The merged table of runs.
        known: Its described columns; the others are the config's.
        schemas: Those of the sources' tables of runs.
    """
    frame = table.to_pandas()
    found = []
    for column, what in (("commit", "commits"), ("numerics_version", "numerics versions")):
        counts = Counter(str(value) for value in table[column].to_pylist()) if column in frame else ()
        if len(counts) > 1:
            found.append(f"mixed {what}: " + ", ".join(f"{value} ({n} runs)" for value, n in sorted(counts.items())))
    if "dirty" in frame and (dirty := table["dirty"].to_pylist().count(True)):
        found.append(f"{dirty} runs were made by code with uncommitted changes")
    if {"data", "data_sha256"} <= {*frame}:
        for data, shas in frame.groupby("data")["data_sha256"].unique().items():
            if len(shas) > 1:
                found.append(f"data={data} is not one corpus, its data_sha256 are {', '.join(sorted(map(str, shas)))}")
    names = [set(schema.names) for schema in schemas]
    partial = [name for name in table.column_names if not all(name in each for each in names)]
    if partial := [name for name in partial if not _is_of_members(frame, name)]:
        found.append(f"mixed schema: only some sources have {', '.join(partial)}; null in the others")
    return found + _missing_seeds(frame, known)


def _is_of_members(frame: "pd.DataFrame", name: str) -> bool:
    """Whether a column is a parameter that some members of its group have and others lack, as `attn_mode.bias` is."""
    group = name.partition(".")[0]
    if group == name or group not in frame:
        return False
    there = frame[name].notna()
    return set(frame[group][there]).isdisjoint(frame[group][~there])


def _missing_seeds(frame: "pd.DataFrame", known: Known) -> list[str]:
    """One line for each config that lacks a seed which another config has."""
    names: list[str] = []  # the fewest columns that tell the configs apart; group names, which have no dot, first
    n_groups = 1
    swept = [str(column) for column in frame if column not in known and column != "seed"]
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
