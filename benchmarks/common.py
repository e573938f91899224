"""What benchmarks share: a table on the terminal, and the same rows with their origin in results/*.json."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

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


def origin() -> dict[str, object]:
    """Where numbers come from; where `load` is above `threads`, others were at work too."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "ditkit")}},
    }


def device() -> str:
    """The GPU's name, or the processor's with the number of cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
