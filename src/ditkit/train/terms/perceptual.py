"""Perceptual distance of a decoded picture to the given one, in the features of a frozen network.

B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ditkit.core.codec import Codec
from ditkit.core.config import check_fields
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.nn.efficientnet import load_efficientnet_lite0, normalised
from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import EncoderTeacher, Teacher

Network = Literal["lpips-vgg", "lpips-alex", "efficientnet-lite0"]
LITE, LPIPS = "efficientnet-lite0", "lpips-"
COMPARED = (0, 2, 4, 10, 15)
"""Blocks of EfficientNet-Lite0 that are compared: the last at each of its five resolutions, as LPIPS has of VGG."""
TINY = 1e-10
"""Added to the length of a position's channels."""


@dataclass(frozen=True)
class Perceptual(Term):
    """LPIPS (Zhang et al. 2018, eq. 1) of what a codec decodes, or the same sum over another network's features.

    Features are scaled to unit length over channels at each position; their squared difference, weighted by channel,
    is averaged over positions and summed over layers. LPIPS learned its weights of VGG's or AlexNet's channels; those
    of EfficientNet-Lite0 are all 1, which is no LPIPS and is at hand without a download. RAE, the VAE of latent
    diffusion and most codecs add LPIPS at weight 1 to the absolute error.

    Args:
        network: lpips-vgg and lpips-alex take torchvision's weights, which have to be at hand.
    """

    weight: Weight = 1.0
    network: Network = "lpips-vgg"
    teacher: Teacher | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_fields(self, type(self).__name__)
        opened = EncoderTeacher(partial(_opened, self.network), self.network)
        object.__setattr__(self, "teacher", opened)

    def check(self, model: Model) -> str:
        channels = getattr(model.config, "channels", 0)
        if not isinstance(model, Codec) or channels not in (1, 3):
            return f"a codec of pictures with 1 or 3 channels; got a {type(model).__name__} of {channels}"
        return "" if self.network == LITE else missing(self.network)

    def loss(self, batch: Batch) -> Tensor:
        assert batch.taught is not None
        distance: Callable[[Tensor, Tensor], Tensor] = batch.taught.out
        return distance(batch.prediction, batch.data)


class FeatureDistance(nn.Module):
    """Distance of pictures in EfficientNet-Lite0's features, with all weights 1, at 224 x 224 pixels."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.network = load_efficientnet_lite0(path)

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] to their distances [B]."""
        with torch.autocast(x.device.type, enabled=False):
            a, b = (self.network.maps(normalised(pictures), COMPARED) for pictures in (x, ref))
            parts = [(unit(p) - unit(q)).square().sum(1).mean((1, 2)) for p, q in zip(a, b, strict=True)]
        return torch.stack(parts).sum(0)


class Lpips(nn.Module):
    """LPIPS of torchmetrics, over VGG's or AlexNet's features with learned weights.

    Raises:
        ConfigError: torchvision or its weights are not at hand.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        if lacking := missing(network):
            raise ConfigError(f"Perceptual needs {lacking}")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.network = LearnedPerceptualImagePatchSimilarity(network.removeprefix(LPIPS)).net

    def forward(self, x: Tensor, ref: Tensor) -> Tensor:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] to their distances [B]."""
        with torch.autocast(x.device.type, enabled=False):
            pairs = (pictures.float().expand(-1, 3, -1, -1) for pictures in (x, ref))
            found: Tensor = self.network(*pairs)
        return found.flatten()


def unit(x: Tensor) -> Tensor:
    """Scale the channels of [B, C, h, w] to length 1 at each position."""
    return x / (x.norm(dim=1, keepdim=True) + TINY)


def missing(network: str) -> str:
    """Name what LPIPS needs and is not at hand; empty for nothing. Nothing is fetched."""
    instead = f"network={LITE} is at hand with `pip install 'ditkit[evaluate]'`"
    if find_spec("torchvision") is None:
        return f"torchvision for {network}: pip install torchvision; {instead}"
    from torchvision import models

    weights = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights"}[network.removeprefix(LPIPS)]
    url = getattr(models, weights).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    return "" if path.is_file() else f"{path}, the file of {url}, for {network}; {instead}"


def _opened(network: Network) -> nn.Module:
    return FeatureDistance() if network == LITE else Lpips(network)
