"""Representation autoencoders (RAE, arXiv 2510.11690): tokens of a frozen encoder as latents, decoded by a ViT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from ditkit.core.codec import RepresentingCodec, fingerprint, frame_by_frame
from ditkit.core.config import FROM_DATA, Count, Depth, ModelConfig
from ditkit.core.errors import CheckpointError, ConfigError, DataError, ShapeError
from ditkit.nn.encoders import PictureEncoder, check_grid, facts_of, of_rae, open_rae, picture_encoder
from ditkit.nn.vit_decoder import ViTDecoder, ViTDecoderConfig

EPS = 1e-5
"""Added to variances."""
DECODERS = {"B": (768, 3072, 12, 12), "L": (1024, 4096, 16, 24), "XL": (1152, 4096, 16, 28)}
"""Width, width of the MLPs, heads and blocks of the paper's decoders."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class RepresentationConfig(ModelConfig):
    """Architecture of a representation autoencoder. The defaults suit pictures of 32 pixels on a CPU.

    Args:
        size: height and width of a picture, or both.
        patch: pixels that one latent is decoded to, along a side.
        encoder: frozen, by name: efficientnet-lite0, vit:FOLDER, rae:SOURCE, or a vision model of transformers.
        width: of the decoder.
        hidden: width of its MLPs.
        heads: of its attention.
        depth: its blocks.
        noise: tau, the most that latents are disturbed by when the decoder is trained.
        law: of the disturbance's size: uniform in [0, tau] (the published code), or |N(0, tau^2)| (the paper).
        channels: of a picture.
        latent_channels: values of a token.
        digest: of the encoder's weights.
        mean: of the encoder's pixels in [0, 1], by channel.
        std: their deviation.
        step: distance of neighbouring positions in the decoder; 16 / side in diffusers' copy of it.
    """

    task: ClassVar[str] = "image-codec"

    size: Count | tuple[Count, Count] = 32
    patch: Count = 4
    encoder: str = "efficientnet-lite0"
    width: Count = 128
    hidden: Count = 512
    heads: Count = 4
    depth: Depth = 4
    noise: Annotated[float, Ge(0)] = 0.8
    law: Literal["uniform", "half-normal"] = "uniform"
    channels: Count = field(default=3, metadata=FROM_DATA)
    latent_channels: Count = field(default=112, metadata=FROM_DATA)
    digest: str = field(default="", metadata=FROM_DATA)
    mean: tuple[float, ...] = field(default=MEAN, metadata=FROM_DATA)
    std: tuple[float, ...] = field(default=STD, metadata=FROM_DATA)
    step: Annotated[float, Gt(0)] = field(default=1.0, metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % self.patch for side in self.sides):
            raise ShapeError(f"RepresentationCodec: size={self.size} does not divide by patch={self.patch}")
        self.decoder()

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, width=16, hidden=32, heads=2, depth=1)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        height, width = self.sides
        return height // self.patch, width // self.patch

    def decoder(self) -> ViTDecoderConfig:
        """Return the architecture of the decoder."""
        return ViTDecoderConfig(
            self.latent_channels,
            self.channels,
            self.grid,
            self.patch,
            self.width,
            self.hidden,
            self.heads,
            self.depth,
            self.step,
        )


