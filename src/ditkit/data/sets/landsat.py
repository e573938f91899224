"""Series of one real Landsat-7 scene, which Debian's `r-cran-stars` ships: Olinda and Recife, six bands of 28.5 m.

The scene is real, and one date. SIMULATED from it are the other dates (a season for each parcel of vegetation, the
height of the sun, noise), clouds and their shadows, the speckled second sensor, and the classes of land cover.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError, unknown
from ditkit.data.clips import frame_size
from ditkit.data.pinned import find, read_pinned
from ditkit.data.rasters import Raster, read_raster
from ditkit.data.satellite import SatelliteSet, Scenes, Weather, calendar_of

DEBIAN_FILE = Path("/usr/lib/R/site-library/stars/tif/L7_ETMs.tif")
SHA256 = "3b722bf4470144b6691bf720bac08f47c99464acff4dd258252891c06312678e"
INSTALL = (
    "`apt-get install --no-install-recommends r-cran-stars`, or without R "
    "`apt-get download r-cran-stars && dpkg -x r-cran-stars_*.deb stars`"
)
BANDS = ("blue", "green", "red", "near infrared", "short-wave infrared 1", "short-wave infrared 2")
RADAR_BANDS = ("VV, dB", "VH, dB")
CLASSES = ("water", "built or bare", "dormant vegetation", "green vegetation")
SPLITS: Mapping[str, tuple[float, float]] = {"train": (0.25, 1.0), "test": (0.0, 0.25)}
"""Shares of the scene's rows, from the north, to the nearest parcel; no pixel is in both."""
SIZE, FRAMES, LENGTH = 64, 8, 10_000
YEAR = np.datetime64("2001-01-01", "D")
REVISIT_DAYS = 8  # of two satellites of 16 days each
PARCEL_PX = 12
# The simulation: change of reflectance from bare to full green, in the order of BANDS
GREENING = (-0.02, 0.01, -0.08, 0.22, -0.10, -0.12)
SUN, GAIN, OFFSET = 0.06, 0.01, 0.004
LOOKS = 4  # of the radar's speckle


class Ground(NamedTuple):
    """The facts that the real scene gives of each pixel, [H, W] each but for `reflectance` [6, H, W].

    Args:
        green: share of vegetation, 0 to 1. water: bool.
        place: longitude and latitude of the four corners, [2, 2, 2]: first north and south, then west and east.
    """

    reflectance: Tensor
    green: Tensor
    water: Tensor
    place: Tensor


def load(
    size: int | tuple[int, int] | None = None,
    frames: int = FRAMES,
    split: str = "train",
    length: int = LENGTH,
    seed: int = 0,
    least_cloud: float = 0.5,
    most_cloud: float = 0.85,
    speckle: bool = True,
) -> LandsatSeries:
    """Load `length` windows of `frames` dates of `size` pixels (64 unless given), real in space, simulated in time.

    Args:
        split: "train" are the southern three quarters of the scene, "test" is the rest.
        least_cloud, most_cloud: share of each date that simulated clouds cover.
        speckle: of the simulated radar.

    Raises:
        DataError: the file is not found, or is not the pinned one.
        ConfigError: an unknown split, a number out of range, or the package rasterio is not installed.
    """
    own = frame_size(SIZE if size is None else size)
    integer("frames", frames, least=2)
    integer("length", length, least=1)
    integer("seed", seed, least=0)
    if split not in SPLITS:
        raise ConfigError(unknown("split of landsat", split, SPLITS))
    weather = Weather(least_cloud, most_cloud)
    ground = ground_of(read_scene())
    low, high = SPLITS[split]
    rows = ground.green.shape[0]
    first, last = (row_of(share, rows) for share in (low, high))
    if own[0] > last - first or own[1] > ground.green.shape[1]:
        raise ConfigError(
            f"landsat: size={own[0]} x {own[1]} does not fit into the {last - first} x {ground.green.shape[1]} pixels "
            f"of split={split}"
        )
    return LandsatSeries(ground, (first, last), frames, own, split, length, seed, weather, speckle)


def row_of(share: float, rows: int) -> int:
    """Return the row at a share of the scene, between two parcels, so that splits share no season either."""
    return rows if share == 1 else PARCEL_PX * round(share * rows / PARCEL_PX)


