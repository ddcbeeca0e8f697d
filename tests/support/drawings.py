"""A drawing of every kind, of small frames."""

from typing import Any

import numpy as np
import pandas as pd

from lnjac.reporting import marks

LEVELS = ["softmax", "sigmoid"]
SITES = ["blocks.0.ln_1", "blocks.0.ln_2", "ln_f"]


def lines(**more: list[Any]) -> pd.DataFrame:
    """A mean with its interval for every combination of the given columns and levels."""
    index = pd.MultiIndex.from_product([*more.values(), LEVELS], names=[*more, "level"])
    mean = np.arange(1.0, len(index) + 1)
    return pd.DataFrame({"mean": mean, "low": mean - 0.5, "high": mean + 0.5}, index=index).reset_index()


def by_seed(**more: list[Any]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([*more.values(), [1, 2]], names=[*more, "seed"])
    return pd.DataFrame({"value": np.arange(1.0, len(index) + 1)}, index=index).reset_index()


NAMED = marks.Levels("attn_mode", LEVELS)


TITLES = {"r_mean": "The mean", "r_radial": 'The "radial" part'}


def drawn_lines(frame: pd.DataFrame, x: str, title: marks.Title = "y", **more: Any) -> marks.Picture:
    return marks.lines(frame, x=x, levels=NAMED, title=title, **more)


def every_drawing() -> dict[str, marks.Picture]:
    places = lines(place=SITES)
    cells = lines(site=SITES, metric=["radial_share", "sigma_mean"])
    cells = (
        cells[cells["level"] == "softmax"].assign(shade=0.5, shown="0.1", clear=True).rename(columns={"level": "cell"})
    )
    alone = places.drop_duplicates("place").drop(columns="level")
    return {
        "rows": marks.dots(by_seed(place=SITES, level=LEVELS), places, title="x", levels=NAMED),
        "joined": marks.dots(by_seed(place=SITES), alone, title="x", zero=False, joined=True),
        "map": marks.shades(cells, legend="x", sites=SITES, breaks=range(-4, 4)),
        "curves": drawn_lines(lines(site=SITES, metric=["r_mean", "r_radial"], step=[0, 1, 100]), "step", TITLES),
        "steps": drawn_lines(lines(cell=["a", "b"], step=[0, 50, 100]), "step"),
        "depth": drawn_lines(lines(site=SITES), "site", {"sigma_mean": "σ"}, log=True),
        "sizes": drawn_lines(lines(x=[32, 64]), "x", size="model.n_embd", log=True),
    }


def layers(spec: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [layer for layer in spec["layer"] if layer["mark"]["type"] == mark]
