"""Physical fields and series as numbers of mean 0 and deviation 1, and back to their units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from ditkit.core.codec import Codec, per_channel
from ditkit.core.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class StandardisedConfig:
    """Names and units of the variables, one a channel, and the step of time between two values.

    A unit or step is "" where the data did not say, or a codec of an earlier version did not remember.
    """

    variables: tuple[str, ...]
    units: tuple[str, ...]
    step: str = ""

    def __post_init__(self) -> None:
        if not self.variables or len(self.variables) != len(self.units):
            raise ConfigError(f"Standardised: {len(self.variables)} variables with {len(self.units)} units")


@final
class Standardised(Codec):
    """z = (x - mean) / std of each variable; the statistics are saved with it, to serve on other data too.

    They are float64, and so is what is computed with them: values may lie far from 0.
    """

    Config = StandardisedConfig
    config: StandardisedConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: StandardisedConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(len(config.variables), dtype=torch.float64))
        self.register_buffer("std", torch.ones(len(config.variables), dtype=torch.float64))

    @classmethod
    def of(
        cls, variables: Sequence[str], units: Sequence[str], mean: Tensor, std: Tensor, step: str = ""
    ) -> Self:
        """With these statistics, [C] each in the variables' units.

        Raises:
            ConfigError: a deviation is not positive.
        """
        if not (std > 0).all():
            raise ConfigError(f"Standardised: deviations {std.tolist()} should be positive")
        codec = cls(StandardisedConfig(tuple(variables), tuple(units), step))
        codec.mean.copy_(mean)
        codec.std.copy_(std)
        return codec

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        self.latent_shape(tuple(x.shape[1:]))
        mean, std = self._beside(x)
        return ((x.to(mean) - mean) / std).to(x.device, torch.float32)

    def decode(self, z: Tensor) -> Tensor:
        self.signal_shape(tuple(z.shape[1:]))
        mean, std = self._beside(z)
        return (z.to(mean) * std + mean).to(z)

    def _beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the statistics in float64 to be broadcast over x; on the CPU where x lies on MPS, which has none."""
        self.to("cpu" if x.device.type == "mps" else x.device)
        return per_channel(self.mean, x), per_channel(self.std, x)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or shape[0] != len(self.config.variables):
            raise ShapeError(
                f"Standardised: a field of shape {list(shape)} should have the channels {self.config.variables}"
            )
        return tuple(shape)

    def signal_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.latent_shape(shape)
