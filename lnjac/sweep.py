"""Merge runs, sweeps and earlier merges into one set of typed tables.

Suspiciously: a file that is broken, foreign or of another schema is named and skipped, the same run found twice must
agree with itself, and what makes a comparison doubtful (mixed commits, missing seeds) is said. docs/merging.md has the rules.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lnjac import runs
from lnjac.config import PLUGIN_GROUPS, ConfigError
from lnjac.tables import CORE as TABLES
from lnjac.tables import KEYS, SCHEMA_VERSION, VOLATILE

if TYPE_CHECKING:
    import pandas as pd

RTOL = 1e-6
"""Relative difference up to which two measurements of the same run count as equal."""

NO_SCIENCE = (*VOLATILE, "jacobian_residual", "data")
"""Columns in which equal runs may differ: the residual is nothing but rounding error, and one corpus may be read by
another name (its content is in data_sha256)."""

STACKED_AT_ONCE = 500
"""How many tables are held one by one: a small one is mostly overhead, 290 KB a run."""

OWNER = ("run_id", "diag_id")
"""What identifies a run with its diagnostics; curves carry only the first."""

Tables = dict[str, pa.Table]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """One run's folder, or the layers file of an earlier merge, under the name the user knows it by."""

    path: Path
    merged: bool


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
        return found + [f"warning: {text}" for text in self.warnings]

    def to_json(self) -> str:
        plain = dataclasses.asdict(self) | {"skipped": [skip._asdict() for skip in self.skipped]}
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


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


class Unfit(Exception):
    """Why a source cannot be merged, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))


@dataclass
class Pile:
    """The tables of many sources, stacked on top of one another as they come."""

    sources: list[Source] = field(default_factory=list)
    n_rows: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in TABLES})
    pieces: dict[str, list[pa.Table]] = field(default_factory=lambda: {name: [] for name in TABLES})
    schemas: dict[str, dict[pa.Schema, list[Source]]] = field(default_factory=lambda: {name: {} for name in TABLES})

    def add(self, source: Source, tables: Tables) -> None:
        self.sources.append(source)
        for name, table in tables.items():
            self.n_rows[name].append(table.num_rows)
            self.schemas[name].setdefault(table.schema, []).append(source)
            self.pieces[name].append(table)
            if len(self.pieces[name]) >= STACKED_AT_ONCE:
                self.stacked(name)

    def stacked(self, name: str) -> pa.Table:
        schema = agreed({known: same[0] for known, same in self.schemas[name].items()})
        table = pa.concat_tables(self.pieces[name], promote_options="permissive")
        self.pieces[name] = [table.select(schema.names).cast(schema).combine_chunks()]
        return self.pieces[name][0]

    def origin(self, name: str) -> Integers:
        """For each row of the stacked table, the number of the source that it came from."""
        return np.repeat(np.arange(len(self.sources)), self.n_rows[name])


def merge(
    sources: Sequence[Path],
    output: Path,
    *,
    strict: bool = False,
    rtol: float = RTOL,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge run folders, sweep folders and earlier merges into `output` (X.parquet) and its companions.

    Writes X.parquet (layers), X.runs.parquet, X.curves.parquet and X.merge.json (the report). Nothing is written, and
    what is there stays, when ConfigError is raised: for no run found, none that can be merged, any skipped one if
    `strict`, or two runs that contradict each other. `progress(done, total)` is called as sources have been read.
    """
    _check_output(output)
    found = discover(sources)
    if not found:
        raise ConfigError(f"no runs in {', '.join(map(str, sources))}: name run folders, sweep folders or merged files")
    pile, skipped = _read_all(found, progress)
    if skipped and (strict or not pile.sources):
        why = "strict: no run may be skipped" if strict else "none of the runs found can be merged"
        raise ConfigError("\n".join([why, *by_reason(skipped)]))
    tables, duplicates = _combine(pile, rtol)
    report = MergeReport(
        output=str(output),
        sources=[str(path) for path in sources],
        found=sum(pile.n_rows["runs"]) + len(skipped),
        merged=tables["runs"].num_rows,
        skipped=skipped,
        duplicates=duplicates,
        rows={name: table.num_rows for name, table in tables.items()},
        warnings=_warnings(pile, tables["runs"]),
    )
    _write(tables, report, output)
    return report


