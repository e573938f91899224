"""`ditkit recipes`: what can be trained."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditkit.cli.train import found


def recipes() -> None:
    """List the training recipes: a network, data and settings, which `ditkit train NAME` takes and flags change.

    Examples:
        ditkit recipes
        ditkit train fashion-dit --help
        ditkit train fashion-dit --dry-run
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("data", no_wrap=True)
    table.add_column("what it trains")
    for name, build in found().items():
        line = (inspect.getdoc(build) or "").partition("\n")[0]
        table.add_row(name, build().data, escape(line))
    Console(highlight=False).print(table)
    print("\nditkit train NAME --help shows the settings of one; --dry-run what it would take")
