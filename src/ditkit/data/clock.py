"""Clocks: the zone or the calendar that the times of a set are written in."""

from __future__ import annotations

import logging
import re
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import numpy as np

from ditkit.core.errors import ConfigError, nearest
from ditkit.data.calendar import Times, shown

logger = logging.getLogger(__name__)

STANDARD = "standard"
"""The calendar of clocks on a wall: days as NumPy knows them."""
OFFSET = re.compile(r"(?:UTC)?([+-])(\d{2}):?(\d{2})")
FAMILIAR = ("Europe/", "America/", "Asia/", "Australia/")
AHEAD = [timedelta(weeks=week) for week in range(0, 105, 2)]
"""Moments after the last stamp at which all zones that stamps may be of have to agree."""


@dataclass(frozen=True)
class Clock:
    """The zone or calendar that the times of a set are written in.

    Args:
        zone: an IANA name such as Europe/Berlin, or an offset such as +01:00; "" where stamps name none.
        local: the times are dates and hours as the zone or the calendar writes them; else they are UTC, or microseconds
            of the calendar since 1970-01-01. Days and months of a zone are local, and months of a calendar.
        calendar: of CF.
    """

    zone: str = ""
    local: bool = False
    calendar: str = STANDARD

    def index(self, times: Times) -> Any:
        """Return the times as a pandas index: with their zone, or as dates of cftime in another calendar.

        A local time that a clock leaves out is moved to the first one after it.
        """
        import pandas as pd

        if self.calendar != STANDARD:
            return pd.Index(self._dates(times), dtype=object, name="time")
        found = pd.DatetimeIndex(times, name="time")
        if not self.zone:
            return found
        place = zone_of(self.zone)
        if not self.local:
            return found.tz_localize("UTC").tz_convert(place)
        first = np.ones(len(found), dtype=bool)  # of two times of one name the first, which is in summer time
        return found.tz_localize(place, ambiguous=first, nonexistent="shift_forward")

    def civil(self, times: Times) -> Times:
        """Return the dates that a calendar writes, those that NumPy does not have as the last of their month."""
        if self.calendar == STANDARD or self.local:
            return times
        return np.array([numpy_date(date) for date in self._dates(times)], dtype="M8[us]")

    def shown(self, time: Any) -> str:
        """Write a time in ISO 8601 to the minute, or finer where it is."""
        if self.calendar == STANDARD or self.local:
            return shown(time)
        (date,) = self._dates(np.array([time]))
        return str(date.isoformat())

    def _dates(self, times: Times) -> list[Any]:
        """Return the times as dates of cftime."""
        from cftime import datetime as date_of
        from cftime import num2date

        if not self.local:
            return list(num2date(times.astype("M8[us]").astype(np.int64), SINCE, self.calendar))
        parts = [time.timetuple()[:6] for time in times.astype("M8[s]").tolist()]
        return [date_of(*part, calendar=self.calendar) for part in parts]


def numpy_date(date: Any) -> np.datetime64:
    """Return a date of cftime as NumPy's, the last of its month where NumPy's ends before."""
    month = np.datetime64(f"{date.year:04d}-{date.month:02d}", "M")
    length = int(((month + 1).astype("M8[D]") - month.astype("M8[D]")).astype(np.int64))
    day = month.astype("M8[us]") + np.timedelta64(min(date.day, length) - 1, "D")
    seconds = 3600 * date.hour + 60 * date.minute + date.second
    return day + np.timedelta64(1_000_000 * seconds + date.microsecond, "us")


SINCE = "microseconds since 1970-01-01"
CLOCK = Clock()
"""Stamps without a zone, in days as they are."""


def zone_of(name: str) -> tzinfo:
    """Return the zone of that name, or of an offset such as +01:00.

    Raises:
        ConfigError: there is none.
    """
    if name.upper() in ("UTC", "Z"):
        return UTC
    if found := OFFSET.fullmatch(name):
        offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
        if offset < timedelta(days=1):
            return timezone(-offset if found[1] == "-" else offset)
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        close = nearest(name, zoneinfo.available_timezones())
        raise ConfigError(
            f"zone={name!r}, expected a name such as Europe/Berlin or an offset such as +01:00{close}"
        ) from error


def zone_name(offset: timedelta) -> str:
    """Write an offset from UTC as +HH:MM; UTC where there is none."""
    minutes = round(offset / timedelta(minutes=1))
    hours, rest = divmod(abs(minutes), 60)
    return f"{'-' if minutes < 0 else '+'}{hours:02d}:{rest:02d}" if minutes else "UTC"


def zone_with(times: Times, offsets: Sequence[timedelta], source: str) -> str:
    """Find the zone of stamps that name no more than their offsets.

    One offset is a zone. Several are of a place whose clock is set forward and back: any whose clock shows all of
    them, provided that all such places go on alike in the next two years; else the last offset is held, with a warning.

    Args:
        times: in UTC.
    """
    distinct = sorted(set(offsets))
    if len(distinct) < 2:
        return zone_name(distinct[0]) if distinct else "UTC"
    given = np.array([offset // timedelta(seconds=1) for offset in offsets])
    changed = np.flatnonzero(np.diff(given[np.argsort(times, kind="stable")]))
    order = np.argsort(times, kind="stable")
    chosen = order[sorted({0, len(given) - 1, *changed.tolist(), *(changed + 1).tolist()})]
    moments = [datetime.fromtimestamp(int(s), UTC) for s in times[chosen].astype("M8[s]").astype(np.int64)]
    named = [timedelta(seconds=int(seconds)) for seconds in given[chosen]]
    ahead = [moments[-1] + step for step in AHEAD]
    found: dict[tuple[Any, ...], list[str]] = {}
    for name in zoneinfo.available_timezones():
        place = zoneinfo.ZoneInfo(name)
        if all(m.astimezone(place).utcoffset() == o for m, o in zip(moments, named, strict=True)):
            found.setdefault(tuple(m.astimezone(place).utcoffset() for m in ahead), []).append(name)
    if len(found) == 1:
        (names,) = found.values()
        return min(names, key=lambda name: (not name.startswith(FAMILIAR), name))
    last = zone_name(named[-1])
    logger.warning(
        "%s: stamps have the offsets %s, which tell no zone; later ones are written with %s: name it with zone=",
        source,
        " and ".join(map(zone_name, distinct)),
        last,
    )
    return last
