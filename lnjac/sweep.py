"""Merge runs, sweeps and earlier merges into one set of typed tables.

Suspiciously: a file that is broken, foreign or of another schema is named and skipped, the same run found twice must
agree with itself, and what makes a comparison doubtful (mixed commits, missing seeds) is said. docs/merging.md has the rules.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lnjac import compaction, runs
from lnjac.compaction import Index, Memory
from lnjac.config import ConfigError
from lnjac.doubts import warnings
from lnjac.escape import visible
from lnjac.pile import Kind, Pile, combine
from lnjac.sources import (
    OWNER,
    Source,
    Tables,
    Unfit,
    companion,
    companions,
    discover,
    layers_file,
    read,
    read_noted,
    report_file,
    search,
)
from lnjac.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd

RTOL = 1e-6
"""Relative difference up to which two measurements of the same run count as equal."""

__all__ = ["MergeReport", "Skip", "Source", "Unfit", "companions", "discover", "layers_file", "load", "merge", "read"]


class Skip(NamedTuple):
    """A run, or an earlier merge, that was found and not merged."""

    path: str
    reason: str


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

    @classmethod
    def from_json(cls, text: str) -> "MergeReport":
        plain = json.loads(text)
        return cls(**plain | {"skipped": [Skip(**skip) for skip in plain["skipped"]]})


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
    sources: Sequence[Path],
    output: Path,
    *,
    strict: bool = False,
    rtol: float = RTOL,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge run folders, sweep folders and earlier merges into `output` (X.parquet) and its companions.

    Writes X.parquet (layers), X.runs.parquet, X.curves.parquet, X.swaps.parquet and its like where a table in long form
    has rows, and X.merge.json (the report). Nothing is written, and what is there stays, when ConfigError is raised: for
    no run found, none that can be merged, any skipped one if `strict`, or two runs that contradict each other.
    `progress(done, total)` is called as sources have been read.
    """
    _check_output(output)
    found, merges = search(sources)
    if not found:
        raise ConfigError(f"no runs in {', '.join(map(str, sources))}: name run folders, sweep folders or merged files")
    proofs = {source: compaction.proof(source) for source in found}
    request = _request(sources, output, strict, rtol, proofs)
    known = compaction.load([output, *merges])
    if before := _unchanged(request, output, known) or _copied(request, sources, output, list(proofs.values()), known):
        if progress:
            progress(len(found), len(found))
        return before
    pile, skipped = _read_all(found, compaction.recall(proofs, known), progress)
    if skipped and (strict or not pile.sources):
        why = "strict: no run may be skipped" if strict else "none of the runs found can be merged"
        raise ConfigError("\n".join([why, *by_reason(skipped)]))
    combined = combine(pile, rtol)
    tables = combined.tables
    report = MergeReport(
        output=str(output),
        sources=[str(path) for path in sources],
        found=len(pile.sources) + len(skipped),
        merged=tables["runs"].num_rows,
        skipped=skipped,
        duplicates=combined.duplicates,
        rows={name: table.num_rows for name, table in tables.items()},
        warnings=warnings(tables["runs"], [kind.schemas["runs"] for kind in pile.declared.values()]),
    )
    index = Index(request, "", {}, *compaction.remember(proofs, pile, combined))
    _write(output, report, index, lambda ready: _write_tables(tables, report, ready))
    return report


