r"""Escape foreign text for the medium it is shown in.

A level, a norm, a path or an error's message comes from a table, a config or a file system, and may hold anything: a line
break, a terminal's escape sequence, a mark that reverses the order of reading, or what LaTeX, Markdown or a spreadsheet
gives a meaning of its own. Whatever prints or writes such a text passes it through one of these functions. JSON and
parquet keep it as it is.
"""

import logging
import re
import unicodedata
from typing import Any


def visible(text: str) -> str:
    """Replace each character that cannot be seen by its code point: a line break becomes `<U+000A>`.

    `str.isprintable` decides: control characters, line separators, marks of direction, halves of surrogate pairs and
    spaces other than the plain one are replaced. What has been replaced once stays as it is.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _code(c) for c in text)


def visible_lines(text: str) -> str:
    """Replace as `visible` does, but keep line breaks and tabs: for a text that is meant to have several lines."""
    return re.sub(r"[^\n\t]+", lambda part: visible(part[0]), text)


def visible_within(tree: Any) -> Any:
    """Replace as `visible` does in every text of nested dicts and lists."""
    if isinstance(tree, str):
        return visible(tree)
    nested = (str, dict, list)  # a number is no call: charts have many
    if isinstance(tree, dict):
        return {name: visible_within(inner) if isinstance(inner, nested) else inner for name, inner in tree.items()}
    if isinstance(tree, list):
        return [visible_within(inner) if isinstance(inner, nested) else inner for inner in tree]
    return tree


class LogFormatter(logging.Formatter):
    """Format log records without characters that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return visible_lines(super().format(record))


def _code(character: str) -> str:
    return f"<U+{ord(character):04X}>"


# Spreadsheets

_PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_FORMULA = tuple("=+-@＝＋－＠")  # the wide ones begin a formula in East Asian versions


def spreadsheet(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would take for a formula; leave a number as it is."""
    text = visible(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) and not _PLAIN_NUMBER.fullmatch(text) else text


# Markdown

_MARKDOWN = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore within a word has no meaning
    r"|<(?=[a-z/!?])|&(?=#?\w+;)",  # only these begin an element or an entity
    re.IGNORECASE,
)


def markdown(text: str) -> str:
    """Escape a text for a table's cell or a paragraph of GitHub's Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


# LaTeX

_LATEX = {c: f"\\{c}" for c in "{}$&#_%"}
_LATEX |= {c: f"{{{c}}}" for c in "[*"}  # after the end of a row they would be its option
_LATEX |= {
    "$": "$\\$$",
    "\\": "\\textbackslash{}",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    '"': "{\\char34}",
}
_LATEX |= {"<": "$<$", ">": "$>$", "|": "\\textbar{}", "…": "\\ldots{}", "–": "--", "—": "---"}
_LATEX |= {"−": "$-$", "×": "$\\times$", "±": "$\\pm$", "≤": "$\\leq$", "≥": "$\\geq$", "∞": "$\\infty$"}
_LATEX |= dict(zip("ßæÆøØ", ("\\ss{}", "\\ae{}", "\\AE{}", "\\o{}", "\\O{}"), strict=True))
_GREEK = {"αβγδεζηθικλμν": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu"}
_GREEK |= {"ξπρστυφχψω": "xi pi rho sigma tau upsilon phi chi psi omega", "ΓΔΘΛΞ": "Gamma Delta Theta Lambda Xi"}
_GREEK |= {"ΠΣΦΨΩ": "Pi Sigma Phi Psi Omega"}
for _letters, _names in _GREEK.items():
    _LATEX |= {letter: f"$\\{name}$" for letter, name in zip(_letters, _names.split(), strict=True)}
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030c\u0327", "`'^~=u.\"rvc", strict=True))
_LIGATURES = "-`',!?"
"""Characters that TeX joins with a following one of their kind: `--` to a dash, !` to ¡."""


def latex(text: str) -> str:
    """Escape a text for any LaTeX engine and font encoding; a character that neither has is shown by its code point."""
    pieces = [""]
    for character in visible(text):
        joined = character in _LIGATURES and pieces[-1][-1:] in _LIGATURES and pieces[-1]
        pieces.append(("{}" if joined else "") + _latex_character(character))
    return "".join(pieces)


def latex_paragraph(text: str) -> str:
    """Escape a text that fills lines: long words may be broken within, after a mark or after 20 characters."""
    parts = re.findall(r"\s+|[^\s=_./,;:@|+-]{1,20}[=_./,;:@|+-]?|.", visible(text))
    return "".join(latex(part) + ("" if part.isspace() else "\\allowbreak{}") for part in parts)


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character
    base, *marks = list(unicodedata.normalize("NFD", character))
    if base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in _ACCENTS:
        return f"\\{_ACCENTS[marks[0]]}{{{base}}}"
    return "".join(_LATEX.get(c, c) for c in _code(character))
