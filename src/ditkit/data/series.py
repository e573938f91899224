"""Several series in one plain CSV file, a column each, beside a column of time stamps."""

from __future__ import annotations

import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.fields import FieldSet, field_set
from ditkit.data.repair import Raw, chosen_repairs
from ditkit.data.stamps import read_stamps

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)

HEADER_LINES = 1
TAB = "\t"
SEPARATORS = (";", TAB, "|")
NAMELESS = re.compile(r"Unnamed: \d+")
"""Names that pandas gives to columns without one."""
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
PACKED = (".gz", ".bz2", ".xz", ".zip", ".zst")
"""Endings of files that pandas unpacks as it reads them."""


def suffix_of(path: Path) -> str:
    """Return the ending of a file below that of its packing: .csv of load.csv.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def stem_of(path: Path) -> str:
    """Return the name of a file without its endings."""
    return Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem


def load(
    path: str | Path,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    repair: str | Sequence[str] = (),
    time_format: str | None = None,
    separator: str | None = None,
    zone: str | None = None,
    decimal: str = ".",
    na: str | Sequence[str] = (),
    encoding: str = "utf-8",
) -> FieldSet:
    """Load the columns of a CSV file with a header line as variables of a field of one cell: [N, C, 1, 1].

    Blank lines are left out; what pandas reads as missing ("", "NA", "nan", "null" ...) is missing. A column without
    a name that counts the rows, as `DataFrame.to_csv` writes it, is left out with a warning. A file that ends in .gz,
    .bz2, .xz, .zip or .zst is unpacked as it is read.

    Args:
        time: the column of time stamps; the first one unless given.
        columns: the series; all other columns unless given.
        repair: "sort", "first" and "interpolate", see `ditkit.data.repair`.
        time_format: as for strptime, for example "%d.%m.%Y %H:%M", or s, ms, us or ns for counts since 1970; found
            from the stamps unless given, where they have one reading.
        separator: between values; a tab in .tsv, else a comma, unless given.
        zone: of the stamps, for example Europe/Berlin; by default that of the offsets that they name, if any.
        decimal: the character before the decimals.
        na: further words for a missing value, such as "-".
        encoding: of the file, for example latin-1.

    Raises:
        DataError: the first line that is not as expected and has no repair; dates that have two readings.
        ConfigError: an unknown column, repair, zone or encoding, no such format or separator, or the package pandas
            is not installed.
    """
    repairs, path = chosen_repairs(repair), Path(path)
    if separator is None:
        separator = TAB if suffix_of(path) == ".tsv" else ","
    for name, mark in (("separator", separator), ("decimal", decimal)):
        if len(mark) != 1:
            raise ConfigError(f"{name}={mark!r}, expected one character, such as ';' or a tab")
    table = _read(path, separator, (na,) if isinstance(na, str) else tuple(na), encoding)
    if time is None:
        table = _without_count(table, path)
    header = [str(name) for name in table.columns]
    time = header[0] if time is None else time
    chosen = [name for name in header if name != time] if columns is None else list(columns)
    for name in (time, *chosen):
        if name not in header:
            raise ConfigError(f"{path}: " + unknown("column", name, header))
    if columns is None:
        chosen = [name for name in chosen if not _counts_rows(table, name, path)]
    if not chosen or len({time, *chosen}) != 1 + len(chosen):
        raise ConfigError(
            f"{path}: time={time!r} and columns={chosen!r} of {header}, expected at least one series, each column once"
            + _other_separator(header)
        )
    times, clock = read_stamps(table[time], time_format, zone, str(path), time)
    raw = Raw(
        source=str(path),
        row="line",
        column="column",
        rows=table.index.to_numpy(np.int64),
        times=times,
        values=np.stack([_numbers(table, name, path, decimal) for name in chosen], axis=1)[:, :, None, None],
        variables=tuple(chosen),
        units=("",) * len(chosen),
        clock=clock,
    )
    return field_set(stem_of(path), raw, repairs)


def _read(path: Path, separator: str, na: tuple[str, ...], encoding: str) -> DataFrame:
    """Read the table, with the number of each line as index."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("CSV files need the package pandas: pip install pandas") from error
    options: dict[str, Any] = {"sep": separator, "header": None, "dtype": str, "encoding": encoding}
    try:
        names = pd.read_csv(path, nrows=1, keep_default_na=False, **options)
        header = names.iloc[0].str.strip().tolist()
        table = pd.read_csv(
            path,
            skiprows=HEADER_LINES,
            skip_blank_lines=False,
            na_values=list(na),
            skipinitialspace=True,
            **options,
        )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} holds no lines of data, expected a header and at least 2") from error
    except LookupError as error:
        raise ConfigError(
            f"encoding={encoding!r}, expected one that Python knows, such as latin-1"
        ) from error
    except UnicodeError as error:
        raise DataError(f"cannot read {path} as CSV in {encoding}: {error}; see encoding=") from error
    except (
        OSError,
        ValueError,
        EOFError,
        ImportError,
        zlib.error,
        zipfile.BadZipFile,
        lzma.LZMAError,
    ) as error:
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
            f"{separator!r}" + _other_separator(header)
        )
    table.columns = pd.Index(header)
    table.index = pd.RangeIndex(1 + HEADER_LINES, 1 + HEADER_LINES + len(table))
    return table.dropna(how="all")


def _other_separator(header: Sequence[str]) -> str:
    """Name the separator that stands in the one name of a header, if any."""
    other = next((mark for mark in SEPARATORS if len(header) == 1 and mark in header[0]), None)
    return f"; see separator={other!r}" if other else ""


def _without_count(table: DataFrame, path: Path) -> DataFrame:
    """Leave out a first column that has no name and counts the rows."""
    first = str(table.columns[0])
    return table.iloc[:, 1:] if table.shape[1] > 1 and _counts_rows(table, first, path) else table


def _counts_rows(table: DataFrame, name: str, path: Path) -> bool:
    """Return whether a column has no name and counts the rows, with a warning that says so."""
    import pandas as pd

    if name and not NAMELESS.fullmatch(name):
        return False
    numbers = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
    if len(numbers) < 2 or numbers[0] not in (0, 1) or not (np.diff(numbers) == 1).all():
        return False
    logger.warning(
        "%s: column %d has no name and counts the rows from %d to %d; it is left out",
        path,
        list(table.columns).index(name) + 1,
        numbers[0],
        numbers[-1],
    )
    return True


def _numbers(table: DataFrame, name: str, path: Path, decimal: str) -> NDArray[np.float64]:
    import pandas as pd

    texts = given = table[name].str.strip()
    if decimal != ".":
        texts = texts.str.replace(".", "?", regex=False).str.replace(decimal, ".", regex=False)
    numbers = pd.to_numeric(texts, errors="coerce")
    wrong = np.flatnonzero(numbers.isna() & texts.notna())
    if wrong.size:
        i = int(wrong[0])
        text = str(given.iloc[i])
        raise DataError(
            f"{path}, line {texts.index[i]}: column {name!r} is {text[:60]!r}, expected a number; "
            + _advice(text)
        )
    values = numbers.to_numpy(np.float64)
    # what a network's numbers cannot hold is not finite, which is refused by its line
    return np.where(np.abs(values) > np.finfo(np.float32).max, np.inf, values)


def _advice(text: str) -> str:
    """Name the option that a text which is no number asks for."""
    if DECIMAL_COMMA.fullmatch(text):
        return "see decimal=','"
    if text and not any(letter.isalnum() for letter in text):
        return f"see na={text!r} for missing values"
    return "choose the series with columns=, or name words for missing values with na="
