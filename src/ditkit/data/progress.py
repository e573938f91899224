"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Sequence[T], doing: str) -> Iterable[T]:
    """The items one by one, with a bar on stderr that says what is being done and then vanishes."""
    from rich.console import Console
    from rich.progress import track

    terminal = Console(stderr=True)
    return track(items, doing, console=terminal, transient=True, disable=not terminal.is_terminal)
