"""Codecs: from a signal to what a model works on, and back; pixels as they are, or the latents of a network."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.catalog import find
from ditkit.core.checkpoint import dump_state, fill, read_json, read_state, replacing, to_disk, write_json
from ditkit.core.cond import Cond
from ditkit.core.condition import Condition
from ditkit.core.config import config_of
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError, unknown

CODEC_WEIGHTS = "codec.safetensors"
CODEC_CONFIG = "config.json"
FINGERPRINT = "weights_sha256"
"""Key of config.json: of the tensors that it was saved with."""
DESCRIBED = ("codec", "config", "history", FINGERPRINT)
"""Keys of config.json."""
NO_CONDITIONS: Mapping[str, Condition] = {}
FRAMES_AT_ONCE = 32
"""Frames that a codec of pictures holds at once, so that a long clip takes the memory of a short one."""


SIDE = "side"
"""The stream of `Cond` that a codec's side value is given in."""


class Coded(NamedTuple):
    """A signal as a codec has it: its latents, and what else it is decoded from, such as a map of grains (D2iT)."""

    z: Tensor
    side: Tensor | None = None


class Codec(nn.Module, ABC):
    """Signals [B, C, H, W] or [B, C, T, H, W] in [-1, 1] to latents of mean 0 and deviation 1, and back.

    A subclass names its config's dataclass in `Config`; `__init__` takes one. It moves to where its input lies.
    """

    homes: ClassVar[tuple[str, ...]] = ("ditkit.core", "ditkit.codecs")
    Config: ClassVar[type]
    config: Any
    history: tuple[Any, ...] = ()
    """The steps that the weights went through since training; saved with them."""
    task: str = ""
    """Name of the task (`ditkit.core.task`) that the weights were trained for."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass of training, instead of keeping what is inside them."""

    @property
    def last_training(self) -> Mapping[str, Any] | None:
        """The last entry of `history` that names the data of a training; None if no entry does."""
        return last_training(self.history)

    @abstractmethod
    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of `x`: their mean, or with `noise`, standard normal of the latents' shape, a sample.

        A codec that leaves nothing to chance has no use for the noise.

        Raises:
            ShapeError: `x` is not what the codec takes.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to a signal.

        Raises:
            ShapeError: `z` is not what `encode` makes.
        """

    def side_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the side value of latents of `shape`, without the batch axis; None: there is none."""
        return None

    def code(self, x: Tensor, noise: Tensor | None = None) -> Coded:
        """`encode`, with the side value of a codec that has one."""
        return Coded(self.encode(x, noise))

    def decode_coded(self, coded: Coded) -> Tensor:
        """`decode`, by the side value of a codec that has one."""
        return self.decode(coded.z)

    def weave(self, noise: Tensor, side: Tensor) -> Tensor:
        """Return noise of the latents' shape as latents of this side value have it, at each draw; by default white."""
        return noise

    @abstractmethod
    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the latents of a signal of `shape`, both without the batch axis.

        Raises:
            ShapeError: a signal of this shape cannot be coded.
        """

    @abstractmethod
    def signal_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the signal of latents of `shape`, both without the batch axis.

        Raises:
            ShapeError: no signal has such latents.
        """

    def save(self, folder: str | Path) -> Path:
        """config.json and safetensors in `folder`, both on disk before either takes its place.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self.drafted(Path(folder)):
            pass
        return Path(folder)

    @contextmanager
    def drafted(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Both files beside their places, which they take when the block ends well; yields what config.json says."""
        state = self.state_dict()
        described: dict[str, Any] = {
            "codec": type(self).__name__,
            "config": dataclasses.asdict(self.config),
            "history": list(self.history),
            FINGERPRINT: fingerprint(state),
        }
        with replacing(folder / CODEC_CONFIG) as config, replacing(folder / CODEC_WEIGHTS) as weights:
            dump_state(
                weights, state, {"format": "pt"}
            )  # a file with neither tensors nor metadata cannot be read
            to_disk(weights)
            write_json(config, described)
            yield described

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load a codec saved by `save`, in float32 and eval mode.

        Raises:
            CheckpointError: the folder is incomplete, of another codec, damaged, or a config and weights that were
                not saved together (a config that does not say with which is taken as it is).
        """
        path, weights = Path(folder) / CODEC_CONFIG, Path(folder) / CODEC_WEIGHTS
        described = read_json(path)
        kind = _codec_class(described, path)
        if not issubclass(kind, cls):
            raise CheckpointError(f"{folder} holds a {kind.__name__}, expected a {cls.__name__}")
        state = read_state(weights)
        codec = kind.holding(config_of(kind.Config, described.get("config"), path), state, weights)
        if described.get(FINGERPRINT, saved := fingerprint(state)) != saved:
            raise CheckpointError(
                f"{weights} are other weights than {path} was saved with: a save was interrupted, or one was edited"
            )
        codec.history = tuple(described.get("history", ()))
        return codec

    @classmethod
    def holding(cls, config: Any, state: Mapping[str, Tensor], source: object) -> Self:
        """Build a codec in eval mode with copies of the tensors `state`, in float32.

        Raises:
            CheckpointError: the tensors are not those of `config`; `source` is what the message names.
        """
        try:
            with torch.device("meta"):
                codec = cls(config)
        except (RuntimeError, TypeError, OverflowError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{source}: the config's sizes make no tensor: {first}") from error
        fill(codec, state, source)
        return codec.eval()

    def with_weights(self, state: Mapping[str, Tensor], source: object) -> Self:
        """Return a copy in eval mode that holds `state` instead, with the same history."""
        copy = self.holding(self.config, state, source)
        copy.history = self.history
        return copy


class VariationalCodec(Codec):
    """A codec whose latents are Gaussians that training draws from (arXiv 1312.6114)."""

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Code `x` with `noise` and decode it, for training, which is before normalisation.

        The second and third tensor are the mean and log variance of its latents.
        """


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """Nothing to say."""


