"""The gallery has every chart, its page is the one that its script writes, and its pictures are there and small."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from support.scripts import script

from lnjac.reporting.charts import CHARTS

pytest.importorskip("altair", reason="the extra [report] is not installed")

LARGEST = 60_000
"""Bytes of a picture in the repository."""


@pytest.fixture(scope="module")
def gallery(root: Path) -> ModuleType:
    return script(root / "docs" / "gallery.py")


def test_it_has_every_chart_with_a_picture_and_a_command(gallery: ModuleType, root: Path) -> None:
    text = (root / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert text == gallery.page()  # else run docs/gallery.py again
    assert list(gallery.TABLES) == list(CHARTS)
    assert re.findall("^### (.*)", text, re.MULTILINE) == list(CHARTS)
    for table in re.findall(r"^lnjac plot (\S+)", text, re.MULTILINE):
        assert (root / table).exists()


def test_its_pictures_are_there_and_small(gallery: ModuleType, root: Path) -> None:
    docs = root / "docs"
    pictures = {docs / gallery.IMAGES / f"{name}.svg" for name in CHARTS}
    assert set((docs / gallery.IMAGES).iterdir()) == pictures
    for picture in [*pictures, *(docs / name for name in gallery.ELSEWHERE)]:
        assert picture.stat().st_size < LARGEST
        assert 'width="468pt"' in picture.read_text(encoding="utf-8")[:300]


@pytest.mark.parametrize("name", CHARTS)
def test_its_tables_can_show_their_charts(gallery: ModuleType, root: Path, name: str) -> None:
    from lnjac.comparing.tables import open_tables
    from lnjac.reporting.view import view

    table, *options = gallery.TABLES[name]
    given = dict(zip(options[::2], options[1::2], strict=True))
    shown = view(open_tables(root / "studies" / f"{table}.parquet"), where=given.get("--where"))
    assert CHARTS[name].draw(shown, given.get("--metric")).caption
