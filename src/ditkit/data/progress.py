"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Sequence[T], doing: str) -> Iterable[T]:
    """Iterate with a bar on stderr that names what is being done and vanishes at the end."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    terminal = Console(stderr=True)
    return track(items, escape(doing), console=terminal, transient=True, disable=not terminal.is_terminal)
