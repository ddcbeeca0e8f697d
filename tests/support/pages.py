"""The code blocks of a page of the documents, and the pages of reports without what takes long."""

import re
from pathlib import Path

import pytest

BUNDLE = "window.vegaEmbed = null;"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def without_vega(patch: pytest.MonkeyPatch) -> None:
    """Leave Vega's own 0.9 MB out of reports: they take two seconds to put together."""
    from lnjac.reporting import page, report

    patch.setattr(report, "bundle_ahead", lambda: None)
    patch.setattr(page, "_bundle", lambda: BUNDLE)
