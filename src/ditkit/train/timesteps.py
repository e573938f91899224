"""Which noise-times training visits, as a map from a uniform number to t."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.train.randomness import SampleRNG


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
    """t' = a t / (1 + (a - 1) t): a > 1 moves mass to noise; the same as adding ln a to the logit."""

    shift: float = 3.0
    inner: Uniform | LogitNormal = UNIFORM

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ConfigError(f"Shifted: shift={self.shift} should be positive")

    def quantile(self, u: Tensor) -> Tensor:
        t = self.inner.quantile(u)
        return self.shift * t / (1 + (self.shift - 1) * t)


class Clock(ABC):
    """What has a noise-time of its own; numbers are uniform, and `Timesteps` places them."""

    @abstractmethod
    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """From one uniform number a sample, [B] float64: those of the times [B] or [B, T], and a second time's [B]."""

    def check(self, model: Model) -> None:  # noqa: B027
        """Refuse a model that cannot be told such times, before the first step."""


@dataclass(frozen=True)
class Independent(Clock):
    """Each sample by itself."""

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        return u, None


INDEPENDENT = Independent()


@dataclass(frozen=True)
class Stratified(Clock):
    """Place i of the global batch in stratum i mod `strata` of [0, 1): each has as many, whatever the processes."""

    strata: int = 4

    def __post_init__(self) -> None:
        if type(self.strata) is not int or self.strata < 1:
            raise ConfigError(f"Stratified: strata={self.strata!r}, expected an integer of at least 1")

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        stratum = torch.tensor([place % self.strata for place in rng.places], dtype=u.dtype)
        return (stratum + u) / self.strata, None


@dataclass(frozen=True)
class PerFrame(Clock):
    """Each frame of a clip by itself (diffusion forcing, arXiv 2407.01392)."""

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        return rng.of_term("PerFrame", shape[2]), None

    def check(self, model: Model) -> None:
        if not getattr(model, "takes_frame_times", False) or len(model.sample_shape) != CLIP_AXES:
            raise ConfigError(
                f"PerFrame: a {type(model).__name__} is told one time a sample; expected a model of clips with "
                "takes_frame_times"
            )


CLIP_AXES = 4


@dataclass(frozen=True)
class Paired(Clock):
    """A second time beside each, nearer to the data by up to `gap`: u' = max(u - gap v, 0), v uniform (SRA).

    Terms find it as `batch.other`.
    """

    gap: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.gap <= 1:
            raise ConfigError(f"Paired: gap={self.gap} should lie in (0, 1]")

    def uniforms(self, u: Tensor, rng: SampleRNG, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        return u, (u - self.gap * rng.of_term("Paired")[:, 0]).clamp_min(0)
