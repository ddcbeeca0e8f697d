"""The command: its texts, its exit codes, and that it starts fast and without torch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.folders import make_run
from support.paths import ROOT

import lnjac as package
from lnjac.columns import Column
from lnjac.runs import folder as runs
from lnjac.runs import merge as sweep


def numbered(step: int, site: str) -> dict[str, float]:
    """A norm's row: r_mean is a thousandth of the step, and a tenth more at the last norm."""
    return {"r_mean": step / 1000 + 0.1 * (site == "ln_f"), "r_radial": math.nan}


def numbered_run(folder: Path, seed: int = 1, **more: Any) -> Path:
    """A run of two norms, run_id abc1, whose printed numbers are round."""
    losses = {"val_loss_nats": 1.5, "unigram_nats": 3.0, "bigram_nats": 2.0}
    return make_run(
        folder,
        seed=seed,
        run_id=f"abc{seed}",
        sites=("blocks.0.ln_1", "ln_f"),
        config=[(Column("attn_mode.bias", "bool", "", ""), True)],
        layers=numbered,
        run=losses | more.pop("run", {}),
        **more,
    )


# Starting


def test_reading_code_never_imports_torch():
    code = "import lnjac.cli.main, lnjac.runs.merge, lnjac.text, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("command", "said", "slow"), [
    (["-m", "lnjac"], "merge", {"hydra", "omegaconf"}),
    ([ROOT / "run.py"], "attn_mode: linear, relu, sigmoid, softmax", set()),
])  # fmt: skip
def test_help_waits_for_no_heavy_import(command: list[str], said: str, slow: set[str]):
    words = [sys.executable, "-X", "importtime", *command, "--help"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert said in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "json" in imported
    assert not imported & {"torch", "pandas", "scipy", "statsmodels", "matplotlib", "altair", *slow}


def test_a_user_error_is_one_line_and_exit_code_1(tmp_path: Path):
    words = [sys.executable, "-m", "lnjac", "merge", str(tmp_path / "nope"), "-o", "x.parquet"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"lnjac: {tmp_path / 'nope'} does not exist\n"


@pytest.mark.parametrize("words", [
    ["show", "run"],
    *(pytest.param(words, marks=pytest.mark.slow) for words in (
        ["--help"], ["merge", "run", "-o", "all.parquet"], ["compare", "one.parquet", "--by", "seed"]))
])  # fmt: skip
def test_a_reader_that_leaves_ends_no_command_with_a_traceback(tmp_path: Path, words: list[str]):
    sweep.merge([numbered_run(tmp_path / "run"), numbered_run(tmp_path / "other", 2)], tmp_path / "one.parquet")
    line = [sys.executable, "-m", "lnjac", *words]
    whole = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.close()  # what `| head -1` does, and no write can come before it
    assert process.stderr
    assert process.stderr.read() == whole.stderr
    assert process.wait() == whole.returncode


def test_an_output_of_another_encoding_keeps_numbers_and_json_whole(tmp_path: Path):
    numbered_run(tmp_path / "σ−run")

    def show(*more: str) -> str:
        line = [sys.executable, "-m", "lnjac", "show", "σ−run", *more]
        env = os.environ | {"PYTHONIOENCODING": "ascii"}
        return subprocess.run(line, cwd=tmp_path, env=env, check=True, capture_output=True, encoding="ascii").stdout

    assert "sigma_mu" in show()
    assert json.loads(show("--json"))["run"]["seed"] == 1


def test_the_version_is_one_line(lnjac: Any):
    assert lnjac("--version") == (0, f"lnjac {package.__version__}\n", "")


@pytest.mark.parametrize("command", ["merge", "show", "diff"])
def test_every_command_has_help_with_an_example(lnjac: Any, command: str):
    code, text, _ = lnjac(command, "--help")
    assert code == 0
    assert "Example:" in text
    assert f"\n      lnjac {command}" in text


def test_a_bug_is_not_dressed_up_as_a_user_error(lnjac: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lnjac.runs.diff.diff", lambda *_: int("bug"))
    with pytest.raises(ValueError, match="bug"):
        lnjac("diff", "a", "b")


# merge


def test_merge_says_what_it_did(lnjac: Any, tmp_path: Path):
    numbered_run(tmp_path / "s" / "0", 1)
    numbered_run(tmp_path / "s" / "1", 2, status="running")
    out = tmp_path / "all.parquet"
    code, text, err = lnjac("merge", tmp_path / "s", "-o", out)
    assert (code, err) == (0, "")
    assert text.splitlines() == [
        f"{out}: 1 of 2 runs found, 4 rows of layers, 1 rows of runs, 3 rows of curves",
        f"skipped {tmp_path / 's' / '1'}: running",
    ]
    code, text, err = lnjac("merge", tmp_path / "s", out, "-o", out, "--json")
    assert json.loads(text)["duplicates"]["runs"] == 1
    assert json.loads(text) == json.loads(out.with_suffix(".merge.json").read_text())


def test_merge_strict_and_rtol(lnjac: Any, tmp_path: Path):
    numbered_run(tmp_path / "s" / "0", 1)
    numbered_run(tmp_path / "s" / "1", 1, run={"val_loss_nats": 1.5001})
    out = tmp_path / "all.parquet"
    code, text, err = lnjac("merge", tmp_path / "s", "-o", out)
    assert (code, text) == (1, "")
    assert err.startswith(f"lnjac: {tmp_path / 's' / '0'} and {tmp_path / 's' / '1'} both hold")
    assert lnjac("merge", tmp_path / "s", "-o", out, "--rtol", 0.01)[0] == 0
    numbered_run(tmp_path / "s" / "2", 2, status="running")
    code, text, err = lnjac("merge", tmp_path / "s", "-o", tmp_path / "strict.parquet", "--rtol", 0.01, "--strict")
    assert (code, text) == (1, "")
    assert err.splitlines() == [
        "lnjac: strict: no run may be skipped",
        f"lnjac: {tmp_path / 's' / '2'}: running",
    ]
    assert not (tmp_path / "strict.parquet").exists()


def test_merge_refuses_a_bad_output_name(lnjac: Any, tmp_path: Path):
    code, _, err = lnjac("merge", numbered_run(tmp_path / "0"), "-o", tmp_path / "all.csv")
    assert code == 1
    assert err.count("\n") == 1
    assert "must end in .parquet" in err


def test_a_bar_is_drawn_on_a_terminal_only(lnjac: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tqdm.auto

    seen: list[tuple[int, int]] = []
    real = tqdm.auto.tqdm.update

    def spy(self: Any, n: int) -> None:
        real(self, n)
        seen.append((self.n, self.total))

    monkeypatch.setattr(tqdm.auto.tqdm, "update", spy)
    words = ("merge", numbered_run(tmp_path / "0"), "-o", tmp_path / "all.parquet")
    assert lnjac(*words)[0] == 0
    assert seen == []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, text, _ = lnjac(*words)
    assert (code, seen) == (0, [(1, 1)])
    assert len(text.splitlines()) == 1
    numbered_run(tmp_path / "1", seed=2)
    assert lnjac("compare", tmp_path / "0", tmp_path / "1", "--by", "seed")[0] == 1  # once both are read
    assert seen[1:] == [(2, 2)]


# show


def test_show_prints_the_last_step(lnjac: Any, tmp_path: Path):
    code, text, err = lnjac("show", numbered_run(tmp_path / "0"))
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert (
        lines[0]
        == "seed=1 attn_mode=softmax data=play | done | val loss 1.5000, unigram 3.0000, bigram 2.0000 nats/token"
    )
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["name", "r_mean", "r_rad"],
        ["blocks.0.ln_1", "0.1000", "-"],
        ["ln_f", "0.2000", "-"],
        ["AVG", "0.1500", "-"],
    ]
    assert lines[-1].startswith("AVG: the plain mean of the norms")


def test_show_another_step(lnjac: Any, tmp_path: Path):
    folder = numbered_run(tmp_path / "0")
    assert "ln_f           0.1000" in lnjac("show", folder, "--step", 0)[1]
    code, _, err = lnjac("show", folder, "--step", 5)
    assert (code, err) == (1, f"lnjac: {folder} was not measured at step 5: choose one of 0, 100\n")


def test_show_as_json(lnjac: Any, tmp_path: Path):
    folder = numbered_run(tmp_path / "0", status="diverged", run={"diverged_step": 9, "val_loss_nats": math.inf})
    code, text, _ = lnjac("show", folder, "--json", "--step", 100)
    found = json.loads(text, parse_constant=pytest.fail)
    assert code == 0
    assert [(row["site"], row["r_mean"], row["r_radial"]) for row in found["layers"]] == [
        ("blocks.0.ln_1", 0.1, None),
        ("ln_f", 0.2, None),
    ]
    assert {key: found["run"][key] for key in ("status", "val_loss_nats", "attn_mode.bias", "seed")} == {
        "status": "diverged",
        "val_loss_nats": "inf",
        "attn_mode.bias": True,
        "seed": 1,
    }


def test_show_a_diverged_run_and_one_without_diagnostics(lnjac: Any, tmp_path: Path):
    folder = numbered_run(
        tmp_path / "0", status="diverged", run={"diverged_step": 9, "val_loss_nats": math.nan}, steps=()
    )
    code, text, _ = lnjac("show", folder)
    assert code == 0
    assert "| diverged at step 9 | val loss -," in text
    assert text.endswith("no norms were measured\n")


@pytest.mark.parametrize(
    ("state", "more", "said"),
    [("running", {}, "running"), ("failed", {"error": "out of\nmemory"}, "failed: out of memory")],
)
def test_show_an_unfinished_run_says_why(lnjac: Any, tmp_path: Path, state: str, more: dict[str, str], said: str):
    folder = numbered_run(tmp_path / "0")
    runs.RunFolder(folder, {}).status(state, **more)
    assert lnjac("show", folder) == (1, "", f"lnjac: {folder}: {said}\n")


def test_show_a_sweep_lists_the_runs_to_choose_from(lnjac: Any, tmp_path: Path):
    numbered_run(tmp_path / "0", 1)
    assert lnjac("show", tmp_path)[0] == 0  # the only run in there
    numbered_run(tmp_path / "1", 2)
    code, _, err = lnjac("show", tmp_path)
    assert code == 1
    assert err == f"lnjac: {tmp_path} holds 2 runs: choose one by --run from abc1, abc2\n"
    assert lnjac("show", tmp_path, "--run", "abc2") == lnjac("show", tmp_path / "1")
    error = f"lnjac: the run_id of no runs in {tmp_path} starts with 0: choose one by --run from abc1, abc2\n"
    assert lnjac("show", tmp_path, "--run", 0) == (1, "", error)
    error = f"lnjac: the run_id of 2 runs in {tmp_path} starts with a: choose one by --run from abc1, abc2\n"
    assert lnjac("show", tmp_path, "--run", "a") == (1, "", error)


def test_show_tells_one_runs_diagnostics_apart(lnjac: Any, tmp_path: Path):
    numbered_run(tmp_path / "0", diag_id="final", steps=(100,))
    numbered_run(tmp_path / "1", diag_id="often")
    out = tmp_path / "all.parquet"
    lnjac("merge", tmp_path, "-o", out)
    assert lnjac("show", out)[2].endswith("from abc1/final, abc1/often\n")
    assert lnjac("show", out, "--run", "abc1/often", "--step", 0)[0] == 0
    assert lnjac("show", out, "--run", "abc1/final", "--step", 0)[0] == 1


def test_show_a_merged_file_asks_for_one_of_its_runs(lnjac: Any, tmp_path: Path):
    numbered_run(tmp_path / "0", 1)
    numbered_run(tmp_path / "1", 2)
    out = tmp_path / "all.parquet"
    lnjac("merge", tmp_path, "-o", out)
    assert lnjac("show", out) == (1, "", f"lnjac: {out} holds 2 runs: choose one by --run from abc1, abc2\n")
    assert lnjac("show", out, "--run", "abc2")[1] == lnjac("show", tmp_path / "1")[1]
    code, _, err = lnjac("show", out, "--run", "zzz")
    said = f"lnjac: the run_id of no runs in {out} starts with zzz: choose one by --run from abc1, abc2\n"
    assert (code, err) == (1, said)


def test_show_a_folder_brought_home_is_its_merged_table(lnjac: Any, tmp_path: Path):
    out = tmp_path / "home" / "all.parquet"
    lnjac("merge", numbered_run(tmp_path / "0"), "-o", out)
    code, text, err = lnjac("show", out.parent)
    assert (code, err) == (0, f"lnjac: {out.parent} holds no run folders: its merged table {out} is read\n")
    assert text == lnjac("show", tmp_path / "0")[1]


@pytest.mark.parametrize("name", ["nope", "empty", "text.parquet"])
def test_show_what_is_no_run_is_one_line(lnjac: Any, tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no table")
    code, text, err = lnjac("show", tmp_path / name)
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert err.startswith("lnjac: ")
    assert name in err
