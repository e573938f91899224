"""Solvers that extrapolate the predicted data from earlier steps, in half the logarithm of the signal-to-noise ratio.

Between two times with lambda = log(alpha / sigma), h apart, the ODE's solution is exactly
x_s = (sigma_s / sigma_t) x_t + sigma_s * integral of e^lambda data(lambda); a multistep solver replaces the data by a
polynomial through the predictions at earlier times (DPM-Solver++, arXiv 2211.01095).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, inf, isfinite, log
from typing import NamedTuple, final

import torch
from torch import Tensor

from ditkit.core.ddpm import Spacing
from ditkit.core.path import Path
from ditkit.core.time_grid import EVEN, TimeGrid
from ditkit.sample.denoiser import Estimate
from ditkit.sample.noise import SampleNoise
from ditkit.sample.solvers import Solver, check_order, check_where, spaced
from ditkit.sample.steppers import OneEstimate, Stepper


@final
@dataclass(frozen=True)
class DpmSolverPP(Solver):
    """DPM-Solver++(2M), deterministic (Lu et al. 2022, arXiv 2211.01095, algorithm 2); order 2.

    The first step, and the last one if it ends at the data, where lambda is infinite, are DDIM's.

    Args:
        order: 2 (2M), or 1, which is DDIM.
        spacing: of the indices of a discrete path on the even grid, as in `Ddim`.
        grid: where the steps lie.
    """

    order: int = 2
    spacing: Spacing = "strided"
    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        check_order(self, 1, 2)
        check_where(self)

    def times(self, path: Path, steps: int) -> Tensor:
        return spaced(self, path, steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return DpmSolverPPStepper(self, path, times)


@final
class DpmSolverPPStepper(OneEstimate):
    """Keeps the last step's predicted data."""

    def __init__(self, solver: DpmSolverPP, path: Path, times: Tensor) -> None:
        super().__init__(solver, path, times)
        self.order = solver.order
        self.before: tuple[float, Tensor] | None = None  # lambda and data of the last estimate

    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        here, there = noise_level(self.path, t), noise_level(self.path, s)
        data = direction = estimate.to("data")
        h = there.half_log_snr - here.half_log_snr
        if self.order == 2 and self.before is not None and isfinite(h):
            earlier, predicted = self.before
            r = (here.half_log_snr - earlier) / h
            direction = data + (data - predicted) / (2 * r)
        self.before = here.half_log_snr, data
        return there.sigma / here.sigma * x - there.alpha * expm1(-h) * direction


@final
@dataclass(frozen=True)
class UniPc(Solver):
    """UniPC-p with B(h) = e^h - 1, predicting data (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2).

    The estimate that a step begins with also corrects the step before it, at no further evaluation. Fewer earlier
    estimates than the order asks for lower it in the first steps; so does the end, if it is the data, in the last ones.

    Args:
        order: p of the predictor, 1 to 3; the corrector adds one.
        spacing: of the indices of a discrete path on the even grid, as in `Ddim`.
        grid: where the steps lie.
    """

    order: int = 2
    spacing: Spacing = "strided"
    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        check_order(self, 1, 2, 3)
        check_where(self)

    def times(self, path: Path, steps: int) -> Tensor:
        return spaced(self, path, steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return UniPcStepper(self, path, times)


@final
class UniPcStepper(OneEstimate):
    """Keeps the predicted data of the last steps, and the state before the last one for its correction."""

    def __init__(self, solver: UniPc, path: Path, times: Tensor) -> None:
        super().__init__(solver, path, times)
        self.order = solver.order
        self.ends_at_data = noise_level(path, self.times[-1]).sigma == 0
        self.known: list[Known] = []  # newest last
        self.origin: tuple[Tensor, int] | None = None  # the state before the last step, and its order

    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        data, level = estimate.to("data"), noise_level(self.path, t)
        if self.origin is not None:
            before, order = self.origin
            x = self._update(before, level, order, corrected=data)
        self.known = [*self.known, Known(level, data)][-self.order :]
        order = self._next_order()
        self.origin = x, order
        return self._update(x, noise_level(self.path, s), order)

    def _next_order(self) -> int:
        usable = 1 + sum(isfinite(known.level.half_log_snr) for known in self.known[:-1])
        left = len(self.times) - 1 - self.index
        return min(self.order, usable, left if self.ends_at_data else self.order)

    def _update(self, x: Tensor, there: NoiseLevel, order: int, corrected: Tensor | None = None) -> Tensor:
        """Make UniP's step from the newest estimate to `there`; with the data predicted there, UniC's."""
        here, data = self.known[-1]
        h = there.half_log_snr - here.half_log_snr
        ratios, slopes = [], []
        for known in self.known[-order:-1][::-1]:
            ratios.append((known.level.half_log_snr - here.half_log_snr) / h)
            slopes.append((known.data - data) / ratios[-1])
        if corrected is not None:
            ratios.append(1.0)
            slopes.append(corrected - data)
        x = there.sigma / here.sigma * x - there.alpha * expm1(-h) * data
        for weight, slope in zip(_weights(ratios, h), slopes, strict=True):
            x = x - there.alpha * expm1(-h) * weight * slope
        return x


class NoiseLevel(NamedTuple):
    """The signal and noise of a state at a time of a path."""

    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), infinite at both ends."""
        if self.sigma == 0:
            return inf
        return -inf if self.alpha == 0 else log(self.alpha) - log(self.sigma)


class Known(NamedTuple):
    """Predicted data [B, C, ...] and the noise level at which they were predicted."""

    level: NoiseLevel
    data: Tensor


def noise_level(path: Path, t: float) -> NoiseLevel:
    """Return the noise level at a time of a path, as Python floats."""
    c = path.at(torch.tensor(t, dtype=torch.float64))
    return NoiseLevel(c.alpha.item(), c.sigma.item())


def _weights(ratios: list[float], h: float) -> list[float]:
    """Return the weights w of slopes to points at `ratios` r of h: sum of w r^(k-1) = k! phi_(k+1)(-h) h / (1 - e^-h).

    One slope has 1/2 whatever h, which is exact to the same order, as in UniPC's code.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, factorial, sides = expm1(-h) / -h - 1, 1, []
    for k in range(1, len(ratios) + 1):
        sides.append(phi * factorial / expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor([[r**k for r in ratios] for k in range(len(ratios))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(sides, dtype=torch.float64)).tolist()