class RepresentationCodec(RepresentingCodec):
    """Latents z = (tokens - mean) / sqrt(variance + 1e-5), by position and channel, of an encoder's last norm unscaled.

    The encoder is no part of the weights: it is opened by its name when something is encoded, and held to its digest.
    Decoding needs none. The statistics are 0 and 1 until `fit_statistics` measures them.
    """

    Config = RepresentationConfig
    task = "image-codec"
    config: RepresentationConfig
    mean: Tensor
    variance: Tensor
    _encoder: PictureEncoder | None

    def __init__(self, config: RepresentationConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = ViTDecoder(config.decoder())
        shape = (config.latent_channels, *config.grid)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self._hold(None)

    def _hold(self, encoder: PictureEncoder | None) -> None:
        """Keep an encoder beside the modules: it is neither trained nor saved."""
        object.__setattr__(self, "_encoder", encoder)

    @classmethod
    def preset(cls, name: str, encoder: str = "facebook/dinov2-with-registers-base", size: int = 256) -> Self:
        """Build with a decoder of the paper: B, L or XL, for latents of width 768 and patches of 16 pixels.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in DECODERS:
            raise ConfigError(f"RepresentationCodec: preset {name!r}, expected one of {', '.join(DECODERS)}")
        width, hidden, heads, depth = DECODERS[name]
        return cls(RepresentationConfig(size, 16, encoder, width, hidden, heads, depth, latent_channels=768))

    @classmethod
    def from_diffusers(cls, source: str | Path | nn.Module, **download: Any) -> Self:
        """Copy an AutoencoderRAE of diffusers in float32, with its encoder and its statistics.

        Args:
            source: a module, a folder, or an id of the hub. download: options of diffusers' `from_pretrained`.

        Raises:
            CheckpointError: there is none, or it is something else. ConfigError: diffusers is not installed.
        """
        network = source if isinstance(source, nn.Module) else open_rae(str(source), **download)
        config, state = _described(network, "" if isinstance(source, nn.Module) else str(source))
        codec = cls.holding(config, state, type(source).__name__ if isinstance(source, nn.Module) else source)
        codec._hold(of_rae(network))
        return codec

    def with_weights(self, state: Mapping[str, Tensor], source: object) -> Self:
        copy = super().with_weights(state, source)
        copy._hold(self._encoder)
        return copy

    def encoder(self, device: torch.device | str = "cpu") -> PictureEncoder:
        """Return the frozen encoder, opened at the first call.

        Raises:
            ConfigError, DataError, CheckpointError: its weights are not at hand, or are others than the codec's.
        """
        held = self._encoder
        if held is None:
            if not self.config.encoder:
                raise ConfigError("RepresentationCodec: its encoder has no name, so it can only decode")
            held = picture_encoder(self.config.encoder, affine=False)
            if self.config.digest not in ("", found := fingerprint(held.state_dict())):
                raise CheckpointError(
                    f"encoder {self.config.encoder!r} has other weights, {found[:12]}, than the codec was trained "
                    f"with, {self.config.digest[:12]}"
                )
            self._hold(held)
        return held.to(device)

    def forward(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return self._decoded(self.noised(self.tokens(x), noise, u))

    @property
    def last_weight(self) -> Tensor:
        """The weight of the decoder's last layer, by which an adversary is balanced."""
        return self.decoder.out.weight

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens of pictures [B, C, H, W] before normalisation, as a map [B, D, h, w].

        Raises:
            ShapeError: pictures of other channels or sides.
        """
        shape = self.latent_shape(tuple(x.shape[1:]))
        if x.is_meta:  # costs of the decoder are counted; the encoder is not trained
            return x.new_empty(len(x), *shape)
        found = self.encoder(x.device)(x, self.config.grid).tokens
        return found.mT.unflatten(2, self.config.grid)

    def noised(self, tokens: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Add noise of size sigma(u) to tokens that are not yet normalised; u [B] in [0, 1)."""
        size = u if self.config.law == "uniform" else math.sqrt(2) * torch.erfinv(u)
        return tokens + self.config.noise * size.view(-1, 1, 1, 1) * noise

    def normalised(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, D, h, w] to latents by the statistics of each position and channel."""
        return (tokens - self.mean) / (self.variance + EPS).sqrt()

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        self.to(x.device)
        return frame_by_frame(lambda pictures: self.normalised(self.tokens(pictures)), x)

    def decode(self, z: Tensor) -> Tensor:
        self.signal_shape(tuple(z.shape[1:]))
        self.to(z.device)
        return frame_by_frame(lambda maps: self._decoded(maps * (self.variance + EPS).sqrt() + self.mean), z)

    def _decoded(self, tokens: Tensor) -> Tensor:
        """Decode tokens that are not normalised to pictures in [-1, 1]."""
        pixels = self.decoder(tokens, self.gradient_checkpointing and self.training)
        mean, std = (_of_channels(values, pixels) for values in (self.config.mean, self.config.std))
        return 2 * (pixels * std + mean) - 1

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        time = _time(shape, (self.config.channels, *self.config.sides), "a picture")
        return (self.config.latent_channels, *time, *self.config.grid)

    def signal_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        time = _time(shape, (self.config.latent_channels, *self.config.grid), "latents")
        return (self.config.channels, *time, *self.config.sides)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and variance of each position and channel, in float64.

        Args:
            batches: pictures [B, C, H, W] of the training data.

        Raises:
            DataError: there are fewer than two pictures, or tokens are not finite; the statistics are unchanged.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in batches:
            tokens = self.tokens(x).cpu().double()
            count, total, squares = (
                count + len(x),
                total + tokens.sum(0),
                squares + tokens.square().sum(0),
            )
        if count < 2 or not squares.isfinite().all():
            raise DataError(
                f"RepresentationCodec: statistics of {count} pictures, expected two or more with finite tokens"
            )
        mean = total / count
        self.mean.copy_(mean)
        self.variance.copy_((squares / count - mean.square()).clamp_min(0))


def decided(config: RepresentationConfig, channels: int) -> RepresentationConfig:
    """Return the config with what the data and the encoder decide. Raises as `picture_encoder` does."""
    check_grid(config.encoder, facts_of(config.encoder), config.grid)
    encoder = picture_encoder(config.encoder, affine=False)
    return replace(
        config,
        channels=channels,
        latent_channels=encoder.facts.width,
        digest=fingerprint(encoder.state_dict()),
        mean=tuple(encoder.mean),
        std=tuple(encoder.std),
    )


DECODER_NAMES = {
    "decoder_embed.": "embed.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "out.",
    "decoder_layers.": "blocks.",
    "layernorm_before.": "norm_attn.",
    "layernorm_after.": "norm_mlp.",
    "attention.to_out.0.": "attn.out.",
    "attention.output.dense.": "attn.out.",
    "intermediate.dense.": "mlp.inner.",
    "output.dense.": "mlp.outer.",
}
"""Parts of the names in RAE's repository and in diffusers, and ours."""
PROJECTIONS = (
    ("attention.to_q.", "attention.to_k.", "attention.to_v."),
    tuple(f"attention.attention.{part}." for part in ("query", "key", "value")),
)


def decoder_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a decoder's state dict of RAE's repository or of diffusers; queries, keys and values become one layer."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "decoder_pos_embed":
            continue
        if name == "trainable_cls_token":
            found["token"] = value.reshape(-1)
            continue
        ours, tensor = name, value
        for parts in PROJECTIONS:
            if parts[0] in name:
                tensor = torch.cat([state[name.replace(parts[0], part)] for part in parts])
                ours = name.replace(parts[0], "attn.qkv.")
        if any(part in ours for parts in PROJECTIONS for part in parts[1:]):
            continue
        for theirs, instead in DECODER_NAMES.items():
            ours = ours.replace(theirs, instead)
        found[ours] = tensor
    return found


def _described(network: Any, source: str) -> tuple[RepresentationConfig, dict[str, Tensor]]:
    """Our config of an AutoencoderRAE, and its decoder and statistics."""
    if type(network).__name__ != "AutoencoderRAE":
        raise CheckpointError(
            f"RepresentationCodec: a {type(network).__name__} was given, expected an AutoencoderRAE"
        )
    given = network.config
    side = network.decoder_image_size // network.decoder_patch_size
    config = RepresentationConfig(
        size=network.decoder_image_size,
        patch=network.decoder_patch_size,
        encoder=f"rae:{source}" if source else "",
        width=given.decoder_hidden_size,
        hidden=given.decoder_intermediate_size,
        heads=given.decoder_num_attention_heads,
        depth=given.decoder_num_hidden_layers,
        noise=given.noise_tau,
        channels=given.num_channels,
        latent_channels=given.encoder_hidden_size,
        digest=fingerprint(of_rae(network).state_dict()),
        mean=tuple(network.encoder_mean.flatten().tolist()),
        std=tuple(network.encoder_std.flatten().tolist()),
        step=16 / side,
    )
    shape = (config.latent_channels, side, side)
    std = (network._latents_std.double() + EPS) / given.scaling_factor  # diffusers adds EPS to the deviation
    mean = network._latents_mean.float().reshape(-1, *network._latents_mean.shape[-2:])
    decoder = {
        f"decoder.{name}": value for name, value in decoder_weights(network.decoder.state_dict()).items()
    }
    return config, {
        **decoder,
        "mean": mean.broadcast_to(shape).clone(),
        "variance": (std.square() - EPS).float().reshape(-1, *std.shape[-2:]).broadcast_to(shape).clone(),
    }


def _of_channels(values: tuple[float, ...], x: Tensor) -> Tensor:
    """Return the encoder's values of three channels for pictures x; their mean where x has one."""
    own = x.new_tensor(values)
    return (own if len(own) == x.shape[1] else own.mean().expand(x.shape[1])).view(1, -1, 1, 1)


def _time(shape: tuple[int, ...], expected: tuple[int, int, int], what: str) -> tuple[int, ...]:
    """Frames of a clip's shape (C, T, H, W), none of a picture's (C, H, W), which should be `expected`."""
    bare = (shape[0], *shape[-2:]) if len(shape) in (3, 4) else ()
    if bare != expected or not all(shape):
        raise ShapeError(
            f"RepresentationCodec: {what} of shape {list(shape)} should be {list(expected)}, or of frames of that"
        )
    return tuple(shape[1:-2])
