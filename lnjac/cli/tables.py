"""Tables of text: printed, or written as Markdown, LaTeX, CSV or Parquet; and values as JSON."""

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

    `spare` are columns that a narrow terminal may leave out, the least needed first.
    """

    title: str
    heads: list[str]
    labels: int
    lines: list[list[str]]
    strong: set[int]
    spare: Sequence[int] = ()

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

LATEX_BEGIN = r"""% A document of its own, or part of another by \input.
% There the package graphicx shrinks wide tables, and booktabs draws their rules.
\makeatletter
\def\lnjacend{}
\ifx\@nodocument\relax\else
  \documentclass{article}
  \usepackage{graphicx}
  \IfFileExists{booktabs.sty}{\usepackage{booktabs}}{}
  \begin{document}
  \def\lnjacend{\end{document}}
\fi
\makeatother
\providecommand{\resizebox}[3]{#3}
\providecommand{\toprule}{\hline}
\providecommand{\midrule}{\hline}
\providecommand{\bottomrule}{\hline}
"""


def _latex(parts: Sequence[Part]) -> str:
    """Return tables and notes in ASCII and without a package, so that any LaTeX compiles them."""
    body = [_latex_table(part) if isinstance(part, Grid) else _latex_line(part) for part in parts]
    return "\n".join([LATEX_BEGIN, *body, "\\lnjacend\n"])


def _latex_line(text: str) -> str:
    return f"{{\\raggedright\\noindent {latex_paragraph(text)}\\par}}" if text else "\\medskip"


def _latex_cell(text: str) -> str:
    """Return a cell for LaTeX; the numbers of an interval, a bound or a value stand in maths, where `-` is a minus sign."""
    if not re.fullmatch(rf"<?{_NUMBER}( to {_NUMBER})?", text):
        return latex(text)
    return re.sub(rf"<?{_NUMBER}", lambda found: f"${re.sub('e(.*)', _power, found[0])}$", text)


_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def _power(found: "re.Match[str]") -> str:
    return rf" \cdot 10^{{{int(found[1])}}}"


def _latex_table(grid: Grid) -> str:
    title, grid = latex_paragraph(grid.title), grid.escaped(_latex_cell)
    sides = "l" * grid.labels + "r" * (len(grid.heads) - grid.labels)
    found = []
    for first in range(0, len(grid.lines), ROWS_OF_A_PAGE):
        rows = [grid.heads, *grid.lines[first : first + ROWS_OF_A_PAGE]]
        head, *lines = [" & ".join(re.sub("^  ", r"\\quad ", cell) for cell in row) + r" \\" for row in rows]
        inside = "\n".join(
            [
                rf"\begin{{tabular}}{{@{{}}{sides}@{{}}}}",
                r"\toprule",
                head,
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        said = title + (" (continued)" if first else "")
        found.append(
            f"{{\\raggedright\\noindent\\textbf{{{said}}}\\par\\nobreak\\smallskip\\noindent\n"
            f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{inside}}}\\par\\medskip}}\n"
        )
    return "\n".join(found)
