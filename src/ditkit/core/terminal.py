"""Tables and bars for a terminal: the names of files and classes are shown as they are, never read as markup."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[str, int, int], None]
"""Called with (what is being done, so many done, so many in all)."""
LINE_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""

WIDTH = 100
"""Columns of a table that is printed where there is no terminal."""


class Table(table.Table):
    """rich's table, whose texts are plain, and whose `str` is the table."""

    def __init__(self, *headers: str, **options: Any) -> None:
        for name in ("title", "caption"):
            if options.get(name) is not None:
                options[name] = plain(options[name])
        super().__init__(**options)
        for header in headers:
            self.add_column(header)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        super().add_column(plain(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(plain, cells), **options)

    def __str__(self) -> str:
        width = Console().width if sys.stdout.isatty() else WIDTH
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")


def plain(given: Any) -> Any:
    """Return a text as one without markup; anything else as it is."""
    return Text(given) if isinstance(given, str) else given


@contextmanager
def progress(lines: bool = True) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs, gone when it ends; elsewhere, a line now and then.

    Args:
        lines: False for nothing where there is no terminal.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task, line_at = bar.add_task("", total=None), time.monotonic()

    def advance(stage: str, done: int, total: int) -> None:
        nonlocal line_at
        bar.update(task, description=stage, completed=done, total=total)
        if bar.disable and lines and time.monotonic() - line_at > LINE_SECONDS:
            line_at = time.monotonic()
            print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)

    with bar:
        yield advance
