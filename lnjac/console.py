"""Make standard output and standard error work in any encoding, and after their reader has gone."""

import codecs
import io
import os
import sys
import unicodedata

SPELLED = {"−": "-", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "·": ".", "×": "x"}
"""ASCII for signs that lnjac prints. Greek letters are spelled by name, other characters by code point (`\\u2016`)."""


class Steady(io.TextIOWrapper):
    """A text stream that drops text that nobody reads any more: `| head -1` neither ends a run nor prints a traceback."""

    replaced: io.TextIOWrapper

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Connect the file descriptor to the null device, so that the rest of the buffer can be flushed."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def steady() -> None:
    """Make sys.stdout and sys.stderr Steady, and spell out in ASCII each character that they cannot encode."""
    codecs.register_error("lnjac.spelled", _spelled)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not a Steady one, nor one of a test or a notebook
            stream.flush()
            new = Steady(
                stream.buffer,
                encoding=stream.encoding,
                errors="lnjac.spelled",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            new.replaced = stream  # kept, because its collection would close their common buffer
            setattr(sys, name, new)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(sign: str) -> str:
    if sign in SPELLED:
        return SPELLED[sign]
    if (name := unicodedata.name(sign, "")).startswith("GREEK "):
        return name.split()[-1].lower()
    return sign.encode("ascii", "backslashreplace").decode()
