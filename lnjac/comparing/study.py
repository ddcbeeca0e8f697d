"""What varies among runs, and one number per seed and norm, arranged by it.

Which columns vary is found, not asked. Runs that agree in all of them but `seed` and the compared one make a cell: only
within a cell are levels compared, and there a seed of one level has its twin in the other.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lnjac.columns import Column
from lnjac.comparing import pooling
from lnjac.comparing.filter import Where, known_column
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.runs import merge as sweep
from lnjac.runs.placing import finish
from lnjac.runs.read import companion, companions, search
from lnjac.runs.schema import KEYS, SCHEMA_VERSION, TABLES, VOLATILE
from lnjac.text import exact, listed

if TYPE_CHECKING:
    import pandas as pd

LAST_NORM = "ln_f"
"""The norm before the head: a headline names it wherever it was measured."""

RUN = ["run_id", "diag_id"]
IDENTITY = ("data_sha256", "numerics_version")
"""Columns outside the config in which runs of one config may differ, and then must not be compared with each other."""


@dataclass(frozen=True)
class Study:
    """The tables of one merge, read as they are needed, and what makes a comparison within them doubtful."""

    path: Path
    doubts: list[str]
    held: Any = field(default=None, repr=False)
    """Keeps a temporary folder as long as the study."""

    def schema(self, table: str) -> pa.Schema:
        return pq.read_schema(self._file(table))

    def described(self, table: str) -> dict[str, Column]:
        """Return the descriptions of the table's columns, of those that have one."""
        known = {column.name: column for column in TABLES[table]}
        return {name: known[name] for name in self.columns(table) if name in known}

    def columns(self, table: str) -> list[str]:
        return list(self.schema(table).names)

    def frame(self, table: str, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """A table, or some of its columns; NaN stands for null in columns of numbers. Raises ConfigError if it is missing."""
        found: pd.DataFrame = runs.read_table(self._file(table), columns).to_pandas()
        return found

    def _file(self, table: str) -> Path:
        file = companion(self.path, table)
        if not file.exists():
            raise ConfigError(f"{file}, the {table} of this merge, is missing: bring it here too, or merge again")
        return file


def read(sources: Sequence[Path], progress: Callable[[int, int], None] | None = None) -> Study:
    """One merged table as it is; of other sources (sweeps, runs, several tables) a merge in a temporary folder.

    A folder is the runs that it holds now, whatever was merged from it earlier. `progress(done, total)` is called as
    sources have been read for it.
    """
    paths = [Path(source) for source in sources]
    found = search(paths)
    if len(found.sources) == 1 and found.sources[0].merged and not found.skipped:
        path = found.sources[0].path
        finish(path)
        return Study(path, [*found.notes, *_checked(path)])
    folder = tempfile.TemporaryDirectory(prefix="lnjac-")
    path = Path(folder.name) / "all.parquet"
    report = sweep.merge(paths, path, progress=progress)
    return Study(path, _doubts(report.warnings, [skip.path for skip in report.skipped]), folder)


def varying(frame: "pd.DataFrame") -> list[str]:
    """The config columns (and IDENTITY) in which these runs differ, `seed` left out: groups first, then their settings."""
    declared = {column.name for column in TABLES["runs"]} - set(IDENTITY)
    names = [str(name) for name in frame if name not in declared and name != "seed"]
    found = [name for name in names if frame[name].nunique(dropna=False) > 1]
    return sorted(found, key=lambda name: (name in IDENTITY, "." in name))


def factors(frame: "pd.DataFrame") -> list[str]:
    """What runs can be compared by: columns of the config, and others that tell runs apart; first those that vary."""
    declared = {column.name for column in TABLES["runs"]}
    config = [str(name) for name in frame if name not in declared and name != "seed"]
    found = [*config, *(name for name in (*IDENTITY, *VOLATILE) if name in frame)]
    return sorted(found, key=varying(frame).__contains__, reverse=True)


def labelled(frame: "pd.DataFrame", column: str) -> "pd.Series[Any]":
    """The column's values; a group's member with those of its settings that vary: `center_scale@ln_f`, `sgd[lr=0.1]`."""
    values, groups = frame[column], frame.groupby(column, dropna=False)
    for option in [name for name in map(str, frame) if name.startswith(f"{column}.")]:
        text = frame[option].map(exact if frame[option].dtype.kind == "f" else str, na_action="ignore")
        if option == "ln_backward.sites":
            values = values + ("@" + text).where(text != "all", "")
        elif groups[option].nunique(dropna=False).max() > 1:
            values = values + (f"[{option.removeprefix(column)[1:]}=" + text + "]").fillna("")
    return values


@dataclass(frozen=True)
class Values:
    """One number per seed: data (metric, site, cell, level of each `by`, seed), NaN where there is none.

    Diverged runs have no numbers here; `there` and `diverged` (cell, level of each `by`, seed) say which runs there are.

    Runs that differ in nothing but the seed are an arm: `arm` (cell, level of each `by`) is its number, −1 for none, and
    `settings` (arm, column of `others`) holds a code for each value, equal where values are, of what else varies.
    """

    data: npt.NDArray[np.float64]
    metrics: list[str]
    sites: list[str]
    cells: "pd.DataFrame"
    by: list[str]
    levels: list[list[Any]]
    seeds: npt.NDArray[np.int64]
    there: npt.NDArray[np.bool_]
    diverged: npt.NDArray[np.bool_]
    arm: npt.NDArray[np.int64]
    others: list[str]
    settings: npt.NDArray[np.int64]
    doubts: list[str]

    def met(self, corners: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """The cells in which runs of these levels (of each `by`) meet: for each meeting, the cell of each, −1 for none.

        They are judged by themselves: what varies only among runs of other levels keeps none of them apart.
        """
        arms = np.stack([self.arm[(slice(None), *levels)] for levels in corners])  # type: ignore[arg-type]
        corner, cell = np.nonzero(arms >= 0)
        known = self.settings[arms[corner, cell]]
        meeting = np.zeros(len(cell), int)
        for column in _telling_apart(corner, known):
            meeting = _finer(meeting, known[:, column])
        found = np.full((meeting.max(initial=-1) + 1, len(corners)), -1)
        found[meeting, corner] = cell
        return sorted(found.tolist(), key=lambda row: min(at for at in row if at >= 0))

    def moving(self, arms: Sequence[int]) -> tuple[str, ...]:
        """The columns that are not the same in all of these arms, but for settings of a group that is one of them."""
        known = self.settings[[arm for arm in arms if arm >= 0]]
        found = [name for name, codes in zip(self.others, known.T, strict=True) if len(set(codes)) > 1]
        own = tuple(f"{name}." for name in found) + ("data_sha256",) * ("data" in self.by)
        return tuple(name for name in found if not name.startswith(own))


def named(cells: "pd.DataFrame", cell: int | np.signedinteger[Any]) -> str:
    """A cell in words: `method=fa model.n_embd=64`."""
    return " ".join(f"{name}={word(value)}" for name, value in cells.iloc[int(cell)].items())


def word(value: Any) -> str:
    """A level in words; a missing one is null (only NaN differs from itself)."""
    if value is None or value != value:
        return "null"
    return exact(value) if isinstance(value, float) else str(value)


def gather(
    study: Study,
    by: Sequence[str],
    metrics: Sequence[str],
    *,
    table: str = "layers",
    at: int | None = None,
    where: str | None = None,
) -> Values:
    """The metrics of a study's runs by seed, at a measured step (the last of each run unless given), arranged by `by`.

    `by` are config columns, or others that tell runs apart (commit, device, …); or, of layers, the measured `step`.
    """
    every = study.frame("runs")
    if "seed" not in every:
        raise ConfigError(f"{study.path} has no column seed, the unit of every comparison")
    levels = factors(every) + ["step"] * (table == "layers")
    for name in by:
        known_column(name, levels, "runs are not told apart by")
    chosen = Where(where) if where is not None else None
    rows = _rows(study, every, list(metrics), table, "every" if "step" in by else at, chosen)
    if "step" in by:  # a run is then one run for each step
        each = rows[["run", "step"]].drop_duplicates()
        every = every.loc[each["run"]].assign(step=each["step"].to_numpy()).reset_index(drop=True)
        rows = rows.assign(run=rows.groupby(["run", "step"], sort=False).ngroup())
    every = every.loc[[*rows["run"].unique(), *_without_rows(every, rows, chosen, by)]]
    if table == "runs":
        every = every[~every["run_id"].duplicated()]  # other diagnostics of one run are no other run
        every = every[[name for name in every if not str(name).startswith("diagnostics.")]]
        rows = rows[rows["run"].isin(every.index)]
    vary = varying(every)
    every = every.assign(**{name: labelled(every, name) for name in {"ln_backward", *by} if name in every})
    for name in by:
        if every[name].nunique(dropna=False) < 2:
            raise ConfigError(f"all {len(every)} runs chosen have {name}={every[name].iloc[0]}: nothing to compare")
    vary = [name for name in vary if name != "ln_backward.sites"]
    rows, left_out = _finite(rows, every, list(by), list(metrics))
    return _arranged(rows, every, list(by), list(metrics), vary, [*left_out, *study.doubts])


def _rows(
    study: Study, every: "pd.DataFrame", metrics: list[str], table: str, at: int | str | None, chosen: Where | None
) -> "pd.DataFrame":
    """Chosen rows: `run` (its label in `every`), `step`, `site` and the metrics."""
    if table == "runs":
        if at is not None:
            raise ConfigError(f"--at {at}: a run's row is of its last update; leave --at out, or compare --layers")
        require_metrics(study, table, metrics)
        kept = every[chosen.holds(every)] if chosen else every
        return _some(kept[metrics].assign(run=kept.index, site=""), chosen, every)
    require_metrics(study, table, metrics)
    known = study.columns(table)
    named = chosen.columns if chosen else []
    if chosen:
        chosen.require([*map(str, every), *known])
    own = [name for name in named if name in known and name not in every]
    wanted = dict.fromkeys([*RUN, "step", "site", "call", *metrics, *own])
    layers = study.frame(table, list(wanted))
    known_runs = every[RUN].assign(run=every.index)
    layers = layers.merge(known_runs, on=RUN, how="left")
    if chosen:
        shown = [name for name in named if name in every]
        context = layers.assign(**{name: every[name].to_numpy()[layers["run"]] for name in shown})
        layers = layers[chosen.holds(context)]
    if at != "every":
        steps = sorted(layers["step"].unique().tolist())
        layers = layers[layers["step"] == (layers.groupby("run")["step"].transform("max") if at is None else at)]
        if steps and layers.empty:
            raise ConfigError(f"no norm was measured at step {at}: choose one of {', '.join(map(str, steps[:20]))}")
    if layers["call"].any():
        described = study.described(table)
        more = study.frame(table, pooling.needed(metrics, described)).loc[layers.index]
        layers = pooling.pooled(more, metrics, described).merge(known_runs, on=RUN)
    return _some(layers[["run", "step", "site", *metrics]], chosen, every)


def _finite(
    rows: "pd.DataFrame", every: "pd.DataFrame", by: list[str], metrics: list[str]
) -> "tuple[pd.DataFrame, list[str]]":
    """The rows, what is no finite number in them made missing; and how many such values runs have that did not diverge."""
    import pandas as pd

    done = (every["status"] != runs.DIVERGED)[rows["run"]].to_numpy()
    levels = [" ".join(f"{name}={word(value)}" for name, value in row.items()) for row in every[by].to_dict("records")]
    level = pd.Series(levels, index=every.index)[rows["run"]].to_numpy()
    kept, said = {}, []
    for name in metrics:
        values = rows[name].to_numpy(float)
        lost = ~np.isfinite(values) & done
        kept[name] = np.where(np.isinf(values), np.nan, values)
        if lost.any():
            infinite = int((np.isinf(values) & done).sum())
            kinds = {"infinite": infinite, "NaN or null": int(lost.sum()) - infinite}
            what = " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
            where = [
                f"{one} {int((lost & (level == one)).sum())} of {int((done & (level == one)).sum())}"
                for one in dict.fromkeys(level[lost])
            ]
            said.append(f"{what} values of {name} are left out: {listed(where, 5)}")
    return rows.assign(**kept), said


def _without_rows(every: "pd.DataFrame", rows: "pd.DataFrame", chosen: Where | None, by: Sequence[str]) -> list[Any]:
    """Chosen runs that diverged before any norm was measured: they have no numbers, but they count."""
    if "step" in by or (chosen and not set(chosen.columns) <= set(every)):
        return []
    absent = every[(every["status"] == runs.DIVERGED) & ~every.index.isin(rows["run"])]
    return list(absent[chosen.holds(absent)].index if chosen else absent.index)


def _some(rows: "pd.DataFrame", chosen: Where | None, every: "pd.DataFrame") -> "pd.DataFrame":
    if rows.empty:
        named = [name for name in chosen.columns if name in every] if chosen else []
        known = "".join(f"; {name} is {listed(sorted(map(str, every[name].unique())))}" for name in named)
        raise ConfigError(f"--where {chosen.text!r} holds for no row{known}" if chosen else "the tables have no rows")
    return rows


def require_metrics(study: Study, table: str, metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that is no column of numbers in this table, with the nearest one that is."""
    schema = study.schema(table)
    for name in metrics:
        if name in schema.names:
            if not _is_number(schema.field(name)):
                raise ConfigError(f"--metric {name} holds no numbers: choose a column of numbers")
            continue
        other = "runs" if table == "layers" else "layers"
        others = study.columns(other) if companion(study.path, other).exists() else []
        if name in others:
            raise ConfigError(
                f"--metric {name} is a column of {other}, and not of {table}, which are compared here: "
                "compare and scaling choose the table by --runs or --layers"
            )
        shared = {*KEYS[table], *others}  # the config
        measured = [field.name for field in schema if _is_number(field) and field.name not in shared]
        declared = {column.name for column in TABLES[table]}
        known_column(name, sorted(measured, key=lambda name: name not in declared), "no column for --metric is called")


def _is_number(field: pa.Field) -> bool:
    return bool(pa.types.is_integer(field.type) or pa.types.is_floating(field.type))


def strata(every: "pd.DataFrame", by: Sequence[str], vary: Sequence[str]) -> list[str]:
    """The fewest varying columns that make cells: with `by`, they tell apart all runs that differ in more than the seed."""
    others = _others(by, vary)
    return [others[i] for i in _telling_apart(_codes(every, by), _settings(every, others))]


def _others(by: Sequence[str], vary: Sequence[str]) -> list[str]:
    """The varying columns but `by` and the settings of its members (`attn_mode.bias`), which are part of their level."""
    return [name for name in vary if name not in by and not name.startswith(tuple(f"{name}." for name in by))]


def _settings(every: "pd.DataFrame", names: Sequence[str]) -> npt.NDArray[np.int64]:
    """(runs, names): a code for each value, missing ones alike."""
    return np.stack([_codes(every, [name]) for name in names], -1) if names else np.zeros((len(every), 0), int)


def _codes(every: "pd.DataFrame", names: Sequence[str]) -> npt.NDArray[np.int64]:
    """One number for each combination of the columns' values."""
    found = np.zeros(len(every), int)
    for name in names:
        found = _finer(found, every[name].factorize(use_na_sentinel=False)[0])
    return found


def _finer(groups: npt.NDArray[np.int64], codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The groups divided further by the codes."""
    return np.unique(groups * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]


def _telling_apart(groups: npt.NDArray[np.int64], settings: npt.NDArray[np.int64]) -> list[int]:
    """The fewest columns, taken in their order, that divide the groups as far as all of them do."""
    found, groups = [], _finer(groups, np.zeros_like(groups))
    for i, codes in enumerate(settings.T):
        finer = _finer(groups, codes)
        if finer.max(initial=0) > groups.max(initial=0):
            found.append(i)
            groups = finer
    return found


def _arranged(
    rows: "pd.DataFrame",
    every: "pd.DataFrame",
    by: list[str],
    metrics: list[str],
    vary: list[str],
    doubts: list[str],
) -> Values:
    import pandas as pd

    cells, others = strata(every, by, vary), _others(by, vary)
    cell = every.groupby(cells, dropna=False, sort=False).ngroup().to_numpy() if cells else np.zeros(len(every), int)
    seeds, slot = np.unique(every["seed"], return_inverse=True)
    levels: list[list[Any]] = []
    level: list[npt.NDArray[np.int64]] = []
    for name in by:
        found = sorted(every[name].dropna().unique().tolist()) + [None] * bool(every[name].isna().any())
        levels.append(found)
        number = every[name].map({value: i for i, value in enumerate(found)}).fillna(len(found) - 1)
        level.append(number.to_numpy(int))
    place = (cell, *level, slot)
    shape = (cell.max() + 1, *map(len, levels), len(seeds))
    count = np.zeros(shape, int)
    np.add.at(count, place, 1)
    if (count > 1).any():
        again = np.flatnonzero(count[place] > 1)
        names = ", ".join(every["run_id"].iloc[again[:2]])
        raise ConfigError(f"several runs have one config and seed ({names}): choose by --where")
    diverged = np.zeros(shape, bool)
    diverged[place] = every["status"] == runs.DIVERGED
    arms, first = np.unique(np.stack(place[:-1]), axis=1, return_index=True)
    arm = np.full(shape[:-1], -1)
    arm[tuple(arms)] = np.arange(len(first))
    settings = _settings(every, others)[first]

    sites = list(dict.fromkeys(rows["site"]))
    at = pd.Series(range(len(every)), index=every.index)[rows["run"]].to_numpy()
    site = rows["site"].map({name: i for i, name in enumerate(sites)}).to_numpy()
    data = np.full((len(metrics), len(sites), *shape), np.nan)
    of_row: Any = (site, *(part[at] for part in place))
    for plane, metric in zip(data, metrics, strict=True):
        plane[of_row] = rows[metric].to_numpy(float)
    data[..., diverged] = np.nan
    table = every[cells].iloc[pd.Series(cell).drop_duplicates().index].reset_index(drop=True)
    there = count > 0
    return Values(data, metrics, sites, table, by, levels, seeds, there, diverged, arm, others, settings, doubts)


def _checked(path: Path) -> list[str]:
    """The doubts of an earlier merge, whose files must be whole, ours and of one merge."""
    merges = set()
    for table, file in companions(path).items():
        if table != "runs" and not file.exists():  # said when it is asked for: who looks at losses needs no layers
            continue
        try:
            note = runs.read_metadata(file)
        except FileNotFoundError:
            raise ConfigError(f"{file} is missing, the {table} of {path}: merge again") from None
        except (KeyError, ValueError, OSError) as error:
            raise ConfigError(f"{file} cannot be read as a table of lnjac: {error}") from None
        if not note.get("merged"):
            raise ConfigError(f"{file} is one file of a run: name its folder, {file.parent}")
        if (version := note.get("schema_version")) != SCHEMA_VERSION:
            raise ConfigError(f"{file} has schema version {version}, this lnjac reads {SCHEMA_VERSION}: merge again")
        merges.add(note.get("merge_id"))
    if len(merges) > 1:
        raise ConfigError(f"{path} and the files beside it are not of one merge: merge again")
    said = path.with_suffix(".merge.json")
    if not said.exists():
        return [f"{said.name} is missing: mixed commits, data or schemas would go unsaid"]
    report = json.loads(said.read_text(encoding="utf-8"))
    return _doubts(report["warnings"], [skip["path"] for skip in report["skipped"]])


def _doubts(warnings: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """A merge's warnings but those of missing seeds, which every comparison counts for itself."""
    found = [line for line in warnings if not line.startswith("missing seeds")]
    if skipped:
        found.append(
            f"{len(skipped)} runs were found and not merged: {', '.join(skipped[:3])}" + ", …" * (len(skipped) > 3)
        )
    return found