def load(path: Path, columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """One merged table, or some of its columns, as a data frame, its checksums verified; NaN stands for null in numbers."""
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


# Reading


def _request(sources: Sequence[Path], output: Path, strict: bool, rtol: float, proofs: Mapping[Source, str]) -> str:
    """What is asked of a merge, in short: the same answer is there already if the same was asked before."""
    asked = [*map(str, sources), str(output), strict, rtol]
    asked += [(str(source.path), proof) for source, proof in proofs.items()]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _unchanged(request: str, output: Path, known: Mapping[Path, Index]) -> MergeReport | None:
    """The report of the merge that is there, if it answers the same request and its files are as they were written."""
    index = known.get(output)
    if index is None or index.request != request or not index.intact(output):
        return None
    return MergeReport.from_json(report_file(output).read_text(encoding="utf-8"))


def _copied(
    request: str, sources: Sequence[Path], output: Path, proofs: Sequence[str], known: Mapping[Path, Index]
) -> MergeReport | None:
    """The report of another merge of just these sources, whose files are those that this one would write, now copied."""
    for layers, index in known.items():
        if not index.is_of(proofs) or (said := index.report_of(layers)) is None:
            continue
        report = MergeReport.from_json(said)
        if report.found > len(proofs):  # it dropped some, of which the index knows nothing
            continue
        report = dataclasses.replace(report, output=str(output), sources=[str(path) for path in sources])
        try:
            _write(output, report, dataclasses.replace(index, request=request), partial(index.copy, layers))
        except compaction.Altered:
            continue
        return report
    return None


def _read_all(
    found: Sequence[Source], memories: Sequence[Memory], progress: Callable[[int, int], None] | None
) -> tuple[Pile, list[Skip]]:
    """What the memories have not got is read; columns come in the order of `found` either way."""
    pile, skipped = Pile(), []
    known = {
        source: schemas for memory in memories for source, schemas in zip(memory.sources, memory.schemas, strict=True)
    }
    kinds: dict[int, Kind] = {}
    for done, source in enumerate(found, 1):  # no threads: small files are read in Python's time, where these only wait
        if source in known:
            if id(schemas := known[source]) not in kinds:
                kinds[id(schemas)] = pile.declare(source, schemas)
        elif isinstance(data := _try_read(source), str):
            skipped.append(Skip(str(source.path), data))
        else:
            kind = pile.declare(source, {name: table.schema for name, table in data.items()})
            n_runs = data["runs"].num_rows
            pile.add(data, [source] * n_runs, [kind] * n_runs)
        if progress:
            progress(done, len(found))
    for memory in memories:
        of_runs = [kinds[id(schemas)] for schemas in memory.schemas]
        pile.add(memory.tables, memory.sources, of_runs, below=True)  # newer runs mostly follow: nothing to sort
    return pile, skipped


def _try_read(source: Source) -> Tables | str:
    """The source's tables, or the reason why it has none to merge."""
    try:
        return read(source)
    except Unfit as error:
        return str(error)


# Writing


def _check_output(output: Path) -> None:
    if output.suffix != ".parquet":
        raise ConfigError(f"the output {output} must end in .parquet: try {output.name}.parquet")
    if output.name in runs.FILES.values() or layers_file(output) != output:
        raise ConfigError(f"the output must not be called {output.name}, which means something else: try all.parquet")
    if output.is_dir():
        raise ConfigError(f"the output {output} is a folder: try {output / 'all.parquet'}")


def _write(output: Path, report: MergeReport, index: Index, fill: Callable[[Path], dict[str, str]]) -> None:
    """Complete all files in a hidden folder beside the output, then move them to their places, the layers last.

    `fill` puts the tables there and returns their SHA-256; one that an earlier merge of this name had, and this one has
    not, is removed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as folder:
        ready = Path(folder) / output.name
        files = fill(ready)
        report_file(ready).write_text(report.to_json(), encoding="utf-8")
        dataclasses.replace(index, report=runs.file_sha256(report_file(ready)), files=files).write(ready)
        for name in TABLES.keys() - files.keys():
            companion(output, name).unlink(missing_ok=True)
        for path in sorted(Path(folder).iterdir(), key=lambda path: path == ready):
            path.replace(output.parent / path.name)


def _write_tables(tables: Tables, report: MergeReport, layers: Path) -> dict[str, str]:
    identity = tables["runs"].select([*OWNER, "started_at"]).to_pylist()
    note = {
        "merged": True,
        "merge_id": hashlib.sha256(json.dumps([identity, report.rows]).encode()).hexdigest()[:16],
        "rows": report.rows,
    }
    for name, table in tables.items():
        runs.write_table(companion(layers, name), table, {"table": name, **note})
    return {name: runs.file_sha256(companion(layers, name)) for name in tables}
