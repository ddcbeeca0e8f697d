"""The study's page says what its script prints from the tables beside it, and its other text holds no number of its own."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

STUDY = ROOT / "docs" / "study"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", STUDY / "study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_is_the_scripts(study: ModuleType) -> None:
    text = (STUDY / "README.md").read_text()
    assert study.filled(text) == text


def test_prose_has_no_measured_number(study: ModuleType) -> None:
    text = (STUDY / "README.md").read_text()
    for name in study.BLOCKS:
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    assert "-->" not in text
    assert not re.findall(r"\d+\.\d+", text)


def test_an_altered_table_or_page_is_noticed(study: ModuleType, tmp_path: Path) -> None:
    text = (STUDY / "README.md").read_text()
    assert study.filled(text.replace("| 1 | ", "| 1 | 9", 1)) == text
    with pytest.raises(KeyError, match="primary"):
        study.filled(text.replace("<!-- primary -->", ""))