@lru_cache(maxsize=1)
def read_scene() -> Raster:
    """Read the scene from Debian's place for it or from a folder of `pinned.roots()`.

    Raises:
        DataError: it is not found, which says what to install, or has another checksum.
    """
    names = [DEBIAN_FILE.name, f"stars{DEBIAN_FILE}"]
    path = DEBIAN_FILE if DEBIAN_FILE.exists() else find(names)
    if path is None:
        raise DataError(
            f"the landsat set is not on this machine: run {INSTALL} (Debian), or put {DEBIAN_FILE.name} in the "
            "current folder, in ~/.cache/ditkit, or in a folder named by the environment variable DITKIT_DATA"
        )
    return read_raster(path, read_pinned(path, SHA256))


def ground_of(scene: Raster) -> Ground:
    """Derive vegetation and water from the bands of a scene: NDVI, and darkness in the short-wave infrared."""
    reflectance = torch.from_numpy(scene.values.astype(np.float32)) / 255
    red, near, short = reflectance[2], reflectance[3], reflectance[4]
    ndvi = (near - red) / (near + red).clamp_min(1e-3)
    water = short < 0.1
    green = ((ndvi + 0.1) / 0.6).clamp(0, 1).masked_fill(water, 0)
    return Ground(reflectance, green, water, torch.from_numpy(scene.corners()).float())


