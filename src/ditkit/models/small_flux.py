"""diffusers' own FLUX network at the scale of a CPU, on pixels, told a class by the letters of its name.

So that a person without FLUX's weights has a real pipeline to try things on, and so that caches of other libraries,
which know diffusers' classes only, can be measured on weights that mean something.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from ditkit.core.cond import Cond, label_of
from ditkit.core.config import FROM_DATA, Count, Depth, ModelConfig, Share, names_every_class
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, Segment
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Handler, Run, Site, named
from ditkit.core.transform import Stacked
from ditkit.nn.blocks import attention
from ditkit.nn.embeddings import drop_labels

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PATCH = 4
"""Pixels a side of a token: a pixel-unshuffle by 2 in the VAE's place, and FLUX's own packing by 2."""
FLOW = Convention()
"""FLUX predicts noise - data at noise-time t."""
GATES = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
"""Ends of the names of the layers that shift, scale and gate."""


@dataclass(frozen=True)
class SmallFluxConfig(ModelConfig):
    """Architecture of a small FLUX.

    Args:
        size: height and width of a picture.
        channels: of a sample.
        width: of a token's vector.
        heads: of attention.
        depth: number of blocks of two streams.
        single_depth: number of blocks of one stream.
        letters: rows of text, one a letter of the class's name.
        classes: number of them.
        label_dropout: share of training samples that are told nothing.
        class_names: one a class, or empty for their numbers.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    channels: Count = field(default=1, metadata=FROM_DATA)
    width: Count = 192
    heads: Count = 6
    depth: Depth = 2
    single_depth: Depth = 6
    letters: Annotated[int, Interval(ge=1, le=10_000)] = 16
    classes: Count = field(default=10, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = FLOW
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % PATCH:
            raise ShapeError(f"SmallFlux: size={self.size} does not divide into patches of {PATCH}")
        if self.width % (8 * self.heads):
            raise ShapeError(
                f"SmallFlux: width={self.width} does not divide into heads={self.heads} of a multiple of 8"
            )
        names_every_class(self)
        if self.convention != FLOW:
            raise ConfigError(f"SmallFlux: convention={self.convention}, expected {FLOW}, as FLUX has it")

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, channels=3, width=32, heads=4, depth=2, single_depth=2, classes=5)


