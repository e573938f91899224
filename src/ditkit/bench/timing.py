"""Wall clock of several functions in one process, compared fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from ditkit.core.errors import ConfigError

Progress = Callable[[int, int], None]  # (calls done, calls in all)


def alternated(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each function, in turns: A B C, C B A, A B C, ...

    Turns, because a machine that slows down meanwhile slows all of them; the order is reversed every other
    round, so that a steady drift cancels. `warmup` untimed calls of each come first. Raises ConfigError if
    nothing is to be timed.
    """
    if rounds < 1 or warmup < 0 or not functions:
        raise ConfigError(
            f"alternated: expected functions, rounds >= 1 and warmup >= 0, got {len(functions)} functions, "
            f"rounds={rounds}, warmup={warmup}"
        )
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    total = len(names) * (warmup + rounds)
    done = 0
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            elapsed = seconds_of(functions[name])
            if turn >= 0:
                seconds[name].append(elapsed)
            done += 1
            if progress is not None:
                progress(done, total)
    return seconds


def seconds_of(function: Callable[[], object]) -> float:
    """Wall clock of one call, the work it queued on a CUDA device included."""
    _finish_queued_work()
    start = time.perf_counter()
    function()
    _finish_queued_work()
    return time.perf_counter() - start


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Compute the median of each list."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def _finish_queued_work() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
