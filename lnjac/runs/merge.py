"""Merge runs, sweeps and earlier merges into one set of typed tables.

Suspiciously: a file that is broken, foreign or of another schema is named and skipped, the same run found twice must
agree with itself, and what makes a comparison doubtful (mixed commits, missing seeds) is said. docs/merging.md has the rules.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lnjac.errors import ConfigError
from lnjac.escape import visible
from lnjac.runs import folder as runs
from lnjac.runs.pile import combine
from lnjac.runs.placing import finish, new_files
from lnjac.runs.read import (
    OWNER,
    Skip,
    Tables,
    Unfit,
    companion,
    layers_file,
    read_noted,
    report_file,
    search,
)
from lnjac.runs.reading import read_all
from lnjac.runs.warnings import warnings

if TYPE_CHECKING:
    import pandas as pd

RTOL = 1e-6
"""Relative difference up to which two measurements of the same run count as equal."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; runs are counted in `found` = `merged` + len(`skipped`) + `duplicates["runs"]`."""

    output: str
    sources: list[str]
    found: int
    merged: int
    skipped: list[Skip]
    duplicates: dict[str, int]
    rows: dict[str, int]
    warnings: list[str]

    def lines(self) -> list[str]:
        """The report for a reader; skipped ones are all named in `to_json` only, where there are very many."""
        rows = ", ".join(f"{n} rows of {name}" for name, n in self.rows.items())
        found = [f"{self.output}: {self.merged} of {self.found} runs found, {rows}"]
        if any(self.duplicates.values()):
            rows = ", ".join(f"{n} rows of {name}" for name, n in self.duplicates.items())
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
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    strict: bool = False,
    rtol: float = RTOL,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge run folders, sweep folders and earlier merges into `output` (X.parquet) and its companions.

    Writes X.parquet (layers), X.runs.parquet, X.curves.parquet, X.swaps.parquet and its like where a table in long form
    has rows, and X.merge.json (the report), in one step. What is there stays when ConfigError is raised: for
    no run found, none that can be merged, any skipped one if `strict`, or two runs that contradict each other.
    `progress(done, total)` is called as sources have been read.
    """
    output = Path(output)
    _check_output(output)
    found = search(map(Path, sources))
    if not found.sources:
        raise ConfigError(
            "\n".join(
                [
                    f"no runs in {', '.join(map(str, sources))}: name run folders, sweep folders or merged files",
                    *by_reason(found.skipped),
                ]
            )
        )
    for source in found.sources:
        if source.merged:
            finish(source.path)
    pile, unfit = read_all(found.sources, progress)
    skipped = [*found.skipped, *unfit]
    if skipped and (strict or not pile.sources):
        why = "strict: no run may be skipped" if strict else "none of the runs found can be merged"
        raise ConfigError("\n".join([why, *by_reason(skipped)]))
    tables, duplicates = combine(pile, rtol)
    doubts = warnings(tables["runs"], [declared.schemas["runs"] for declared in pile.declared.values()])
    report = MergeReport(
        output=str(output),
        sources=[str(path) for path in sources],
        found=len(pile.sources) + len(skipped),
        merged=tables["runs"].num_rows,
        skipped=skipped,
        duplicates=duplicates,
        rows={name: table.num_rows for name, table in tables.items()},
        warnings=[*found.notes, *doubts],
    )
    with new_files(output) as layers:
        _write(tables, report, layers)
    return report


def load(path: str | Path, columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """One merged table, or some of its columns, as a data frame, its checksums verified; NaN stands for null in numbers."""
    finish(layers_file(Path(path)))
    try:
        data, note = read_noted(Path(path), columns=columns)
    except Unfit as error:
        raise ConfigError(f"{path}: {error}") from None
    if not note.get("merged"):
        raise ConfigError(f"{path} is not a merged table: make one with `lnjac merge FOLDER -o all.parquet`")
    if missing := [name for name in columns or () if name not in data.column_names]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}")
    frame: pd.DataFrame = data.to_pandas()
    return frame


# Writing


def _check_output(output: Path) -> None:
    if output.suffix != ".parquet":
        raise ConfigError(f"the output {output} must end in .parquet: try {output.name}.parquet")
    if output.name in runs.FILES.values() or layers_file(output) != output:
        raise ConfigError(f"the output must not be called {output.name}, which means something else: try all.parquet")
    if output.is_dir():
        raise ConfigError(f"the output {output} is a folder: try {output / 'all.parquet'}")


def _write(tables: Tables, report: MergeReport, layers: Path) -> None:
    identity = tables["runs"].select([*OWNER, "started_at"]).to_pylist()
    note = {
        "merged": True,
        "merge_id": hashlib.sha256(json.dumps([identity, report.rows]).encode()).hexdigest()[:16],
        "rows": report.rows,
    }
    for name, table in tables.items():
        runs.write_table(companion(layers, name), table, {"table": name, **note})
    report_file(layers).write_text(report.to_json(), encoding="utf-8")
