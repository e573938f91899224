"""Finding the files of a named set on this machine, and holding them to their SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ditkit.core.errors import DataError


def roots() -> list[Path]:
    """Folders searched for downloaded sets: `$DITKIT_DATA`, the current folder, `~/.cache/ditkit`."""
    chosen = os.environ.get("DITKIT_DATA")
    # os.path.expanduser: Path's own raises where a container's user has no home
    cache = Path(os.path.expanduser("~/.cache/ditkit"))
    return [*([Path(chosen)] if chosen else []), Path(), cache]


def find(candidates: Sequence[str]) -> Path | None:
    """Find the first of `candidates` (relative paths) that exists under one of the roots."""
    return next((root / name for root in roots() for name in candidates if (root / name).exists()), None)


def read_pinned(path: Path, sha256: str) -> bytes:
    """Read the file's bytes. Raises `DataError` when it cannot be read or has another checksum."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{path} has SHA-256 {found}, expected {sha256}; delete it and fetch it again")
    return content
