"""A small convolutional classifier of pictures: a judge, whose last features and classes compare sets of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class PictureClassifierConfig:
    """Architecture of a `PictureClassifier`.

    Args:
        channels: of a picture. classes: that it tells apart.
        widths: of the stages; each halves the sides of the one before.
        class_names: one a class, or empty.
    """

    channels: int = 1
    classes: int = 10
    widths: tuple[int, ...] = (32, 64, 96)
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.channels, self.classes, len(self.widths), *self.widths) < 1:
            raise ConfigError(
                f"{self}: channels, classes and widths should be at least 1, and one stage or more"
            )
        if self.class_names and len(self.class_names) != self.classes:
            raise ConfigError(f"{len(self.class_names)} class names for {self.classes} classes")


class PictureClassifier(nn.Module):
    """Stages of two 3 x 3 convolutions with batch norm, then the mean over the picture and one linear layer."""

    Config = PictureClassifierConfig

    def __init__(self, config: PictureClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(
            nn.Sequential(*_convolution(width, out), *_convolution(out, out))
            for width, out in pairwise((config.channels, *config.widths))
        )
        self.head = nn.Linear(config.widths[-1], config.classes)

    def features(self, x: Tensor) -> Tensor:
        """Means over the picture of the last stage, [B, D], of pictures [B, C, H, W] in [-1, 1].

        Raises:
            ShapeError: other channels, or sides that cannot be halved between the stages.
        """
        smallest = 2 ** (len(self.stages) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.channels or min(x.shape[2:]) < smallest:
            raise ShapeError(
                f"PictureClassifier: input {list(x.shape)} should be [B, {self.config.channels}, H, W], "
                f"H and W {smallest} or more"
            )
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]. Raises as `features` does."""
        return self.head(self.features(x))


def _convolution(width: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
