"""Which noise-times training visits, as a map from a uniform number to t."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.core.time_grid import Shift


class Timesteps(ABC):
    """A density over noise-time, given as its quantile function."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Uniform u in [0, 1) to t in [0, 1]; float64 in and out."""


@dataclass(frozen=True)
class Uniform(Timesteps):
    """t ~ U[0, 1]."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


UNIFORM = Uniform()


@dataclass(frozen=True)
class LogitNormal(Timesteps):
    """t = sigmoid(mean + std N(0, 1)) (Esser et al. 2024, eq. 19); on the linear path sigma = exp(N)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"LogitNormal: std={self.std} should be positive")

    def quantile(self, u: Tensor) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-12, 1 - 1e-12) - 1)
        return torch.sigmoid(self.mean + self.std * normal)


@dataclass(frozen=True)
class Shifted(Timesteps):
    """Times of `inner` moved as `Shift(shift)` moves a sampler's: above 1 to noise, by ln(shift) on the logit."""

    shift: float = 3.0
    inner: Uniform | LogitNormal = UNIFORM

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ConfigError(f"Shifted: shift={self.shift} should be positive")

    def quantile(self, u: Tensor) -> Tensor:
        return Shift(self.shift).warp(self.inner.quantile(u))
