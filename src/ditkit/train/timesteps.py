"""Distributions of the noise-times of training, as maps from a uniform number to t."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from ditkit.core.config import Checked, Count
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.time_grid import Shift
from ditkit.train.randomness import SampleRNG


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


class Clock(Checked, ABC):
    """The unit that has a noise-time of its own; numbers are uniform, and `Timesteps` places them."""

    @abstractmethod
    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """From one uniform number a sample, [B] float64: those of the times [B] or [B, T], and a second time's [B]."""

    def check(self, model: Model) -> None:
        """Refuse a model that cannot be told such times, before the first step."""

    def check_batch(self, batch: int) -> None:
        """Refuse a number of samples, over all processes, that cannot have such times, before the first step."""


@dataclass(frozen=True)
class Independent(Clock):
    """Each sample by itself."""

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        return u, None


INDEPENDENT = Independent()


@dataclass(frozen=True)
class Stratified(Clock):
    """Place i of the global batch in stratum i mod `strata` of [0, 1): each has as many, whatever the processes."""

    strata: Count = 4

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        stratum = torch.tensor([place % self.strata for place in rng.places], dtype=u.dtype)
        return (stratum + u) / self.strata, None

    def check_batch(self, batch: int) -> None:
        if batch % self.strata:
            raise ConfigError(
                f"Stratified: batch={batch} does not divide into strata={self.strata} (remainder "
                f"{batch % self.strata}), expected as many samples of each"
            )


@dataclass(frozen=True)
class PerFrame(Clock):
    """Each frame of a clip by itself (diffusion forcing, arXiv 2407.01392)."""

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        return rng.of_term("PerFrame", shape[2]), None

    def check(self, model: Model) -> None:
        if not getattr(model, "takes_frame_times", False):
            raise ConfigError(
                f"PerFrame: a {type(model).__name__} is told one time a sample; expected a model of clips with "
                "takes_frame_times"
            )


@dataclass(frozen=True)
class Paired(Clock):
    """A second time beside each, nearer to the data by up to `gap`: u' = max(u - gap v, 0), v uniform (SRA).

    Terms find it as `batch.other`.
    """

    gap: Annotated[float, Interval(gt=0, le=1)] = 0.2

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        return u, (u - self.gap * rng.of_term("Paired")[:, 0]).clamp_min(0)
