"""The commands compare, cost, scaling and diff: their tables, their JSON, their files and their exit codes."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
from support.folders import make_run, noise
from support.tables import COSTS, NULLS, TWO_MODES, run, study
from typer.testing import CliRunner

from lnjac.cli import main as cli
from lnjac.cli import options, tables
from lnjac.comparing import intervals as stats
from lnjac.runs import folder as runs

RUNNER = CliRunner()


def call(*words: object) -> str:
    """What the command prints; it must succeed."""
    done = RUNNER.invoke(cli.app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def below(*words: object) -> str:
    """What the command prints below the sentences, which end in an empty line."""
    return call(*words).split("\n\n", 1)[1]


@pytest.fixture
def modes(tmp_path: Path) -> Path:
    return study(tmp_path, TWO_MODES).path


def test_compare_prints_one_line_a_norm(modes: Path):
    lines = below("compare", modes, "--by", "attn_mode", "--metric", "radial_share").splitlines()
    assert lines == [
        "radial_share",
        "site           softmax  sigmoid  difference      95% interval  effect  p adj.  n",
        "blocks.0.ln_1  0.38333  0.28333         0.1  -0.0242 to 0.224       2    0.15  3",
        "ln_f           0.76667  0.56667         0.2  -0.0484 to 0.448       2    0.15  3",
        "",
        "- paired by seed, 95% t interval",
        "- p adjusted by Holm's method over the 2 p values of one metric in one cell (all norms, all pairs of levels); "
        "never over metrics or cells",
    ]


def test_agreement_stands_where_an_interval_would(tmp_path: Path):
    rows = [
        run(seed, loss + 2.0**-52 * (mode == "sigmoid"), [seed / 8 + 0.5 * (mode == "softmax"), 0.1], attn_mode=mode)
        for mode in ("softmax", "sigmoid")
        for seed, loss in ((1, 1.2), (2, 1.3), (3, 1.1))
    ]
    path = study(tmp_path, rows).path
    lines = below("compare", path, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats").splitlines()
    assert lines[1].split()[-5:] == ["interval", "effect", "p", "adj.", "n"]
    assert lines[2].split()[-5:] == ["0", "identical", "-", "-", "3"]
    text = below("compare", path, "--by", "attn_mode", "--metric", "radial_share")
    assert text.splitlines()[2].split()[3:] == ["0.5", "the", "same", "in", "every", "seed", "-", "-", "3"]
    found = json.loads(call("compare", path, "--by", "attn_mode", "--metric", "radial_share", "--json"))["rows"][0]
    assert (found["agreement"], found["p"], found["effect"]) == ("the same in every seed", None, None)


def test_the_answer_in_words_comes_first_and_is_wrapped(modes: Path, monkeypatch: pytest.MonkeyPatch):
    words = ("compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats")
    (sentence, *more) = json.loads(call(*words, "--json"))["verdict"]
    assert sentence.startswith("The validation loss is not shown to differ between softmax and sigmoid")
    assert " ".join([sentence, *more]) == " ".join(call(*words).split("\n\n")[0].splitlines())
    for columns in (40, 60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, call(*words).split("\n\n")[0].splitlines())) <= columns


def test_a_margin_judges_each_difference(modes: Path):
    words = ("compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats", "--margin")
    for margin, judged in ((0.5, "undecided"), (2.0, "equivalent"), (0.1, "different")):
        head, line = below(*words, margin).splitlines()[1:3]
        assert head.split()[-2:] == ["margin", f"{margin:g}"]
        assert line.split()[-1] == judged
        found = json.loads(call(*words, margin, "--json"))
        assert found["rows"][0]["equivalence"] == judged
        assert any(f"a margin of {margin:g} nats" in line and judged in line for line in found["verdict"])
    done = RUNNER.invoke(cli.app, list(map(str, (*words, -1))))
    assert "--margin -1" in str(done.exception)


def test_every_seed_on_request(modes: Path):
    text = below("compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats", "--seeds")
    assert text.splitlines()[:5] == [
        "val_loss_nats",
        "a − b              softmax  sigmoid  difference    95% interval  effect  p adj.  n",
        "softmax − sigmoid   3.8333   2.8333           1  -0.242 to 2.24       2   0.074  3",
        "  seed 1                 3        2           1",
        "  seed 2               3.5        3         0.5",
    ]


def test_json_has_no_nan_and_the_numbers_of_the_library(modes: Path):
    text = call("compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats", "--json", "--seeds")
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["rows"][0]["difference"] == pytest.approx(1.0)
    assert [seed["difference"] for seed in found["seeds"]] == pytest.approx([1.0, 0.5, 1.5])
    assert found["rows"][0]["family"] == 1
    assert found["notes"][0] == "paired by seed, 95% t interval"
    assert "over the 1 p value of one metric in one cell" in found["notes"][1]
    one = call(
        "compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats", "--json", "--where", "seed==1"
    )
    assert json.loads(one, parse_constant=pytest.fail)["rows"][0]["low"] is None


@pytest.mark.parametrize("suffix", ["csv", "md", "tex", "parquet"])
def test_exports(modes: Path, tmp_path: Path, suffix: str):
    out = tmp_path / f"x.{suffix}"
    call("compare", modes, "--by", "attn_mode", "--metric", "radial_share", "-o", out)
    if suffix == "parquet":
        assert pd.read_parquet(out)["difference"].tolist() == pytest.approx([0.1, 0.2])
    elif suffix == "csv":
        assert pd.read_csv(out)["difference"].tolist() == pytest.approx([0.1, 0.2])
    else:
        lines = out.read_text().splitlines()
        assert [line for line in lines if "ln_f" in line or r"ln\_f" in line]
        assert len({line.count("|" if suffix == "md" else "&") for line in lines if "&" in line or "|" in line}) == 1
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_seeds_are_exported_on_request_into_a_folder_that_is_made(modes: Path, tmp_path: Path):
    out = tmp_path / "new" / "x.csv"
    call("compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats", "--seeds", "-o", out)
    assert pd.read_csv(out)["difference"].tolist() == pytest.approx([1.0, 0.5, 1.5])


@pytest.mark.parametrize(("confidence", "said"), [("0.999", "99.9%"), ("0.975", "97.5%"), ("0.9", "90%")])
def test_the_confidence_is_said_as_it_is(modes: Path, confidence: str, said: str):
    text = call("compare", modes, "--by", "attn_mode", "--metric", "radial_share", "--confidence", confidence)
    assert f"{said} interval" in text
    assert f"{said} t interval" in text


def test_costs_are_not_compared_by_the_backward(modes: Path):
    done = RUNNER.invoke(cli.app, ["cost", str(modes), "--by", "ln_backward"])
    assert done.exit_code == 1
    assert "give the factor" in str(done.exception)


def test_an_unknown_export_is_refused_before_anything_is_printed(modes: Path, tmp_path: Path):
    done = RUNNER.invoke(cli.app, ["compare", str(modes), "--by", "attn_mode", "-o", str(tmp_path / "x.xlsx")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "must end in one of .csv, .md, .tex, .parquet" in str(done.exception)


def test_cost_shows_losses_costs_and_their_difference(tmp_path: Path):
    rows = [row | {"val_loss_nats": row["val_loss_nats"] + 0.1 * row["seed"] * (i % 2)} for i, row in enumerate(COSTS)]
    rows[4] |= {"status": "diverged", "val_loss_nats": math.nan}
    text = below("cost", study(tmp_path, rows).path)
    first, second = text.split("val_loss_nats")[1:]
    head = "attn_mode ln_backward mean exact cost 95% interval effect p adj. n diverged"
    assert " ".join(first.splitlines()[1].split()) == head
    assert [line.split()[:2] for line in first.splitlines()[2:6]] == [
        ["softmax", "center_scale"],
        ["softmax", "center_scale@ln_f"],
        ["sigmoid", "center_scale"],
        ["sigmoid", "center_scale@ln_f"],
    ]
    assert [line.split()[-2:] for line in first.splitlines()[2:4]] == [["1/3", "0/3"], ["0/3", "0/3"]]
    assert " ".join(second.splitlines()[1].split()[:6]) == "ln_backward softmax sigmoid difference of costs"
    found = json.loads(call("cost", tmp_path / "all.parquet", "--json"))
    assert list(found) == ["verdict", "cost", "difference_of_costs"]


def test_scaling_shows_the_means_and_the_slope(tmp_path: Path):
    rows = [run(seed, 9 * (d / 64) ** k, model__n_embd=d) for d in (64, 128) for seed, k in enumerate((-1, -2, -3), 1)]
    words = ("scaling", study(tmp_path, rows).path, "--x", "model.n_embd", "--runs", "--metric", "val_loss_nats")
    text = below(*words)
    assert text.splitlines()[:3] == [
        "val_loss_nats, by model.n_embd",
        "metric         64    128  slope    95% interval  n",
        "val_loss_nats   9  2.625     -2  -4.48 to 0.484  3",
    ]
    seeds = below("scaling", tmp_path / "all.parquet", "--x", "model.n_embd", "--metric", "radial_share", "--seeds")
    assert [line.split()[-1] for line in seeds.splitlines() if "seed" in line][:3] == ["-1", "-2", "-3"]
    found = json.loads(
        call(
            "scaling", tmp_path / "all.parquet", "--x", "model.n_embd", "--runs", "--metric", "val_loss_nats", "--json"
        )
    )
    assert found["slopes"][0]["slope"] == pytest.approx(-2)


def test_scaling_shows_r2_and_curvature_where_lines_have_more_than_two_points(tmp_path: Path):
    rows = [
        run(seed, d ** (0.5 * seed), method=method, method__scale=scale, model__n_embd=d)
        for method, scale in (("bp", math.nan), ("fa", 0.5), ("fa", 2.0))
        for d in (64, 128, 256)
        for seed in (1, 2, 3)
    ]
    path = study(tmp_path, rows).path
    lines = below("scaling", path, "--x", "model.n_embd", "--runs", "--metric", "val_loss_nats", "--seeds").splitlines()
    assert " ".join(lines[1].split()) == (
        "method method.scale 64 128 256 slope 95% interval R² curvature 95% interval n"
    )
    assert " ".join(lines[2].split()) == "bp null 194.7 529.2 1456 1 -0.242 to 2.24 1 0 0 to 0 3"
    for seed, line in enumerate(lines[3:6], 1):
        *numbers, curvature = line.split()
        assert numbers == ["seed", str(seed), f"{seed / 2:g}", "1"]
        assert abs(float(curvature)) < 1e-12
    assert lines[6].split()[:2] == ["fa", "0.5"]


def test_a_missing_level_is_called_null_and_a_moving_column_is_left_open(tmp_path: Path):
    path = study(tmp_path, NULLS).path
    lines = below("compare", path, "--by", "method.scale", "--runs", "--metric", "val_loss_nats").splitlines()
    assert lines[1].split()[:4] == ["model.n_embd", "a", "−", "b"]
    assert [line.split()[1:4] for line in lines[2:5]] == [["2", "−", "0.5"], ["null", "−", "0.5"], ["null", "−", "2"]]
    lines = below(
        "compare", path, "--by", "method.scale", "--runs", "--metric", "val_loss_nats", "--reference", "null"
    ).splitlines()
    assert lines[1].split()[:4] == ["model.n_embd", "method.scale", "mean", "null"]
    rows = [
        row | {"precision": "fp32" if row["method"] == "bp" else "bf16"} for row in NULLS if row["model.n_embd"] == 64
    ]
    rows += [row | {"precision": "fp32"} for row in rows if row["method.scale"] == 2]
    lines = below(
        "compare", study(tmp_path, rows).path, "--by", "method.scale", "--runs", "--metric", "val_loss_nats"
    ).splitlines()
    cells = {" ".join(line.split()[1:4]): line.split()[0] for line in lines[2:5]}
    assert cells == {"2 − 0.5": "bf16", "null − 0.5": "-", "null − 2": "fp32"}


def test_a_terminal_shows_the_headline_in_bold_and_loses_no_character(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    wide = "x" * 300
    found = tables.Grid("t", ["site", "difference"], 1, [["ln_f", "0.5"], [wide, "0.123456789012"]], {1})
    plain = [f"{'site':300}      difference", f"{'ln_f':300}             0.5", f"{wide}  0.123456789012"]
    tables.show([found, "- a note"])
    assert capsys.readouterr().out.splitlines() == ["t", *plain, "", "- a note"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    tables.show([found])
    assert capsys.readouterr().out.splitlines() == ["t", *plain[:2], f"\x1b[1m{plain[2]}\x1b[0m", ""]


@pytest.mark.parametrize("command", ["compare", "cost", "scaling", "diff"])
def test_every_command_has_help_with_an_example(command: str):
    text = call(command, "--help")
    assert "Example:" in text
    assert f"\n      lnjac {command}" in text


def test_intervals_offered_are_those_there_are():
    assert get_args(options.IntervalKind) == stats.METHODS


@pytest.mark.parametrize("kind", stats.METHODS)
def test_each_interval(modes: Path, kind: str):
    words = ("compare", modes, "--by", "attn_mode", "--runs", "--metric", "val_loss_nats", "--interval", kind)
    assert call(*words) == call(*words)


def test_a_slip_is_one_line_on_stderr(modes: Path):
    words = [sys.executable, "-m", "lnjac", "compare", str(modes), "--by", "attn_mod"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lnjac: runs are not told apart by attn_mod: did you mean attn_mode?\n"


def test_completion_can_be_shown():
    words = [
        sys.executable,
        "-c",
        "from lnjac.cli.main import app; app(prog_name='lnjac')",
        "--show-completion",
        "bash",
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "_LNJAC_COMPLETE" in done.stdout


# diff


def exit_code(*words: object) -> tuple[int, str]:
    done = RUNNER.invoke(cli.app, ["diff", *map(str, words)])
    return done.exit_code, done.stdout


@pytest.fixture
def merged(tmp_path: Path) -> Any:
    """Make two runs as the trainer writes them, and merge them."""

    def make(name: str, **options: Any) -> Path:
        for seed in (1, 2):
            make_run(tmp_path / name / str(seed), seed=seed, **(options if seed == 1 else {}))
        call("merge", tmp_path / name, "-o", tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    return make


def test_diff_of_equal_science_is_0(merged: Any):
    one = merged("a")
    other = merged("b", run={"wall_s": 99.0, "commit": "x", "val_loss_nats": _loss() * (1 + 1e-8)})
    assert exit_code(one, other) == (0, "the same science\n")
    assert exit_code(one, other, "--rtol", "1e-9")[0] == 1


def _loss() -> float:
    return noise("softmax-1", "val_loss_nats")


def test_diff_names_changed_values(merged: Any):
    one, other = merged("a"), merged("b", run={"val_loss_nats": 5.0}, layers={"role": "new"})
    code, text = exit_code(one, other)
    assert code == 1
    assert text.splitlines() == [
        "layers: role differs in 6 rows, such as role and new at run_id=softmax-1 diag_id=d step=0 site=blocks.0.ln_1 call=0",
        f"runs: val_loss_nats differs in 1 rows, such as {_loss()} and 5.0 at run_id=softmax-1 diag_id=d",
    ]
    found = json.loads(exit_code(one, other, "--json")[1])
    assert list(found["runs"]["changed"][0]) == ["run_id", "diag_id", "column", "one", "other", "relative"]
    assert found["curves"] == {"only_one": [], "only_other": [], "changed": [], "columns": []}


def test_diff_names_rows_that_one_lacks(merged: Any):
    one, other = merged("a"), merged("b", run_id="other", steps=(0,))
    code, text = exit_code(one, other)
    assert code == 1
    lines = text.splitlines()
    assert lines[0].startswith(f"layers: 6 rows only in {one}, such as run_id=softmax-1 ")
    assert lines[1].startswith(f"layers: 3 rows only in {other}, such as run_id=other ")
    assert [line.split(":")[0] for line in lines] == ["layers"] * 2 + ["runs"] * 2 + ["curves"] * 2


def test_diff_tells_null_from_nan_and_sees_columns(merged: Any):
    from lnjac.columns import Column

    one = merged("a", run={"val_loss_nats": math.nan})
    other = merged("b", run={"val_loss_nats": None}, config=[(Column("extra", "int64", "", ""), 1)])
    code, text = exit_code(one, other)
    assert code == 1
    assert "runs: columns that only one has: extra" in text
    assert "runs: val_loss_nats differs in 1 rows, such as nan and None" in text


def test_diff_of_what_is_no_merge_is_refused(merged: Any, tmp_path: Path):
    done = RUNNER.invoke(cli.app, ["diff", str(merged("a")), str(tmp_path / "a" / "1" / runs.FILES["runs"])])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert RUNNER.invoke(cli.app, ["diff", str(merged("b")), str(tmp_path / "nowhere")]).exit_code == 2


def test_what_was_tuned_is_shown_and_is_in_json(tmp_path: Path) -> None:
    rates = {"softmax": 0.001, "sigmoid": 0.01}
    rows = [
        run(seed, 2.0 + (rate != best) + seed / 8 * (mode == "softmax"), attn_mode=mode, optimizer__lr=rate)
        for mode, best in rates.items()
        for rate in (0.0001, 0.001, 0.01, 0.1)
        for seed in (1, 2, 3, 4)
    ]
    words = ["compare", study(tmp_path, rows).path, "--by", "attn_mode", "--runs", "--tune", "optimizer.lr"]
    words += ["--metric", "val_loss_nats"]
    lines = call(*words).splitlines()
    first = lines.index("optimizer.lr chosen on seeds 1, 2")
    assert [line.split() for line in lines[first + 2 : first + 4]] == [
        ["softmax", "0.001", "2.1875", "4"],
        ["sigmoid", "0.01", "2", "4"],
    ]
    found = json.loads(call(*words, "--json"))
    assert found["choices"]["keys"] == ["optimizer.lr"]
    assert {row["attn_mode"]: row["optimizer.lr"] for row in found["choices"]["rows"]} == rates
    assert [row["n"] for row in found["rows"]] == [2]
