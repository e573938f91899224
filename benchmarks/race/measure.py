"""What one call takes, measured alike for every contestant: nothing here knows who is running.

A step is what lies between two `callback_on_step_end`, or the call's beginning and the first.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ditkit.bench.macs import MacCounter

Told = dict[str, Any]
OnStep = Callable[[Any, int, Any, Told], Told]


@dataclass(frozen=True)
class Counted:
    """One call under the counters.

    Args:
        samples: what was drawn. macs: of each step.
        alive_bytes: the most that tensors made since the call began, and alive at the end of a step, take.
        rows: what each linear layer of the transformer put out in the call, in rows.
    """

    samples: Tensor
    macs: list[int]
    alive_bytes: int
    rows: Counter[str]


@torch.no_grad()
def count(fast: Any, transformer: nn.Module, told: Told) -> Counted:
    totals, alive = [0], [0]
    with fresh_objects(), rows_of(transformer) as rows, MacCounter() as counter:

        def note() -> None:
            totals.append(counter.total)
            alive.append(alive_bytes())

        samples = drawn(fast, told, note)
    return Counted(samples, [b - a for a, b in pairwise(totals)], max(alive), rows)


@torch.no_grad()
def clocked(fast: Any, told: Told) -> list[float]:
    """Seconds of each step, and after them what was left to do."""
    times = [time.perf_counter()]
    drawn(fast, told, lambda: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def drawn(fast: Any, told: Told, note: Callable[[], None]) -> Tensor:
    """What the call returns, [n, L, C] or pictures, with `note` called at the end of each step."""

    def on_step(pipe: Any, index: int, t: Any, known: Told) -> Told:
        note()
        return {}

    return torch.as_tensor(fast(**told, callback_on_step_end=on_step)[0])


@contextmanager
def fresh_objects() -> Iterator[None]:
    """Inside, the garbage collector knows the objects only that were made inside."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def alive_bytes() -> int:
    """Of the storages of all tensors that the garbage collector knows."""
    tensors = [o for o in gc.get_objects() if type(o) is Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def rows_of(transformer: nn.Module) -> Iterator[Counter[str]]:
    """Inside, the rows that each linear layer puts out are counted under its name."""
    names = {id(part): name for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    rows: Counter[str] = Counter()

    def seen(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in names:
            rows[names[id(module)]] += out.numel() // out.shape[-1]

    handle = register_module_forward_hook(seen)
    try:
        yield rows
    finally:
        handle.remove()


def spared(rows: Counter[str], exact: Counter[str]) -> int:
    """Linear layers that were computed on fewer rows than exactly."""
    return sum(rows[name] < whole for name, whole in exact.items())


def overhead_share(
    seconds: list[float], macs: list[int], exact_seconds: list[float], exact_macs: list[int]
) -> float | None:
    """Of a step in which something was skipped: time beyond what its MACs take at the exact run's rate.

    As a share of an exact step; medians over the steps but the first, which sets the call up. None where nothing
    was skipped. What is no MAC, norms and the solver, counts as overhead too, for all alike.
    """
    dense_s, dense = median(exact_seconds[1 : len(exact_macs)]), median(exact_macs[1:])
    steps = list(zip(seconds, macs, strict=False))[1:]
    over = [s / dense_s - m / dense for s, m in steps if m < 0.999 * dense]
    return median(over) if over else None