NOTHING = IdentityConfig()


@final
class Identity(Codec):
    """The signal itself, to the bit."""

    Config = IdentityConfig
    config: IdentityConfig

    def __init__(self, config: IdentityConfig = NOTHING) -> None:
        super().__init__()
        self.config = config

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)

    def signal_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)


IDENTITY = Identity()
"""The codec of a model that has no other."""


def frame_by_frame(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn` of pictures [N, C, H, W], on pictures or on the frames of clips [B, C, T, H, W]."""
    if x.ndim == 4:
        return fn(x)
    frames = x.transpose(1, 2).flatten(0, 1)
    out = torch.cat([fn(part) for part in frames.split(FRAMES_AT_ONCE)])
    return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2).contiguous()


def check_side(codec: Codec, cond: Cond, latent: tuple[int, ...]) -> Tensor | None:
    """Return the side value that latents of this shape are given with; None for a codec without one.

    Raises:
        ConfigError: it is missing. ShapeError: it is of another shape.
    """
    expected, given = codec.side_shape(latent), cond.streams.get(SIDE)
    if expected is None:
        return None
    name = type(codec).__name__
    if given is None:
        raise ConfigError(
            f"a {name} decodes by a side value, expected Cond.streams[{SIDE!r}] {['B', *expected]}; got none"
        )
    if tuple(given.shape[1:]) != tuple(expected):
        raise ShapeError(f"{name}: side {list(given.shape)} should be {['B', *expected]}")
    return given


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` [C] to be broadcast over x [B, C, ...]."""
    return values.view(-1, *(1,) * (x.ndim - 2))


def encode_given(codec: Codec, cond: Cond, conditions: Mapping[str, Condition] = NO_CONDITIONS) -> Cond:
    """`cond` on the codec's latents: given content coded, and a latent to be made where any of its pixels is.

    A codec looks beyond the pixels of one latent, so those that are to be made are blank when it does.

    Args:
        conditions: what the model can be given; streams that it declares as signals are coded too, whatever their
            length is.
    """
    if isinstance(codec, Identity):
        return cond
    signals = [name for name in cond.streams if name in conditions and conditions[name].coded]
    if signals:
        coded = {name: codec.encode(cond.streams[name]) for name in signals}
        cond = dataclasses.replace(cond, streams={**cond.streams, **coded})
    if cond.context is None:
        return cond
    if cond.mask is None:
        return dataclasses.replace(cond, context=codec.encode(cond.context))
    context = codec.encode(cond.context.masked_fill(cond.mask.bool(), 0))
    pools = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}
    mask = pools[context.ndim](cond.mask.float(), context.shape[2:])
    return dataclasses.replace(cond, context=context, mask=mask)


def last_training(history: Sequence[Any]) -> Mapping[str, Any] | None:
    """Return the last entry of a history that names the data of a training; None if no entry does."""
    runs = [run for run in history if isinstance(run, dict) and run.get("trained") is not None]
    return runs[-1] if runs else None


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, types, shapes and bytes, whatever their order and device."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _codec_class(described: Mapping[str, Any], source: Path) -> type[Codec]:
    for key in described:
        if key not in DESCRIBED:
            raise CheckpointError(f"{source}: " + unknown("key", key, DESCRIBED))
    if not isinstance(described.get("history", []), list):
        raise CheckpointError(f"{source}: 'history' should be a list")
    name = described.get("codec")
    if not isinstance(name, str):
        raise CheckpointError(f"{source}: no 'codec' that names a codec; is this a ditkit codec folder?")
    try:
        return find(Codec, name)  # type: ignore[type-abstract]
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
