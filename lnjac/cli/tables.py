"""Tables of text: printed, or written as Markdown, LaTeX, CSV or Parquet; and values as JSON."""

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lnjac.errors import ConfigError
from lnjac.escape import latex, latex_paragraph, markdown, spreadsheet, visible
from lnjac.text import aligned

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".csv", ".md", ".tex", ".parquet")


class Grid(NamedTuple):
    """A table of text under its title: `labels` columns of names, then numbers; `strong` lines are the headline.

    `spare` are columns that a narrow terminal may leave out, the least needed first. `of` tells what the numbers are of.
    `pairs` has for each line the pair of levels that the last column of names tells, by which a wide table may be split.
    """

    title: str
    heads: list[str]
    labels: int
    lines: list[list[str]]
    strong: set[int]
    spare: Sequence[int] = ()
    of: str = ""
    pairs: Sequence[str] = ()

    def text(self, without: Collection[int] = ()) -> str:
        """Return the heads and lines in aligned columns, some of which may be left out."""
        kept = [[cell for i, cell in enumerate(line) if i not in without] for line in (self.heads, *self.lines)]
        return aligned(kept, self.labels)

    def escaped(self, escape: Callable[[str], str]) -> "Grid":
        """Return the grid with each of its texts escaped."""
        lines = [list(map(escape, line)) for line in self.lines]
        return self._replace(title=escape(self.title), heads=list(map(escape, self.heads)), lines=lines)


Part = str | Grid
"""A piece of an answer: a line, or a table."""


def show(parts: Iterable[Part]) -> None:
    """Print lines and tables; on a terminal the headline is bold, and columns that it has no room for are left out."""
    terminal, left_out = sys.stdout.isatty(), list[str]()
    width = shutil.get_terminal_size().columns if terminal else sys.maxsize
    for part in parts:
        if isinstance(part, str):
            print(visible(part))
            continue
        without = _without(part, width)
        left_out += [part.heads[i] for i in without]
        head, *lines = part.text(without).split("\n")
        bold = part.strong if terminal else set()
        lines = [f"\x1b[1m{line}\x1b[0m" if i in bold else line for i, line in enumerate(lines)]
        print(visible(part.title), head, *lines, "", sep="\n")
    if left_out:
        names = ", ".join(dict.fromkeys(map(visible, left_out)))
        print(f"- left out, as the terminal is {width} characters wide: {names}; -o FILE.csv has them")


def _without(grid: Grid, width: int) -> list[int]:
    """Return the fewest of the spare columns without which the table is no wider than this, or all of them."""
    for n in range(len(grid.spare)):
        if max(map(len, grid.text(grid.spare[:n]).split("\n"))) <= width:
            return list(grid.spare[:n])
    return list(grid.spare)


def show_wrapped(sentence: str) -> None:
    """Print a sentence, wrapped to the terminal's width, or to 100 characters if the output is no terminal."""
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    print(*textwrap.wrap(visible(sentence), min(width, 120), break_long_words=False, break_on_hyphens=False), sep="\n")


