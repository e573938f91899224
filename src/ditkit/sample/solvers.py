"""Solvers from noise to data whose step needs one estimate of the model, or two; their base, and what they refuse.

Every solver keeps its state in float64, cast to the model's dtype for each call: a step adds a small number
to a large one, and what differs between two runs should be the model, not the rounding of a sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi, sin, sqrt
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from ditkit.core.ddpm import DiscretePath, Spacing
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.path import ContinuousPath, Path
from ditkit.core.time_grid import EVEN, TimeGrid, as_time_grid, check_falling
from ditkit.sample.denoiser import LATEST, Estimate, GuidedDenoiser
from ditkit.sample.noise import SampleNoise
from ditkit.sample.steppers import OneEstimate, Stepper, follow

Diffusion = Literal["sigma", "constant", "sbdm", "linear", "decreasing", "increasing-decreasing"]


class Solver(ABC):
    """A frozen dataclass; what one trajectory needs lives in its `Stepper` and dies with it."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.sample",)

    @abstractmethod
    def times(self, path: Path, steps: int) -> Tensor:
        """Return the times visited, float64, from noise to data; on a discrete path indices, then -1.

        Raises:
            ConfigError: the solver cannot run on this path, or not in so many steps.
        """

    @abstractmethod
    def evaluations(self, steps: int) -> int:
        """Count the evaluations of the guided model in `steps` steps."""

    @abstractmethod
    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        """Begin a trajectory over `times`, as those of `times(path, steps)` or a part of them.

        Args:
            noise: a stochastic solver draws from it.

        Raises:
            ConfigError: times that do not fall, a path that the solver cannot run on, or no noise where it draws some.
        """

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        """Solve for data [B, C, ...] from `x`, noise of the same shape; a stochastic solver draws more from `noise`."""
        return follow(self.begin(field.path, self.times(field.path, steps), noise), field, x)


@final
@dataclass(frozen=True)
class Euler(Solver):
    """dx = v dt; order 1.

    Args:
        grid: where the steps lie.
    """

    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        as_time_grid("Euler", self.grid)

    def times(self, path: Path, steps: int) -> Tensor:
        return continuous(self, path).times(steps, self.grid)

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return EulerStepper(self, continuous(self, path), times)


@final
class EulerStepper(OneEstimate):
    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        return x + (s - t) * estimate.to("velocity")


@final
@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoid rule on velocity; order 2. Two evaluations a step, one in the step that ends at t = 0.

    There sigma = 0 and a model is not trained, so the last step is Euler's (Karras et al. 2022, algorithm 1).

    Args:
        grid: where the steps lie.
    """

    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        as_time_grid("Heun", self.grid)

    def times(self, path: Path, steps: int) -> Tensor:
        return continuous(self, path).times(steps, self.grid)

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return HeunStepper(self, continuous(self, path), times)


@final
class HeunStepper(Stepper):
    """A step goes to the next time as Euler's does, and is gone again from `origin` with the mean of both slopes."""

    def __init__(self, solver: Solver, path: Path, times: Tensor) -> None:
        self.times, self.index = times.tolist(), 0
        check_falling(type(solver).__name__, self.times)
        self.origin: tuple[Tensor, Tensor] | None = None  # the state before the step, and the slope there

    @property
    def t(self) -> float | None:
        if self.origin is not None:
            return self.times[self.index + 1]
        return self.times[self.index] if self.index < len(self.times) - 1 else None

    def step(self, x: Tensor, estimate: Estimate) -> Tensor:
        t, s = self.times[self.index : self.index + 2]
        slope = estimate.to("velocity")
        if self.origin is None and s > 0:
            self.origin = x, slope
            return x + (s - t) * slope
        if self.origin is not None:
            x, first = self.origin
            slope = (first + slope) / 2
        self.origin = None
        self.index += 1
        return x + (s - t) * slope


