"""The variational autoencoder of latent diffusion (arXiv 2112.10752): diffusers' AutoencoderKL as a codec."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Interval, Len
from torch import Tensor, nn

from ditkit.core.codec import VariationalCodec, frame_by_frame, per_channel
from ditkit.core.config import FROM_DATA, Count, ModelConfig
from ditkit.core.errors import CheckpointError, ConfigError, DataError, ShapeError

CONSTANT = 1e-6
"""Latents whose deviation is a smaller part of their size than this are constant, to float32."""
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True)
class ImageVaeConfig(ModelConfig):
    """Architecture of an AutoencoderKL. The defaults suit pictures of 32 to 128 pixels on a CPU.

    Args:
        size: height and width of a picture; any that divides by `factor` runs, too.
        channels: of a picture.
        latent_channels: of its latents.
        widths: channels of each level; between two levels the sides are halved.
        layers: residual blocks of a level (the decoder has one more).
        groups: of the normalisation; every width divides by it.
        attention: over all positions of the smallest level.
        quant_conv: a 1 x 1 convolution before the latents (Stable Diffusion 1 to XL; none since 3).
        post_quant_conv: a 1 x 1 convolution after the latents.
    """

    task: ClassVar[str] = "image-codec"

    size: Count = 32
    channels: Count = field(default=3, metadata=FROM_DATA)
    latent_channels: Count = 4
    widths: Annotated[tuple[Count, ...], Len(1, 8)] = (32, 64, 128)
    layers: Annotated[int, Interval(ge=1, le=100)] = 1
    groups: Count = 16
    attention: bool = True
    quant_conv: bool = False
    post_quant_conv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in self.widths:
            if width % self.groups:
                raise ConfigError(f"ImageVae: a width of {width} does not divide into groups={self.groups}")
        if self.size % self.factor:
            raise ShapeError(
                f"ImageVae: size={self.size} does not divide by {self.factor}, the side of a latent"
            )

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, latent_channels=2, widths=(8, 8), groups=4)

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.widths) - 1)


class ImageVae(VariationalCodec):
    """Latents z = (mean - shift) scale of an AutoencoderKL; clips are coded frame by frame.

    `shift` and `scale`, one a channel, are 0 and 1 until `fit_statistics` measures them.
    """

    Config = ImageVaeConfig
    task = "image-codec"
    config: ImageVaeConfig
    shift: Tensor
    scale: Tensor

    def __init__(self, config: ImageVaeConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.widths)
        self.network = autoencoder_class()(
            in_channels=config.channels,
            out_channels=config.channels,
            down_block_types=(DOWN,) * levels,
            up_block_types=(UP,) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.layers,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            sample_size=config.size,
            use_quant_conv=config.quant_conv,
            use_post_quant_conv=config.post_quant_conv,
            mid_block_add_attention=config.attention,
        )
        self.register_buffer("shift", torch.zeros(config.latent_channels))
        self.register_buffer("scale", torch.ones(config.latent_channels))

    @classmethod
    def from_diffusers(cls, source: str | Path | nn.Module, **download: Any) -> Self:
        """Copy an AutoencoderKL in float32, its scaling and shift taken as the statistics.

        Args:
            source: a module, a folder, or an id of the hub. download: options of diffusers' `from_pretrained`:
                subfolder="vae" for a pipeline, revision, token ...

        Raises:
            CheckpointError: there is none, or it has parts that our config cannot describe.
        """
        network = source if isinstance(source, nn.Module) else _pretrained(source, download)
        config, statistics = _described(network)
        state = {f"network.{name}": value for name, value in network.state_dict().items()}
        named = type(source).__name__ if isinstance(source, nn.Module) else source
        return cls.holding(config, state | statistics, named)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()
        mean, log_variance = self.posterior(x)
        return self._decoded(_sample(mean, log_variance, noise)), mean, log_variance

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_variance = self.posterior(x)
        raw = mean if noise is None else _sample(mean, log_variance, noise)
        return (raw - per_channel(self.shift, raw)) * per_channel(self.scale, raw)

    def decode(self, z: Tensor) -> Tensor:
        self.signal_shape(tuple(z.shape[1:]))
        self.to(z.device)
        return self._decoded(z / per_channel(self.scale, z) + per_channel(self.shift, z))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents before normalisation, which are independent Gaussians.

        Raises:
            ShapeError: other channels than the config's, or sides that do not divide by the factor.
        """
        self.latent_shape(tuple(x.shape[1:]))
        self.to(x.device)
        x = x.to(self.shift.dtype)
        moments = frame_by_frame(lambda frames: self.network.encode(frames).latent_dist.parameters, x)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)  # AutoencoderKL's bounds

    def _decoded(self, raw: Tensor) -> Tensor:
        return frame_by_frame(lambda frames: self.network.decode(frames).sample, raw)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        factor = self.config.factor
        *time, height, width = _taken(shape, self.config.channels, "a picture or clip")
        if height % factor or width % factor:
            raise ShapeError(
                f"ImageVae: sides {height} x {width} should divide by {factor}, the side of a latent"
            )
        return (self.config.latent_channels, *time, height // factor, width // factor)

    def signal_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        *time, height, width = _taken(shape, self.config.latent_channels, "latents")
        return (self.config.channels, *time, height * self.config.factor, width * self.config.factor)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Measure shift and scale, in float64, so that the means of the posteriors leave with mean 0 and deviation 1.

        Args:
            batches: pictures [B, C, H, W] or clips [B, C, T, H, W] of the training data.

        Raises:
            DataError: there are none, latents are not finite, or a channel never changes; shift and scale are
                unchanged.
        """
        sums = torch.zeros(3, self.config.latent_channels, dtype=torch.float64)
        for x in batches:
            raw = self.posterior(x)[0].transpose(0, 1).flatten(1).cpu().double()
            sums += torch.stack([torch.ones_like(raw), raw, raw.square()]).sum(-1)
        if not sums.any():
            raise DataError("ImageVae: no pictures to measure statistics on, expected at least one batch")
        _, mean, square = sums / sums[0]
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        for channel, value in enumerate((deviation / square.sqrt()).tolist()):
            if not CONSTANT < value <= 1:
                raise DataError(
                    f"ImageVae: latent channel {channel} should vary on the data and be finite; its mean is "
                    f"{mean[channel]:.4g}, its deviation {deviation[channel]:.4g}"
                )
        self.shift.copy_(mean)
        self.scale.copy_(1 / deviation)


def autoencoder_class() -> Any:
    """Import diffusers' AutoencoderKL.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        return importlib.import_module("diffusers").AutoencoderKL
    except ImportError as error:
        raise ConfigError("ImageVae needs diffusers; install it with: pip install 'ditkit[hosts]'") from error


def _sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    return mean + torch.exp(0.5 * log_variance) * noise


def _pretrained(source: str | Path, download: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = autoencoder_class().from_pretrained(source, **download)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"no AutoencoderKL at {source}: {first}") from error
    return network


def _described(network: nn.Module) -> tuple[ImageVaeConfig, dict[str, Tensor]]:
    """Our config of an AutoencoderKL, and its statistics: shift_factor or latents_mean, scaling_factor / latents_std.

    Raises:
        CheckpointError: it is something else, or has blocks or activations that the config cannot describe.
    """
    if not isinstance(network, autoencoder_class()):
        raise CheckpointError(f"ImageVae: a {type(network).__name__} was given, expected an AutoencoderKL")
    given = network.config
    for key, expected in (
        ("down_block_types", {DOWN}),
        ("up_block_types", {UP}),
        ("act_fn", {"silu"}),
        ("out_channels", {given.in_channels}),
    ):
        found = given[key] if isinstance(given[key], list | tuple) else (given[key],)
        if set(found) != expected:
            raise CheckpointError(
                f"ImageVae: {key}={given[key]} of the AutoencoderKL, expected {expected.pop()} only"
            )
    size = given.sample_size
    config = ImageVaeConfig(
        size=size if isinstance(size, int) else size[0],
        channels=given.in_channels,
        latent_channels=given.latent_channels,
        widths=tuple(given.block_out_channels),
        layers=given.layers_per_block,
        groups=given.norm_num_groups,
        attention=given.mid_block_add_attention,
        quant_conv=given.use_quant_conv,
        post_quant_conv=given.use_post_quant_conv,
    )
    none = torch.zeros(config.latent_channels)
    shift = none + torch.tensor(given.latents_mean or given.shift_factor or 0.0)
    scale = given.scaling_factor / (none + torch.tensor(given.latents_std or 1.0))
    return config, {"shift": shift, "scale": scale}


def _taken(shape: tuple[int, ...], channels: int, what: str) -> tuple[int, ...]:
    """`shape` without its channels, which should be `channels`: of a picture (C, H, W) or a clip (C, T, H, W)."""
    if len(shape) not in (3, 4) or shape[0] != channels or not all(shape):
        raise ShapeError(
            f"ImageVae: {what} of shape {list(shape)} should be [{channels}, H, W] or [{channels}, T, H, W]"
        )
    return shape[1:]
