"""`ditkit systems`: the published systems, and how far each has come."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from json import dumps

from rich.console import Console
from rich.table import Table

from ditkit.core import systems as catalogue
from ditkit.core.errors import ConfigError

STYLES = {"works": "green", "partial": "yellow", "planned": "dim"}


def systems(json: bool = False, check: bool = False) -> None:
    """List the published systems: which work, which are planned, and where each lives.

    Examples:
        ditkit systems
        ditkit systems --json
        ditkit systems --check

    Args:
        json: Print every field as JSON, for a program to read.
        check: Compare the list with the code instead; each thing that is not so is one line, and exit code 2.
    """
    if json and check:
        raise ConfigError("systems: got both --json and --check, expected at most one of them")
    rows = catalogue.load()
    if check:
        problems = catalogue.check(rows)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            raise SystemExit(2)
        print(summary(rows))
    elif json:
        print(dumps([dataclasses.asdict(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        console = Console()
        console.print(table(rows))
        console.print(summary(rows))


def summary(rows: tuple[catalogue.System, ...]) -> str:
    """`44 systems: 1 works, 0 partial, 43 planned`."""
    counts = Counter(row.status for row in rows)
    return f"{len(rows)} systems: " + ", ".join(f"{counts[status]} {status}" for status in catalogue.STATUSES)


def table(rows: tuple[catalogue.System, ...]) -> Table:
    """Number, name, arXiv number, status and components, for 80 columns."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("#", justify="right")
    out.add_column("system", no_wrap=True)
    out.add_column("arXiv", no_wrap=True)
    out.add_column("status", no_wrap=True)
    out.add_column("components", overflow="fold")
    for row in rows:
        components = "\n".join(_short(path) for path in row.components)
        style = STYLES.get(row.status, "red")
        out.add_row(str(row.number), row.name, row.arxiv, f"[{style}]{row.status}[/]", components)
    return out


def _short(component: str) -> str:
    """`ditkit.caching.taylorseer:TaylorSeer` as `caching.TaylorSeer`."""
    module, _, name = component.partition(":")
    return f"{module.split('.')[1]}.{name}"
