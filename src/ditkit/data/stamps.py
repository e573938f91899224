"""Time stamps of texts: their form, of which there may be two readings, and their zone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.calendar import Times, shown, step_of
from ditkit.data.clock import CLOCK, Clock, zone_of, zone_with

if TYPE_CHECKING:
    from pandas import Series

EPOCH = ("s", "ms", "us", "ns")
"""Time formats of counts since 1970, in UTC."""
DAY_OR_MONTH = re.compile(r"\s*\d{1,2}([./-])\d{1,2}\1(\d{4}|\d{2})(?!\d)(.*)")
OFFSET = re.compile(r"(?:\d:\d{2}(?:[.,]\d+)?|[T ]\d{2})\s*(Z|UTC|[+-]\d{2}(?::?\d{2})?)\s*$")
TWELVE_HOURS = (" %I:%M %p", " %I:%M:%S %p")


def read_stamps(
    stamps: Series, time_format: str | None, zone: str | None, source: str, name: str
) -> tuple[Times, Clock]:
    """Read texts, by the number of their line, as times and the clock that they are of.

    Days and months are counted on the clock of a zone, everything finer in UTC.

    Raises:
        DataError: a stamp that is none, two readings of one column, or a local time that its zone does not have.
        ConfigError: no such format or zone.
    """
    place = None if zone is None else zone_of(zone)
    if time_format in EPOCH:
        times = _counted(stamps, time_format, source, name)
        return (times, CLOCK) if place is None else clocked(times, zone or "")
    instants = _read(stamps, time_format, source, name)
    offsets = _offsets(stamps)
    if offsets is None and place is not None:
        try:
            instants = (
                instants.dt.tz_localize(None).dt.tz_localize(place, ambiguous="infer").dt.tz_convert("UTC")
            )
        except ValueError as error:
            raise DataError(
                f"{source}: time column {name!r} in zone={zone}: {' '.join(str(error).split())}; expected times that "
                "its clock shows, or stamps with offsets"
            ) from error
    times = instants.dt.tz_localize(None).to_numpy().astype("M8[us]")
    if offsets is None and place is None:
        return times, CLOCK
    return clocked(times, zone or zone_with(times, offsets or [], source))


def clocked(times: Times, zone: str) -> tuple[Times, Clock]:
    """Return times of UTC as they are, or as the zone's own where each is at the same hour of its day."""
    clock = Clock(zone)
    local = clock.index(times).tz_localize(None).to_numpy().astype("M8[us]")
    days = local.astype("M8[D]")
    one_a_day = len(times) > 1 and len(np.unique(local - days)) == 1 and len(np.unique(days)) > 1
    return (local, Clock(zone, local=True)) if one_a_day else (times, clock)


def _read(stamps: Series, time_format: str | None, source: str, name: str) -> Series:
    import pandas as pd

    readings = {} if time_format else _readings(stamps)
    if len(readings) == 1:
        return next(iter(readings.values()))
    if len(readings) > 1:
        even = {form: found for form, found in readings.items() if _is_even(found)}
        if len(even) == 1:
            return next(iter(even.values()))
        i = _telling(readings)
        both = " or ".join(
            f"{shown(found.iloc[i].to_datetime64())[:10]} (time_format={form!r})"
            for form, found in readings.items()
        )
        raise DataError(
            f"{source}, line {stamps.index[i]}: time column {name!r} is {stamps.iloc[i]!r}, which is {both}; "
            "expected time_format="
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it guesses; what it cannot read is refused below
        try:
            found = pd.to_datetime(stamps, errors="coerce", utc=True, format=time_format)
        except ValueError as error:
            raise ConfigError(
                f"time_format={time_format!r}: {error}; expected one such as %d.%m.%Y, or s or ms of counts"
            ) from error
    unread = np.flatnonzero(found.isna())
    if unread.size:
        raise _no_stamp(stamps, int(unread[0]), time_format, source, name)
    return found


def _readings(stamps: Series) -> dict[str, Series]:
    """Read stamps such as 01.02.2023 in each order of day, month and year that all of them allow; no two alike."""
    import pandas as pd

    first = DAY_OR_MONTH.fullmatch(str(stamps.iloc[0]))
    if first is None:
        return {}
    separator, year, rest = first.groups()
    orders = ("dmY", "mdY") if len(year) == 4 else ("dmy", "mdy", *(() if separator == "." else ("ymd",)))
    found: dict[str, Series] = {}
    for form in _forms(separator, orders, rest):
        read = pd.to_datetime(stamps.str.strip(), errors="coerce", utc=True, format=form)
        if not read.isna().any() and not any(read.equals(other) for other in found.values()):
            found[form] = read
    return found


def _forms(separator: str, orders: tuple[str, ...], rest: str) -> Iterator[str]:
    """Yield a format for each order, before the clock that `rest` is."""
    from pandas.tseries.api import guess_datetime_format

    guessed = guess_datetime_format(f"2023-01-02{rest.rstrip()}")
    tails = TWELVE_HOURS if guessed is None else (guessed.removeprefix("%Y-%m-%d"),)
    for order in orders:
        for tail in tails:
            yield separator.join(f"%{part}" for part in order) + tail


def _is_even(found: Series) -> bool:
    times = found.dt.tz_localize(None).to_numpy().astype("M8[us]")
    if len(times) < 2 or not (times[1:] > times[:-1]).all():
        return False
    return bool((step_of(times).index(times) == np.arange(len(times))).all())


def _telling(readings: dict[str, Any]) -> int:
    """Find the first row that two readings make different times of."""
    one, other, *_ = readings.values()
    return int(np.flatnonzero((one != other).to_numpy())[0])


def _counted(stamps: Series, unit: str, source: str, name: str) -> Times:
    """Read counts since 1970, in fractions of a second to the microsecond."""
    import pandas as pd

    counts = pd.to_numeric(stamps, errors="coerce")
    found = pd.to_datetime(counts, unit=unit, errors="coerce")
    unread = np.flatnonzero(found.isna())
    if unread.size:
        raise _no_stamp(stamps, int(unread[0]), unit, source, name)
    return found.dt.round("us").to_numpy().astype("M8[us]")


def _offsets(stamps: Series) -> list[timedelta] | None:
    """Return the offset from UTC of each stamp; None where they name none."""
    named = [OFFSET.search(text) for text in stamps.astype(str)]
    if not any(named):
        return None
    return [timedelta() if found is None else _offset(found[1]) for found in named]


def _offset(text: str) -> timedelta:
    if text in ("Z", "UTC"):
        return timedelta()
    digits = text[1:].replace(":", "").ljust(4, "0")
    offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return -offset if text[0] == "-" else offset


def _no_stamp(stamps: Series, i: int, time_format: str | None, source: str, name: str) -> DataError:
    import pandas as pd

    form = (
        f"the format {time_format!r}" if time_format else f"{stamps.iloc[0]!r}" if i else "2024-01-31 18:00"
    )
    text = "empty" if pd.isna(stamps.iloc[i]) else repr(stamps.iloc[i])[:60]
    counts = text.strip("'").replace(".", "", 1).isdigit() and not time_format
    hint = "time_format=s or time_format=ms of counts since 1970" if counts else "time= and time_format="
    return DataError(
        f"{source}, line {stamps.index[i]}: time column {name!r} is {text}, expected a time stamp like {form}; "
        f"see {hint}"
    )
