"""Trajectories that are advanced one estimate at a time, and the loop that follows one to its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from ditkit.core.path import Path
from ditkit.core.time_grid import check_falling
from ditkit.sample.denoiser import Estimate


class Stepper(ABC):
    """One trajectory under a solver: where it is, and what it remembers of the steps before.

    A state belongs to one stepper: predictions of overlapping windows are merged before the step of the long
    latent, and blocks at noise levels of their own have a stepper each.
    """

    @property
    @abstractmethod
    def t(self) -> float | None:
        """The time of the next estimate; None when the trajectory has ended."""

    def start(self, x: Tensor) -> Tensor:
        """Turn standard normal noise `x` into the state that the first step expects."""
        return x

    def input(self, x: Tensor) -> Tensor:
        """Turn the state `x` into the input of the next estimate."""
        return x

    @abstractmethod
    def step(self, x: Tensor, estimate: Estimate) -> Tensor:
        """Return the next state [B, C, ...] from `x` and the estimate there, at the time `t`."""


def follow(stepper: Stepper, field: Callable[[Tensor, float], Estimate], x: Tensor) -> Tensor:
    """Return the state at the end of a trajectory that starts from `x`, with estimates of `field`."""
    x = stepper.start(x)
    while (t := stepper.t) is not None:
        x = stepper.step(x, field(stepper.input(x), t))
    return x


class OneEstimate(Stepper):
    """One estimate a step, from each time to the next."""

    def __init__(self, solver: object, path: Path, times: Tensor) -> None:
        self.path, self.times, self.index = path, times.tolist(), 0
        check_falling(type(solver).__name__, self.times)

    @property
    def t(self) -> float | None:
        return self.times[self.index] if self.index < len(self.times) - 1 else None

    def step(self, x: Tensor, estimate: Estimate) -> Tensor:
        t, s = self.times[self.index : self.index + 2]
        x = self.move(x, estimate, t, s)
        self.index += 1
        return x

    @abstractmethod
    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        """Return the state at `s` from `x` at `t`."""
