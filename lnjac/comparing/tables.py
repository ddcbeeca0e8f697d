"""Open the merged tables that are compared, or merge runs and sweeps into temporary ones."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lnjac.columns import KEY
from lnjac.comparing.filter import require_column
from lnjac.errors import ConfigError
from lnjac.progress import bar
from lnjac.runs import folder as runs
from lnjac.runs.frames import contents, runs_of
from lnjac.runs.merge import merge
from lnjac.runs.merged import companion, companions, report_file
from lnjac.runs.read import search
from lnjac.runs.schema import FROZEN, SCHEMA_VERSION, Known, describe, described, with_role


@dataclass(frozen=True)
class Choices:
    """Values that were chosen for each arm on some seeds (`lnjac.comparing.tune`).

    Attributes:
        keys: The tuned columns.
        levels: The columns that tell arms apart.
        tuning: The seeds that chose.
        compared: The other seeds.
        rows: A row for each arm: `levels`, the chosen value of each of `keys`, `val_loss_nats` (its mean over the tuning
            seeds), `tried` (how many values the arm was run at), `edge` (which keys are at the lowest or highest of those).
    """

    keys: list[str]
    levels: list[str]
    tuning: list[Any]
    compared: list[Any]
    rows: pd.DataFrame


@dataclass(frozen=True)
class MergedTables:
    """The tables of one merge, which are read when they are needed.

    Attributes:
        path: The file of the layers; the other tables are beside it.
        report: The report of the merge; empty if its file is lost.
        warnings: The warnings of the merge, of which a reader of any comparison must know.
    """

    path: Path
    report: Mapping[str, Any]
    warnings: list[str]
    temporary: Any = field(default=None, repr=False)
    """The temporary folder of the tables, which is deleted with this object."""
    choices: Choices | None = field(default=None, repr=False)
    """What was tuned, if these are the runs at chosen values."""

    def columns(self, table: str) -> list[str]:
        """Return the names of a table's columns."""
        return list(pq.read_schema(self._file(table)).names)

    def described(self, table: str) -> Known:
        """Return the descriptions of the table's columns, of those that have one."""
        known, held = described(table, runs.read_metadata(self._file(table))), set(self.columns(table))
        return {name: known[name] for name in known if name in held}

    def units(self, table: str, metrics: Sequence[str]) -> dict[str, str]:
        """Return the unit of each of these columns; an empty text of one without a description."""
        known = self.described(table)
        return {name: known[name].unit if name in known else "" for name in metrics}

    def frame(self, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return a table, or some of its columns, with NaN for null in columns of numbers.

        Raises:
            ConfigError: The table's file is missing.
        """
        found: pd.DataFrame = runs.read_table(self._file(table), columns).to_pandas()
        return found

    def require_metrics(self, table: str, metrics: Sequence[str]) -> None:
        """Raise ConfigError if a metric is no column of numbers in a table, with the nearest column that is one."""
        schema = pq.read_schema(self._file(table))
        numbers = [
            field.name for field in schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        ]
        other = "runs" if table == "layers" else "layers"
        others = self.columns(other) if companion(self.path, other).exists() else []
        known = self.described(table)
        shared = {*with_role(KEY, known), *others}  # the config
        measured = sorted((name for name in numbers if name not in shared), key=lambda name: name not in known)
        for name in metrics:
            if name in schema.names and name not in numbers:
                raise ConfigError(f"--metric {name} holds no numbers: choose a column of numbers")
            if name in others and name not in schema.names:
                raise ConfigError(
                    f"--metric {name} is a column of {other}, and not of {table}, which are compared here: "
                    "compare and scaling choose the table by --runs or --layers"
                )
            if name not in schema.names and table == "runs" and LAYERS_ALONE in self.warnings:
                raise ConfigError(
                    f"{name} is a column of runs, but only layers were given: give [layers, runs] of lnjac.load"
                )
            if name not in schema.names:
                require_column(name, measured, "no column for --metric is called")

    def _file(self, table: str) -> Path:
        file = companion(self.path, table)
        if not file.exists() and self.path.stem == FRAMES:
            other = ', or compare runs by table="runs"' * (table == "layers")
            raise ConfigError(f"no DataFrame of {table} was given: give [layers, runs, curves] of lnjac.load{other}")
        if not file.exists():
            raise ConfigError(f"{file}, the {table} of this merge, is missing: bring it here too, or merge again")
        return file


Source = str | PathLike[str] | pd.DataFrame
Sources = Source | Sequence[Source] | MergedTables
"""A path, or several: of merged tables, sweeps and runs; or data frames of one merge's tables; or tables open already."""

FRAMES = "DataFrames"
"""The name of the merge that data frames are."""

LAYERS_ALONE = "only layers were given, so that diverged runs count as done: give [layers, runs] of lnjac.load"


def open_tables(sources: Sources) -> MergedTables:
    """Open one merged table as it is; merge any other sources into a temporary folder, with a bar where it is seen.

    A folder stands for the runs that it holds now, whatever was merged from it earlier.

    Args:
        sources: A path or several, of merged tables, sweeps and runs; or one or more DataFrames of `lnjac.load`, of which
            rows may be left out and columns added. Open tables are returned as they are.

    Returns:
        The tables, with the warnings of their merge.

    Raises:
        ConfigError: A source does not exist, cannot be read, or holds no finished run.
    """
    if isinstance(sources, MergedTables):
        return sources
    given = [sources] if isinstance(sources, (str, PathLike, pd.DataFrame)) else sources
    if frames := [source for source in given if isinstance(source, pd.DataFrame)]:
        if len(frames) < len(given):
            raise ConfigError("paths and DataFrames were given together: load the paths by lnjac.load first")
        return _of_frames(frames)
    paths = [Path(source) for source in given if not isinstance(source, pd.DataFrame)]
    found = search(paths)
    if len(found.sources) == 1 and found.sources[0].merged and not found.skipped:
        path, notes, folder = found.sources[0].path, found.notes, None
        _require_one_merge(path)
    else:
        folder = tempfile.TemporaryDirectory(prefix="lnjac-")
        path, notes = Path(folder.name) / "all.parquet", []  # the merge notes them too
        with bar("reading runs") as progress:
            merge(paths, path, progress=progress)
    file = report_file(path)
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return MergedTables(path, report, [*notes, *_warnings(report, file)], folder)


def _of_frames(frames: Sequence[pd.DataFrame]) -> MergedTables:
    """Write data frames into a temporary folder; without a frame of runs, the runs are those of the layers."""
    found, warnings = contents(frames), list[str]()
    if "runs" not in found.tables:
        if "layers" not in found.tables:
            raise ConfigError(f"a DataFrame of {', '.join(found.tables)} was given alone: give that of runs too")
        layers = frames[list(found.tables).index("layers")]
        found.tables["runs"] = pa.Table.from_pandas(runs_of(layers), preserve_index=False)
        found.known["runs"] = FROZEN["runs"]
        warnings = [LAYERS_ALONE]
    if "seed" not in found.tables["runs"].column_names:
        raise ConfigError(
            f"the DataFrame of {'layers' if warnings else 'runs'} has no column seed, the unit of every comparison"
        )
    folder = tempfile.TemporaryDirectory(prefix="lnjac-")
    path = Path(folder.name) / f"{FRAMES}.parquet"
    for name, table in found.tables.items():
        note = {"table": name, "merged": True, "columns": describe(found.known[name].values())}
        runs.write_table(companion(path, name), table.replace_schema_metadata(), note)
    return MergedTables(path, {}, warnings, folder)


def _require_one_merge(path: Path) -> None:
    """Raise ConfigError unless the files of a merge are whole, of this version of lnjac, and of one merge."""
    merges = set()
    for table, file in companions(path).items():
        if table != "runs" and not file.exists():  # refused when it is needed: a comparison of losses needs no layers
            continue
        try:
            note = runs.read_metadata(file)
        except FileNotFoundError:
            raise ConfigError(f"{file} is missing, the {table} of {path}: merge again") from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{file} cannot be read as a table of lnjac: {error}") from None
        if not note.get("merged"):
            raise ConfigError(f"{file} is one file of a run: name its folder, {file.parent}")
        if (version := note.get("schema_version")) != SCHEMA_VERSION:
            raise ConfigError(f"{file} has schema version {version}, this lnjac reads {SCHEMA_VERSION}: merge again")
        merges.add(note.get("merge_id"))
    if len(merges) > 1:
        raise ConfigError(f"{path} and the files beside it are not of one merge: merge again")


def _warnings(report: Mapping[str, Any], file: Path) -> list[str]:
    """Return a merge's warnings; those of missing seeds are left out, since every comparison counts its own."""
    if not report:
        return [f"{file.name} is missing: mixed commits, data or schemas would go unsaid"]
    found = [line for line in report["warnings"] if not line.startswith("missing seeds")]
    if skipped := [skip["path"] for skip in report["skipped"]]:
        more = ", …" * (len(skipped) > 3)
        found.append(f"{len(skipped)} runs were found and not merged: {', '.join(skipped[:3])}{more}")
    return found
