"""Write files atomically, hash their content, and name the system's reason for refusing one."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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


def digest(plain: Mapping[str, Any]) -> str:
    """Return the identity of plain values: the first 16 digits of the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def why(error: OSError) -> str:
    """Return the system's reason alone, such as `permission denied`, for a message that already names the file."""
    return (error.strerror or str(error)).lower()
