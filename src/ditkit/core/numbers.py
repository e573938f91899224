"""Whole numbers that a caller gives."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from ditkit.core.errors import ConfigError


def integer(name: str, given: object, least: int, most: int | None = None) -> int:
    """`given` as an int; NumPy's and torch's integers count, booleans and whole floats do not.

    Raises:
        ConfigError: it is no integer, or lies outside [least, most].
    """
    if isinstance(given, bool) or not isinstance(given, SupportsIndex):
        raise ConfigError(f"{name}={given!r} should be an integer")
    try:
        value = operator.index(given)
    except TypeError as error:  # a torch tensor has __index__, and refuses when it holds something else
        raise ConfigError(f"{name}={given!r} should be an integer") from error
    if value < least:
        raise ConfigError(f"{name}={value} should be at least {least}")
    if most is not None and value > most:
        raise ConfigError(f"{name}={value} should be at most {most}")
    return value
