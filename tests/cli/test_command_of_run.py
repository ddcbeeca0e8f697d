"""`lnjac command`: the line that makes a run again, from a merge, a sweep or a run; and what differs here."""

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.folders import make_run

from lnjac import load, merge
from lnjac.config import identity
from lnjac.config.compose import as_typed, compose
from lnjac.runs import folder as runs
from lnjac.runs.configs import CONFIGS, of_runs
from lnjac.runs.folder import provenance
from lnjac.runs.merged import companion
from lnjac.runs.record import record

SHA256 = "ab" * 32


def run_of(folder: Path, *words: str, run: dict[str, Any] | None = None) -> str:
    """A run as the trainer would write it for these words; its run_id."""
    config = compose(*words)
    name = identity.run_id(config, SHA256)
    make_run(
        folder / name,
        seed=config.seed,
        run_id=name,
        diag_id=identity.diag_id(config),
        run={"data_sha256": SHA256, "numerics_version": identity.NUMERICS_VERSION} | provenance() | (run or {}),
        note={"config": identity.to_dict(config), "provenance": {}},
    )
    return name


def test_the_printed_line_makes_the_same_run(lnjac: Any, tmp_path: Path) -> None:
    words = ["attn_mode=sigmoid", "ln_backward=ste", "ln_backward.sites=[ln_1,ln_f]", "seed=7", "device=cpu"]
    ids = {run_of(tmp_path / "runs", *words): words, run_of(tmp_path / "runs", "seed=2"): ["seed=2"]}
    merge(tmp_path / "runs", tmp_path / "all.parquet")
    merge(tmp_path / "all.parquet", tmp_path / "again.parquet")
    for name, typed in ids.items():
        for table in (
            tmp_path / "all.parquet",
            tmp_path / "again.parquet",
            tmp_path / "runs",
            tmp_path / "runs" / name,
        ):
            code, out, err = lnjac("command", table, name[:6])
            assert (code, err) == (0, "")
            line, *comments = out.splitlines()
            python, script, *printed = shlex.split(line)
            assert (python, script) == ("python", "run.py")
            assert identity.run_id(compose(*as_typed(printed)), SHA256) == name
            assert sorted(printed) == sorted(word for word in typed if word != "device=cpu")
            assert all(comment.startswith("# ") for comment in comments)
            assert SHA256 in comments[0]
            assert not [comment for comment in comments if "another run" in comment]


def test_what_differs_here_is_told(lnjac: Any, tmp_path: Path) -> None:
    there = {"commit": "c0ffee", "dirty": False, "torch_version": "1.0", "data_sha256": "cd" * 32}
    name = run_of(tmp_path, "seed=3", run=there)
    code, out, _ = lnjac("command", tmp_path, name)
    assert code == 0
    assert "# here: torch " in out
    assert "commit c0ffee" in out
    assert f"commit {provenance()['commit']}" in out.splitlines()[2]
    assert f", not {name}" in out.splitlines()[-1]  # of another corpus, and so another run
    told = json.loads(lnjac("command", tmp_path, name, "--json")[1])
    assert told["command"] == "python run.py seed=3"
    assert told["made"]["commit"] == "c0ffee"


def test_a_path_is_left_to_fill_in(lnjac: Any, tmp_path: Path) -> None:
    name = run_of(tmp_path / "runs", "data=text", f"data.files=[{tmp_path}/a.txt,b.txt]", "tracker=mlflow")
    merge(tmp_path / "runs", tmp_path / "all.parquet")
    out = lnjac("command", tmp_path / "all.parquet", name)[1]
    assert out.startswith("python run.py data=text 'data.files=[PATH,'\"'\"'b.txt'\"'\"']'\n")
    assert f"# put your own paths in place of PATH, of the corpus with the SHA-256 {SHA256}" in out
    assert str(tmp_path) not in companion(tmp_path / "all.parquet", CONFIGS).read_bytes().decode("latin-1")
    assert str(tmp_path) not in str(load(companion(tmp_path / "all.parquet", CONFIGS)).to_dict())


@pytest.mark.parametrize(("prefix", "said"), [
    ("", "holds 2 runs: choose one from "),
    ("zz", "the run_id of no runs in all.parquet starts with zz: choose one from "),
])  # fmt: skip
def test_a_prefix_must_be_unique(
    lnjac: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, said: str
) -> None:
    for seed in (1, 2):
        run_of(tmp_path / "runs", f"seed={seed}")
    monkeypatch.chdir(tmp_path)
    merge("runs", "all.parquet")
    code, out, err = lnjac("command", "all.parquet", prefix)
    assert (code, out) == (1, "")
    assert said in err


def test_a_merge_without_configs_is_merged_again(lnjac: Any, tmp_path: Path) -> None:
    name = run_of(tmp_path / "runs", "seed=2")
    table = tmp_path / "all.parquet"
    merge(tmp_path / "runs", table)
    companion(table, CONFIGS).unlink()  # as earlier versions wrote it
    for part in ("layers", "runs", "curves"):
        file = companion(table, part)
        note = runs.read_metadata(file)
        del note["rows"][CONFIGS]
        runs.write_table(file, pq.read_table(file), note)
    code, out, err = lnjac("command", table, name)
    assert (code, out) == (1, "")
    assert err == (
        f"lnjac: {table} does not hold the configs of its runs: merge them again by `lnjac merge FOLDER -o {table}`\n"
    )
    merge([table, tmp_path / "runs"], tmp_path / "both.parquet")
    assert lnjac("command", tmp_path / "both.parquet", name)[1].startswith("python run.py seed=2\n")


def test_a_run_of_another_loop_shows_its_config(lnjac: Any, tmp_path: Path) -> None:
    with record(tmp_path / "a", config={"width": 8, "parts": ["x"]}, seed=3) as run:
        run.scalars(1, train_loss=1.0)
    code, out, _ = lnjac("command", tmp_path / "a", "")
    assert code == 0
    shown, _, comments = out.partition("\n# ")
    assert json.loads(shown) == {"width": 8, "parts": ["x"], "seed": 3}
    assert "lnjac knows no command of it" in comments


def test_many_configs_take_little_space(tmp_path: Path) -> None:
    config = identity.to_dict(compose("diagnostics=full"))
    row = pa.table({"run_id": ["r"], "diag_id": ["d"]})
    rows = [of_runs(row, [{"config": config | {"seed": seed, "batch_size": seed % 97}}]) for seed in range(3000)]
    path = tmp_path / "all.configs.parquet"
    runs.write_table(path, pa.concat_tables(rows).combine_chunks(), {"table": CONFIGS})
    assert path.stat().st_size < 60 * 3000
