"""Recipes of satellite series: clouds filled or removed, later dates, maps of land cover; one class of network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.data.loading import accepts_option, load_satellite
from ditkit.data.satellite import SatelliteSet
from ditkit.models.units import UniTSConfig
from ditkit.tasks.denoiser import DenoiserRecipe
from ditkit.tasks.remote_sensing.figures import write_sheet
from ditkit.tasks.remote_sensing.jobs import check_data, given, target
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.randomness import SampleRNG


@dataclass(frozen=True, kw_only=True)
class SatelliteRecipe(DenoiserRecipe):
    """A network of satellite series, for the job that its config names.

    Args:
        data: a named set, or a folder of dated GeoTIFFs.
        model: its channels, its radar's mean and deviation, and its classes are taken from the data.
    """

    sources: ClassVar[str] = "A named set of satellite series (landsat), or a folder of dated GeoTIFFs."
    task: ClassVar[str] = "remote_sensing"
    then: ClassVar[str] = "ditkit evaluate"
    then_data: ClassVar[bool] = True
    latent: ClassVar[bool] = False
    model: UniTSConfig

    def read(self) -> SatelliteSet:
        options = dict(self.loading)
        if accepts_option(self.data, "split"):
            options.setdefault("split", "train")
        return load_satellite(self.data, self.model.shape[1:], frames=self.model.frames, **options)

    def signal_shape(self, data: SatelliteSet) -> tuple[int, ...]:
        change = self.model.job == "change-detection"
        return (len(data.classes) if change else len(data.bands), data.frames, *data.size)

    def decided(self, data: SatelliteSet) -> Mapping[str, Any]:
        if self.model.job == "change-detection" and len(data.classes) < 2:
            raise ConfigError(
                f"{self.data}: {len(data.classes)} classes of land cover, expected two or more: maps in classes/"
            )
        mean, std = data.radar_scaling() if self.model.radar_channels else ((), ())
        return {
            "optical_channels": len(data.bands),
            "radar_channels": len(data.radar_bands) if self.model.radar_channels else 0,
            "radar_mean": mean,
            "radar_std": std,
            "bands": data.bands,
            "land_cover": data.classes if self.model.job == "change-detection" else (),
        }

    def dataset(self, data: SatelliteSet) -> TrainingSet:
        check_data(self.model, data)
        return SatelliteDataset(data, self.model)

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, SatelliteDataset)
        data = samples.data
        radar = f" and {len(data.radar_bands)} of radar" if data.radar_bands else ""
        about = f"; simulated: {data.simulated}" if data.simulated else ""
        height, width = data.size
        windows = f"{len(data)} windows of {data.frames} dates, {height} x {width} pixels"
        return f"{windows}, {len(data.bands)} bands{radar}{about}"

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, SatelliteDataset)
        return partial(write_sheet, folder, samples.data)


class SatelliteDataset:
    """Windows as training samples: what is made of them and what is told, under other clouds at every visit.

    Pixels that are not known are not learned from.
    """

    def __init__(self, data: SatelliteSet, config: UniTSConfig) -> None:
        self.data, self.config = data, config

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        scenes = self.data.scenes(indices, rng.of_data())
        signal, counted = target(self.config, scenes)
        cond = given(self.config, scenes)
        return signal, cond if counted.all() else replace(cond, mask=counted.to(torch.float32))
