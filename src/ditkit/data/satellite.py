"""Series of satellite images: their dates, what hides them, a second sensor, and the weather that is simulated.

T dates, C bands, R bands of the second sensor, H rows and W columns of pixels. Images are reflectances, 0 to 1, as
[-1, 1]; radar is in the unit of its files, usually decibels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ditkit.core.config import Checked, Fraction
from ditkit.core.errors import ConfigError, DataError

Dates = NDArray[np.datetime64]
CLOUD_WHITE = 0.8
"""The radiance of a simulated cloud, in [-1, 1]."""
SHADE = 0.45
"""The share of the light that a simulated cloud's shadow leaves."""
OCTAVES = (2, 4, 8)
"""Cells of the noise that clouds are made of, along a side."""


class Scenes(NamedTuple):
    """n windows of T dates, cut out of series.

    Args:
        image: [n, C, T, H, W] in [-1, 1], as it would be without clouds; arbitrary where it is not `known`.
        known: [n, 1, T, H, W] bool, where the truth is known.
        hidden: [n, 1, T, H, W] bool, by clouds, shadows or missing data.
        observed: [n, C, T, H, W] as the sensor has it, clouds and shadows included.
        days: [n, T] since each window's first date. day_of_year: [n, T], from 1 on.
        place: [n, 2] longitude and latitude in degrees; NaN where files say none.
        present: [n, T] bool, false at dates that fill a short series up.
        dates: [n, T] days.
        radar: [n, R, T, H, W], NaN where it has no value; or None.
        labels: int64 [n, T, H, W], the class of each pixel, -1 where it is unknown; or None.
    """

    image: Tensor
    known: Tensor
    hidden: Tensor
    observed: Tensor
    days: Tensor
    day_of_year: Tensor
    place: Tensor
    present: Tensor
    dates: Dates
    radar: Tensor | None = None
    labels: Tensor | None = None


class SatelliteSet(ABC):
    """Windows of satellite series of one length and size, drawn by index; the same index gives the same window."""

    name: str
    bands: tuple[str, ...]
    frames: int
    size: tuple[int, int]
    radar_bands: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    has_split: bool = True
    """Whether its training and its test split share no pixel."""
    simulated: ClassVar[str] = ""
    """The parts of the data that are simulated, for a person; empty if all was measured."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def scenes(self, indices: Tensor, skies: Iterable[torch.Generator] | None = None) -> Scenes:
        """Return the chosen windows.

        Args:
            skies: the generator of each window's simulated clouds, which otherwise belong to its index.
        """

    @abstractmethod
    def id(self, index: int) -> str:
        """Name the window, uniquely within the set."""

    def radar_scaling(self, most: int = 64) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation of each radar band, over windows from all over the set; empty without radar.

        Raises:
            DataError: a band has no values.
        """
        if not self.radar_bands:
            return (), ()
        count = min(most, len(self))
        radar = self.scenes(torch.arange(count) * len(self) // count).radar
        assert radar is not None
        measured = [band[~band.isnan()] for band in radar.double().unbind(1)]
        if any(len(band) < 2 for band in measured):
            raise DataError(f"{self.name}: a radar band has no values in the windows that are looked at")
        return tuple(b.mean().item() for b in measured), tuple(max(b.std().item(), 1e-6) for b in measured)


@dataclass(frozen=True)
class Weather(Checked):
    """Clouds and their shadows, simulated: smooth noise above a threshold, so that each date is covered by its share.

    Args:
        least, most: share of a date that clouds cover, drawn evenly between them.
        shadows: each cloud's shadow falls beside it.
    """

    least: Fraction = 0.5
    most: Fraction = 0.85
    shadows: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.most:
            raise ConfigError(f"Weather: least={self.least} is above most={self.most}")

    def draw(self, frames: int, size: tuple[int, int], generator: torch.Generator) -> Sky:
        """Draw the sky over `frames` dates of `size` pixels."""
        height, width = size
        noise = torch.zeros(frames, 1, height, width)
        for i, cells in enumerate(OCTAVES):
            coarse = torch.randn(frames, 1, cells + 2, cells + 2, generator=generator)
            noise += F.interpolate(coarse, size, mode="bicubic", align_corners=False) / 2**i
        cover = self.least + (self.most - self.least) * torch.rand(frames, generator=generator)
        reach = torch.randint(1, 4, (2,), generator=generator).tolist()
        covered = (cover * height * width).round().long().tolist()
        cloud, shadow = torch.zeros(frames, height, width), torch.zeros(frames, height, width)
        for t, count in enumerate(covered):
            order = noise[t, 0].flatten().argsort(descending=True)
            opacity = torch.zeros(height * width)
            depth = torch.arange(count) / max(count, 1)  # 0 at the thickest, 1 at the edge
            opacity[order[:count]] = (1.6 * (1 - depth)).clamp(0.15, 1)
            cloud[t] = opacity.view(height, width)
            if self.shadows:
                shadow[t] = torch.roll(cloud[t], reach, (0, 1))
        return Sky(cloud, shadow.where(cloud == 0, torch.zeros(())))


class Sky(NamedTuple):
    """Opacity of clouds, and of those whose shadow falls on a pixel, [T, H, W] from 0 to 1."""

    cloud: Tensor
    shadow: Tensor

    @property
    def hidden(self) -> Tensor:
        """The pixels with anything between the sensor and the ground, or the ground and the sun: [T, H, W] bool."""
        return (self.cloud > 0) | (self.shadow > 0)

    def over(self, image: Tensor) -> Tensor:
        """Return images [C, T, H, W] in [-1, 1] as a sensor sees them under this sky."""
        lit = (image + 1) * (1 - (1 - SHADE) * self.shadow) - 1
        return torch.lerp(lit, torch.full_like(image, CLOUD_WHITE), self.cloud.expand_as(image))


def calendar_of(dates: Dates) -> tuple[Tensor, Tensor]:
    """Return days since each window's first date, and days of the year from 1 on, both float32 as `dates` [n, T]."""
    days = dates.astype("M8[D]")
    since = (days - days.min(-1, keepdims=True)).astype(np.int64)
    of_year = (days - days.astype("M8[Y]").astype("M8[D]")).astype(np.int64) + 1
    return torch.from_numpy(since).float(), torch.from_numpy(of_year).float()
