"""The mean of the past at the same time of the year or day: the forecast that looks at no weather."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError
from ditkit.data.calendar import MONTH, Step, Steps, Times, month_of_year, slot_of_day
from ditkit.data.clock import CLOCK, Clock
from ditkit.data.fields import FieldSet

REPEATS = 2  # a mean over one year or one day would only be that year or day again


@dataclass(frozen=True)
class Cycle:
    """Phases of the year, of the day, of both, or a single one."""

    name: str  # "calendar month and hour of day", "calendar month", "hour of day" or "mean"
    months: int  # phases of the year: how many different calendar months the step visits
    slots: int  # phases of the day

    def phase(self, times: Times) -> Steps:
        """Compute the phase of each time; not every number below 12 * slots need occur."""
        month = month_of_year(times) if self.months > 1 else np.zeros(len(times), np.int64)
        return month * self.slots + slot_of_day(times, self.slots)

    def enough(self, times: Times) -> bool:
        """Every phase occurs, each in two different years or on two different days."""
        period = times.astype("M8[Y]" if self.months > 1 else "M8[D]").astype(np.int64)
        distinct = np.unique(np.stack([self.phase(times), period]), axis=1)[0]
        phases, repeats = np.unique(distinct, return_counts=True)
        return len(phases) == self.months * self.slots and bool(repeats.min() >= REPEATS)


@dataclass(frozen=True, eq=False)
class Climatology:
    """Mean fields of a training part, by the finest cycle that it repeats often enough."""

    cycle: Cycle
    phases: Steps  # [P], those that occur, increasing
    means: Tensor  # [P, C, H, W]
    clock: Clock = CLOCK  # of the times

    @classmethod
    def fit(cls, training: FieldSet) -> Climatology:
        """Fit the means of a training set. Raises ConfigError for an empty set."""
        if not len(training):
            raise ConfigError(f"{training.name} has no steps, expected some to take a climatology from")
        times = training.clock.civil(training.times)
        found = (cycle for cycle in _cycles(training.step) if cycle.enough(times))
        cycle = next(found, Cycle("mean", 1, 1))
        phases, index = np.unique(cycle.phase(times), return_inverse=True)
        row = torch.from_numpy(index)
        sums = training.values.new_zeros(len(phases), *training.values.shape[1:], dtype=torch.float64)
        sums.index_add_(0, row, training.values.double())
        return cls(cycle, phases, (sums / row.bincount()[:, None, None, None]).float(), training.clock)

    @property
    def name(self) -> str:
        return f"climatology ({self.cycle.name})"

    def at(self, times: Times) -> Tensor:
        """Forecast these times, [C, T, H, W]. Raises ConfigError for a phase without training data."""
        wanted = self.cycle.phase(self.clock.civil(times))
        unseen = np.flatnonzero(~np.isin(wanted, self.phases))
        if unseen.size:
            raise ConfigError(
                f"{self.name}: no training step at the phase of {self.clock.shown(times[unseen[0]])}"
            )
        return self.means[torch.from_numpy(np.searchsorted(self.phases, wanted))].transpose(0, 1)


def _cycles(step: Step) -> Iterator[Cycle]:
    """List the cycles that a step can have, the finest first."""
    months = 12 // math.gcd(step.count, 12) if step.unit == MONTH else 12
    slots = step.per_day
    if months > 1 and slots:
        yield Cycle("calendar month and hour of day", months, slots)
    if months > 1:
        yield Cycle("calendar month", months, 1)
    if slots:
        yield Cycle("hour of day", 1, slots)


def blended(context: Tensor, mask: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] whose made pixels are linear in time between the given ones of the same place.

    Before the first given frame and after the last one the nearest is held, so that a prediction repeats the
    last frame that was seen. Where a place is given in no frame, it is 0, mid-grey.

    Args:
        mask: [B, 1, T, H, W], 1 where a pixel was made, 0 where it was given.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if context.ndim != 5 or mask.shape != (context.shape[0], 1, *context.shape[2:]):
        raise ShapeError(f"blended: clips {list(context.shape)} and mask {list(mask.shape)} do not fit")
    frames = context.shape[2]
    time = torch.arange(frames, device=context.device).reshape(1, 1, -1, 1, 1)
    given = mask == 0
    before = torch.where(given, time, -1).cummax(2).values
    after = torch.where(given, time, frames).flip(2).cummin(2).values.flip(2)
    left, right = torch.where(before < 0, after, before), torch.where(after == frames, before, after)
    share = ((time - left) / (right - left).clamp_min(1)).to(context.dtype)
    first, last = (context.gather(2, at.clamp(0, frames - 1).expand_as(context)) for at in (left, right))
    mixed = torch.lerp(first, last, share.expand_as(context))
    return mixed.where(given.any(2, keepdim=True), torch.zeros_like(context))
