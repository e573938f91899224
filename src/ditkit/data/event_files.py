"""Event lists of a user's own, a line an event, from CSV or Parquet; no event is lost, and none is moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.events import EventSet, numbered

if TYPE_CHECKING:
    from pandas import DataFrame, Series

REPAIRS = ("sort",)
SUFFIXES = (".csv", ".parquet")
NODE, LABEL = "node", "label"
"""Columns of a list of nodes; its others are features."""


def load(
    path: str | Path,
    source: str = "source",
    destination: str = "destination",
    time: str = "time",
    features: Sequence[str] | None = None,
    source_label: str = "",
    destination_label: str = "",
    nodes: str = "",
    repair: str = "",
    separator: str = ",",
    directed: bool = True,
) -> EventSet:
    """Load a CSV file with a header line, or a Parquet file, as events of a graph; each line is one.

    Args:
        source, destination, time: columns; times are seconds, or dates.
        features: columns of numbers; all others unless given.
        source_label, destination_label: columns of what class the nodes are of, if any.
        nodes: a file of all nodes, by columns `node`, `label` (may be empty) and numbers; else those of the events.
        repair: "sort" puts events in the order of time, simultaneous ones as they stand.
        directed: whether (u, v) is another link than (v, u).

    Raises:
        DataError: the first line that is not as expected.
        ConfigError: an unknown column or repair, or a package that is needed is not installed.
    """
    path = Path(path)
    if repair and repair not in REPAIRS:
        raise ConfigError(unknown("repair", repair, REPAIRS))
    return event_set(
        path.stem,
        _read(path, separator),
        str(path),
        source=source,
        destination=destination,
        time=time,
        features=features,
        source_label=source_label,
        destination_label=destination_label,
        nodes=_read(Path(nodes), separator) if nodes else None,
        sort=repair == "sort",
        directed=directed,
    )


def event_set(
    name: str,
    table: DataFrame,
    where: str,
    *,
    source: str = "source",
    destination: str = "destination",
    time: str = "time",
    features: Sequence[str] | None = None,
    source_label: str = "",
    destination_label: str = "",
    nodes: DataFrame | None = None,
    sort: bool = False,
    directed: bool = True,
) -> EventSet:
    """Make events of a table; the arguments are those of `load`, and `where` is what errors name."""
    labels = [column for column in (source_label, destination_label) if column]
    if len(labels) == 1:
        raise ConfigError(f"{where}: labels of one side only, {labels[0]!r}; expected both or none")
    own = (source, destination, time, *labels)
    chosen = (
        [str(c) for c in table.columns if c not in own] if features is None else [f for f in features if f]
    )
    for column in (*own, *chosen):
        if column not in table.columns:
            raise ConfigError(f"{where}: " + unknown("column", column, table.columns))
    if table.empty:
        raise DataError(f"{where} holds no events, expected some lines below the header")
    table, seconds = _in_order(table, time, sort, where)
    ends = [_names(table, column, where) for column in (source, destination)]
    known = (
        _ordered({*ends[0], *ends[1]}) if nodes is None else _names(nodes, NODE, f"{where}: list of nodes")
    )
    columns = [torch.from_numpy(_numbers(table, column, where)) for column in chosen]
    index = [_indices(table, names, known, where) for names in ends]
    node_features, given = _of_nodes(nodes, where)
    if labels:
        given = _labels_of_ends(table, ends, labels, known, where)
    classes = tuple(sorted({label for label in given if label}))
    return EventSet(
        name=name,
        source=index[0],
        destination=index[1],
        time=torch.from_numpy(seconds),
        nodes=tuple(known),
        features=torch.stack(columns, 1) if columns else torch.zeros(len(table), 0),
        node_features=node_features,
        labels=torch.tensor([classes.index(label) if label else -1 for label in given], dtype=torch.int64),
        classes=classes,
        directed=directed,
    )


def _in_order(table: DataFrame, time: str, sort: bool, where: str) -> tuple[DataFrame, np.ndarray]:
    """Read the times, and put the lines in their order if asked to; else refuse the first line out of order."""
    seconds = _seconds(table[time], where)
    if sort:
        order = np.argsort(seconds, kind="stable")
        return table.iloc[order], seconds[order]
    if (falls := np.flatnonzero(np.diff(seconds) < 0)).size:
        i = int(falls[0]) + 1
        raise DataError(
            f"{where}, line {_line(table, i)}: time {table[time].iloc[i]} is before that of line "
            f"{_line(table, i - 1)}, {table[time].iloc[i - 1]}; expected the order of time; see repair=sort"
        )
    return table, seconds


def _indices(table: DataFrame, names: list[str], known: Sequence[str], where: str) -> Tensor:
    """Find the nodes of one end; refuse the first that is not known."""
    found, wrong = numbered(names, known)
    if wrong is not None:
        raise DataError(f"{where}, line {_line(table, wrong)}: " + unknown("node", names[wrong], known))
    return found


def no_pandas() -> ConfigError:
    return ConfigError("event lists need the package pandas, and Parquet pyarrow: pip install pandas pyarrow")


def is_event_list(path: Path) -> bool:
    """Tell whether a file is Parquet, or CSV with columns `source` and `destination`."""
    if path.suffix.lower() == ".parquet":
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        header = [name.strip() for name in file.readline(65_536).split(",")]
    return {"source", "destination"} <= set(header)


def _read(path: Path, separator: str) -> DataFrame:
    """Read the table; numbers of a CSV file stay texts, so that a node's name is what is written."""
    try:
        import pandas as pd
    except ImportError as error:
        raise no_pandas() from error
    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except ImportError as error:
        raise no_pandas() from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} holds no events, expected a header and some lines") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot read {path} as an event list: {reason}") from error


