"""Paths: mixtures of data and noise in noise-time (t = 0 data, t = 1 noise), and conversions of predictions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.time_grid import EVEN, TimeGrid

Prediction = Literal["velocity", "noise", "data", "score"]
Time = TypeVar("Time", float, Tensor)


class Coefficients(NamedTuple):
    """x_t = alpha x + sigma noise, and the derivatives of both in t."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor


def spread(t: Tensor, like: Tensor, axis: int | None = None) -> Tensor:
    """Add axes of length 1 to times [B] or [B, T] until they broadcast against `like`.

    Args:
        axis: of `like`, which the T times of a sample follow: 2 in clips [B, C, T, H, W] and in series [B, C, T], 1 in
            tokens [B, T, D]. One time a sample needs none.

    Raises:
        ShapeError: no axis for times [B, T], or one of another length.
    """
    if t.ndim == 1:
        return t.reshape(t.shape + (1,) * (like.ndim - 1))
    if axis is None or t.ndim != 2 or not 0 < axis < like.ndim or t.shape[1] not in (1, like.shape[axis]):
        raise ShapeError(
            f"times {list(t.shape)} with axis={axis} do not fit {list(like.shape)}; expected [B], or [B, T] and the "
            "axis of length T: 2 in clips [B, C, T, H, W], 1 in tokens [B, T, D]"
        )
    return t.reshape(len(t), *(t.shape[1] if i == axis else 1 for i in range(1, like.ndim)))


class Path(ABC):
    """A pair of schedules alpha(t), sigma(t). All tensors keep the dtype of `t`; use float64 for tables."""

    @abstractmethod
    def at(self, t: Tensor) -> Coefficients:
        """Coefficients at times `t`, any shape."""

    @abstractmethod
    def times(self, steps: int, grid: TimeGrid = EVEN) -> Tensor:
        """Return the `steps + 1` float64 times that a sampler visits on `grid`, from noise to data."""

    @abstractmethod
    def noise_time(self, t: Time) -> Time:
        """`t` as a share of the way from data (0) to noise (1), the clock that guidance and policies read."""

    @abstractmethod
    def place(self, u: Tensor) -> Tensor:
        """Numbers u in [0, 1) to times of this path."""

    def trainable(self, t: Tensor, prediction: Prediction) -> Tensor:
        """Drawn times `t`, moved to where a network can learn `prediction`; a discrete path's stay."""
        return t

    def mix(self, data: Tensor, noise: Tensor, t: Tensor, axis: int | None = None) -> Tensor:
        """x_t = alpha data + sigma noise; `t` [B], or [B, T] along `axis` as in `spread`."""
        c = self.at(spread(t, data, axis))
        return c.alpha * data + c.sigma * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor, axis: int | None = None) -> Tensor:
        """dx_t / dt = alpha' data + sigma' noise."""
        c = self.at(spread(t, data, axis))
        return c.alpha_rate * data + c.sigma_rate * noise

    def convert(
        self,
        value: Tensor,
        x: Tensor,
        t: Tensor,
        source: Prediction,
        target: Prediction,
        axis: int | None = None,
    ) -> Tensor:
        """Convert a prediction at (x, t) to another form; `t` [B], or [B, T] along `axis` as in `spread`.

        A data prediction says nothing of the noise at sigma = 0, nor a noise or score prediction of the data
        at alpha = 0: such a conversion gives infinities. Velocity converts at every t.

        Raises:
            ConfigError: `source` or `target` is no prediction. ShapeError: as `spread` does.
        """
        for kind in (source, target):
            if kind not in get_args(Prediction):
                raise ConfigError(unknown("prediction", kind, get_args(Prediction)))
        if source == target:
            return value
        c = self.at(spread(t, x, axis))
        data, noise = _separate(value, x, c, source)
        if target == "data":
            return data()
        if target == "noise":
            return noise()
        if target == "score":
            return -noise() / c.sigma
        return c.alpha_rate * data() + c.sigma_rate * noise()


def _separate(value: Tensor, x: Tensor, c: Coefficients, source: Prediction):  # type: ignore[no-untyped-def]
    """Return data and noise as functions, so that only what is asked for is computed (and divided by)."""
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

    unit: ClassVar[float] = 1.0
    """Noise-time 1 on the clock that a network of this path is fed, and by which its velocity counts."""

    def times(self, steps: int, grid: TimeGrid = EVEN) -> Tensor:
        return grid.warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64))

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
        return _quarter_turn(t)


@dataclass(frozen=True)
class Trig(ContinuousPath):
    """TrigFlow (Lu and Song 2024): x = cos(a) data + sin(a) noise, the network fed the angle a = pi t / 2.

    The mixture is `Cosine`'s; its velocity is by the angle, cos(a) noise - sin(a) data, of unit variance at every time.
    """

    unit: ClassVar[float] = math.pi / 2

    def at(self, t: Tensor) -> Coefficients:
        return _quarter_turn(t)


def _quarter_turn(t: Tensor) -> Coefficients:
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


PATHS: dict[str, type[ContinuousPath]] = {
    "linear": Linear,
    "cosine": Cosine,
    "vp": VariancePreserving,
    "trig": Trig,
}
