"""Frozen encoders of pictures, by name: tokens on a grid, and the attention between them.

B batch, L patches, D width, N heads.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.checkpoint import read_json
from ditkit.core.config import config_of
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.core.loading import HUB_ID
from ditkit.core.run import Handler, Run
from ditkit.nn.efficientnet import STAGES, EfficientNetLite0, load_efficientnet_lite0, normalised
from ditkit.nn.frozen import CONFIG, load_network
from ditkit.nn.vit import ViT, ViTConfig

LITE, VIT, RAE = "efficientnet-lite0", "vit", "rae"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of encoders that come without their own."""
LITE_BLOCK = 10
"""The last block with one position for each 16 x 16 pixels."""
FINAL_NORMS = ("layernorm", "post_layernorm", "norm")
"""Names that vision transformers of the transformers library give to the norm after their last block."""
Sides = tuple[int, int]


class Encoded(NamedTuple):
    """A batch of pictures as an encoder has it.

    Args:
        tokens: [B, L, D], row-major, without class and register tokens. maps: softmax of the scores between these
            patches alone, [B, N, L, L] in float32, of the last blocks that were asked for, in their order.
    """

    tokens: Tensor
    maps: tuple[Tensor, ...] = ()


class Facts(NamedTuple):
    """Numbers of an encoder that are known without its weights.

    Args:
        width: of a token. patch: pixels along its side. depth, heads: of its attention, 0 where it has none.
        grid: the only one that it takes; None if it takes any.
    """

    width: int
    patch: int
    depth: int = 0
    heads: int = 0
    grid: Sides | None = None


class PictureEncoder(nn.Module, ABC):
    """A network in eval mode, without gradients."""

    facts: Facts
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    @abstractmethod
    def forward(self, pictures: Tensor, grid: Sides, maps: int = 0) -> Encoded:
        """Encode pictures [B, 1 or 3, H, W] in [-1, 1], resized so that they make `grid` tokens.

        Args:
            maps: of how many blocks attention is wanted, from the last one back.

        Raises:
            ShapeError: other channels, or a grid that it cannot make. ConfigError: it has no attention.
        """

    def after_blocks(self, pictures: Tensor, grid: Sides, blocks: Sequence[int]) -> list[Tensor]:
        """Tokens [B, L, D] after some blocks, counted from 0, before the last norm; the pictures get a gradient.

        Raises:
            ConfigError: it has no such blocks. ShapeError: as `forward` does.
        """
        raise ConfigError(f"encoder {type(self).__name__}: it has no blocks of tokens of one width")

    def sides(self, grid: Sides) -> Sides:
        """Height and width in pixels of what makes `grid`."""
        return grid[0] * self.facts.patch, grid[1] * self.facts.patch


def facts_of(source: str) -> Facts:
    """Look up an encoder's numbers; its weights are not read.

    Args:
        source: efficientnet-lite0, of which efficientnet-lite0:14 names another block; vit:FOLDER, a ViT of ours;
            rae:SOURCE, the one in an AutoencoderRAE of diffusers; or a vision model of the transformers library. A
            source is a folder, or an id on the hub.

    Raises:
        ConfigError, CheckpointError: there is no such encoder, or the library that opens it is missing.
    """
    kind, _, rest = source.partition(":")
    if kind == LITE:
        return _lite_facts(_lite_block(rest))
    if kind == VIT:
        path = Path(rest) / CONFIG
        if not path.exists():
            raise ConfigError(
                f"encoder {source!r}: there is no {path}; python benchmarks/donors/train_teacher.py makes one"
            )
        return _vit_facts(config_of(ViTConfig, read_json(path).get("config"), path))
    if kind == RAE:
        return picture_encoder(source).facts
    return _transformers_facts(_config(source))


def picture_encoder(source: str, affine: bool = True) -> PictureEncoder:
    """Load an encoder.

    Args:
        source: as of `facts_of`. affine: False takes scale and shift from the last norm, so that a token has mean 0
            and variance 1 over its channels (RAE); one without such a norm is normalised so.

    Raises:
        ConfigError, CheckpointError, DataError: there is none; in one line, what to install or to train.
    """
    kind, _, rest = source.partition(":")
    encoder: PictureEncoder
    if kind == LITE:
        encoder = LiteEncoder(load_efficientnet_lite0(), _lite_block(rest), affine)
    elif kind == VIT:
        facts_of(source)
        encoder = ViTEncoder(load_network(ViT, rest), affine)
    elif kind == RAE:
        encoder = of_rae(open_rae(rest))
    else:
        encoder = _opened(source, affine)
    return encoder.eval().requires_grad_(False)


def check_grid(source: str, facts: Facts, grid: Sides) -> None:
    """Refuse a grid that the encoder cannot make.

    Raises:
        ConfigError: it takes another one only.
    """
    if facts.grid is not None and facts.grid != grid:
        raise ConfigError(
            f"encoder {source!r} makes {_by(facts.grid)} tokens only, the model has {_by(grid)}: expected the same grid"
        )


