"""A scene without a download, folders of GeoTIFFs, and small networks that are awake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.data.rasters import Raster
from ditkit.data.sets import landsat
from ditkit.models.units import UniTS, UniTSConfig
from models_support import perturbed

SIDE = 96
TINY = UniTSConfig(
    channels=3,
    optical_channels=3,
    radar_channels=2,
    frames=4,
    size=(8, 12),
    width=32,
    depth=2,
    heads=4,
    groups=8,
)


def units(**changes: Any) -> UniTS:
    """A small network with no weight at zero."""
    from dataclasses import replace

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return perturbed(UniTS(replace(TINY, **changes)), 0.1).requires_grad_(False)


def told(config: UniTSConfig, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Every stream that a network takes; a third of the pixels is hidden, and dates are uneven."""
    draw = torch.Generator().manual_seed(seed)
    streams = {
        name: torch.rand(count, *condition.shape, generator=draw) * 2 - 1
        for name, condition in config.conditions.items()
    }
    streams["clouds"] = (torch.rand(streams["clouds"].shape, generator=draw) < 1 / 3).float()
    gaps = torch.randint(3, 20, (count, config.frames), generator=draw)
    streams["days"] = gaps.cumsum(1).float()
    streams["present"] = torch.ones(count, config.frames)
    if config.dates:
        streams["day_of_year"] = (streams["days"] + 40) % 365 + 1
    if config.places:
        streams["place"] = torch.tensor([[11.5, 48.1], [-34.9, -8.0], [0.0, 51.5]])[:count]
    return streams


def cond_of(streams: dict[str, Tensor], **changes: Tensor | None) -> Cond:
    """The conditioning with some streams replaced, or left out where None."""
    return Cond(streams={k: v for k, v in {**streams, **changes}.items() if v is not None})


def scene() -> Raster:
    """A scene of six bands in the way of the real one: water, fields and bare ground in smooth patches."""
    draw = np.random.default_rng(0)
    coarse = draw.random((SIDE // 8, SIDE // 8)).repeat(8, 0).repeat(8, 1)
    bands = np.stack(
        [
            60 + 40 * coarse,
            60 + 30 * coarse,
            40 + 60 * (1 - coarse),
            40 + 90 * coarse,
            90 - 40 * coarse,
            70 - 40 * coarse,
        ]
    )
    bands[4:, :, : SIDE // 8] = 5  # water
    values = (bands + draw.normal(0, 4, bands.shape)).clip(0, 255).astype(np.uint8)
    transform = (28.5, 0.0, 288_776.25, 0.0, -28.5, 9_120_760.75)
    return Raster(Path("scene.tif"), values, np.ones((SIDE, SIDE), bool), "EPSG:31985", transform, {})


def ground() -> landsat.Ground:
    """`landsat.ground_of` of that scene, without rasterio."""
    found = scene()
    return landsat.ground_of(found._replace(crs=""))._replace(
        place=torch.tensor([[[-34.9, -7.9], [-34.8, -7.9]], [[-34.9, -8.0], [-34.8, -8.0]]])
    )
