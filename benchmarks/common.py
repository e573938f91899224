"""What benchmarks share: a table on the terminal, and the same rows with their origin in results/*.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ditkit.bench.origin import device, origin

__all__ = ["Row", "device", "origin", "record", "show"]

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, object]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print `rows`, which have the same keys, as one table, its shorter side across; a key's name carries the unit."""
    names = [name.replace("_", " ") for name in rows[0]]
    cells = [[_text(value) for value in row.values()] for row in rows]
    if len(rows) >= len(names):
        table = Table(*names, title=title)
    else:
        table = Table(title=title, show_header=False)
        cells = [[name, *column] for name, column in zip(names, zip(*cells, strict=True), strict=True)]
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def record(name: str, rows: Sequence[Row]) -> Path:
    """Write `rows` to results/`name`.json with the command, date, device and versions that made them."""
    RESULTS.mkdir(exist_ok=True)
    path, beside = RESULTS / f"{name}.json", RESULTS / f"{name}.json.part"
    beside.write_text(json.dumps({**origin(), "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
    Console().print(f"wrote {path.relative_to(RESULTS.parents[1])}")
    return path


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