class SmallFlux(Denoiser):
    """`FluxTransformer2DModel` with the sites of its view; `pipeline` hands the same weights to diffusers."""

    Config = SmallFluxConfig
    task = "image"
    config: SmallFluxConfig

    def __init__(self, config: SmallFluxConfig) -> None:
        from diffusers import FluxTransformer2DModel

        from ditkit.hosts import flux
        from ditkit.nn.toy_text_encoder import LETTERS

        super().__init__()
        self.config = config
        self.transformer = flux.view(FluxTransformer2DModel(**_arguments(config, LETTERS)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As DiT: Xavier-uniform layers, zero modulation and output; the first output is 0."""
        for layer in self.transformer.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        gates = [part for name, part in self.transformer.named_modules() if name.endswith(GATES)]
        for layer in (*gates, self.transformer.proj_out):
            nn.init.zeros_(layer.weight)

    @cached_property
    def _spelled(self) -> Tensor:
        """The letters of each class's name and of none, made when they are first read: a config alone costs nothing."""
        from torch.utils._python_dispatch import _disable_current_modes

        from ditkit.nn.toy_text_encoder import encode_letters

        names = self.config.class_names or tuple(map(str, range(self.config.classes)))
        # it is kept, so it is of no mode that the first call is made in: an exporter's fake tensors, inference
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            return encode_letters((*names, ""), self.config.letters)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-2:]), PATCH)
        text = Grid(self.config.letters)
        return (Segment("text", text, text.length), Segment("image", grid, grid.length))

    def sites(self) -> tuple[Site, ...]:
        from ditkit.hosts import flux

        return flux.sites(self.transformer)

    def stacks(self) -> Mapping[str, Stacked]:
        return {
            "blocks": Stacked("transformer.transformer_blocks", "depth"),
            "single": Stacked("transformer.single_transformer_blocks", "single_depth"),
        }

    def unconditional(self, cond: Cond) -> Cond:
        """Every name replaced by none."""
        return replace(cond, label=torch.full_like(label_of(self.config, cond), self.config.classes))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict the velocity noise - data.

        Args:
            x: [B, C, H, W]. t: [B], 0 is data. cond: `label` [B].

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by 4.
        """
        from ditkit.hosts import flux
        from ditkit.nn.toy_text_encoder import pooled

        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ShapeError(f"SmallFlux: input {list(x.shape)} should be [B, {self.config.channels}, H, W]")
        grid = Grid.of((x.shape[2], x.shape[3]), PATCH)
        label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
        letters = self._spelled.to(x)[drop_labels(label, cond.drop, self.config.classes, rate)]
        self._switch_checkpointing()
        if self.training:  # diffusers' attention is slow in bf16 on a CPU, see nn.blocks.PLAIN_KEYS
            run = Run({**dict.fromkeys(named(self.sites(), "core"), _attend), **run.handlers})
        with flux.running(run):
            (out,) = self.transformer(
                hidden_states=pack(x),
                encoder_hidden_states=letters,
                pooled_projections=pooled(letters),
                timestep=t,
                img_ids=F.pad(grid.coordinates()[:, 1:], (1, 0)).to(x),
                txt_ids=x.new_zeros(letters.shape[1], 3),
                return_dict=False,
            )
        return unpack(out, grid)

    def pipeline(self) -> FluxPipeline:
        """Build diffusers' pipeline around a copy of the transformer, without sites: `pipe("ankle boot").images`.

        The prompt is spelled for the network, so one that is no class's name gives what its letters resemble. A model
        of inherent policies gives one that runs through `ditkit.accelerate` only.
        """
        from ditkit.hosts import flux
        from ditkit.hosts.hosted import mark
        from ditkit.hosts.toy_flux_pipeline import ToyFluxPipeline

        self._register_plain(transformer := flux.restore(deepcopy(self.transformer)).eval())
        mark(transformer, [policy for policy in self.policies if policy.inherent], deepcopy(self.learned))
        return ToyFluxPipeline.around(transformer, self.config.size, self.config.letters)

    def _register_plain(self, transformer: Any) -> None:
        """Write what transforms made of the structure into a copy's config.

        Raises:
            ConfigError: one has no form that plain diffusers opens.
        """
        if lost := [type(t).__name__ for t in self.transforms if t.plain(self) is None]:
            raise ConfigError(f"SmallFlux: {lost[0]} has no form that plain diffusers opens; finish it first")
        counts = {"num_layers": len(self.transformer.transformer_blocks)}
        counts["num_single_layers"] = len(self.transformer.single_transformer_blocks)
        transformer.register_to_config(**counts)

    def _switch_checkpointing(self) -> None:
        if self.recomputes != self.transformer.gradient_checkpointing:
            switch = "enable" if self.recomputes else "disable"
            getattr(self.transformer, f"{switch}_gradient_checkpointing")()


def pack(x: Tensor) -> Tensor:
    """Pixels [B, C, H, W] to FLUX's tokens of their unshuffled latents, [B, L, 16 C]."""
    return F.pixel_unshuffle(F.pixel_unshuffle(x, 2), 2).flatten(2).mT


def unpack(tokens_BLC: Tensor, grid: Grid) -> Tensor:
    """`pack`, backwards."""
    packed = tokens_BLC.mT.unflatten(2, (grid.height, grid.width))
    return F.pixel_shuffle(F.pixel_shuffle(packed, 2), 2)


def _attend(_: Handler, *args: Any) -> Tensor:
    return attention(*args)


def _arguments(config: SmallFluxConfig, letters: int) -> dict[str, Any]:
    """Return the arguments of diffusers' network.

    A head's rotation is shared out as in FLUX.1: 1/8 for the picture's index, then rows and columns alike.
    """
    head = config.width // config.heads
    side = (head - head // 8) // 4 * 2
    return {
        "patch_size": 1,
        "in_channels": PATCH**2 * config.channels,
        "num_layers": config.depth,
        "num_single_layers": config.single_depth,
        "attention_head_dim": head,
        "num_attention_heads": config.heads,
        "joint_attention_dim": letters,
        "pooled_projection_dim": letters,
        "guidance_embeds": False,
        "axes_dims_rope": (head - 2 * side, side, side),
    }
