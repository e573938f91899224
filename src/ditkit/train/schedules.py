"""Weights of terms that change in training: 0 at a step means that nothing of the term is computed then."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError


class Schedule(ABC):
    """A number a step, counted from 0."""

    @abstractmethod
    def at(self, step: int) -> float:
        """Return the number at `step`, not negative."""

    @abstractmethod
    def last(self) -> float:
        """Return the last step with a number above 0; infinite if there is none, -1 if it never is."""

    def ends(self, step: int) -> bool:
        """Return whether it is 0 from `step` on."""
        return step > self.last()


@dataclass(frozen=True)
class Between(Schedule):
    """`value` from step `first` to before step `stop`, and 0 otherwise: HASTE's hard stop (arXiv 2505.16792).

    Raises:
        ConfigError: it ends before it starts, or the value is negative.
    """

    value: float = 1.0
    first: int = 0
    stop: int = 1

    def __post_init__(self) -> None:
        _check("Between", self.value, self.first, self.stop)

    def at(self, step: int) -> float:
        return self.value if self.first <= step < self.stop else 0.0

    def last(self) -> float:
        return self.stop - 1 if self.value else -1


@dataclass(frozen=True)
class Ramp(Schedule):
    """From `start` at step `first` in a straight line to `end` at step `stop`, constant before and after.

    Raises:
        ConfigError: it ends before it starts, or a value is negative.
    """

    start: float = 0.0
    end: float = 1.0
    first: int = 0
    stop: int = 1

    def __post_init__(self) -> None:
        _check("Ramp", self.start, self.first, self.stop)
        _check("Ramp", self.end, self.first, self.stop)

    def at(self, step: int) -> float:
        done = min(max((step - self.first) / (self.stop - self.first), 0.0), 1.0)
        return self.start + (self.end - self.start) * done

    def last(self) -> float:
        if self.end:
            return math.inf
        return self.stop - 1 if self.start else -1


@dataclass(frozen=True)
class EpochDecay(Schedule):
    """`value` to epoch `hold`, then a tenth of it every `decade` epochs (SRA, arXiv 2505.02831): never 0.

    Epochs are counted by samples, floor(step batch / samples), so that they do not depend on where a run was resumed.
    SRA takes 0.2, 149 and 1000 for SiT on 256 pixels, 0.2, 99 and 800 on 512, and 0.04 for DiT.

    Args:
        samples: of the data, by default ImageNet's. batch: of the run.

    Raises:
        ConfigError: a value is out of its range.
    """

    value: float = 0.2
    hold: int = 149
    decade: int = 1000
    samples: int = 1_281_167
    batch: int = 256

    def __post_init__(self) -> None:
        _check_value("EpochDecay", self.value)
        for name in ("decade", "samples", "batch"):
            integer(f"EpochDecay: {name}", getattr(self, name), least=1)
        integer("EpochDecay: hold", self.hold, least=0)

    def at(self, step: int) -> float:
        epoch = step * self.batch // self.samples
        return self.value * 10.0 ** (-max(epoch - self.hold, 0) / self.decade)

    def last(self) -> float:
        return math.inf if self.value else -1


Weight = float | Schedule


def weight_at(weight: Weight, step: int) -> float:
    """Return the value of a number or a schedule at a step."""
    return weight.at(step) if isinstance(weight, Schedule) else weight


def never(weight: Weight) -> bool:
    """Return whether it is 0 at all steps."""
    return weight.last() < 0 if isinstance(weight, Schedule) else not weight


def ended(weight: Weight, step: int) -> bool:
    """Return whether it is 0 from `step` on."""
    return weight.ends(step) if isinstance(weight, Schedule) else not weight


def _check(name: str, value: float, first: int, stop: int) -> None:
    _check_value(name, value)
    if type(first) is not int or type(stop) is not int or not 0 <= first < stop:
        raise ConfigError(f"{name}: first={first} and stop={stop}, expected steps 0 <= first < stop")


def _check_value(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}: value={value}, expected a finite number of at least 0")
