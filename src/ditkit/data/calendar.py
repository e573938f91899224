"""Evenly spaced times: the step of a calendar, in whole months or in a fixed length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.datetime64]
Steps = NDArray[np.int64]

MONTH = "month"
LENGTH_US = {
    "day": 86_400_000_000,
    "hour": 3_600_000_000,
    "minute": 60_000_000,
    "second": 1_000_000,
    "millisecond": 1_000,
    "microsecond": 1,
}
# 31 January, 28 February, 31 March is one stamp a month
SAME_PLACE = np.timedelta64(3, "D")


@dataclass(frozen=True)
class Step:
    """`count` months, days, hours, minutes, seconds, milliseconds or microseconds."""

    count: int
    unit: str

    def __str__(self) -> str:
        return self.unit if self.count == 1 else f"{self.count} {self.unit}s"

    @property
    def per_day(self) -> int:
        """Steps in a day, 0 where a day is no whole number of at least two of them."""
        if self.unit == MONTH:
            return 0
        steps, rest = divmod(LENGTH_US["day"], self.count * LENGTH_US[self.unit])
        return steps if steps > 1 and not rest else 0

    def index(self, times: Times) -> Steps:
        """Count the steps from the first time to each; -1 for a time that lies between two steps."""
        if self.unit == MONTH:
            months = _months(times)
            passed, length = months - months[:1], self.count
        else:
            passed, length = (times - times[:1]).astype("m8[us]").astype(np.int64), self._length_us
        return np.where(passed % length == 0, passed // length, -1)

    def after(self, first: np.datetime64, index: Steps) -> Times:
        """Compute the times `index` steps after `first`; months keep the day, or have it on their last one."""
        if self.unit == MONTH:
            start = first.astype("M8[M]")
            months = start + index * self.count
            day, clock = first.astype("M8[D]") - start, first.astype("M8[us]") - first.astype("M8[D]")
            last = (months + 1).astype("M8[D]") - np.timedelta64(1, "D")
            return np.minimum(months.astype("M8[D]") + day, last) + clock
        return first.astype("M8[us]") + (index * self._length_us).astype("m8[us]")

    def following(self, times: Times, count: int) -> Times:
        """Compute the `count` times after the last of `times`.

        Months go on at the latest day that one of them has, and on their last ones where all of them do.
        """
        steps = np.arange(1, count + 1)
        if self.unit != MONTH:
            return self.after(times[-1], steps)
        months, days = times.astype("M8[M]"), times.astype("M8[D]")
        latest = int((times - months.astype("M8[us]")).argmax())
        found = self.after(times[latest], steps + len(times) - 1 - latest)
        if not ((days + 1).astype("M8[M]") > months).all():
            return found
        ends = (found.astype("M8[M]") + 1).astype("M8[D]") - np.timedelta64(1, "D")
        return ends + (found - found.astype("M8[D]"))

    @property
    def _length_us(self) -> int:
        return self.count * LENGTH_US[self.unit]


def step_of(times: Times) -> Step:
    """Find the most common spacing of two or more increasing times.

    It is in months where there is at most one time a month and all lie within three days of one place in their month.
    """
    place = times.astype("M8[us]") - times.astype("M8[M]")
    months = np.diff(_months(times))
    if months.min() >= 1 and np.ptp(place) <= SAME_PLACE:
        return Step(_most_common(months), MONTH)
    length = _most_common(np.diff(times.astype("M8[us]")).astype(np.int64))
    unit = next(unit for unit, size in LENGTH_US.items() if length % size == 0)
    return Step(length // LENGTH_US[unit], unit)


def month_of_year(times: Times) -> Steps:
    """0 for January to 11 for December."""
    return _months(times) % 12


def slot_of_day(times: Times, slots: int) -> Steps:
    """In which of `slots` equal parts of its day each time lies, from 0."""
    since_midnight = (times.astype("M8[us]") - times.astype("M8[D]")).astype(np.int64)
    return since_midnight // (LENGTH_US["day"] // slots)


def shown(time: Any) -> str:
    """ISO 8601 to the minute, or finer where the time is."""
    return str(np.datetime_as_string(time.astype("M8[us]"), unit="auto" if _fine(time) else "m"))


def _fine(time: Any) -> bool:
    return bool(time.astype("M8[m]") != time)


def _months(times: Times) -> Steps:
    return times.astype("M8[M]").astype(np.int64)


def _most_common(spacings: Steps) -> int:
    values, counts = np.unique(spacings, return_counts=True)
    return int(values[counts.argmax()])