@final
@dataclass(frozen=True)
class Ddim(Solver):
    """x_s = alpha_s data + sigma_s noise, both as predicted at t; order 1 (DDIM, eq. 12, eta = 0).

    Args:
        spacing: of the indices of a discrete path on the even grid: strided (DDIM's; 50: 980, 960 ... 0), even (DiT's
            published scripts; 50: 999, 979 ... 20, 0) or trailing (50: 999, 979 ... 19).
        grid: where the steps lie.
    """

    spacing: Spacing = "strided"
    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        check_where(self)

    def times(self, path: Path, steps: int) -> Tensor:
        return spaced(self, path, steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return DdimStepper(self, path, times)


@final
class DdimStepper(OneEstimate):
    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        at_s = self.path.at(x.new_tensor([s]))
        return at_s.alpha * estimate.to("data") + at_s.sigma * estimate.to("noise")


@final
@dataclass(frozen=True)
class Ancestral(Solver):
    """x_s ~ q(x_s | x_t, data), variance as learned, else beta~ (Ho et al. 2020, algorithm 2).

    Evenly respaced steps, no clipping of the predicted data, no noise in the last step: DiT's sampler (250).

    Args:
        grid: where the steps lie.
    """

    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        as_time_grid("Ancestral", self.grid)

    def times(self, path: Path, steps: int) -> Tensor:
        if self.grid != EVEN:
            return discrete(self, path).times(steps, self.grid)
        return discrete(self, path).times(steps, spacing="even")

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return AncestralStepper(self, discrete(self, path), times, drawn(self, noise))


@final
class AncestralStepper(OneEstimate):
    def __init__(self, solver: Solver, path: DiscretePath, times: Tensor, noise: SampleNoise) -> None:
        super().__init__(solver, path, times)
        if self.times[-1] != -1:
            raise ConfigError(f"Ancestral: times end at {self.times[-1]:g}, expected -1, the data")
        self.kept, self.noise = path.respaced(times[:-1].flip(0).long().cpu()), noise

    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        kept_index = self.kept.steps - 1 - self.index
        here = torch.tensor([kept_index], device=x.device)
        x = self.kept.posterior_mean(x, estimate.to("data"), here)
        if kept_index:
            std = (0.5 * self.kept.log_variance(estimate.fraction, here, x)).exp()
            x = x + std * self.noise.draw(x.device)
        return x


@final
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """dx = [v - w(t) score] dt + sqrt(2 w) dW, backwards in noise-time (SiT, arXiv 2401.08740, eq. 4).

    Even times from 1 to `last`, then one step to 0 without noise (SiT's "Mean"); SiT takes 250 steps.

    Args:
        diffusion: w(t), which changes the trajectories but not their marginals: sigma(t); constant 1; sbdm,
            the forward process's sigma sigma' - sigma^2 alpha' / alpha; linear t; decreasing (towards the
            data) sin(pi t / 2)^4; increasing-decreasing sin(pi t)^2.
        scale: factor of w; at 0 the solver is Euler's, bit for bit.
        last: length of the last step, on the even grid.
        grid: moves these times.
    """

    diffusion: Diffusion = "sigma"
    scale: float = 1.0
    last: float = 0.04
    grid: TimeGrid = EVEN

    def __post_init__(self) -> None:
        if self.diffusion not in get_args(Diffusion):
            raise ConfigError(unknown("diffusion", self.diffusion, get_args(Diffusion)))
        if self.scale < 0:
            raise ConfigError(f"EulerMaruyama: scale={self.scale} should not be negative")
        if not 0 < self.last < 1:
            raise ConfigError(f"EulerMaruyama: last={self.last} should lie between 0 and 1")
        as_time_grid("EulerMaruyama", self.grid)

    def times(self, path: Path, steps: int) -> Tensor:
        continuous(self, path)
        noisy = torch.linspace(1, self.last, steps, dtype=torch.float64)
        return self.grid.warp(torch.cat([noisy, noisy.new_zeros(1)]))

    def evaluations(self, steps: int) -> int:
        return steps

    def begin(self, path: Path, times: Tensor, noise: SampleNoise | None = None) -> Stepper:
        return EulerMaruyamaStepper(self, continuous(self, path), times, drawn(self, noise))

    def strength(self, path: Path, t: float) -> float:
        """w(t) at scale 1; sbdm, infinite at alpha = 0, is taken no later than `LATEST`."""
        if self.diffusion == "sbdm":
            c = path.at(torch.tensor(min(t, LATEST), dtype=torch.float64))
            return (c.sigma * c.sigma_rate - c.sigma**2 * c.alpha_rate / c.alpha).item()
        if self.diffusion == "sigma":
            return path.at(torch.tensor(t, dtype=torch.float64)).sigma.item()
        forms = {
            "constant": 1.0,
            "linear": t,
            "decreasing": (1 - cos(pi * t)) ** 2 / 4,
            "increasing-decreasing": sin(pi * t) ** 2,
        }
        return forms[self.diffusion]


@final
class EulerMaruyamaStepper(OneEstimate):
    def __init__(self, solver: EulerMaruyama, path: Path, times: Tensor, noise: SampleNoise) -> None:
        super().__init__(solver, path, times)
        self.solver, self.noise = solver, noise

    def move(self, x: Tensor, estimate: Estimate, t: float, s: float) -> Tensor:
        w = self.solver.scale * self.solver.strength(self.path, t)
        x = x + (s - t) * (estimate.to("velocity") - w * estimate.to("score"))
        if s > 0:
            x = x + sqrt(2 * w * (t - s)) * self.noise.draw(x.device)
        return x


def default_solver(path: Path) -> Solver:
    """Return Euler's on a continuous path, and DDIM's on a discrete one, which has no velocity."""
    return Ddim() if isinstance(path, DiscretePath) else Euler()


def spaced(solver: Any, path: Path, steps: int) -> Tensor:
    """Return the times of a solver that has a `grid`, and a `spacing` for discrete paths.

    Raises:
        ConfigError: a spacing on a continuous path, or what `DiscretePath.times` refuses.
    """
    if isinstance(path, DiscretePath):
        return path.times(steps, solver.grid, solver.spacing)
    if solver.spacing != "strided":
        raise ConfigError(
            f"{type(solver).__name__}: spacing={solver.spacing!r} is of discrete paths; on {type(path).__name__} give "
            "a grid, such as Shift(3.0)"
        )
    return path.times(steps, solver.grid)


def check_where(solver: Any) -> None:
    """Raise ConfigError unless the solver's `grid` is one, and its `spacing` known."""
    name = type(solver).__name__
    as_time_grid(name, solver.grid)
    if solver.spacing not in get_args(Spacing):
        raise ConfigError(f"{name}: " + unknown("spacing", solver.spacing, get_args(Spacing)))


def check_order(solver: Any, *orders: int) -> None:
    """Raise ConfigError unless the solver's `order` is one of `orders`."""
    if solver.order not in orders:
        closest = min(orders, key=lambda order: abs(order - solver.order))
        listed = ", ".join(map(str, orders))
        raise ConfigError(
            f"{type(solver).__name__}: order={solver.order}, expected one of {listed}; did you mean {closest}?"
        )


def drawn(solver: Solver, noise: SampleNoise | None) -> SampleNoise:
    """Return `noise`; raise ConfigError where there is none."""
    if noise is None:
        raise ConfigError(f"{type(solver).__name__} draws noise in its steps: give begin(path, times, noise)")
    return noise


def continuous(solver: Solver, path: Path) -> ContinuousPath:
    """Return `path`; raise ConfigError for a discrete one, which has no velocity."""
    if not isinstance(path, ContinuousPath):
        name = type(solver).__name__
        raise ConfigError(
            f"{name} needs a velocity, and DDPM's discrete path has none; use Ddim or Ancestral"
        )
    return path


def discrete(solver: Solver, path: Path) -> DiscretePath:
    """Return `path`; raise ConfigError for a continuous one."""
    if not isinstance(path, DiscretePath):
        names = type(solver).__name__, type(path).__name__
        raise ConfigError(
            f"{names[0]} needs DDPM's discrete path, not {names[1]}; use Euler, Heun, Ddim or EulerMaruyama"
        )
    return path
