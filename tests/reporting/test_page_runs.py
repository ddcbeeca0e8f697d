"""The page's table of runs: each has the command that makes it again, to be read without JavaScript."""

import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.paths import ROOT
from support.studies import write_study

from lnjac.comparing.tables import open_tables
from lnjac.reporting import page, report

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")

TUTORIAL = ROOT / "studies" / "tiny" / "first"


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("light")]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A merge with the configs of its runs, in a folder whose name a shell would take apart."""
    folder = tmp_path / "my sweeps"
    folder.mkdir()
    for file in TUTORIAL.parent.glob(f"{TUTORIAL.name}.*"):
        shutil.copy(file, folder / file.name)
    return folder / "first.parquet"


def of_runs(html: str) -> str:
    """The details on every run."""
    return html[html.index('<details id="runs"') :].partition("</details>")[0]


def commands(html: str) -> list[list[str]]:
    return [shlex.split(unescape(one)) for one in re.findall("<td class=command>([^<]*)", of_runs(html))]


def test_each_run_has_the_command_that_makes_it_again(lnjac: Any, study: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(study.parent.parent)
    found = commands(report.report("my sweeps/first.parquet", output="x.html").html)
    ids = pd.read_parquet(study.with_suffix(".runs.parquet"))["run_id"]
    assert sorted(words[-1] for words in found) == sorted(ids)
    assert {tuple(words[:-1]) for words in found} == {("lnjac", "command", "my sweeps/first.parquet")}
    code, text, _ = lnjac(*found[0][1:])
    assert code == 0
    assert text.startswith("python run.py ")
    assert f"run_id {found[0][-1]}" in text


def test_no_page_tells_where_its_writer_keeps_things(study: Path, tmp_path: Path):
    html = report.report(study, output=tmp_path / "x.html").html
    assert str(tmp_path) not in html
    assert commands(html)[0][:3] == ["lnjac", "command", "first.parquet"]
    for several in ([study, study], open_tables(study)):
        assert commands(report.report(several, output=tmp_path / "x.html").html)[0][:3] == ["lnjac", "command", "TABLE"]


def test_runs_without_configs_have_no_command_and_many_are_in_the_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(page.MOST, "most_runs", 4)
    html = report.make(open_tables(write_study(tmp_path, {"attn_mode": ["a", "b"]}, steps=(100,))), "t").html
    assert commands(html) == []
    assert "<summary>Every run</summary>" in html
    assert len(re.findall("<tr><td", of_runs(html))) == 4
    assert "2 more runs are in the CSV." in of_runs(html)