def ascii_json(found: Any) -> str:
    """Return the value as JSON in ASCII: any terminal can show it, and no text in it can command one."""
    return json.dumps(_plain(found), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return the value as JSON knows it: tables as rows; NaN and missing as null, infinite numbers as text."""
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict("records") if value.ndim == 2 else value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# Files


def require_format(path: Path | None) -> Path | None:
    """Return the path of an output whose format is known, or None."""
    if path is not None and path.suffix not in FORMATS:
        raise ConfigError(f"the output {path} must end in one of {', '.join(FORMATS)}")
    return path


def write(frame: "pd.DataFrame", parts: Sequence[Part], path: Path) -> None:
    """Write all columns for a program to read, or for a reader the tables and notes that are printed."""
    from lnjac.files import write_atomically

    writers: dict[str, Callable[[Path], object]] = {
        ".csv": lambda to: for_spreadsheets(frame).to_csv(to, index=False),
        ".md": lambda to: to.write_text("\n".join(map(_markdown, parts)) + "\n", encoding="utf-8"),
        ".tex": lambda to: to.write_text(_latex(parts), encoding="ascii"),
        ".parquet": lambda to: frame.to_parquet(to, index=False),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, writers[path.suffix])


def for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the frame with no text, name or value, that a spreadsheet would compute; numbers stay as they are."""
    safe = frame.map(lambda value: spreadsheet(value) if isinstance(value, str) else value)
    return safe.rename(columns=spreadsheet)


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return markdown(part)
    grid = part.escaped(markdown)
    sides = [":--"] * grid.labels + ["--:"] * (len(grid.heads) - grid.labels)
    lines = [grid.heads, sides, *grid.lines]
    return f"**{grid.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


ROWS_OF_A_PAGE = 36
"""Lines of a table in LaTeX, after which it is continued in another: a table cannot be broken between pages."""

POINTS_OF_A_COLUMN = 6.5 * 72
"""Points of the text column that a table is to fit."""
CHARACTER, GAP = 5.0, 12.0
"""Points of a character, about, and between the columns of a table."""

LATEX_BEGIN = r"""% A document of its own, or part of another by \input. Each table has a \label for \ref.
% There the package graphicx shrinks tables that are too wide, and booktabs draws their rules.
\makeatletter
\def\lnjacend{}
\ifx\@nodocument\relax\else
  \documentclass{article}
  \usepackage{graphicx}
  \IfFileExists{booktabs.sty}{\usepackage{booktabs}}{}
  \setlength{\textwidth}{6.5in}
  \setlength{\oddsidemargin}{0in}
  \begin{document}
  \def\lnjacend{\end{document}}
\fi
\providecommand{\lnjaccaption}[1]{\def\@captype{table}\caption{#1}}
\makeatother
\providecommand{\resizebox}[3]{#3}
\providecommand{\toprule}{\hline}
\providecommand{\midrule}{\hline}
\providecommand{\bottomrule}{\hline}
"""


def _latex(parts: Sequence[Part]) -> str:
    """Return tables, each with its label and its notes, in ASCII and without a package, so that any LaTeX compiles them."""
    body, above, labels = [LATEX_BEGIN], "", list[str]()
    for part in parts:
        if isinstance(part, Grid):
            for each in _by_pair(part):
                labels.append(_label(each, labels))
                body.append(_latex_table(each, labels[-1]))
            above = "\\nopagebreak\\smallskip"
        elif above and part.startswith("- "):
            note = latex_paragraph(part.removeprefix("- "))
            body.append(f"{above}{{\\footnotesize\\raggedright\\noindent {note}\\par}}")
            above = "\\nopagebreak"
        else:
            body.append(f"{{\\raggedright\\noindent {latex_paragraph(part)}\\par}}" if part else "\\medskip")
            above = ""
    return "\n".join([*body, "\\lnjacend\n"])


def _by_pair(grid: Grid) -> list[Grid]:
    """Return a table that is wider than a column of text as one for each pair of levels, which its title names."""
    wide = sum(max(map(len, column)) for column in zip(grid.heads, *grid.lines, strict=True)) * CHARACTER
    wide += GAP * (len(grid.heads) - 1)
    if wide <= POINTS_OF_A_COLUMN or grid.labels < 2 or len(set(grid.pairs)) < 2:
        return [grid]
    at, found = grid.labels - 1, list[Grid]()
    heads = [*grid.heads[:at], *grid.heads[at + 1 :]]
    for pair in dict.fromkeys(grid.pairs):
        own = [line for line, name in zip(grid.lines, grid.pairs, strict=True) if name == pair]
        # a seed is named in the column that goes
        lines = [[*line[: at - 1], line[at - 1] or line[at], *line[at + 1 :]] for line in own]
        found.append(Grid(f"{grid.title}, {pair}", heads, at, lines, set(), of=grid.of))
    return found


def _latex_cell(text: str) -> str:
    """Return a cell for LaTeX; the numbers of an interval, a bound or a value stand in maths, where `-` is a minus sign."""
    if text == "-":  # nothing is there
        return "--"
    if not re.fullmatch(rf"<?{_NUMBER}( to {_NUMBER})?", text):
        return latex(text)
    return re.sub(rf"<?{_NUMBER}", lambda found: f"${re.sub('e(.*)', _power, found[0])}$", text)


_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def _power(found: "re.Match[str]") -> str:
    return rf" \cdot 10^{{{int(found[1])}}}"


def _label(grid: Grid, taken: Collection[str]) -> str:
    """Return a label made of what is compared, with a number where other letters than ASCII's leave two alike."""
    plain = "tab:" + re.sub("[^a-z0-9.]+", "-", f"{grid.of} {grid.title}".lower()).strip("-")
    return next(label for n in count(1) if (label := f"{plain}-{n}" if n > 1 else plain) not in taken)


def _latex_table(grid: Grid, label: str) -> str:
    """Return a table with a caption and a label, in pieces that fit a page."""
    said = f"{grid.title}: {grid.of}" if grid.of else grid.title
    caption = f"\\lnjaccaption{{{latex_paragraph(said)}}}\\label{{{label}}}"
    grid = grid.escaped(_latex_cell)
    sides = "l" * grid.labels + "r" * (len(grid.heads) - grid.labels)
    found = []
    for first in range(0, len(grid.lines), ROWS_OF_A_PAGE):
        rows = [grid.heads, *grid.lines[first : first + ROWS_OF_A_PAGE]]
        head, *lines = [" & ".join(re.sub("^  ", r"\\quad ", cell) for cell in row) + r" \\" for row in rows]
        found += [
            r"\par\medskip\noindent\begin{minipage}{\linewidth}\centering",
            f"{latex_paragraph(said)} (continued)\\par" if first else caption,
            "\\smallskip",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            rf"\begin{{tabular}}{{@{{}}{sides}@{{}}}}",
            r"\toprule",
            head,
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{minipage}\par",
        ]
    return "\n".join(found)
