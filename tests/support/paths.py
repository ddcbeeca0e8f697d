"""Where the repository is, and in it the study: its tables, and the page with their numbers and commands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "studies" / "cost"
STUDY_PAGE = ROOT / "docs" / "study.md"
