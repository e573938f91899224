"""Calls that overlap, in threads or inside a callback: what a scheduler and a pipeline keep of a call is its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from threading import Lock
from typing import Any

from ditkit.core.errors import ConflictError

_LOCK = Lock()
_BUSY: dict[int, Any] = {}
"""The schedulers of the calls under way, by their identity."""


@contextmanager
def reserved(pipe: Any) -> Iterator[Any]:
    """Inside, the pipeline to call: `pipe`, or a copy with a scheduler of its own while another call has its scheduler.

    Weights, hooks and settings of the copy are those of `pipe`; what the call writes on it is its own.

    Raises:
        ConflictError: a call is under way, and the pipeline moves its parts between devices in each.
    """
    with _LOCK:
        own = pipe if id(pipe.scheduler) not in _BUSY else _separate(pipe)
        scheduler = own.scheduler
        _BUSY[id(scheduler)] = scheduler
    try:
        yield own
    finally:
        with _LOCK:
            del _BUSY[id(scheduler)]


def _separate(pipe: Any) -> Any:
    if getattr(pipe, "_all_hooks", None):
        raise ConflictError(
            f"{type(pipe).__name__}: a call is under way, and its offload moves the parts of one call at a time; "
            "expected the next call after it"
        )
    own = copy(pipe)
    # diffusers' own way to register would note the new part in a config that both share
    object.__setattr__(own, "scheduler", separate_scheduler(pipe.scheduler))
    return own


def separate_scheduler(scheduler: Any) -> Any:
    """Copy a scheduler that another thread may be stepping; it has the class and the settings of the original."""
    kind: Any = getattr(type(scheduler), "ditkit_own", type(scheduler))
    own = kind.__new__(kind)
    vars(own).update(deepcopy(dict(vars(scheduler))))
    return own
