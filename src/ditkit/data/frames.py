"""Tables of pandas and data sets of xarray as fields, without a file between."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.clock import CLOCK
from ditkit.data.fields import FieldSet, field_set
from ditkit.data.netcdf import read as read_netcdf
from ditkit.data.repair import Raw, chosen_repairs
from ditkit.data.stamps import clocked

SPATIAL = ("y", "x")
"""Axes of one cell that a series of xarray is given."""


def is_in_memory(data: Any) -> bool:
    """Return whether `data` are a table of pandas, a data set of xarray, or fields: no name and no path."""
    return isinstance(data, FieldSet) or _library(data) in ("pandas", "xarray")


def load(
    data: Any,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    repair: str | Sequence[str] = (),
    name: str = "",
) -> FieldSet:
    """Take a pandas DataFrame or Series, an xarray Dataset or DataArray, or a FieldSet, as fields.

    Times are the index of a table, or its column `time`; the zone of the index goes along. A data set's variables lie
    over (time, y, x) or over time alone, in any calendar.

    Args:
        columns: the variables; all unless given.
        repair: "sort", "first" and "interpolate", see `ditkit.data.repair`.
        name: of the set in messages; that of its class unless given.

    Raises:
        DataError: no times, values that are no numbers, and what a file of the kind would be refused for.
        ConfigError: an unknown column, or data of another kind.
    """
    name, repairs = name or type(data).__name__, chosen_repairs(repair)
    if isinstance(data, FieldSet):
        return data if columns is None else data.chosen(columns)
    if _library(data) == "pandas":
        return field_set(name, _table(data, time, columns, name), repairs)
    if _library(data) == "xarray":
        return field_set(name, _data_set(data, columns, name), repairs)
    raise ConfigError(
        f"got a {type(data).__name__}, expected a path, a pandas DataFrame or an xarray Dataset"
    )


def _library(data: Any) -> str:
    return type(data).__module__.partition(".")[0]


def _table(data: Any, time: str | None, columns: Sequence[str] | None, name: str) -> Raw:
    import pandas as pd

    table = data.to_frame(data.name or "value") if isinstance(data, pd.Series) else data
    if not isinstance(table, pd.DataFrame):
        raise ConfigError(f"got a pandas {type(data).__name__}, expected a DataFrame or a Series")
    header = [str(column) for column in table.columns]
    if len(set(header)) < len(header):
        raise DataError(f"{name}: columns {header} are not distinct, expected each name once")
    table = table.set_axis(header, axis=1)
    if time is not None and time not in header:
        raise ConfigError(f"{name}: " + unknown("column", time, header))
    stamps = table.index if time is None else pd.Index(table[time])
    if isinstance(stamps, pd.PeriodIndex):
        stamps = stamps.to_timestamp()
    if not isinstance(stamps, pd.DatetimeIndex):
        place = "index" if time is None else f"column {time!r}"
        raise DataError(
            f"{name} has no times: its {place} holds {stamps.dtype}, expected a DatetimeIndex, such as "
            "pandas.to_datetime makes, or time= with a column of one"
        )
    if stamps.hasnans:
        raise DataError(f"{name}, row {int(stamps.isna().argmax()) + 1}: the time is missing")
    chosen = [column for column in header if column != time] if columns is None else list(columns)
    for column in chosen:
        if column not in header:
            raise ConfigError(f"{name}: " + unknown("column", column, header))
        if not pd.api.types.is_numeric_dtype(table[column].dtype):
            raise DataError(f"{name}: column {column!r} holds {table[column].dtype}, expected numbers")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"{name}: columns={chosen!r} of {header}, expected at least one series, each once")
    times, clock = stamps.tz_localize(None).to_numpy().astype("M8[us]"), CLOCK
    if stamps.tz is not None:
        utc = stamps.tz_convert("UTC").tz_localize(None).to_numpy().astype("M8[us]")
        times, clock = clocked(utc, str(stamps.tz))
    return Raw(
        source=name,
        row="row",
        column="column",
        rows=np.arange(1, len(table) + 1),
        times=times,
        values=table[chosen].to_numpy(np.float64, na_value=np.nan, copy=True)[:, :, None, None],
        variables=tuple(chosen),
        units=("",) * len(chosen),
        clock=clock,
    )


def _data_set(data: Any, columns: Sequence[str] | None, name: str) -> Raw:
    """Read through a file in memory's stead, which decides of calendars, levels and rows as for any other."""
    data_set = data.to_dataset(name=data.name or "value") if hasattr(data, "to_dataset") else data
    if not hasattr(data_set, "data_vars"):
        raise ConfigError(f"got an xarray {type(data).__name__}, expected a Dataset or a DataArray")
    series = {
        key: variable.expand_dims(SPATIAL, axis=(1, 2))
        for key, variable in data_set.data_vars.items()
        if variable.ndim == 1 and not set(SPATIAL) & set(data_set.dims)
    }
    data_set = data_set.assign(series).drop_encoding()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.nc"
        try:
            data_set.to_netcdf(path, engine="netcdf4")
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f"{name} cannot be written as netCDF: {' '.join(str(error).split())}") from error
        return read_netcdf(Path(name), columns, content=path.read_bytes())
