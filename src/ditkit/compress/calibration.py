"""Inputs of a network along its own trajectories, from which quantisers are fitted: no data is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core.errors import ConfigError, ShapeError
from ditkit.nn.quantised import TIMES
from ditkit.nn.time_path import SAMPLES, Bound, binder, map_tensors, name_of, tensors_of


@dataclass(frozen=True)
class Calibration:
    """The calls of a network, each with its arguments by name.

    Args:
        calls: in the order of sampling; tensors have the batch first, and of one call all rows are at one time.
    """

    calls: tuple[Bound, ...] = ()

    @property
    def times(self) -> tuple[float, ...]:
        """The times of the steps, each once, in the order in which they were met."""
        return tuple(dict.fromkeys(time_of(call) for call in self.calls))

    def at(self, time: float) -> list[Bound]:
        """Return the calls at a time."""
        return [call for call in self.calls if time_of(call) == time]

    def every(self, interval: int) -> Calibration:
        """Return the calls of every `interval`-th time."""
        kept = set(self.times[::interval])
        return Calibration(tuple(call for call in self.calls if time_of(call) in kept))

    def rows(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return tensors of these names of all calls, one row of each sample, those that are equal in all once."""
        parts = {name: [row_wise(tensors_of(call)[name], call) for call in self.calls] for name in names}
        joined = {name: torch.cat(values) for name, values in parts.items()}
        flat = torch.cat([value.reshape(len(value), -1).double() for value in joined.values()], 1)
        _, group = flat.unique(dim=0, return_inverse=True)
        first = [(group == k).nonzero()[0, 0] for k in range(int(group.max()) + 1)]
        index = torch.stack(first).sort().values
        return {name: value[index] for name, value in joined.items()}

    def check(self, who: str, least: int, shape: tuple[int, ...] = ()) -> None:
        """Refuse too few samples, or samples of another shape.

        Raises:
            ConfigError: a step has fewer than `least` samples, or rows of one call are at several times.
            ShapeError: samples are not of `shape`, where that is known, or not all of one.
        """
        if not self.calls:
            raise ConfigError(f"{who}: got calibration of no calls, expected those of a trajectory")
        shapes = [tuple(call[name_of(SAMPLES, call)].shape[1:]) for call in self.calls]
        wanted = shape or shapes[0]
        if odd := [one for one in shapes if one != wanted]:
            raise ShapeError(f"{who}: calibration has samples of {odd[0]}, expected {wanted}")
        for time in self.times:
            count = sum(len(call[name_of(SAMPLES, call)]) for call in self.at(time))
            if count < least:
                raise ConfigError(
                    f"{who}: calibration has {count} samples at t={time:g}, expected at least {least} at each step"
                )


def time_of(call: Bound) -> float:
    """Return the time of a call.

    Raises:
        ConfigError: its rows are at several times.
    """
    t = torch.as_tensor(call[name_of(TIMES, call)]).double().reshape(-1)
    if (t != t[0]).any():
        raise ConfigError(f"calibration: a call at times {t[0]:g} to {t[-1]:g}, expected one time a call")
    return t[0].item()


def row_wise(value: Tensor, call: Bound) -> Tensor:
    """Return an argument with as many rows as the call has samples."""
    count = len(call[name_of(SAMPLES, call)])
    return value.reshape(1).expand(count) if value.ndim == 0 or len(value) != count else value


def some_rows(call: Bound, first: int, last: int) -> Bound:
    """Return the samples `first` to `last` of a call."""
    count = len(call[name_of(SAMPLES, call)])
    cut: Mapping[str, Any] = map_tensors(
        dict(call), lambda _, v: v[first:last] if v.ndim and len(v) == count else v
    )
    return cut


@contextmanager
def recording(network: nn.Module, batch: int = 64) -> Iterator[list[Bound]]:
    """Yield a list that holds the arguments of every call of `network` inside, in parts of at most `batch` samples.

    `Calibration(tuple(calls))` makes of it what transforms take; for a pipeline, `network` is its transformer.
    """
    calls: list[Bound] = []
    bound = binder(network)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = map_tensors(dict(bound(args, kwargs)), lambda _, v: v.detach().clone())
        count = len(call[name_of(SAMPLES, call)])
        calls.extend(some_rows(call, first, first + batch) for first in range(0, count, batch))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
