"""Write files atomically, hash their content, and name the system's reason for refusing one."""

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside path, then move it to path, which stays as it was on any error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why(error: OSError) -> str:
    """Return the system's reason alone, such as `permission denied`, for a message that already names the file."""
    return (error.strerror or str(error)).lower()
