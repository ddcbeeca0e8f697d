"""Show a result as tables in a notebook."""

import dataclasses
import html
from typing import Any

import pandas as pd


class Shown:
    """The base of a result's dataclass: a notebook shows its first DataFrame, the results that it holds, and its notes."""

    def _repr_html_(self) -> str:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        frames = [_table(value) for value in values if isinstance(value, pd.DataFrame)]
        inner = [value._repr_html_() for value in values if isinstance(value, Shown)]
        notes = [f"<li>{html.escape(note)}</li>" for note in getattr(self, "notes", ())]
        return "".join([*frames[:1], *inner, *(["<ul>", *notes, "</ul>"] if notes else [])])


def _table(frame: pd.DataFrame) -> Any:
    """Return the frame as HTML, without the columns that are empty in all rows."""
    empty = [name for name in frame if frame[name].isna().all() or frame[name].astype(str).eq("").all()]
    return frame.drop(columns=empty).to_html(border=0, float_format="{:.4g}".format, max_rows=60)
