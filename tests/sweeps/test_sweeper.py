"""Sweeps as a user meets them: checked, resumed, killed, on full disks; with the default launcher unless said otherwise."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf, open_dict
from support.commands import TINY, assert_ends_well_without_a_reader, command
from support.paths import ROOT
from support.sweeping import folders, one_job_fails, science, started, sweeper_of, wait_for, workers

from lnjac.config import compose
from lnjac.config import identity as config_identity
from lnjac.config.compose import CONF, Composer, RunComposer
from lnjac.runs import folder as runs
from lnjac.sweeps import jobs, protocol, sweeper
from lnjac.sweeps.grid import grid
from lnjac.sweeps.launchers import engine
from lnjac.sweeps.protocol import Start

PROCESSES = "hydra.launcher.jobs=2"
LAUNCHERS = ["basic", pytest.param("local", marks=pytest.mark.rare)]
SIGNALS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.rare)]


@pytest.mark.parametrize("words", [
    ["seed=1", "attn_mode=sigmoid", "attn_mode.bias=-2.0"],
    ["+experiment=width_sweep", "model.n_embd=64", "steps=${batch_size}"],
    ["data=text", "data.files=[a,b]", "seed=3"],
    ["hydra.launcher.jobs=2", "seed=2"],
    ["~save_model", "+more=1", "seed=1"],
])  # fmt: skip
def test_jobs_are_composed_as_hydra_composes_them(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    sweeper = sweeper_of()
    loader, master = sweeper.hydra_context.config_loader, sweeper.config
    composer = RunComposer(loader, lambda words: loader.load_sweep_config(master, words))
    for _ in range(2):  # the second time from what is known
        one = sweeper._full(SimpleNamespace(composed=composer.compose(words), folder=Path("a-b"), start=Start()))
        other = loader.load_sweep_config(master, words)
        with open_dict(other):
            other.hydra.sweep.subdir = "a-b"
        plain = [OmegaConf.to_container(config, resolve=False) for config in (one, other)]
        assert plain[0] == plain[1]
    with pytest.raises(Exception, match="nosuch"):
        composer.compose([*words, "method=nosuch"])


@pytest.mark.slow
def test_a_sweep_checks_runs_and_merges(tmp_path: Path) -> None:
    done = command("-m", *TINY, "attn_mode=softmax,sigmoid", "seed=1,2", "sweep=A", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "multirun" / "A"
    layers = pd.read_parquet(out / "all.parquet")
    assert set(layers["attn_mode"]) == {"softmax", "sigmoid"}
    assert layers.groupby("run_id").size().tolist() == [5] * 4
    while_running, tables = done.stdout.split("runs found")
    assert tables.count("AVG: the plain mean") == 4
    assert re.search(r"\[4/4\] done, validation loss \d\.\d{4}, after", while_running)
    logs = [path.parent.name.split("-")[0] for path in out.glob("*/run.log") if path.stat().st_size]
    assert sorted(logs) == sorted(layers["run_id"].unique())


@pytest.mark.slow
def test_the_same_sweep_again_runs_what_is_missing(tmp_path: Path) -> None:
    words = ("-m", *TINY, "sweep=A", "hydra/launcher=basic")
    command(*words, "seed=1,2", cwd=tmp_path)
    out = tmp_path / "multirun" / "A"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    dry = command(*words, "seed=1,2,3,3", "dry_run=true", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    for said in ("1 of 4 jobs are the same run", "3 jobs: 1 to do (2 done)", "of computing", "nothing was started"):
        assert said in dry.stdout
    assert len(folders(out)) == 2
    again = command(*words, "seed=1,2,3,3", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert set(pd.read_parquet(out / "all.runs.parquet")["seed"]) == {1, 2, 3}
    lost = folders(out)[2] / runs.MODEL
    lost.unlink()
    whole = command(*words, "seed=1,2,3", cwd=tmp_path)
    assert "3 jobs: 0 to do (3 done)" in whole.stdout
    assert f"{lost.parent.name}: {runs.MODEL} is missing; the rows are whole" in whole.stdout
    assert whole.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_damaged_run_is_named_and_made_again(tmp_path: Path, launcher: str) -> None:
    words = ("-m", *TINY, "seed=1,2,3,4,5", "sweep=A", f"hydra/launcher={launcher}")
    command(*words, cwd=tmp_path)
    out = tmp_path / "multirun" / "A"
    before, by_seed = science(out / "all.parquet"), folders(out)
    file = {seed: by_seed[seed] / runs.FILES["layers"] for seed in by_seed}
    content = bytearray(file[1].read_bytes())
    file[1].write_bytes(content[: len(content) // 2])  # truncated
    file[2].write_bytes(b"")  # empty
    content = bytearray(file[3].read_bytes())
    content[len(content) // 3] ^= 1  # a flipped bit
    file[3].write_bytes(content)
    pd.DataFrame({"a": [1]}).to_parquet(file[4])  # another program's
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "5 jobs: 4 to do (4 broken, 1 done)" in again.stdout
    for seed in (1, 2, 3, 4):
        assert f"{by_seed[seed].name}: run again: broken layers.parquet" in again.stdout
    for one, other in zip(before, science(out / "all.parquet"), strict=True):
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.slow
def test_a_sweep_with_bad_jobs_starts_none_and_lists_all(tmp_path: Path) -> None:
    done = command("-m", *TINY, "model.n_embd=32,33,35", "sweep=A", cwd=tmp_path)
    assert done.returncode != 0
    assert "2 of 3 jobs cannot run; none was started" in done.stderr
    assert "model.n_embd=33 is not divisible" in done.stderr
    assert "model.n_embd=35 is not divisible" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "multirun").exists()


def members(folder: Path, **files: str) -> str:
    """A folder for --config-dir with these members of attn_mode."""
    (folder / "own" / "attn_mode").mkdir(parents=True)
    for name, text in files.items():
        (folder / "own" / "attn_mode" / f"{name}.yaml").write_text(text)
    return str(folder / "own")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "basic"])
def test_a_member_may_be_called_nan(tmp_path: Path, launcher: str) -> None:
    own = members(tmp_path, nan="_target_: lnjac.gpt.attention.Softmax\n")
    words = ("-m", *TINY, "attn_mode=softmax,nan", "seed=1", "sweep=A", f"hydra/launcher={launcher}")
    done = command("--config-dir", own, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")["attn_mode"]) == {"softmax", "nan"}


@pytest.mark.slow
def test_a_bad_member_costs_no_word_about_the_other_jobs(tmp_path: Path) -> None:
    """The job and the file are named for a broken yaml, a label that is typed, a class that is not there."""
    softmax = "_target_: lnjac.gpt.attention.Softmax\n"
    own = members(tmp_path, broken="_target_: [\n", typed=softmax + "name: softmax\n", gone="_target_: gone.X\n")
    done = command("--config-dir", own, "-m", *TINY, "attn_mode=softmax,broken,typed,gone", "sweep=A", cwd=tmp_path)
    assert done.returncode == 1
    assert "3 of 4 jobs cannot run; none was started" in done.stderr
    lines = done.stderr.splitlines()
    for name, said in (
        ("broken", "broken.yaml, line 2: "),
        ("typed", "attn_mode.name=softmax: "),
        ("gone", "not there, gone"),
    ):
        at = next(i for i, line in enumerate(lines) if f"attn_mode={name} " in line)
        assert said in lines[at + 1]
    assert "Traceback" not in done.stderr
    one = command("--config-dir", own, *TINY, "attn_mode=broken", cwd=tmp_path)
    assert one.returncode == 1
    assert re.fullmatch(r".*broken\.yaml, line 2: .*\n", one.stderr)


def test_a_range_counts_with_the_decimals_that_were_typed() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composer = Composer(GlobalHydra.instance().hydra.config_loader, lambda words: OmegaConf.create())
        for word, values in {
            "range(0.1,0.4,0.1)": [0.1, 0.2, 0.3],
            "range(0,0.7,0.1)": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
            "range(1e-3,4e-3,1e-3)": [1e-3, 2e-3, 3e-3],
            "range(0.3,0,-0.1)": [0.3, 0.2, 0.1],
        }.items():
            assert grid([f"optimizer.lr={word}"], composer) == [[f"optimizer.lr={value}"] for value in values]
        assert grid(["seed=range(1,4)"], composer) == [["seed=1"], ["seed=2"], ["seed=3"]]


@pytest.mark.slow
def test_a_key_that_some_members_lack_comes_with_commands_that_work(tmp_path: Path) -> None:
    words = ("-m", *TINY, "method=bp,fa,nosuch", "method.scale=2", "hydra/launcher=basic")
    done = command(*words, "attn_mode=softmax,sigmoid", cwd=tmp_path)
    assert done.returncode != 0
    assert "4 of 6 jobs cannot run; none was started" in done.stderr
    for mode in ("softmax", "sigmoid"):
        assert f"method=bp method.scale=2 attn_mode={mode}\n  method.scale is not a setting: known: name" in done.stderr
        assert re.search(
            rf"method=nosuch method.scale=2 attn_mode={mode}\n  .*Could not find 'method/nosuch'.* bp ", done.stderr
        )
    advised = [shlex.split(line) for line in done.stderr.splitlines() if line.startswith("  python run.py ")]
    assert [sorted(word for word in line if "method" in word) for line in advised] == [
        ["method=bp"],
        ["method.scale=2", "method=fa"],
    ]
    for line in advised:
        again = command(*(word.replace("NAME", "A") for word in line[2:]), "attn_mode=softmax", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    merged = pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet").set_index("method")
    assert merged.loc["fa", "method.scale"] == 2
    assert sorted(merged.index) == ["bp", "fa"]


@pytest.mark.slow
def test_a_key_that_the_default_member_lacks_is_given_to_those_that_have_it(tmp_path: Path) -> None:
    done = command("-m", *TINY, "method=usf,frsf", "method.uniform=true", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 to do" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2026_11_26", "1e3"])
def test_a_sweeps_name_is_the_text_as_typed(tmp_path: Path, name: str) -> None:
    done = command("-m", *TINY, f"sweep={name}", "hydra/launcher=basic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "multirun").iterdir()] == [name]
    (run,) = folders(tmp_path / "multirun" / name).values()
    assert runs.read_status(run)["status"] == "done"


@pytest.mark.parametrize("name", ["", "  ", ".", "..", "a/../../b", "a/ /b", "/tmp/x", "n" * 300, 20261126, None])
def test_a_sweeps_name_that_names_no_folder_is_refused(name: object) -> None:
    said = "names no folder in multirun/.* sweep=pilot" if isinstance(name, str) else f"in quotes, sweep: '{name}'"
    with pytest.raises(CompactHydraException, match=said):
        sweeper._require_name(name, "sweep")
    sweeper._require_name("a/b c", "sweep")
    sweeper._require_name("n" * 255, "sweep")


@pytest.mark.slow
@pytest.mark.parametrize(("words", "said"), [
    (["sweep="], "sweep='' names no folder"),
    (["hydra.sweep.dir="], "hydra.sweep.dir is empty"),
    (["attn_mode=glob(zz*)"], "the sweep has no jobs"),
    (["sweep=a,b"], "sweep belongs to the sweep as a whole"),
    (["+experiment=original,width_sweep"], "experiment belongs to the sweep as a whole"),
    (["seed=interval(1,2)"], "seed is swept over an interval: use choice(), range() or a list"),
    (["dry_run=perhaps"], "dry_run=perhaps must be true or false"),
    (["sweep=" + "n" * 300], "by parts of at most 255 bytes"),
    (["hydra.launcher.jobs=0"], "hydra.launcher.jobs=0 must be at least 1"),
])  # fmt: skip
def test_a_sweep_that_makes_no_sense_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = command("-m", *TINY, *words, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "multirun").exists()


@pytest.mark.slow
def test_odd_values_work(tmp_path: Path) -> None:
    """Spaces, slashes, equals signs and 300 characters in swept values, and in the sweep's name; a line break, too."""
    names = ["line\nbreak\u202e.txt", "a b=c.txt", "sub/dir=x y.txt", "n" * 150 + "/" + "m" * 150 + ".txt"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{i} the quick brown fox " * 200)
    choice = ",".join(f"'{name}'" for name in names)
    done = command("-m", *TINY, "data=text", f"data.files={choice}", "sweep='x y/z=1'", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pd.read_parquet(tmp_path / "multirun/x y/z=1/all.runs.parquet")["data_sha256"].nunique() == 4
    assert "data.files='line<U+000A>break<U+202E>.txt'" in done.stdout
    assert not {"\u202e", "\x1b"} & set(done.stdout + done.stderr)
    assert "no report" not in done.stdout


@pytest.mark.slow
def test_a_sweep_outlives_the_reader_of_its_output_and_needs_its_folders(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    words = ("-m", *TINY, "seed=1,2", "hydra.launcher.jobs=2", "hydra/launcher=local")
    assert_ends_well_without_a_reader(*words, "sweep=A", cwd=tmp_path)
    assert len(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")) == 2
    names = sorted(path.name for path in folders(tmp_path / "multirun" / "A").values())
    (tmp_path / "multirun" / "B").touch()
    (tmp_path / "multirun" / "C").mkdir()
    (tmp_path / "multirun" / "C" / names[0]).touch()
    for name, folder in (("B", "B"), ("C", f"C/{names[0]}")):
        done = command(*words, f"sweep={name}", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"nothing can be written in the folder multirun/{folder} (File exists): set sweep"
        )
        assert "Traceback" not in done.stderr
    runs.claimed(tmp_path / "multirun" / "C" / names[1]).release()  # free
    assert not (tmp_path / "multirun" / "C" / "all.parquet").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failed_job_does_not_lose_the_others(tmp_path: Path, launcher: str) -> None:
    one_job_fails(tmp_path, f"hydra/launcher={launcher}")


LONG = (
    "model=tiny",
    "steps=150",
    "eval.tokens=500",
    "threads=1",
    "sweep=A",
    "report=off",
    "hydra/launcher=local",
    PROCESSES,
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the workers")
def test_a_killed_worker_costs_only_its_own_run(tmp_path: Path) -> None:
    process = started(tmp_path, *LONG, "seed=1,2,3")
    wait_for(lambda: workers(tmp_path))
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "1 of 3 jobs failed" in err
    assert "killed by SIGKILL" in err
    assert "FAILED" in out
    merged = tmp_path / "multirun/A/all.runs.parquet"
    assert len(pd.read_parquet(merged)) == 2
    failed = [path for path in (tmp_path / "multirun/A").iterdir() if runs.read_status(path).get("status") == "failed"]
    assert len(failed) == 1
    assert command("-m", *LONG, "seed=1,2,3", cwd=tmp_path).returncode == 0
    assert set(pd.read_parquet(merged)["seed"]) == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_sweep_told_to_stop_merges_and_goes_on_later(tmp_path: Path, number: int) -> None:
    process = started(tmp_path, *LONG, "seed=1,2,3,4")
    merged = tmp_path / "multirun/A/all.runs.parquet"
    logs = merged.parent.glob
    wait_for(lambda: sum("step 15/150" in path.read_text() for path in logs("*/run.log")) >= 3)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted" in err
    assert "Traceback" not in out + err
    assert 1 <= len(pd.read_parquet(merged)) < 4
    again = command("-m", *LONG, "seed=1,2,3,4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert set(pd.read_parquet(merged)["seed"]) == {1, 2, 3, 4}
    assert any("goes on from the checkpoint" in path.read_text() for path in merged.parent.glob("*/run.log"))


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [1.0, 2.5])
def test_ctrl_c_while_starting_is_one_line(tmp_path: Path, after_s: float) -> None:
    process = started(tmp_path, *LONG, "seed=1,2,3")
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to every process of the command
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in out + err
    assert err.count("interrupted") == 1


@pytest.mark.slow
def test_ctrl_c_while_hydra_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise KeyboardInterrupt\n")
    done = command("-m", *LONG, "seed=1,2,3", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "interrupted\n"


@pytest.mark.rare
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the workers")
def test_sigkill_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """While it makes runs, the whole sweep is killed outright, up to five times; then the same command finishes it."""
    words = ("model=tiny", "steps=150", "eval.tokens=500", "threads=1", "sweep=A", "checkpoint.every=0.2",
             "attn_mode=softmax,sigmoid", "seed=1,2,3", "hydra/launcher=local", PROCESSES)  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    assert command("-m", *words, cwd=whole).returncode == 0
    rng, cut, n_killed = random.Random(0), tmp_path / "cut", 0
    cut.mkdir()
    while n_killed < 5:
        process = started(cut, *words)
        wait_for(lambda process=process: workers(cut) or process.poll() is not None)
        if process.poll() is not None:  # no run was left
            break
        time.sleep(rng.uniform(0, 2))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        n_killed += 1
        wait_for(lambda: not workers(cut))
    assert n_killed > 2
    done = command("-m", *words, cwd=cut)
    assert done.returncode == 0, done.stderr
    for one, other in zip(*(science(path / "multirun/A/all.parquet") for path in (whole, cut)), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.rare
def test_two_sweeps_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    both = [started(tmp_path, *TINY, "seed=1,2", "hydra/launcher=basic") for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    merged = list((tmp_path / "multirun").rglob("all.parquet"))
    assert len(merged) == 2
    assert all(len(pd.read_parquet(path)) == 10 for path in merged)


@pytest.mark.rare
@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_a_sweep_waits_for_what_another_command_runs(tmp_path: Path, number: int) -> None:
    first = started(tmp_path, *LONG, "seed=1")
    out = tmp_path / "multirun" / "A"
    wait_for(lambda: any("step 15/150" in path.read_text() for path in out.glob("*/run.log")))
    os.kill(first.pid, signal.SIGSTOP)
    second = started(tmp_path, *LONG, "seed=1")
    assert second.stdout
    said = ""
    while "waiting for another command to end 1 of these jobs" not in said:
        line = second.stdout.readline()
        assert line, said + second.communicate()[1]
        said += line
    assert not (out / "all.parquet").exists()
    os.kill(first.pid, number)
    rest, err = second.communicate(timeout=120)
    first.communicate(timeout=60)
    if number == signal.SIGCONT:
        assert second.returncode == 0, err
        assert "1 of 1 runs found" in rest
        assert set(pd.read_parquet(out / "all.runs.parquet")["seed"]) == {1}
    else:
        assert second.returncode != 0
        assert "1 of 1 jobs failed" in err
        assert "seed=1: the other command left it unfinished: run this one again" in err
        assert command("-m", *LONG, "seed=1", cwd=tmp_path).returncode == 0


def test_a_job_that_another_command_has_just_begun_has_not_failed(tmp_path: Path) -> None:
    identity = {"run_id": "r", "diag_id": "d"}
    job = jobs.Job("seed=1", ["seed=1"], OmegaConf.create(), protocol.Planned(identity, {}), tmp_path)
    other = runs.RunFolder(job.folder, identity)  # no status yet
    jobs.settle(job, "being written by another process")
    assert job.state.name == runs.RUNNING
    other.release()
    jobs.settle(job, "killed")
    assert (job.state.name, job.state.reason) == (runs.FAILED, "killed")


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_earlier_rows_stay(tmp_path: Path) -> None:
    words = ("-m", *TINY, "sweep=A", "hydra/launcher=basic")
    command(*words, "seed=1", cwd=tmp_path)
    merged = tmp_path / "multirun/A/all.parquet"
    before = merged.read_bytes()
    code = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); sys.argv = sys.argv[1:]; " \
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    full = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "run.py"), *words, "seed=1,2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert full.returncode != 0
    assert "1 of 2 jobs failed" in full.stderr
    assert re.search(r"File too large|No space left", full.stderr)
    assert merged.read_bytes() == before
    assert command(*words, "seed=1,2", cwd=tmp_path).returncode == 0
    assert set(pd.read_parquet(merged)["seed"]) == {1, 2}


@pytest.mark.slow
def test_original_sweeps_both_modes_without_being_told(tmp_path: Path) -> None:
    done = command("+experiment=original", "data=play", *TINY, "sweep=A", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(pd.read_parquet(tmp_path / "multirun/A/all.runs.parquet")["attn_mode"]) == {"softmax", "sigmoid"}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_without_its_extra_names_it(tmp_path: Path, launcher: str, package: str) -> None:
    done = command("-m", *TINY, f"hydra/launcher={launcher}", cwd=tmp_path, env=without(tmp_path, package))
    assert done.returncode != 0
    assert f"[{launcher}]" in done.stderr
    assert "Traceback" not in done.stderr


def without(folder: Path, package: str) -> dict[str, str]:
    """An environment in which the package cannot be imported."""
    (folder / "broken").mkdir()
    (folder / "broken" / f"{package}.py").write_text("raise ImportError('not installed')\n")
    return {**os.environ, "PYTHONPATH": str(folder / "broken")}


@pytest.mark.slow
def test_a_sweep_writes_its_report_and_does_not_fail_for_want_of_one(tmp_path: Path):
    pytest.importorskip("altair", reason="the extra [report] is not installed")
    words = ("-m", *TINY, "seed=1,2", "sweep=A")
    done = command(*words, "report=auto", cwd=tmp_path)
    folder = tmp_path / "multirun" / "A"
    assert done.returncode == 0
    assert "The validation loss after 4 updates is " in done.stdout
    assert "report.html shows this sweep in a browser" in done.stdout
    assert "2 runs" in (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()  # where no file can be put
    (folder / "report.html" / "x").touch()
    done = command(*words, "seed=1,2,3", "report=auto", cwd=tmp_path)
    assert done.returncode == 0
    assert "no report: " in done.stdout + done.stderr
    done = command(*words, "report=sometimes", cwd=tmp_path)
    assert done.returncode == 1
    assert "report=sometimes must be auto or off" in done.stderr


def test_a_full_gpu_names_the_remedy() -> None:
    job = JobReturn(status=JobStatus.FAILED)
    job.return_value = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "hydra.launcher.jobs=1" in engine.reason(job)


def test_a_job_is_planned_as_the_run_that_it_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)  # the corpus
    one = sweeper_of()
    (job,) = one._admitted([["model=tiny", "seed=3"]], tmp_path)
    settings = compose.compose("model=tiny", "seed=3")
    run_id = config_identity.run_id(settings, settings.data.load().sha256)
    assert job.folder == tmp_path / f"{run_id}-{config_identity.diag_id(settings)}"
    assert job.plan.identity["run_id"] == run_id
    assert job.plan.columns == config_identity.column_values(settings)


def test_the_hardware_of_other_machines_is_not_checked_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    one = sweeper_of()
    words = [["model=tiny", "threads=100000"]]
    with pytest.raises(CompactHydraException, match="threads=100000 is more than this machine's"):
        one._admitted(words, tmp_path)
    one.launcher = SimpleNamespace(elsewhere=True)
    assert len(one._admitted(words, tmp_path)) == 1
