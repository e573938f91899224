"""Ctrl-C between steps, where a run can be saved, and not within one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from types import FrameType


@contextmanager
def noted_interrupts(wanted: bool = True) -> Iterator[Event]:
    """While the block runs, a first Ctrl-C only sets the event; a second raises KeyboardInterrupt at once.

    Nothing changes if it is not wanted, where a caller handles or ignores Ctrl-C, and outside the main
    thread, where Python sets no handlers.
    """
    interrupted = Event()
    usual = signal.default_int_handler
    if not wanted or current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield interrupted
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)
