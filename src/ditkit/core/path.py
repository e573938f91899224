"""How data and noise mix, in noise-time: t = 0 is data, t = 1 noise. Predictions are converted here only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, unknown

Prediction = Literal["velocity", "noise", "data", "score"]
Time = TypeVar("Time", float, Tensor)


class Coefficients(NamedTuple):
    """x_t = alpha x + sigma noise, and the derivatives of both in t."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor


def spread(t: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] times with trailing axes added until they broadcast against `like`.

    Per-frame times [B, T] meet [B, C, T, H, W]; per-token times [B, L] meet [B, L, D].
    """
    if t.ndim == 2 and like.ndim == 5:
        t = t[:, None]
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


class Path(ABC):
    """A pair of schedules alpha(t), sigma(t). All tensors keep the dtype of `t`; use float64 for tables."""

    @abstractmethod
    def at(self, t: Tensor) -> Coefficients:
        """Coefficients at times `t`, any shape."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """The `steps + 1` float64 times a sampler visits, from noise to data."""

    @abstractmethod
    def noise_time(self, t: Time) -> Time:
        """`t` as a share of the way from data (0) to noise (1), the clock that guidance and policies read."""

    @abstractmethod
    def place(self, u: Tensor) -> Tensor:
        """Numbers u in [0, 1) to times of this path."""

    def trainable(self, t: Tensor, prediction: Prediction) -> Tensor:
        """Drawn times `t`, moved to where a network can learn `prediction`; a discrete path's stay."""
        return t

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha data + sigma noise; `t` [B] or [B, T]."""
        c = self.at(spread(t, data))
        return c.alpha * data + c.sigma * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t / dt = alpha' data + sigma' noise."""
        c = self.at(spread(t, data))
        return c.alpha_rate * data + c.sigma_rate * noise

    def convert(self, value: Tensor, x: Tensor, t: Tensor, source: Prediction, target: Prediction) -> Tensor:
        """A prediction at (x, t) in another form.

        A data prediction says nothing of the noise at sigma = 0, nor a noise or score prediction of the data
        at alpha = 0: such a conversion gives infinities. Velocity converts at every t.

        Raises:
            ConfigError: `source` or `target` is no prediction.
        """
        for kind in (source, target):
            if kind not in get_args(Prediction):
                raise ConfigError(unknown("prediction", kind, get_args(Prediction)))
        if source == target:
            return value
        c = self.at(spread(t, x))
        data, noise = _separate(value, x, c, source)
        if target == "data":
            return data()
        if target == "noise":
            return noise()
        if target == "score":
            return -noise() / c.sigma
        return c.alpha_rate * data() + c.sigma_rate * noise()


def _separate(value: Tensor, x: Tensor, c: Coefficients, source: Prediction):  # type: ignore[no-untyped-def]
    """Data and noise as functions, so that only what is asked for is computed (and divided by)."""
    if source == "velocity":  # solves x = a d + s n, v = a' d + s' n
        det = c.alpha * c.sigma_rate - c.alpha_rate * c.sigma
        return (
            lambda: (c.sigma_rate * x - c.sigma * value) / det,
            lambda: (c.alpha * value - c.alpha_rate * x) / det,
        )
    if source == "data":
        return (lambda: value), (lambda: (x - c.alpha * value) / c.sigma)
    noise = value if source == "noise" else -c.sigma * value
    return (lambda: (x - c.sigma * noise) / c.alpha), (lambda: noise)


class ContinuousPath(Path):
    """A path over all t in [0, 1]."""

    def times(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def noise_time(self, t: Time) -> Time:
        return t

    def place(self, u: Tensor) -> Tensor:
        return u

    def span(self, prediction: Prediction) -> tuple[float, float]:
        """First and last t in which `prediction` is trained (SiT's train_eps; data, which it has not, at all t)."""
        return (1e-3, 1 - 1e-3) if prediction in ("noise", "score") else (0.0, 1.0)

    def trainable(self, t: Tensor, prediction: Prediction) -> Tensor:
        """[0, 1] onto `span`, evenly, as SiT draws its times."""
        low, high = self.span(prediction)
        return low + (high - low) * t


@dataclass(frozen=True)
class Linear(ContinuousPath):
    """Rectified flow: alpha = 1 - t, sigma = t (Liu et al. 2022; SiT, "Linear")."""

    def at(self, t: Tensor) -> Coefficients:
        return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


@dataclass(frozen=True)
class Cosine(ContinuousPath):
    """Generalised variance-preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (SiT, "GVP")."""

    def at(self, t: Tensor) -> Coefficients:
        half = math.pi / 2
        cos, sin = torch.cos(half * t), torch.sin(half * t)
        return Coefficients(cos, sin, -half * sin, half * cos)


@dataclass(frozen=True)
class VariancePreserving(ContinuousPath):
    """log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2 (Song et al. 2021, eq. 33; SiT, "VP")."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def at(self, t: Tensor) -> Coefficients:
        slope = self.beta_max - self.beta_min
        log_alpha = -0.25 * t**2 * slope - 0.5 * t * self.beta_min
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        alpha_rate = -0.5 * alpha * (t * slope + self.beta_min)
        return Coefficients(alpha, sigma, alpha_rate, -alpha * alpha_rate / sigma)

    def span(self, prediction: Prediction) -> tuple[float, float]:
        """SiT's: sigma' is infinite at t = 0, and alpha is not 0 at t = 1."""
        return 1e-5, 1.0


PATHS: dict[str, type[ContinuousPath]] = {"linear": Linear, "cosine": Cosine, "vp": VariancePreserving}