def _line(table: DataFrame, i: int) -> int:
    """Return the line number of row `i` in its file, whose first is the header."""
    return int(table.index[i]) + 2


def _seconds(column: Series, where: str) -> np.ndarray:
    """Read seconds in float64: numbers as they are, dates since 1970."""
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, copy=True)
    if not pd.api.types.is_numeric_dtype(column) and not np.isfinite(numbers).any():
        dates = pd.to_datetime(column, errors="coerce", utc=True, format="ISO8601").dt.tz_localize(None)
        numbers = dates.astype("datetime64[us]").to_numpy().astype(np.float64) / 1e6
        numbers[dates.isna()] = np.nan
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        i = int(wrong[0])
        _refuse_empty(column, i, where)
        raise DataError(
            f"{where}, line {int(column.index[i]) + 2}: time {column.iloc[i]!r}, expected seconds or a date such as "
            "2013-01-31 18:00"
        )
    return numbers


def _refuse_empty(column: Series, i: int, where: str) -> None:
    """Raise DataError if the cell of row `i` holds nothing."""
    import pandas as pd

    if pd.isna(column.iloc[i]) or column.iloc[i] == "":
        raise DataError(f"{where}, line {int(column.index[i]) + 2}: column {column.name!r} is empty")


def _names(table: DataFrame, name: str, where: str) -> list[str]:
    """Read the texts of a column, none of them empty."""
    if name not in table.columns:
        raise ConfigError(f"{where}: " + unknown("column", name, table.columns))
    column = table[name]
    empty = np.flatnonzero(column.isna() | (column.astype(str) == ""))
    if empty.size:
        _refuse_empty(column, int(empty[0]), where)
    return column.astype(str).tolist()


def _ordered(names: set[str]) -> list[str]:
    """Sort names by their numbers where all are whole numbers, else by their letters."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _numbers(table: DataFrame, name: str, where: str) -> np.ndarray:
    import pandas as pd

    column = table[name]
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float32, copy=True)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        i = int(wrong[0])
        _refuse_empty(column, i, where)
        raise DataError(
            f"{where}, line {_line(table, i)}: column {name!r} is {str(column.iloc[i])[:60]!r}, expected a number; "
            "choose with features="
        )
    return numbers


def _of_nodes(nodes: DataFrame | None, where: str) -> tuple[Tensor, list[str]]:
    """Read features [N, F] and labels ("" where unknown) of a list of nodes; nothing of none."""
    if nodes is None:
        return torch.zeros(0), []
    where = f"{where}: list of nodes"
    if (twice := nodes[NODE].duplicated()).any():
        raise DataError(
            f"{where}: {nodes[NODE][twice].iloc[0]!r} stands there twice, expected each node once"
        )
    columns = [c for c in nodes.columns if c not in (NODE, LABEL)]
    own = [torch.from_numpy(_numbers(nodes, column, where)) for column in columns]
    labels = nodes[LABEL].fillna("").astype(str).tolist() if LABEL in nodes.columns else [""] * len(nodes)
    return torch.stack(own, 1) if own else torch.zeros(0), labels


def _labels_of_ends(
    table: DataFrame, ends: list[list[str]], columns: list[str], known: Sequence[str], where: str
) -> list[str]:
    """Collect the label of each known node, on which its events agree."""
    found: dict[str, str] = {}
    for names, column in zip(ends, columns, strict=True):
        for i, (name, label) in enumerate(zip(names, _names(table, column, where), strict=True)):
            if found.setdefault(name, label) != label:
                raise DataError(
                    f"{where}, line {_line(table, i)}: node {name!r} is labelled {label!r}, and {found[name]!r} before"
                )
    return [found.get(name, "") for name in known]