def load(path: Path) -> "pd.DataFrame":
    """One merged table as a data frame, its checksums verified; NaN stands for null in columns of numbers."""
    try:
        data, note = _read_noted(Path(path))
    except Unfit as error:
        raise ConfigError(f"{path}: {error}") from None
    if not note.get("merged"):
        raise ConfigError(f"{path} is not a merged table: make one with `lnjac merge FOLDER -o all.parquet`")
    frame: pd.DataFrame = data.to_pandas()
    return frame


def companions(layers: Path) -> dict[str, Path]:
    """The three files of a merge by table, given the one that holds the layers."""
    return {
        "layers": layers,
        "runs": layers.with_suffix(".runs.parquet"),
        "curves": layers.with_suffix(".curves.parquet"),
    }


# Finding


def discover(sources: Iterable[Path]) -> list[Source]:
    """Every run folder in or at the sources and every merged file named; each once, however often it is named."""
    seen: set[Path] = set()
    found = []
    for path in sources:
        if path.is_dir():
            found += [Source(folder, merged=False) for folder in _run_folders(path, seen)]
            continue
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
        if path.name in (*runs.FILES.values(), runs.STATUS):
            raise ConfigError(f"{path} is one file of a run: name its folder, {path.parent}")
        layers = layers_file(path)
        if (real := layers.resolve()) not in seen:
            seen.add(real)
            found.append(Source(layers, merged=True))
    return found


def _run_folders(folder: Path, seen: set[Path]) -> Iterator[Path]:
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    inside = sorted(folder.iterdir())
    if {path.name for path in inside} & {runs.STATUS, *runs.FILES.values()}:
        yield folder
        return
    for path in inside:
        if not path.name.startswith(".") and path.is_dir():
            yield from _run_folders(path, seen)


def layers_file(path: Path) -> Path:
    """X.parquet, for X.runs.parquet and X.curves.parquet too: a shell's *.parquet names all three."""
    for name in ("runs", "curves"):
        if path.name.endswith(f".{name}.parquet"):
            return path.with_name(path.name.removesuffix(f".{name}.parquet") + ".parquet")
    return path


# Reading


def _read_all(found: Sequence[Source], progress: Callable[[int, int], None] | None) -> tuple[Pile, list[Skip]]:
    pile, skipped = Pile(), []
    with ThreadPoolExecutor() as pool:
        for done, (source, data) in enumerate(zip(found, pool.map(_try_read, found), strict=True), 1):
            if isinstance(data, str):
                skipped.append(Skip(str(source.path), data))
            else:
                pile.add(source, data)
            if progress:
                progress(done, len(found))
    return pile, skipped


def _try_read(source: Source) -> Tables | str:
    """The source's tables, or the reason why it has none to merge."""
    try:
        return read(source)
    except Unfit as error:
        return str(error)


def read(source: Source) -> Tables:
    """The three tables of a source, cast to the schema and checked to belong together."""
    if source.merged:
        files, sha256 = companions(source.path), None
    else:
        sha256 = _finished(source.path).get("sha256", {})
        files = {name: source.path / runs.FILES[name] for name in TABLES}
    tables, merges = {}, set()
    for name, path in files.items():
        data, note = _read_noted(path)
        if note.get("table") != name or bool(note.get("merged")) != source.merged:
            kind = "of an earlier merge" if source.merged else "of a run"
            raise Unfit(f"{path.name} does not hold the {name} {kind}")
        if (version := note.get("schema_version")) != SCHEMA_VERSION:
            raise Unfit(f"{path.name} has schema version {version}, this lnjac reads {SCHEMA_VERSION}")
        merges.add(note.get("merge_id"))
        try:
            tables[name] = conform(data, runs.schema(TABLES[name]))
        except Unfit as error:
            raise Unfit(f"{path.name} {error}") from None
        if sha256 is not None and sha256.get(path.name) != runs.file_sha256(path):
            raise Unfit(f"{path.name} is not the file that the run wrote: its SHA-256 differs from {runs.STATUS}'s")
    if len(merges) > 1:
        raise Unfit("its three files are not of one merge: merge again")
    _require_whole(tables, source.merged)
    return tables


