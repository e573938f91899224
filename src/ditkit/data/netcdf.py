"""Gridded fields out of a netCDF file: variables over (time, y, x), or (time, level, y, x) with one level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.calendar import Times
from ditkit.data.clock import CLOCK, SINCE, STANDARD, Clock, numpy_date
from ditkit.data.repair import Raw

CALENDARS = (STANDARD, "gregorian", "proleptic_gregorian")
OTHER_CALENDARS = ("noleap", "365_day", "all_leap", "366_day", "360_day", "julian")
"""Calendars with days that no clock of NumPy knows, such as 30 February, or without some that it knows."""
GREGORIAN = (1582, 10, 15)
"""The first day of the calendar of today in the standard one, which is Julian before."""
SHORTEST_MONTH = 28
NORTHWARD = (
    "degrees_north",
    "degree_north",
    "degree_N",
    "degrees_N",
    "degreeN",
    "degreesN",
)
"""Units of a latitude (CF, section 4.1)."""
LENGTHS = ("second", "minute", "hour", "day", "month", "year")
"""The words that the units of a time begin with."""


def read(
    path: Path,
    variables: Sequence[str] | None = None,
    content: bytes | None = None,
    max_bytes: int = 4 * 2**30,
) -> Raw:
    """Read the chosen variables, or all over (time, y, x), which must lie on one grid; missing values are NaN.

    Rows run as in a map, from the largest y (or latitude) down, however the file has them. Scale, offset and
    fill value of the file are applied, and times are rounded to the millisecond, since
    days counted in floating point are no more exact.

    Args:
        content: the bytes of the file, where they are read already.

    Raises:
        DataError: not netCDF, no or unreadable times, an unknown calendar, variables of other or differing
            dimensions, or more than `max_bytes` of values.
        ConfigError: an unknown variable, or the package netCDF4 is not installed.
    """
    try:
        import netCDF4
    except ImportError as error:
        raise ConfigError("netCDF files need the package netCDF4: pip install netCDF4") from error
    try:
        with netCDF4.Dataset(str(path), memory=content) as dataset:
            return _read(dataset, str(path), variables, max_bytes)
    except MemoryError as error:
        raise DataError(f"{path} claims more values than there is memory for") from error
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot read {path} as netCDF: {getattr(error, 'strerror', None) or error}"
        ) from error


def _read(dataset: Any, source: str, variables: Sequence[str] | None, max_bytes: int) -> Raw:
    names = _names(dataset, source, variables)
    chosen = [dataset.variables[name] for name in names]
    dimensions, shape = chosen[0].dimensions, chosen[0].shape
    for variable in chosen:
        if variable.dimensions != dimensions:
            raise DataError(
                f"{source}: {names[0]!r} lies over {dimensions}, {variable.name!r} over {variable.dimensions}, "
                "expected one grid; choose with variables="
            )
    needed = sum(map(_value_bytes, chosen)) * math.prod(shape)
    if needed > max_bytes:
        raise DataError(
            f"{source}: {len(names)} variables of {shape} need {needed:,} bytes of memory, more than "
            f"max_bytes={max_bytes:,}; choose fewer with variables= or raise max_bytes"
        )
    times, clock = _times(dataset.variables[dimensions[0]], source)
    values: Any = np.stack([_values(variable) for variable in chosen], axis=1)
    return Raw(
        source=source,
        row="time step",
        column="variable",
        rows=np.arange(1, len(times) + 1),
        times=times,
        values=values[:, :, ::-1].copy() if _rises(_rows_of(dataset, chosen[0])) else values,
        variables=tuple(names),
        units=tuple(map(_units, chosen)),
        clock=clock,
    )


def _names(dataset: Any, source: str, variables: Sequence[str] | None) -> list[str]:
    fields = [name for name, variable in dataset.variables.items() if _is_field(dataset, variable)]
    if not fields:
        _check_units(dataset, source)
        found = ", ".join(f"{name}{v.dimensions}" for name, v in dataset.variables.items())
        raise DataError(
            f"{source} has no variable over (time, y, x) with a time coordinate; found {found:.300}"
        )
    if variables is None:
        return fields
    chosen = [variables] if isinstance(variables, str) else list(variables)
    for name in chosen:
        if name not in fields:
            raise ConfigError(f"{source}: " + unknown("variable", name, fields))
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ConfigError(f"variables={chosen!r}, expected at least one name, each once")
    return chosen


def _is_field(dataset: Any, variable: Any) -> bool:
    """Numbers over (time, y, x) or one level of them, where time has a coordinate in CF time units."""
    time = _time_of(dataset, variable)
    return time is not None and " since " in _units(time).lower()


def _time_of(dataset: Any, variable: Any) -> Any:
    """Find the coordinate of the first of three axes, or of four with one level; None unless there is one."""
    if not np.issubdtype(variable.dtype, np.number):
        return None
    if variable.ndim != 3 and (variable.ndim != 4 or variable.shape[1] != 1):
        return None
    return dataset.variables.get(variable.dimensions[0])


def _check_units(dataset: Any, source: str) -> None:
    """Refuse the first axis that lacks nothing of a time but a date in its units to count from."""
    for name, variable in dataset.variables.items():
        time = _time_of(dataset, variable)
        if time is not None and (time.name.lower() == "time" or _units(time).lower().rstrip("s") in LENGTHS):
            raise DataError(
                f"{source}: the times of {name!r} are {time.name!r} in units {_units(time)!r}, expected units such as "
                "'hours since 2000-01-01'"
            )


def _units(variable: Any) -> str:
    return str(getattr(variable, "units", ""))


def _rows_of(dataset: Any, variable: Any) -> Any:
    """Find the latitude over rows and columns (CF, section 5.2), or else the coordinate of the rows."""
    *_, y, x = variable.dimensions
    named = [dataset.variables.get(name) for name in str(getattr(variable, "coordinates", "")).split()]
    latitudes = (v for v in named if v is not None and _units(v) in NORTHWARD and v.dimensions == (y, x))
    return next(latitudes, dataset.variables.get(y))


def _rises(coordinate: Any) -> bool:
    """Return whether a coordinate grows from the first row to the last; False where the file gives none."""
    if coordinate is None or coordinate.ndim == 0 or len(coordinate) < 2:
        return False
    return bool(np.mean(coordinate[-1]) > np.mean(coordinate[0]))


def _values(variable: Any) -> Any:
    """Read values as exactly as the file has them: float64 unless float32 holds them all."""
    given = np.ma.asarray(variable[:])
    values = np.ma.filled(given.astype(np.result_type(given.dtype, np.float32)), np.nan)
    # what a network's numbers cannot hold is not finite, which is refused by its row
    values = np.where(np.abs(values) > np.finfo(np.float32).max, values.dtype.type(np.inf), values)
    return values.reshape(len(values), *values.shape[-2:])


def _value_bytes(variable: Any) -> int:
    """Return how many bytes `_values` needs for one; packed ones are unpacked into float64."""
    packed = {"scale_factor", "add_offset"} & set(variable.ncattrs())
    return 8 if packed else int(np.result_type(variable.dtype, np.float32).itemsize)


def _times(time: Any, source: str) -> tuple[Times, Clock]:
    """Read times by CF's units and calendars, to the millisecond.

    Dates of the standard calendar are NumPy's; those of another one are counted in it.
    """
    calendar = str(getattr(time, "calendar", STANDARD)).lower()
    if calendar not in (*CALENDARS, *OTHER_CALENDARS):
        raise DataError(
            f"{source}: " + unknown(f"calendar of {time.name!r}", calendar, (*CALENDARS, *OTHER_CALENDARS))
        )
    counts = np.ma.masked_invalid(time[:])
    if np.ma.count_masked(counts):
        first = int(np.flatnonzero(np.ma.getmaskarray(counts))[0]) + 1
        raise DataError(f"{source}, time step {first}: {time.name!r} is missing, expected a time stamp")
    return dated(
        np.ma.getdata(counts), str(time.units), calendar, f"{source}: {time.name!r} in units {time.units!r}"
    )


def dated(counts: NDArray[Any], units: str, calendar: str, what: str) -> tuple[Times, Clock]:
    """Return the times of counts such as "hours since 1-1-1" in a calendar of CF, and the clock that they are of.

    Raises:
        DataError: units that are none of time, or dates that no calendar of today has; `what` begins the message.
    """
    from cftime import date2num, num2date

    unit, _, since = units.strip().partition(" ")
    word, _, start = since.strip().partition(" ")
    try:
        if unit.lower().rstrip("s") == "month" and calendar in CALENDARS:
            dates = _months_after(counts, start, calendar)
        else:
            dates = np.asarray(num2date(counts, f"{unit.lower()} {word.lower()} {start}", calendar))
        monthly = calendar in OTHER_CALENDARS and _once_a_month(dates)
        if calendar in OTHER_CALENDARS and not monthly:
            exact = np.asarray(date2num(dates, SINCE, calendar), dtype=np.float64).astype(np.int64)
        elif calendar in CALENDARS[:2] and (old := [d for d in dates if d.timetuple()[:3] < GREGORIAN]):
            raise ValueError(f"{old[0]} is before 15 October 1582, expected later dates")
        else:
            exact = np.array([numpy_date(date) for date in dates], dtype="M8[us]").astype(np.int64)
    except (ValueError, OverflowError, TypeError) as error:
        raise DataError(f"{what} is not readable: {error}") from error
    clock = Clock(calendar=calendar, local=monthly) if calendar in OTHER_CALENDARS else CLOCK
    return ((exact + 500) // 1000 * 1000).astype("M8[us]"), clock


def _once_a_month(dates: NDArray[Any]) -> bool:
    """Return whether all dates are at one place in their months, which all months have."""
    months = {(date.year, date.month) for date in dates}
    places = {(date.day, date.hour, date.minute) for date in dates}
    return (
        len(dates) > 1 and len(months) == len(dates) and len(places) == 1 and dates[0].day <= SHORTEST_MONTH
    )


def _months_after(counts: NDArray[Any], start: str, calendar: str) -> NDArray[Any]:
    """Add whole months to a date, which cftime does in the calendar of 360 days only."""
    from cftime import num2date

    whole = np.round(counts).astype(np.int64)
    if (whole != counts).any():
        raise ValueError("parts of a month are no length of time, expected whole ones")
    first = num2date(0, f"days since {start}", calendar)
    if first.day > SHORTEST_MONTH:
        raise ValueError(f"months from day {first.day} on, expected one that all months have")
    months = [first.year * 12 + first.month - 1 + int(count) for count in whole]
    return np.array([first.replace(year=month // 12, month=month % 12 + 1) for month in months])
