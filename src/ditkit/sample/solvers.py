"""Ways from noise to data.

Every solver keeps its state in float64, cast to the model's dtype for each call: a step adds a small number
to a large one, and what differs between two runs should be the model, not the rounding of a sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, sin, sqrt
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.path import ContinuousPath, Path
from ditkit.sample.denoiser import LATEST, GuidedDenoiser
from ditkit.sample.noise import SampleNoise

Diffusion = Literal["sigma", "constant", "sbdm", "linear", "decreasing", "increasing-decreasing"]


class Solver(ABC):
    """A frozen dataclass; what one trajectory needs lives in the frame of `solve` and dies with it."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.sample",)

    @abstractmethod
    def times(self, path: Path, steps: int) -> Tensor:
        """The times visited, float64, from noise to data; on a discrete path indices, then -1.

        Raises:
            ConfigError: the solver cannot run on this path, or not in so many steps.
        """

    @abstractmethod
    def evaluations(self, steps: int) -> int:
        """Evaluations of the guided model in `steps` steps."""

    @abstractmethod
    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        """Data [B, C, ...] from `x`, noise of the same shape; a stochastic solver draws more from `noise`."""


@final
@dataclass(frozen=True)
class Euler(Solver):
    """dx = v dt on even times; order 1."""

    def times(self, path: Path, steps: int) -> Tensor:
        return _continuous(self, path).times(steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        for t, s in pairwise(self.times(field.path, steps).tolist()):
            x = x + (s - t) * field(x, t).to("velocity")
        return x


@final
@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoid rule on velocity; order 2. Two evaluations a step, one in the step that ends at t = 0.

    There sigma = 0 and a model is not trained, so the last step is Euler's (Karras et al. 2022, algorithm 1).
    """

    def times(self, path: Path, steps: int) -> Tensor:
        return _continuous(self, path).times(steps)

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        for t, s in pairwise(self.times(field.path, steps).tolist()):
            slope = field(x, t).to("velocity")
            if s > 0:
                slope = (slope + field(x + (s - t) * slope, s).to("velocity")) / 2
            x = x + (s - t) * slope
        return x


@final
@dataclass(frozen=True)
class Ddim(Solver):
    """x_s = alpha_s data + sigma_s noise, both as predicted at t; order 1 (DDIM, eq. 12, eta = 0).

    Runs on every path: even times on a continuous one, indices of one stride on DDPM's (50: 980, 960 ... 0).
    """

    def times(self, path: Path, steps: int) -> Tensor:
        return path.times(steps)

    def evaluations(self, steps: int) -> int:
        return steps

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        for t, s in pairwise(self.times(field.path, steps).tolist()):
            at_t, at_s = field(x, t), field.path.at(x.new_tensor([s]))
            x = at_s.alpha * at_t.to("data") + at_s.sigma * at_t.to("noise")
        return x


@final
@dataclass(frozen=True)
class Ancestral(Solver):
    """x_s ~ q(x_s | x_t, data), variance as learned, else beta~ (Ho et al. 2020, algorithm 2).

    Evenly respaced steps, no clipping of the predicted data, no noise in the last step: DiT's sampler (250).
    """

    def times(self, path: Path, steps: int) -> Tensor:
        index = _discrete(self, path).evenly(steps)
        return torch.cat([index.flip(0), index.new_tensor([-1])]).double()

    def evaluations(self, steps: int) -> int:
        return steps

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        path = _discrete(self, field.path)
        kept = path.respaced(path.evenly(steps))
        for place, t in zip(reversed(range(steps)), kept.index.flip(0).tolist(), strict=True):
            estimate, here = field(x, float(t)), torch.tensor([place], device=x.device)
            x = kept.posterior_mean(x, estimate.to("data"), here)
            if place:
                std = (0.5 * kept.log_variance(estimate.fraction, here, x)).exp()
                x = x + std * noise.draw(x.device)
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
        last: length of the last step.
    """

    diffusion: Diffusion = "sigma"
    scale: float = 1.0
    last: float = 0.04

    def __post_init__(self) -> None:
        if self.diffusion not in get_args(Diffusion):
            raise ConfigError(unknown("diffusion", self.diffusion, get_args(Diffusion)))
        if self.scale < 0:
            raise ConfigError(f"EulerMaruyama: scale={self.scale} should not be negative")
        if not 0 < self.last < 1:
            raise ConfigError(f"EulerMaruyama: last={self.last} should lie between 0 and 1")

    def times(self, path: Path, steps: int) -> Tensor:
        _continuous(self, path)
        noisy = torch.linspace(1, self.last, steps, dtype=torch.float64)
        return torch.cat([noisy, noisy.new_zeros(1)])

    def evaluations(self, steps: int) -> int:
        return steps

    def solve(self, field: GuidedDenoiser, x: Tensor, steps: int, noise: SampleNoise) -> Tensor:
        for t, s in pairwise(self.times(field.path, steps).tolist()):
            estimate, w = field(x, t), self.scale * self.strength(field.path, t)
            x = x + (s - t) * (estimate.to("velocity") - w * estimate.to("score"))
            if s > 0:
                x = x + sqrt(2 * w * (t - s)) * noise.draw(x.device)
        return x

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


def _continuous(solver: Solver, path: Path) -> ContinuousPath:
    if not isinstance(path, ContinuousPath):
        name = type(solver).__name__
        raise ConfigError(
            f"{name} needs a velocity, and DDPM's discrete path has none; use Ddim or Ancestral"
        )
    return path


def _discrete(solver: Solver, path: Path) -> DiscretePath:
    if not isinstance(path, DiscretePath):
        names = type(solver).__name__, type(path).__name__
        raise ConfigError(
            f"{names[0]} needs DDPM's discrete path, not {names[1]}; use Euler, Heun, Ddim or EulerMaruyama"
        )
    return path
