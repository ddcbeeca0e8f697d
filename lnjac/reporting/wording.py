"""Put numbers, levels and standings into words: the parts of which `lnjac.reporting.verdict` makes its sentences."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lnjac.comparing.intervals import Inference
from lnjac.text import word

Row = dict[str, Any]
"""A row of a comparison by column name, with its number in the frame as `row`."""

CLEAR, UNADJUSTED, UNCLEAR, ALONE, NONE = "clear", "unadjusted", "unclear", "alone", "none"
"""How a difference can stand to 0, beside IDENTICAL and SAME (`standing`)."""


def records(frame: pd.DataFrame) -> list[Row]:
    """Return the rows of a frame."""
    rows = frame.to_dict("records")
    return [{str(k): v for k, v in row.items()} | {"row": at} for at, row in zip(frame.index, rows, strict=True)]


def standing(row: Row, how: Inference) -> str:
    """Return how a row's difference stands to 0 by its interval and its adjusted p.

    Args:
        row: The columns `n`, `agreement`, `low`, `high` and `p_adjusted`.
        how: The kind of interval.

    Returns:
        NONE without a seed; IDENTICAL or SAME as the row's agreement; ALONE without an interval; UNCLEAR where the interval
        holds 0; CLEAR where it does not and the adjusted p is below 1 − confidence; UNADJUSTED where that p is not.
    """
    if not row["n"]:
        return NONE
    if row["agreement"]:
        return str(row["agreement"])
    if math.isnan(row["low"]):
        return ALONE
    if row["low"] <= 0 <= row["high"]:
        return UNCLEAR
    return CLEAR if row["p_adjusted"] < 1 - how.confidence else UNADJUSTED


class Numbers:
    """Write the numbers of one sentence, with as many decimals as give its widest interval's half two digits.

    A number that would be rounded to 0 keeps one digit, and a negative one has a minus sign and no hyphen. The percentage
    of the intervals is written once, and the number of seeds where it changes.

    Args:
        rows: The rows of the sentence, with `difference`, `low` and `high`.
        how: The kind of interval.
        unit: The unit of the differences.
        after: The numbers of an earlier part of the sentence.
    """

    def __init__(self, rows: Sequence[Row], how: Inference, unit: str = "", *, after: "Numbers | None" = None) -> None:
        halves = [half for row in rows if math.isfinite(half := (row["high"] - row["low"]) / 2)]
        sizes = [abs(row["difference"]) for row in rows if math.isfinite(row["difference"])]
        widest = max(halves, default=0.0)
        self.decimals = decimals(widest, 2) if widest > 0 else decimals(max(sizes, default=0.0), 3)
        self.unit = f" {short_unit(unit)}" if unit else ""
        self.how = how
        self.percent: str = after.percent if after else f"{percent(how)} "
        self.seeds: str = after.seeds if after else ""

    def plain(self, value: float) -> str:
        """Return a number, with a minus sign if it is negative."""
        return number(value, self.decimals)

    def signed(self, value: float) -> str:
        """Return a number with its sign; 0 has none."""
        return ("+" if value > 0 else "") + self.plain(value)

    def above(self, size: float) -> str:
        """Return a size rounded up, with its unit, so that no smaller one than an interval's end is called excluded."""
        step = 10.0**-self.decimals
        return self.plain(math.ceil(size / step - 1e-9) * step) + self.unit

    def ends(self, low: float, high: float) -> str:
        """Return two ends; the upper one has a plus sign if 0 lies between them."""
        return f"{self.plain(low)} to {self.signed(high) if low < 0 else self.plain(high)}"

    def interval(self, low: float, high: float) -> str:
        """Return an interval, the first of a sentence with its percentage."""
        before, self.percent = self.percent, ""
        return before + self.ends(low, high)

    def also(self, rows: Sequence[Row]) -> str:
        """Return `, 6 paired seeds` unless the sentence has just said so."""
        said = seeds(rows)
        again, self.seeds = said == self.seeds, said
        return "" if again else f", {said}"

    def inside(self, row: Row, *, flipped: bool = False) -> str:
        """Return a row's interval and its seeds, to stand in brackets; `flipped` is the interval of b − a."""
        ends = (-row["high"], -row["low"]) if flipped else (row["low"], row["high"])
        return self.interval(*ends) + self.also([row])


def number(value: float, places: int) -> str:
    """Return a number with so many decimals, a tiny one by a power of ten; what would be rounded to 0 keeps one digit."""
    size = abs(value)
    tiny = places > 6 and size > 0
    text = f"{size:.{max(0, places + math.floor(math.log10(size)))}e}" if tiny else f"{size:.{places}f}"
    if float(text) == 0 and size:
        text = f"{size:.1g}"
    return ("−" if value < 0 else "") + text.replace("e-", "e−")


def decimals(size: float, digits: int) -> int:
    """Return the decimals that give a number of this size so many digits; 3 for 0."""
    return max(0, digits - 1 - math.floor(math.log10(size))) if size else 3


def short_unit(unit: str) -> str:
    """Return a unit as sentences name it: a loss in nats per token is in nats."""
    return "nats" if unit == "nats/token" else unit


def percent(how: Inference) -> str:
    """Return the confidence of the intervals: `95 %`."""
    return f"{100 * how.confidence:g} %"


def counted(n: int, noun: str) -> str:
    """Return `1 run` or `1,200 runs`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def diverged(n: int, of: int) -> list[str]:
    """Return a sentence on runs that diverged, if any did."""
    return [f"{n} of {counted(of, 'run')} diverged and {'is' if n == 1 else 'are'} in no mean."] if n else []


def seeds(rows: Sequence[Row]) -> str:
    """Return the number of seeds behind rows: `6 paired seeds`, `3 to 6 seeds`, `4 seeds a level, unpaired`."""
    n = sorted({int(row["n"]) for row in rows})
    size = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    noun = f"seed{'s' * (n[-1] != 1)}"
    pairs = {bool(row["paired"]) for row in rows if "runs_b" in row}
    if not pairs:
        return f"{size} {noun}"
    if pairs == {True}:
        return f"{size} paired {noun}"
    return f"{size} {noun} a level, {'not all paired' if True in pairs else 'unpaired'}"


def adjusted(row: Row) -> str:
    """Return `adjusted p 0.019`."""
    p = row["p_adjusted"]
    return f"adjusted p {'< 0.0001' if p < 1e-4 else f'{p:.2g}'}"


def level(by: str, value: Any) -> str:
    """Return a level in words: `under softmax`, `with fa`, `at model.n_embd=64`."""
    if by == "attn_mode":
        return f"under {word(value)}"
    return f"with {word(value)}" if by in ("method", "ln_backward", "optimizer") else f"at {by}={word(value)}"


def place(row: Row, cells: Sequence[str]) -> str:
    """Return where a row's runs are: `with fa under softmax at model.n_embd=64`; columns that move are left out."""
    moving = str(row.get("moving", "")).split(", ")
    parts = [level(name, row[name]) for name in cells if name not in moving]
    order = ("with ", "under ", "at ")
    parts.sort(key=lambda part: [part.startswith(start) for start in order].index(True))
    return " ".join([*parts, *([f"at {row['site']}"] if row.get("site") else [])])


def joined(parts: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def capital(text: str) -> str:
    """Return a text that begins a sentence."""
    return text[:1].upper() + text[1:]
