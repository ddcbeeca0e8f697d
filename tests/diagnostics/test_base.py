"""A diagnostic of one's own: a class, a yaml file, and nothing else; all of them share the passes."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.commands import TINY, command
from support.paths import ROOT
from support.small import SMALL, corpus
from torch import nn

import lnjac
from lnjac.columns import Column
from lnjac.config.compose import compose
from lnjac.config.identity import column_values, diag_id, run_id, to_dict
from lnjac.config.schema import RunConfig, build, check
from lnjac.diagnostics import catalogue
from lnjac.diagnostics.base import Diagnostic, Rows, Subject
from lnjac.errors import ConfigError
from lnjac.norms.probe import Pass
from lnjac.runs import folder as runs
from lnjac.training import loop
from lnjac.training import run as train

AddMember = Callable[..., str]


@dataclass
class Moments(Diagnostic):
    """Notes each moment that it takes part in."""

    table = "moments"
    columns = (Column("moment", "string", "", ""), Column("at", "int64", "updates", ""), Column("n", "int64", "", ""))
    cost = "nothing"

    weight: int

    def problems(self, config: RunConfig) -> Iterator[str]:
        if self.weight < 0:
            yield f"diagnostic weight={self.weight} must not be negative"

    def before(self, subject: Subject) -> Rows:
        return [{"moment": "before", "at": subject.updates, "n": self.weight}]

    def begin(self, subject: Subject) -> None:
        self.subject, self.seen = subject, Rows()

    @contextmanager
    def watch(self) -> Iterator[None]:
        assert all(p.grad is None for p in self.subject.model.parameters())
        yield
        assert any(p.grad is not None for p in self.subject.model.parameters())
        self.note("watch", 0)

    def passed(self, batch: Any, seen: Pass) -> None:
        assert any(p.grad is not None for p in self.subject.model.parameters())
        self.note("passed", len(seen.calls))

    def rows(self) -> Rows:
        self.note("rows", self.weight)
        return self.seen

    def note(self, moment: str, n: int) -> None:
        self.seen.append({"moment": moment, "at": self.subject.updates, "n": n})


MOMENTS = f"_target_: {__name__}.Moments\nweight: 3\n"


def test_a_new_diagnostic_fills_its_table(add_member: AddMember, tmp_path: Path) -> None:
    add_member("diagnostic", MOMENTS, "moments")
    config = compose(
        *SMALL,
        "diagnostics.more=[moments]",
        "diagnostics.schedule=linear",
        "diagnostics.every=2",
        "diagnostics.batches=2",
    )
    assert train.run(config, tmp_path / "run", corpus()) == runs.DONE
    opened = lnjac.load_run(tmp_path / "run", trust=True)
    rows = opened.table("moments")
    assert set(rows["run_id"]) == {run_id(config, corpus().sha256)}
    assert set(rows["diag_id"]) == {diag_id(config)}
    passes = [("watch", 0), ("passed", 5)] * 2
    expected = [(0, "before", 3), *((at, *each) for at in (0, 2, 3) for each in [*passes, ("rows", 3)])]
    assert rows[["step", "moment", "n"]].apply(tuple, axis=1).tolist() == expected
    assert (rows["step"] == rows["at"]).all()
    plain = compose(*SMALL, "diagnostics.schedule=linear", "diagnostics.every=2", "diagnostics.batches=2")
    train.run(plain, tmp_path / "plain", corpus())
    theirs = lnjac.load_run(tmp_path / "plain").layers
    measured = [name for name in theirs if name != "diag_id"]
    assert opened.layers[measured].equals(theirs[measured])


def test_what_is_named_is_hashed_and_what_is_not_changes_nothing(add_member: AddMember) -> None:
    bare = compose()
    add_member("diagnostic", MOMENTS, "moments")
    add_member("diagnostic", MOMENTS.replace("3", "4"), "heavier")
    assert compose("diagnostics.more=[]") == compose() == bare
    assert "more" not in to_dict(bare)["diagnostics"]
    named = [compose(f"diagnostics.more=[{name}]") for name in ("moments", "heavier")]
    assert len({diag_id(config) for config in (bare, *named)}) == 3
    assert len({run_id(config, "data") for config in (bare, *named)}) == 1
    assert {"diagnostics.more"} == set(column_values(named[0])) - set(column_values(bare))
    for config in named:
        assert build(to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_target_: nowhere.Class\n", "names a module that is not there"),
        (f"_target_: {__name__}.Moments\n", "diagnostic.mine.weight has no value"),
        (f"{MOMENTS}wight: 2\n", "diagnostic.mine.wight is not a setting: did you mean weight"),
        ("_target_: lnjac.gpt.attention.Relu\n", "Relu is no lnjac.diagnostics.base.Diagnostic"),
    ],
)
def test_one_that_cannot_be_made_is_refused(text: str, said: str, add_member: AddMember) -> None:
    add_member("diagnostic", text, "mine")
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose("diagnostics.more=[mine]")


def test_one_that_is_not_there_or_cannot_be_measured_is_refused(add_member: AddMember) -> None:
    add_member("diagnostic", MOMENTS.replace("3", "-1"), "moments")
    with pytest.raises(ConfigError, match=r"no file conf/diagnostic/moment\.yaml: write one"):
        compose("diagnostics.more=[moment]")
    said = check(compose("diagnostics=off", "diagnostics.more=[moments]"))
    assert said == [
        "diagnostics.more=['moments'] measures nothing with diagnostics.schedule=none: choose a schedule, such as final",
        "diagnostic weight=-1 must not be negative",
    ]


def test_its_code_is_imported_only_on_trust(add_member: AddMember, tmp_path: Path) -> None:
    add_member("diagnostic", MOMENTS, "moments")
    train.run(compose(*SMALL, "diagnostics.more=[moments]"), tmp_path, corpus())
    with pytest.raises(ConfigError, match="trust=True"):
        _ = lnjac.load_run(tmp_path).config
    assert lnjac.load_run(tmp_path, trust=True).config.diagnostics.more == {"moments": Moments(3)}


def test_each_measurement_starts_anew() -> None:
    training = loop.Training(compose(*SMALL, "diagnostics=full"), corpus())
    one, other = training.diagnose(), training.diagnose()
    assert set(one) == {"layers", "distributions", "tensors", "mechanism", "swaps"}
    for table in one:
        assert len(one[table]) == len(other[table])
    fresh = catalogue.chosen(training.config.diagnostics)
    assert [vars(each) for each in training.diagnostics] == [vars(each) for each in fresh]


def test_each_declares_its_table_its_columns_and_its_cost() -> None:
    for each in catalogue.BUILT_IN:
        assert each.cost in (ROOT / "docs" / "columns.md").read_text()
        assert {"run_id", "diag_id", "step"}.isdisjoint(column.name for column in each.columns)


@pytest.mark.parametrize("many", [pytest.param(False, marks=pytest.mark.rare), True])
@pytest.mark.slow
def test_the_documented_one_works_from_the_command_line(
    many: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    (code,), (settings,) = (
        [block for block in re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) if "relative" in block]
        for kind in ("python", "yaml")
    )
    (tmp_path / "relative.py").write_text(code)
    (tmp_path / "own" / "diagnostic").mkdir(parents=True)
    (tmp_path / "own" / "diagnostic" / "relative.yaml").write_text(settings)
    words = [*TINY, "diagnostics.more=[relative]"]
    words += ["seed=1,2", "hydra.launcher.jobs=2", "sweep=A"] if many else ["hydra.run.dir=multirun/A/0"]
    line = [*["-m"] * many, "--config-dir", str(tmp_path / "own"), *words]
    done = command(*line, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    files = list((tmp_path / "multirun" / "A").glob("*/relative.parquet"))
    assert len(files) == (2 if many else 1)
    rows = runs.read_table(files[0]).to_pylist()
    assert {row["step"] for row in rows} == {4}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "relative", raising=False)
    model: nn.Module = lnjac.load_run(files[0].parent, trust=True).model()
    assert [row["name"] for row in rows] == [name for name, _ in model.named_parameters() if "weight" in name]
    assert all(row["ratio"] > 0 for row in rows)