class LiteEncoder(PictureEncoder):
    """Positions of a block of EfficientNet-Lite0; it has no attention."""

    def __init__(self, network: EfficientNetLite0, block: int = LITE_BLOCK, affine: bool = True) -> None:
        super().__init__()
        self.network, self.block, self.affine = network, block, affine
        self.facts = _lite_facts(block)

    @torch.no_grad()
    def forward(self, pictures: Tensor, grid: Sides, maps: int = 0) -> Encoded:
        if maps:
            raise ConfigError(f"encoder {LITE!r} has no attention to align with")
        tokens = self.network.map(normalised(pictures, self.sides(grid)), self.block).flatten(2).mT
        return Encoded(tokens if self.affine else F.layer_norm(tokens, tokens.shape[-1:]))


class ViTEncoder(PictureEncoder):
    """A `ViT` of ours, all of whose tokens are patches."""

    def __init__(self, network: ViT, affine: bool = True) -> None:
        super().__init__()
        self.network = network
        self.facts = _vit_facts(network.config)
        if not affine:
            network.norm.weight = network.norm.bias = None  # type: ignore[assignment]

    @torch.no_grad()
    def forward(self, pictures: Tensor, grid: Sides, maps: int = 0) -> Encoded:
        check_grid(VIT, self.facts, grid)
        found: list[Tensor] = []

        def keep(fn: Handler, *args: Any) -> Any:
            found.append(attention_map(*args[:2]))
            return fn(*args)

        last = range(self.facts.depth - maps, self.facts.depth)
        run = Run({f"blocks.{i}.attn.core": keep for i in last})
        return Encoded(self.network.features(self._taken(pictures, grid), run), tuple(found))

    def after_blocks(self, pictures: Tensor, grid: Sides, blocks: Sequence[int]) -> list[Tensor]:
        check_grid(VIT, self.facts, grid)
        found: dict[str, Tensor] = {}

        def keep(name: str, fn: Handler, *args: Any) -> Any:
            found[name] = fn(*args)
            return found[name]

        names = [f"blocks.{i}" for i in blocks]
        self.network.features(self._taken(pictures, grid), Run({name: partial(keep, name) for name in names}))
        return [found[name] for name in names]

    def _taken(self, pictures: Tensor, grid: Sides) -> Tensor:
        x, channels = resized(pictures, self.sides(grid)), self.network.config.channels
        return x.mean(1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)


class TransformersEncoder(PictureEncoder):
    """A vision transformer of the transformers library: DINOv2, SigLIP, MAE, ViT, CLIP.

    Args:
        network: the vision model, whose last hidden state has its tokens, patches last and row by row.
        mean, std: of the pixels in [0, 1] that it was trained on, by channel.
    """

    def __init__(
        self,
        network: Any,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, tuple(mean), tuple(std)
        self.facts = _transformers_facts(network.config)
        self.takes = inspect.signature(network.forward).parameters
        if not affine:
            self._last_norm().weight = self._last_norm().bias = None

    def _last_norm(self) -> Any:
        if hasattr(
            self.network, "pre_layrnorm"
        ):  # CLIP's last hidden state has not been through its last norm
            raise ConfigError(f"encoder {type(self.network).__name__}: its tokens are not normalised at last")
        for name in FINAL_NORMS:
            if isinstance(norm := getattr(self.network, name, None), nn.LayerNorm):
                return norm
        raise ConfigError(
            f"encoder {type(self.network).__name__}: expected a norm after its last block under one of the names "
            f"{', '.join(FINAL_NORMS)}"
        )

    @torch.no_grad()
    def forward(self, pictures: Tensor, grid: Sides, maps: int = 0) -> Encoded:
        out, extra = self._out(pictures, grid, output_attentions=maps > 0)
        tokens: Tensor = out.last_hidden_state
        if not maps:
            return Encoded(tokens[:, extra:])
        return Encoded(tokens[:, extra:], tuple(among(p, extra) for p in out.attentions[-maps:]))

    def after_blocks(self, pictures: Tensor, grid: Sides, blocks: Sequence[int]) -> list[Tensor]:
        out, extra = self._out(pictures, grid, output_hidden_states=True)
        return [out.hidden_states[i + 1][:, extra:] for i in blocks]

    def _out(self, pictures: Tensor, grid: Sides, **wanted: bool) -> tuple[Any, int]:
        """Return what the network gives, and how many tokens are not patches."""
        x = standardised(pictures, self.sides(grid), self.mean, self.std)
        count = grid[0] * grid[1]
        options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self.takes:
            options["interpolate_pos_encoding"] = True
        if "noise" in self.takes:  # MAE drops and shuffles patches by it; rising noise keeps their order
            options["noise"] = torch.arange(count, device=x.device).float().expand(len(x), -1)
        out = self.network(pixel_values=x, **wanted, **options)
        extra = out.last_hidden_state.shape[1] - count
        if extra < 0:
            raise ShapeError(
                f"encoder {type(self.network).__name__}: {extra + count} tokens for a grid of {_by(grid)}"
            )
        return out, extra


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) in float32, [B, N, L, L], of queries and keys [B, N, L, K]."""
    return (q.float() * q.shape[-1] ** -0.5 @ k.float().mT).softmax(-1)


def among(probabilities: Tensor, extra: int) -> Tensor:
    """Attention [B, N, S, S] between all but the first `extra` tokens: the softmax over the others' scores."""
    rest = probabilities[..., extra:, extra:].float()
    return rest / rest.sum(-1, keepdim=True)


