"""Several series in one plain CSV file, a column each, beside a column of time stamps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.calendar import Times
from ditkit.data.fields import FieldSet, field_set
from ditkit.data.repair import Raw, chosen_repairs

if TYPE_CHECKING:
    from pandas import DataFrame

HEADER_LINES = 1


def load(
    path: str | Path,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    repair: str | Sequence[str] = (),
    time_format: str | None = None,
    separator: str = ",",
) -> FieldSet:
    """Load the columns of a CSV file with a header line as variables of a field of one cell: [N, C, 1, 1].

    Time stamps that name an offset are converted to UTC. Blank lines are left out; what pandas reads as
    missing ("", "NA", "nan", "null" ...) is missing.

    Args:
        time: the column of time stamps; the first one unless given.
        columns: the series; all other columns unless given.
        repair: "sort", "first" and "interpolate", see `ditkit.data.repair`.
        time_format: as for strptime, for example "%d.%m.%Y %H:%M"; found from the first stamp unless given.

    Raises:
        DataError: the first line that is not as expected and has no repair.
        ConfigError: an unknown column or repair, no such format or separator, or the package pandas is not
            installed.
    """
    repairs, path = chosen_repairs(repair), Path(path)
    if len(separator) != 1:
        raise ConfigError(f"separator={separator!r}, expected one character, such as ';' or a tab")
    table = _read(path, separator)
    header = [str(name) for name in table.columns]
    time = header[0] if time is None else time
    chosen = [name for name in header if name != time] if columns is None else list(columns)
    for name in (time, *chosen):
        if name not in header:
            raise ConfigError(f"{path}: " + unknown("column", name, header))
    if not chosen or len({time, *chosen}) != 1 + len(chosen):
        raise ConfigError(
            f"{path}: time={time!r} and columns={chosen!r} of {header}, expected at least one series, each column once"
        )
    raw = Raw(
        source=str(path),
        row="line",
        column="column",
        rows=table.index.to_numpy(np.int64),
        times=_times(table, time, time_format, path),
        values=np.stack([_numbers(table, name, path) for name in chosen], axis=1)[:, :, None, None],
        variables=tuple(chosen),
        units=("",) * len(chosen),
    )
    return field_set(path.stem, raw, repairs)


def _read(path: Path, separator: str) -> DataFrame:
    """Read the table, with the number of each line as index."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("CSV files need the package pandas: pip install pandas") from error
    try:
        names = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
        header = names.iloc[0].str.strip().tolist()
        table = pd.read_csv(
            path, sep=separator, header=None, skiprows=HEADER_LINES, dtype=str, skip_blank_lines=False
        )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} holds no lines of data, expected a header and at least 2") from error
    except (OSError, ValueError) as error:  # ValueError: pandas' own errors, and bytes that are not UTF-8
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot read {path} as CSV: {reason}") from error
    for name in header:
        if header.count(name) > 1:
            raise DataError(
                f"{path}, line 1: column {name!r} appears {header.count(name)} times, expected once"
            )
    if table.shape[1] != len(header):
        raise DataError(
            f"{path}, line 2: {table.shape[1]} values, expected {len(header)} as in the header, separated by "
            f"{separator!r}"
        )
    table.columns = pd.Index(header)
    table.index = pd.RangeIndex(1 + HEADER_LINES, 1 + HEADER_LINES + len(table))
    return table.dropna(how="all")


def _times(table: DataFrame, name: str, time_format: str | None, path: Path) -> Times:
    import pandas as pd

    stamps = table[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it guesses; what it cannot read is refused below
        try:
            found = pd.to_datetime(stamps, errors="coerce", utc=True, format=time_format)
        except ValueError as error:
            raise ConfigError(
                f"time_format={time_format!r}: {error}; expected one such as %d.%m.%Y"
            ) from error
    unread = np.flatnonzero(found.isna())
    if unread.size:
        i = int(unread[0])
        form = (
            f"the format {time_format!r}"
            if time_format
            else f"{stamps.iloc[0]!r}"
            if i
            else "2024-01-31 18:00"
        )
        text = "empty" if pd.isna(stamps.iloc[i]) else repr(stamps.iloc[i])[:60]
        raise DataError(
            f"{path}, line {stamps.index[i]}: time column {name!r} is {text}, expected a time stamp like {form}; "
            "see time= and time_format="
        )
    return found.dt.tz_localize(None).to_numpy().astype("M8[us]")


def _numbers(table: DataFrame, name: str, path: Path) -> NDArray[np.float32]:
    import pandas as pd

    texts = table[name]
    numbers = pd.to_numeric(texts, errors="coerce")
    wrong = np.flatnonzero(numbers.isna() & texts.notna())
    if wrong.size:
        i = int(wrong[0])
        raise DataError(
            f"{path}, line {texts.index[i]}: column {name!r} is {texts.iloc[i][:60]!r}, expected a number; "
            "choose the series with columns="
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, which is refused by its line
        return numbers.to_numpy(np.float32)
