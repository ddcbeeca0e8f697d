"""Tests of data leave no file behind."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty working directory."""
    monkeypatch.chdir(tmp_path)
