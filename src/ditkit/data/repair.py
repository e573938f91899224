"""Faults of a file of fields or series: each an error with its row, or a repair that was asked for.

Repairs, any of them in one tuple:
    "sort": rows are put in the order of their time stamps.
    "first": of rows with the same time stamp the first one stays.
    "interpolate": values that are missing, and rows missing in the calendar, are interpolated linearly in time
        between the nearest known ones; before the first and after the last known value that value is held.
        It looks at later times, so a long gap across the border of two parts tells the earlier of the later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.calendar import Step, Steps, Times, step_of
from ditkit.data.clock import CLOCK, Clock

logger = logging.getLogger(__name__)

REPAIRS = ("sort", "first", "interpolate")


@dataclass(frozen=True, eq=False)
class Raw:
    """Fields as a file gives them, in the order of its rows."""

    source: str
    row: str  # what a row is called: "line", "time step"
    column: str  # what a variable is called: "column", "variable"
    rows: Steps  # [N], from 1 as a person counts
    times: Times  # [N]
    values: NDArray[np.float32] | NDArray[np.float64]  # [N, C, H, W], NaN where the file has no value
    variables: tuple[str, ...]
    units: tuple[str, ...]
    clock: Clock = CLOCK

    def place(self, index: int) -> str:
        return f"{self.source}, {self.row} {self.rows[index]}"

    def time(self, index: int) -> str:
        return self.clock.shown(self.times[index])

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Raw:
        return replace(self, rows=self.rows[chosen], times=self.times[chosen], values=self.values[chosen])


def chosen_repairs(repair: str | Sequence[str]) -> frozenset[str]:
    """Parse the names in `repair`. Raises ConfigError for an unknown one."""
    names = (repair,) if isinstance(repair, str) else tuple(repair)
    for name in names:
        if name not in REPAIRS:
            raise ConfigError(unknown("repair", name, REPAIRS))
    return frozenset(names)


def regular(raw: Raw, repairs: frozenset[str]) -> tuple[Raw, Step]:
    """Increasing, evenly spaced times, no value missing but where a cell never holds one.

    Raises:
        DataError: the first row that is not so and has no repair, or fewer than two rows.
    """
    raw = _distinct(_increasing(raw, "sort" in repairs), "first" in repairs)
    if len(raw.times) < 2:
        raise DataError(f"{raw.source}: {raw.row}s with data: {len(raw.times)}, expected at least 2")
    step = step_of(raw.times)
    raw = _without_gaps(raw, step, "interpolate" in repairs)
    return _complete(raw, "interpolate" in repairs), step


def _increasing(raw: Raw, repair: bool) -> Raw:
    back = np.flatnonzero(raw.times[1:] < raw.times[:-1])
    if not back.size:
        return raw
    if repair:
        return raw.take(np.argsort(raw.times, kind="stable"))
    i = int(back[0]) + 1
    raise DataError(
        f"{raw.place(i)}: time {raw.time(i)} comes after {raw.time(i - 1)}, expected increasing "
        "times; repair='sort' sorts them"
    )


def _distinct(raw: Raw, repair: bool) -> Raw:
    again = np.flatnonzero(raw.times[1:] == raw.times[:-1]) + 1
    if not again.size:
        return raw
    if repair:
        return raw.take(np.setdiff1d(np.arange(len(raw.times)), again))
    i = int(again[0])
    raise DataError(
        f"{raw.place(i)}: time {raw.time(i)} again, first on {raw.row} {raw.rows[i - 1]}, expected each "
        "time once; repair='first' keeps the first"
    )


def _without_gaps(raw: Raw, step: Step, repair: bool) -> Raw:
    index = step.index(raw.times)
    between = np.flatnonzero(index < 0)
    if between.size:
        i = int(between[0])
        raise DataError(
            f"{raw.place(i)}: time {raw.time(i)} is no whole number of steps ({step}) after "
            f"{raw.time(0)}, expected evenly spaced times"
        )
    gaps = np.flatnonzero(np.diff(index) != 1)
    if not gaps.size:
        return raw
    i, total = int(gaps[0]) + 1, int(index[-1]) + 1
    missing = total - len(index)
    if not repair:
        raise DataError(
            f"{raw.place(i)}: time {raw.time(i)} follows {raw.time(i - 1)}, expected one step "
            f"({step}) between them; repair='interpolate' fills gaps ({missing} steps in all)"
        )
    if missing > len(index):
        raise DataError(
            f"{raw.place(i)}: gaps need {missing} steps ({step}) made up from {len(index)} given ones, expected at "
            "most as many; cut the file or mend its time stamps"
        )
    logger.warning("%s: %d of %d steps are missing and interpolated", raw.source, missing, total)
    return _spread(raw, step, index, total)


def _spread(raw: Raw, step: Step, index: Steps, total: int) -> Raw:
    """Rows at their places in the calendar, NaN at the steps between."""
    rows, values = (
        np.zeros(total, np.int64),
        np.full((total, *raw.values.shape[1:]), np.nan, raw.values.dtype),
    )
    times = step.after(raw.times[0], np.arange(total))
    rows[index], values[index], times[index] = raw.rows, raw.values, raw.times
    return replace(raw, rows=rows, times=times, values=values)


def _complete(raw: Raw, repair: bool) -> Raw:
    known = np.isfinite(raw.values)
    held = np.asarray(known.any(0))  # [C, H, W]
    for c, name in enumerate(raw.variables):
        if not held[c].any():
            raise DataError(f"{raw.source}: {raw.column} {name!r} holds no number at all; leave it out")
    holes = held & ~known
    if not holes.any():
        return raw
    if not repair:
        raise DataError(_first_hole(raw, holes))
    values = raw.values.copy()
    index = np.arange(len(values))
    for c, y, x in np.argwhere(holes.any(0)):
        good = known[:, c, y, x]
        values[~good, c, y, x] = np.interp(index[~good], index[good], values[good, c, y, x])
    logger.warning("%s: %d of %d values are interpolated", raw.source, holes.sum(), holes.size)
    return replace(raw, values=values)


def _first_hole(raw: Raw, holes: NDArray[np.bool_]) -> str:
    n, c, y, x = (int(i) for i in np.argwhere(holes)[0])
    cell = f" in cell ({y}, {x}) of {raw.values.shape[2]} x {raw.values.shape[3]}"
    where = cell if raw.values[0, 0].size > 1 else ""
    return (
        f"{raw.place(n)}: {raw.column} {raw.variables[c]!r} has no finite value{where} "
        f"({int(holes.sum())} missing in all), expected numbers; repair='interpolate' fills them in time"
    )
