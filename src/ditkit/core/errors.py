"""Errors that quote what was given, what was expected, and the nearest valid thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DitkitError(Exception):
    """Base of all errors that a user's input can cause; on the command line one line and exit code 2."""


class ShapeError(DitkitError):
    """A tensor or a size does not fit: widths that do not divide, tokens that do not make a grid."""


class ConfigError(DitkitError):
    """A setting, name or file name is unknown or out of range."""


class CheckpointError(DitkitError):
    """Weights are truncated, of another architecture, incomplete, not finite, or a pickle."""


class DataError(DitkitError):
    """A data set is missing, unreadable, or not what its checksum says."""


class ConflictError(DitkitError):
    """Two methods want to own the same site or resource."""


class NoEffectError(DitkitError):
    """A method that is not set to its neutral setting touched nothing or saved nothing.

    Attributes:
        output: what was drawn all the same, where that was known only at the end; exact, as nothing was saved.
    """

    output: Any = None


def nearest(given: object, choices: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the closest of `choices`, in any case, else an empty string."""
    names = {str(c).lower(): str(c) for c in choices}
    close = difflib.get_close_matches(str(given).lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


LISTED = 16
"""Choices that an error names."""


def unknown(what: str, given: object, choices: Iterable[object]) -> str:
    """One line: the unknown thing, the nearest valid one, and the first choices."""
    names = [str(c) for c in choices]
    listed = ", ".join(names[:LISTED]) + (f", ... ({len(names)} in all)" if len(names) > LISTED else "")
    return f"unknown {what} {str(given)!r}{nearest(given, names)} (choose from: {listed})"
