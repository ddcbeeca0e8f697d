"""Without the packages of the extra [report], what draws says how to install them, and what does not draw works."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from support.studies import write_study

from lnjac.errors import ConfigError
from lnjac.reporting import marks
from lnjac.reporting.report import report
from lnjac.sweeps import sweeper

SAID = "is not installed: pip install 'lnjac[report]' for the charts"


@pytest.fixture(params=["altair", "jinja2", "vl_convert"])
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide one of the packages."""
    monkeypatch.setitem(sys.modules, request.param, None)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path, {"attn_mode": ["sigmoid", "softmax"]}, blocks=0, steps=(100,))


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("words", [
    ("report", "-o", "x.html"),
    ("report", "-o", "x.html", "--json"),
    ("plot",),
    ("plot", "--json"),
    ("plot", "--figure", "depth", "-o", "x.svg"),
])  # fmt: skip
def test_what_draws_names_the_extra(
    lnjac: Any, study: Path, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, text, err = lnjac(words[0], study, *words[1:])
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert SAID in err
    assert not Path("x.html").exists()
    assert not Path("x.svg").exists()


@pytest.mark.usefixtures("hidden")
def test_in_python_too(study: Path, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        report(study, output=tmp_path / "x.html")
    assert str(error.value) == marks.MISSING
    assert marks.MISSING.endswith(SAID)


@pytest.mark.usefixtures("hidden")
def test_a_sweep_ends_with_the_same_words(study: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="lnjac.sweeps"):
        sweeper._report(study.parent)
    assert [record.getMessage() for record in caplog.records] == [f"no report: {marks.MISSING}"]
    assert not (study.parent / sweeper.REPORT).exists()


@pytest.mark.parametrize("suffix", [".csv", ".md", ".tex", ".parquet"])
def test_tables_need_none_of_it(lnjac: Any, study: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    for module in ("altair", "jinja2", "vl_convert"):
        monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / f"x{suffix}"
    code, text, err = lnjac("compare", study, "--by", "attn_mode", "-o", out)
    assert (code, err) == (0, "")
    assert text
    assert out.stat().st_size