def resized(pictures: Tensor, sides: Sides) -> Tensor:
    """Pictures by bicubic interpolation, as they are where their sides are these; outside the range there may be more.

    Raises:
        ShapeError: other channels than 1 or 3.
    """
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ShapeError(
            f"encoder: input {list(pictures.shape)} should be pictures [B, 1 or 3, H, W], not latents; a training set "
            "on latents gives them as Cond.pixels"
        )
    if tuple(pictures.shape[2:]) == sides:
        return pictures
    return F.interpolate(pictures, sides, mode="bicubic", align_corners=False)


def standardised(pictures: Tensor, sides: Sides, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures in [-1, 1] as an encoder takes them, [B, 3, *sides]: in [0, 1], resized, less the mean, by the std."""
    x = resized((pictures + 1) / 2, sides)
    centre, spread = (x.new_tensor(list(v)).view(1, -1, 1, 1) for v in (mean, std))
    return (x - centre) / spread


def open_rae(source: str, **download: Any) -> Any:
    """Open an AutoencoderRAE of diffusers.

    Raises:
        ConfigError: diffusers is not installed, or has none. CheckpointError: there is no such model.
    """
    try:
        from diffusers import AutoencoderRAE
    except ImportError as error:
        raise ConfigError(
            "an AutoencoderRAE needs diffusers 0.37 or newer; install it with: pip install 'ditkit[hosts]'"
        ) from error
    _check_place(source)
    try:
        return AutoencoderRAE.from_pretrained(source, **download)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"no AutoencoderRAE at {source}: {first}") from error


def of_rae(network: Any) -> TransformersEncoder:
    """Return the frozen encoder of an AutoencoderRAE, whose last norm has no scale already."""
    mean, std = (getattr(network, f"encoder_{name}").flatten().tolist() for name in ("mean", "std"))
    inner = getattr(network.encoder, "vision_model", network.encoder)
    encoder = TransformersEncoder(inner, mean, std)
    return encoder.eval().requires_grad_(False)


def _lite_block(text: str) -> int:
    last = sum(stage.repeats for stage in STAGES) - 1
    if not text:
        return LITE_BLOCK
    if not text.isdecimal() or int(text) > last:
        raise ConfigError(f"encoder '{LITE}:{text}': expected a block from 0 to {last}")
    return int(text)


def _lite_facts(block: int) -> Facts:
    stride, first = 2, 0
    for stage in STAGES:
        stride *= stage.stride
        if block < first + stage.repeats:
            return Facts(stage.width, stride)
        first += stage.repeats
    raise ConfigError(f"encoder {LITE!r} has {first} blocks, got number {block}")


def _vit_facts(config: ViTConfig) -> Facts:
    side = config.size // config.patch
    return Facts(config.width, config.patch, config.depth, config.heads, (side, side))


def _transformers_facts(config: Any) -> Facts:
    config = getattr(config, "vision_config", config)
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if not isinstance(patch, int) or not hasattr(config, "hidden_size"):
        name = type(config).__name__
        raise ConfigError(f"encoder {name}: expected a vision transformer with hidden_size and patch_size")
    return Facts(config.hidden_size, patch, config.num_hidden_layers, config.num_attention_heads)


def _transformers(source: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"encoder {source!r} needs transformers; install it with: pip install 'ditkit[hosts]'"
        ) from error
    return transformers


def _check_place(source: str) -> None:
    """Refuse what is neither a folder nor an id of the hub, before the hub is searched."""
    if not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise CheckpointError(_missing(source, "there is no such folder, and it is no id of the hub"))


def _config(source: str) -> Any:
    library = _transformers(source)
    _check_place(source)
    try:
        return library.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(_missing(source, error)) from error


def _opened(source: str, affine: bool) -> TransformersEncoder:
    """Load a vision model of the transformers library, in float32, MAE's without a mask."""
    library, config = _transformers(source), _config(source)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    try:
        network = library.AutoModel.from_pretrained(
            source, config=config, attn_implementation="eager", dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(_missing(source, error)) from error
    try:
        prepared, _ = library.BaseImageProcessor.get_image_processor_dict(source)
    except OSError:  # a folder that a model alone was saved in
        prepared = {}
    mean, std = prepared.get("image_mean", MEAN), prepared.get("image_std", STD)
    return TransformersEncoder(getattr(network, "vision_model", network), mean, std, affine)


def _missing(source: str, error: Exception | str) -> str:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"no encoder {source!r}: {first}; expected {LITE} (pip install 'ditkit[evaluate]'), {VIT}:FOLDER, or a vision "
        "model that the transformers library finds"
    )


def _by(grid: Sides) -> str:
    return f"{grid[0]} x {grid[1]}"
