"""The four jobs of UniTS: for each, the conditions that the network is given of a window, and what it is to make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.data.satellite import SatelliteSet, Scenes
from ditkit.models.units import UniTSConfig, last_clear


def past_of(frames: int) -> int:
    """Count the dates that a forecast is given, of a window: the first half."""
    return frames // 2


def hidden_of(config: UniTSConfig, scenes: Scenes) -> Tensor:
    """Return all that is not given of the optical images, [n, 1, T, H, W] bool.

    Of cloud removal it is what the clouds touch, which the network is not told.
    """
    if config.job == "forecasting":
        future = torch.arange(config.frames) >= past_of(config.frames)
        return ~scenes.known | future.view(1, 1, -1, 1, 1)
    if config.job == "change-detection":
        return ~scenes.known
    return scenes.hidden


def given(config: UniTSConfig, scenes: Scenes) -> Cond:
    """Return the conditions of a network of `config` for these windows.

    Reconstruction has images with holes, cloud removal has them with the clouds' own light, and no mask but of missing
    data; change detection has clear images, and a forecast has the first half of the dates, and never the second
    sensor, which would show the dates to come. Where that sensor has no value it is given its mean in training.
    """
    removal = config.job == "cloud-removal"
    missing = ~scenes.present[:, None, :, None, None].expand_as(scenes.known)
    hidden = (~scenes.known if removal else hidden_of(config, scenes)) | missing
    streams = {
        "optical": torch.where(hidden, 0.0, scenes.observed if removal else scenes.image),
        "clouds": hidden.float(),
        "days": scenes.days,
    }
    if not scenes.present.all():
        streams["present"] = scenes.present.float()
    if config.radar_channels and scenes.radar is not None and config.job != "forecasting":
        mean = scenes.radar.new_tensor(config.radar_mean or (0.0,)).view(-1, 1, 1, 1)
        streams["radar"] = torch.where(scenes.radar.isnan(), mean, scenes.radar)
    if config.dates:
        streams["day_of_year"] = scenes.day_of_year
    if config.places:
        if not scenes.place.isfinite().all():
            raise ConfigError(
                "the images have no reference system, so no longitude and latitude; expected some, or places=False"
            )
        streams["place"] = scenes.place
    return Cond(streams=streams)


def target(config: UniTSConfig, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Return what is to be made, [n, C, T, H, W] in [-1, 1], and where it is learned from, [n, 1, T, H, W].

    A forecast's past is learned, too, since it is made of noise with the rest. Where a value is not known, it is the
    last one that is: what is mixed with noise there then looks as it does in a series that is being made. A class is 1
    in its channel, and -1 in the others.
    """
    present = scenes.present[:, None, :, None, None]
    if config.job == "change-detection":
        assert scenes.labels is not None
        one_hot = F.one_hot(scenes.labels.clamp_min(0), config.channels).permute(0, 4, 1, 2, 3)
        target, known = one_hot.float() * 2 - 1, (scenes.labels >= 0)[:, None]
    else:
        target, known = scenes.image, scenes.known
    return torch.where(known, target, last_clear(target, ~known)), known & present


def check_data(config: UniTSConfig, data: SatelliteSet) -> None:
    """Refuse data that a trained network was not made for.

    Raises:
        ConfigError: other bands, no second sensor, or classes where those are to be judged.
    """
    if len(data.bands) != config.optical_channels:
        raise ConfigError(
            f"{data.name} has {len(data.bands)} bands ({', '.join(data.bands)}), the network takes "
            f"{config.optical_channels}{': ' + ', '.join(config.bands) if config.bands else ''}"
        )
    if config.radar_channels and data.radar_bands and len(data.radar_bands) != config.radar_channels:
        raise ConfigError(
            f"{data.name} has {len(data.radar_bands)} radar bands, the network takes {config.radar_channels}"
        )
    if config.job == "change-detection" and len(data.classes) != config.channels:
        raise ConfigError(f"{data.name} has {len(data.classes)} classes, the network makes {config.channels}")
