"""Standard output and standard error that lose nothing, whatever their encoding, and outlive their reader."""

import codecs
import io
import os
import sys
import unicodedata

SPELLED = {"−": "-", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "·": ".", "×": "x"}
"""ASCII for signs that lnjac prints; Greek letters go by their names, all else by its number (`\\u2016`)."""


class Steady(io.TextIOWrapper):
    """A text stream that drops the rest once nobody reads it: `| head -1` neither ends a run nor prints a traceback."""

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
        """Let the file descriptor lead nowhere, so that what is still in the buffer can be flushed."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def steady() -> None:
    """Make sys.stdout and sys.stderr Steady, and spell out in ASCII each character that they cannot encode."""
    codecs.register_error("lnjac.spelled", _spelled)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not yet Steady, nor one that a test or a notebook put there
            stream.flush()
            new = Steady(
                stream.buffer,
                encoding=stream.encoding,
                errors="lnjac.spelled",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            new.replaced = stream  # which would close their common buffer if it were collected
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
