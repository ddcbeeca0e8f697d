"""Reading of a user's files, with errors that name the setting."""

import os
from pathlib import Path

from lnjac.errors import ConfigError


def read_file(file: Path | str, setting: str, most: int | None = None) -> bytes:
    """Return a regular file's content. Raises ConfigError, which names the setting, if it has more bytes than `most`."""
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe would be waited for, and can be read but once
        what = "is a folder" if os.path.isdir(file) else "is a pipe or a device"
        raise ConfigError(f"cannot read {file}, which {what} and no regular file: check {setting}")
    try:
        with open(file, "rb") as opened:
            content = opened.read(-1 if most is None else most + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror}): check {setting}") from None
    if most is not None and len(content) > most:
        raise ConfigError(f"{file} is refused, being larger than {most} bytes: check {setting}")
    return content


def decode(file: str) -> str:
    """Return the text of one of `data.files`. Raises ConfigError if it is empty or not UTF-8."""
    content = read_file(file, "data.files")
    if not content:
        raise ConfigError(f"{file} is empty: drop it from data.files")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 at byte {error.start}: convert it, as with iconv -t UTF-8") from None