def _read_noted(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A table with the note that `runs.write_table` left in its footer."""
    try:
        data = runs.read_table(path)
    except FileNotFoundError:
        raise Unfit(f"{path.name} is missing") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Unfit(f"{path.name} cannot be read: {error}") from None
    try:
        note = json.loads((data.schema.metadata or {})[b"lnjac"])
    except (KeyError, ValueError):
        note = None
    if not isinstance(note, dict):
        raise Unfit(f"{path.name} was not written by lnjac")
    return data.replace_schema_metadata(), note


def _finished(folder: Path) -> dict[str, Any]:
    """The status of a finished run."""
    status = runs.read_status(folder)
    if not status:
        raise Unfit(f"no readable {runs.STATUS}")
    if (state := status.get("status")) not in runs.FINISHED:
        raise Unfit(f"{state}: {status['error']}" if "error" in status else str(state))
    return status


def _require_whole(tables: Tables, merged: bool) -> None:
    """Every row belongs to a run of this source, every run is there once."""
    owners = {name: _joined(table, [key for key in OWNER if key in KEYS[name]]) for name, table in tables.items()}
    n_runs = tables["runs"].num_rows
    if n_runs == 0 or (n_runs > 1 and not merged):
        raise Unfit(f"holds {n_runs} runs")
    if len(pc.unique(owners["runs"])) != n_runs:
        raise Unfit("holds the same run twice")
    owners_of = {"layers": owners["runs"], "curves": _joined(tables["runs"], ["run_id"])}
    for name, known in owners_of.items():
        if not pc.all(pc.is_in(owners[name], value_set=known), min_count=0).as_py():
            raise Unfit(f"its {name} hold rows of a run that it does not have")


def _joined(table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(*(table[name] for name in names), "/")


# Types


def conform(data: pa.Table, declared: pa.Schema) -> pa.Table:
    """Declared columns first and in their declared type, then the others in their own order and Arrow's widest type."""
    there, known = set(data.column_names), set(declared.names)  # both are made anew at every access
    if missing := [name for name in declared.names if name not in there]:
        raise Unfit(f"lacks the column {', '.join(missing)}")
    if len(there) < data.num_columns:
        raise Unfit("has two columns of one name")
    more = [field for field in data.schema if field.name not in known]
    if nested := [field.name for field in more if pa.types.is_nested(field.type)]:
        raise Unfit(f"has lists or records in the column {', '.join(nested)}")
    target = pa.schema([*declared, *(pa.field(field.name, _widest(field.type)) for field in more)])
    if data.schema.equals(target):
        return data
    return pa.Table.from_arrays([_cast(data[field.name], field) for field in target], schema=target)


def _cast(values: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if {_kind(values.type), _kind(field.type)} not in ({_kind(field.type)}, {"null", _kind(field.type)}):
        raise Unfit(f"has {field.name} as {values.type}, which is no {field.type}")
    try:
        return values.cast(field.type)
    except pa.ArrowException as error:
        raise Unfit(f"has a {field.name} that does not fit {field.type}: {error}") from None


def _widest(dtype: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(dtype):
        return _widest(dtype.value_type)
    if pa.types.is_integer(dtype):
        return pa.int64()
    if pa.types.is_floating(dtype):
        return pa.float64()
    if pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return pa.string()
    return dtype


def _kind(dtype: pa.DataType) -> str:
    """Types of one kind may be cast into each other: Arrow alone would also make text of a number."""
    widest = _widest(dtype)
    return "number" if widest in (pa.int64(), pa.float64()) else str(widest)


def agreed(schemas: Mapping[pa.Schema, Source]) -> pa.Schema:
    """The union of the columns in order of first appearance: null gives way to any type, int64 to float64."""
    union: dict[str, tuple[pa.DataType, Source]] = {}
    for schema, source in schemas.items():
        for column, dtype in zip(schema.names, schema.types, strict=True):
            before, first = union.setdefault(column, (dtype, source))
            if before == pa.null() or {before, dtype} == {pa.int64(), pa.float64()}:
                union[column] = (dtype if before == pa.null() else pa.float64(), source)
            elif dtype not in (before, pa.null()):
                raise ConfigError(
                    f"{column} is {before} in {first.path} but {dtype} in {source.path}: merge them apart"
                )
    return pa.schema([(column, dtype) for column, (dtype, _) in union.items()])


# Combining


def _combine(pile: Pile, rtol: float) -> tuple[Tables, dict[str, int]]:
    """The merged tables in the order of docs/merging.md, and how many duplicate rows each of them lost."""
    units = _units(pile)
    tables = {name: _distinct(name, pile.stacked(name), pile.origin(name), units, rtol) for name in TABLES}
    return tables, {name: sum(pile.n_rows[name]) - table.num_rows for name, table in tables.items()}


def _units(pile: Pile) -> "pd.DataFrame":
    """Every run of every source, one row each, by rank: of two equal runs the one of lower rank is kept.

    Ranked by when the run began, then by its identity, then by every other column in which equal runs may differ, and
    only at last by path: so neither the order of the sources nor whether they were merged before has a say.
    """
    origin = pile.origin("runs")
    table = pile.stacked("runs").select([*OWNER, *VOLATILE]).append_column("source", pa.array(origin))
    table = table.append_column("path", pa.array([str(pile.sources[i].path) for i in origin], pa.string()))
    by = dict.fromkeys(["started_at", *OWNER, *VOLATILE, "path"])
    order = pc.sort_indices(table, sort_keys=[(column, "ascending") for column in by])
    units: pd.DataFrame = table.select([*OWNER, "source", "path"]).take(order).to_pandas()
    return units.assign(rank=np.arange(len(units)))


def _distinct(name: str, table: pa.Table, origin: Integers, units: "pd.DataFrame", rtol: float) -> pa.Table:
    """The table without duplicates, ordered by the rank of their runs, then by step, then as in the run's own file.

    Raises ConfigError where two sources hold the same run with other rows or with other science.
    """
    owner = [key for key in OWNER if key in KEYS[name]]
    units = units.drop_duplicates(["source", *owner])
    keys = table.select(KEYS[name]).to_pandas()
    rank = keys.assign(source=origin).merge(units, how="left", on=["source", *owner])["rank"].to_numpy()
    order = np.lexsort((keys["step"], rank)) if "step" in keys else np.argsort(rank, kind="stable")
    table, keys, rank = table.take(order), keys.iloc[order], rank[order]
    again = keys.duplicated().to_numpy()
    _require_same_rows(name, units.assign(first=units.groupby(owner)["rank"].transform("min")), rank, again)
    if again.any():
        code = keys.groupby(list(keys), sort=False, dropna=False).ngroup().to_numpy()
        twin = np.flatnonzero(~again)[code[again]]  # codes count up in order of first appearance
        _require_same_science(name, table, twin, np.flatnonzero(again), units.set_index("rank")["path"][rank], rtol)
    return table.filter(pa.array(~again))


def _require_same_rows(name: str, units: "pd.DataFrame", rank: Integers, again: Booleans) -> None:
    """A run that was found before (`first` < `rank`) brings the very rows that are there: no row more, none less."""
    n_rows = np.bincount(rank, minlength=units["rank"].max() + 1)
    n_new = np.bincount(rank[~again], minlength=len(n_rows))
    more = units[units["first"] < units["rank"]]
    odd = more[(n_new[more["rank"]] > 0) | (n_rows[more["rank"]] != n_rows[more["first"]])]
    for unit in odd.itertuples():
        first = units.set_index("rank")["path"][unit.first]
        raise ConfigError(
            f"{first} and {unit.path} both hold run {unit.run_id}, but not the same rows of {name}: drop one of them"
        )


def _require_same_science(
    name: str,
    table: pa.Table,
    kept: Integers,
    dropped: Integers,
    paths: "pd.Series[str]",
    rtol: float,
) -> None:
    """Rows `kept` and `dropped` have equal keys; `paths` names the source of each row of the table."""
    for column in table.column_names:
        if column in (*KEYS[name], *NO_SCIENCE):
            continue
        one, other = table[column].take(pa.array(kept)), table[column].take(pa.array(dropped))
        for i in np.flatnonzero(differs(one, other, rtol)):
            key = ", ".join(f"{key}={table[key][int(kept[i])]}" for key in KEYS[name])
            raise ConfigError(
                f"{paths.iloc[kept[i]]} and {paths.iloc[dropped[i]]} both hold the row of {name} with {key}, but "
                f"{column} is {one[int(i)]} in the one and {other[int(i)]} in the other: drop one of them"
                + (", or raise rtol" if pa.types.is_floating(one.type) else "")
            )


def differs(one: pa.ChunkedArray, other: pa.ChunkedArray, rtol: float) -> Booleans:
    """Where the values differ; null equals null and NaN equals NaN, but not each other."""
    if pa.types.is_floating(one.type):
        equal = np.isclose(one.to_numpy(), other.to_numpy(), rtol=rtol, atol=0, equal_nan=True)
    else:
        equal = pc.fill_null(pc.equal(one, other), True).to_numpy()
    return np.asarray(~equal | (one.is_null().to_numpy() != other.is_null().to_numpy()))


# Doubts


def _warnings(pile: Pile, table: pa.Table) -> list[str]:
    """What makes a comparison across these runs doubtful; `table` is the merged table of runs."""
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
    schemas = [set(schema.names) for schema in pile.schemas["runs"]]
    partial = [name for name in table.column_names if not all(name in schema for schema in schemas)]
    # a mode or method has parameters that others lack: only what every run should have is worth a word
    if partial := [name for name in partial if name.partition(".")[0] not in PLUGIN_GROUPS]:
        found.append(f"mixed schema: only some sources have {', '.join(partial)}; null in the others")
    return found + _missing_seeds(frame)


def _missing_seeds(frame: "pd.DataFrame") -> list[str]:
    """One line for each config that lacks a seed which another config has."""
    declared = {column.name for column in TABLES["runs"]}
    names: list[str] = []  # the fewest columns that tell the configs apart; group names, which have no dot, first
    n_groups = 1
    swept = [str(column) for column in frame if column not in declared and column != "seed"]
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


# Writing


def _check_output(output: Path) -> None:
    if output.suffix != ".parquet":
        raise ConfigError(f"the output {output} must end in .parquet: try {output.name}.parquet")
    if output.name in runs.FILES.values() or layers_file(output) != output:
        raise ConfigError(f"the output must not be called {output.name}, which means something else: try all.parquet")
    if output.is_dir():
        raise ConfigError(f"the output {output} is a folder: try {output / 'all.parquet'}")


def _write(tables: Tables, report: MergeReport, output: Path) -> None:
    """Complete all files in a hidden folder beside the output, then move them to their places, the layers last."""
    output.parent.mkdir(parents=True, exist_ok=True)
    identity = tables["runs"].select([*OWNER, "started_at"]).to_pylist()
    note = {
        "merged": True,
        "merge_id": hashlib.sha256(json.dumps([identity, report.rows]).encode()).hexdigest()[:16],
        "rows": report.rows,
    }
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as folder:
        ready = Path(folder) / output.name
        for name, path in companions(ready).items():
            runs.write_table(path, tables[name], {"table": name, **note})
        ready.with_suffix(".merge.json").write_text(report.to_json(), encoding="utf-8")
        for path in sorted(Path(folder).iterdir(), key=lambda path: path == ready):
            path.replace(output.parent / path.name)
