"""Which noise-times training visits, as a map from a uniform number to t."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from ditkit.core.config import Checked
from ditkit.core.time_grid import Shift


class Timesteps(Checked, ABC):
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
    std: Annotated[float, Gt(0)] = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-12, 1 - 1e-12) - 1)
        return torch.sigmoid(self.mean + self.std * normal)


@dataclass(frozen=True)
class Shifted(Timesteps):
    """Times of `inner` moved as `Shift(shift)` moves a sampler's: above 1 to noise, by ln(shift) on the logit."""

    shift: Annotated[float, Gt(0)] = 3.0
    inner: Uniform | LogitNormal = UNIFORM

    def quantile(self, u: Tensor) -> Tensor:
        return Shift(self.shift).warp(self.inner.quantile(u))
