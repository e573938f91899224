"""Times between data (0) and noise (1): how even ones are moved, for the steps of a sampler and for training alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, unknown


class TimeGrid(ABC):
    """A rising map of noise-time, [0, 1] into itself, that leaves the data at 0, unless it says that it ends above."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.core",)

    @abstractmethod
    def warp(self, t: Tensor) -> Tensor:
        """Move even noise-times `t`, of any shape, to those of this grid, in the dtype of `t`."""


@final
@dataclass(frozen=True)
class Even(TimeGrid):
    """Steps of one length."""

    def warp(self, t: Tensor) -> Tensor:
        return t


EVEN = Even()
BASE_VALUES = 4096
"""Values of the samples for which RAE's shift is 1: latents 4 x 32 x 32."""


@final
@dataclass(frozen=True)
class Shift(TimeGrid):
    """t' = a t / (1 + (a - 1) t): a > 1 moves steps to noise (Esser et al. 2024, eq. 23); a = 1 is even.

    Args:
        end: where even times end before they are moved, above the data at 0; RAE's sampler stops at 0.001, and a step
            from there to 0 is not taken.
    """

    a: float = 3.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not self.a > 0:
            raise ConfigError(f"Shift: a={self.a} should be positive; 1 is even")
        if not 0 <= self.end < 1:
            raise ConfigError(f"Shift: end={self.end} should lie in [0, 1); 0 is the data")

    @classmethod
    def of_dimension(cls, values: int, end: float = 0.0) -> Shift:
        """Shift by a = sqrt(values / 4096), for samples of so many values (RAE, section 4.2): 1 for 4 x 32 x 32.

        Raises:
            ConfigError: there are none.
        """
        if values < 1:
            raise ConfigError(f"Shift: a sample of {values} values, expected at least 1")
        return cls(math.sqrt(values / BASE_VALUES), end)

    def warp(self, t: Tensor) -> Tensor:
        t = self.end + (1 - self.end) * t if self.end else t
        return self.a * t / (1 + (self.a - 1) * t)


@final
@dataclass(frozen=True)
class Table(TimeGrid):
    """Noise-times as given, from noise to data; between them, and for another number of steps, straight lines.

    A discrete path counts a time t as its index S t - 1, of S: the index 849 of 1000 is the time 0.85.

    Args:
        times: falling, the first at most 1, the last 0.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        check_falling("Table", self.times)
        if self.times[0] > 1 or self.times[-1] != 0:
            ends = f"{self.times[0]:g} to {self.times[-1]:g}"
            raise ConfigError(f"Table: times go from {ends}, expected from at most 1 (noise) to 0 (data)")

    def warp(self, t: Tensor) -> Tensor:
        table = torch.tensor(self.times[::-1], dtype=torch.float64, device=t.device)
        position = t.double() * (len(table) - 1)
        below = position.floor().clamp(max=len(table) - 2).long()
        return torch.lerp(table[below], table[below + 1], position - below).to(t.dtype)


def check_falling(owner: str, times: Sequence[float]) -> None:
    """Raise ConfigError, in the name of `owner`, unless there are two times or more and each is below the last."""
    if len(times) < 2:
        raise ConfigError(f"{owner}: got {len(times)} times, expected two or more, from noise to data")
    for i, (t, s) in enumerate(pairwise(times)):
        if not s < t:
            raise ConfigError(
                f"{owner}: times should fall from noise to data, but {t:g} is followed by {s:g} (number {i + 2})"
            )


def as_time_grid(owner: str, given: object) -> TimeGrid:
    """Return `given` if it is a time grid; else raise ConfigError in the name of `owner`."""
    if isinstance(given, TimeGrid):
        return given
    if isinstance(given, str):
        raise ConfigError(f"{owner}: " + unknown("time grid", given, ("Even()", "Shift(3.0)", "Table(...)")))
    raise ConfigError(f"{owner}: grid={given!r} should be a time grid: Even(), Shift(3.0) or Table(...)")