class LandsatSeries(SatelliteSet):
    """A `SatelliteSet` that is simulated on demand from one scene; nothing is stored."""

    name = "landsat"
    bands, radar_bands, classes = BANDS, RADAR_BANDS, CLASSES
    simulated: ClassVar[str] = "all dates but one, clouds, shadows, radar and classes"

    def __init__(
        self,
        ground: Ground,
        rows: tuple[int, int],
        frames: int,
        size: tuple[int, int],
        split: str,
        length: int,
        seed: int,
        weather: Weather,
        speckle: bool = True,
    ) -> None:
        self.ground, self.rows, self.frames, self.size = ground, rows, frames, size
        self.split, self.length, self.seed, self.weather, self.speckle = split, length, seed, weather, speckle

    def __len__(self) -> int:
        return self.length

    def id(self, index: int) -> str:
        """Split, seed and number: `train-0-000042`."""
        return f"{self.split}-{self.seed}-{index:06d}"

    def scenes(self, indices: Tensor, skies: Iterable[torch.Generator] | None = None) -> Scenes:
        drawn = [None] * len(indices) if skies is None else skies
        parts = [self._one(self._checked(i), sky) for i, sky in zip(indices.tolist(), drawn, strict=True)]
        joined = {
            name: torch.stack([getattr(part, name) for part in parts])
            for name in Scenes._fields
            if name != "dates"
        }
        return Scenes(dates=np.stack([part.dates for part in parts]), **joined)

    def corner(self, index: int) -> tuple[int, int]:
        """Return the first row and column of window `index` in the scene."""
        return self._corner(self._draw(self._checked(index)))

    def _checked(self, index: int) -> int:
        return integer("window", index, least=0, most=self.length - 1)

    def _draw(self, index: int) -> torch.Generator:
        seed = np.random.SeedSequence((self.seed, sorted(SPLITS).index(self.split), index))
        return torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def _corner(self, draw: torch.Generator) -> tuple[int, int]:
        (height, width), (first, last) = self.size, self.rows
        top = first + int(torch.randint(last - first - height + 1, (), generator=draw))
        return top, int(torch.randint(self.ground.green.shape[1] - width + 1, (), generator=draw))

    def _one(self, index: int, sky_draw: torch.Generator | None = None) -> Scenes:
        """Simulate window `index`, without the axis n."""
        (height, width), draw = self.size, self._draw(index)
        top, left = self._corner(draw)
        cut = slice(top, top + height), slice(left, left + width)
        gaps = REVISIT_DAYS * torch.randint(1, 5, (self.frames,), generator=draw).numpy()
        start = int(torch.randint(365, (), generator=draw))
        dates = YEAR + (start + gaps.cumsum() - gaps[0]).astype("m8[D]")
        days, day_of_year = calendar_of(dates)
        season = self._season(day_of_year, (top, left), draw)
        image = self._image(cut, season, day_of_year, draw)
        sky = self.weather.draw(self.frames, self.size, draw if sky_draw is None else sky_draw)
        green, water = self.ground.green[cut], self.ground.water[cut]
        labels = torch.where(green > 0.4, 2 + (season > 0.5).long(), torch.where(water, 0, 1))
        return Scenes(
            image=image,
            known=torch.ones_like(image[:1], dtype=torch.bool),
            hidden=sky.hidden[None],
            observed=sky.over(image),
            days=days,
            day_of_year=day_of_year,
            place=self._place(top + height / 2, left + width / 2),
            present=torch.ones(self.frames, dtype=torch.bool),
            dates=dates,
            radar=self._radar(cut, season, draw),
            labels=labels,
        )

    def _season(self, day_of_year: Tensor, corner: tuple[int, int], draw: torch.Generator) -> Tensor:
        """Simulate the greenness [T, H, W] of each parcel: it rises within weeks, and falls within days at harvest.

        Parcels lie on the scene, and so do their calendars: windows that share a parcel share its season.
        """
        height, width = self.size
        rows = (corner[0] + torch.arange(height)) // PARCEL_PX
        columns = (corner[1] + torch.arange(width)) // PARCEL_PX
        parcel = rows[:, None] * 1000 + columns
        start = 60 + 120 * _hashed(parcel, 1)  # days of the year
        duration = 70 + 90 * _hashed(parcel, 2)
        top = 0.6 + 0.4 * _hashed(parcel, 3)
        day = day_of_year[:, None, None]
        rise = torch.sigmoid((day - start) / 12)
        return top * rise * torch.sigmoid((start + duration - day) / 3)

    def _image(
        self, cut: tuple[slice, slice], season: Tensor, day_of_year: Tensor, draw: torch.Generator
    ) -> Tensor:
        """Return the scene at each date, [6, T, H, W] in [-1, 1]."""
        base = self.ground.reflectance[:, *cut][:, None]
        change = torch.tensor(GREENING)[:, None, None, None] * self.ground.green[cut] * (season - 0.5)
        sun = 1 + SUN * torch.cos(2 * np.pi * (day_of_year - 355) / 365.25)  # of the southern hemisphere
        gain = sun * (1 + GAIN * torch.randn(self.frames, generator=draw))
        offset = OFFSET * torch.randn(6, self.frames, 1, 1, generator=draw)
        reflectance = (base + change) * gain[:, None, None] + offset
        return reflectance.clamp(0, 1) * 2 - 1

    def _radar(self, cut: tuple[slice, slice], season: Tensor, draw: torch.Generator) -> Tensor:
        """Simulate VV and VH [2, T, H, W] in dB: rough in towns, of volume in leaves, dark on water, and speckled."""
        green, water = self.ground.green[cut], self.ground.water[cut]
        leaves, short = green * season, self.ground.reflectance[4][cut]
        vv = -13 + 8 * (1 - green) * (short - 0.3) + 3 * leaves
        vh = -21 + 5 * (1 - green) * (short - 0.3) + 8 * leaves
        decibels = torch.stack([vv.masked_fill(water, -22.0), vh.masked_fill(water, -29.0)])
        if not self.speckle:
            return decibels
        looks = torch.rand(LOOKS, *decibels.shape, generator=draw).clamp_min(1e-6).log().neg()
        return decibels + 10 * looks.mean(0).log10()  # the mean of exponentials is a gamma of LOOKS looks

    def _place(self, row: float, column: float) -> Tensor:
        """Return longitude and latitude of a pixel, linear between the scene's corners."""
        down, right = row / self.ground.green.shape[0], column / self.ground.green.shape[1]
        west_east = torch.lerp(self.ground.place[0], self.ground.place[1], down)
        return torch.lerp(west_east[0], west_east[1], right)


def _hashed(parcel: Tensor, use: int) -> Tensor:
    """Return a number in [0, 1) for each parcel and use."""
    mixed = (parcel * 7919 + use * 104_729) * 2_654_435_761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2_246_822_519 % 2**32
    return ((mixed ^ (mixed >> 13)) % 2**24).float() / 2**24
