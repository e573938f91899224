"""Paths that a person gives: looked at in one place, where whatever the system refuses becomes one line."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ditkit.core.errors import ConfigError, DitkitError

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF)


def kind_of(path: str | Path, error: type[DitkitError] = ConfigError) -> str:
    """Return "file", "folder", "other" (a pipe, a device, a socket), or nothing where there is none.

    Raises:
        DitkitError: of the kind `error`; the system refuses to look: a folder that one may not enter, a name that is
            too long or holds a null.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as refusal:
        if refusal.errno in ABSENT:
            return ""
        raise error(f"cannot look at {os.fspath(path):.200}: {refusal.strerror}") from refusal
    except ValueError as refusal:
        raise error(f"cannot look at {os.fspath(path)!r:.200}: {refusal}") from refusal
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def is_file(path: str | Path, error: type[DitkitError] = ConfigError) -> bool:
    """Return whether there is a regular file. Raises what `kind_of` does."""
    return kind_of(path, error) == "file"


def is_folder(path: str | Path, error: type[DitkitError] = ConfigError) -> bool:
    """Return whether there is a folder. Raises what `kind_of` does."""
    return kind_of(path, error) == "folder"


def check_regular(path: str | Path, error: type[DitkitError]) -> None:
    """Refuse what is there and is no regular file: a pipe is waited for, and a device need not end.

    Raises:
        DitkitError: of the kind `error`.
    """
    if kind_of(path, error) == "other":
        raise error(f"{path}: not a regular file")
