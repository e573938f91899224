"""DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740): one network, two conventions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.cond import Cond, label_of
from ditkit.core.config import (
    FROM_DATA,
    Count,
    Depth,
    ModelConfig,
    Share,
    divides_for_sincos,
    divides_into_heads,
    names_every_class,
    network,
)
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, Tokens, patchify, unpatchify
from ditkit.core.model import TIMESTEP, Denoiser
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Run
from ditkit.core.transform import Stacked
from ditkit.nn.blocks import Block, Head, Stack
from ditkit.nn.embeddings import TimeEmbedding, drop_labels, sincos_table
from ditkit.nn.init import adaln_zero_

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width, heads (DiT, table 1)."""


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """Architecture and convention of a DiT.

    Args:
        size: height and width of a picture.
        patch: side of a token.
        channels: of a sample.
        width: of a token's vector.
        depth: number of blocks.
        heads: of attention.
        classes: labels, without the null class.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    patch: Count = 2
    channels: Count = field(default=4, metadata=FROM_DATA)
    width: Count = 384
    depth: Depth = 12
    heads: Count = 6
    classes: Count = field(default=1000, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = DDPM
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ShapeError(
                f"{network(self)}: size={self.size} does not divide into patches of {self.patch}"
            )
        divides_into_heads(self)
        divides_for_sincos(self)
        names_every_class(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, channels=3, width=32, depth=2, heads=4, classes=5)


class DiT(Denoiser):
    """A transformer over patches with adaLN-Zero conditioning on time and class."""

    Config = DiTConfig
    task = "image"
    embeds_time = True
    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        c, pixels = config, config.patch**2
        out = c.channels * (1 if c.convention.extra == "none" else 2)
        self.embed = nn.Linear(pixels * c.channels, c.width)
        self.time = TimeEmbedding(c.width)
        self.label = nn.Embedding(c.classes + 1, c.width)
        self.blocks = nn.ModuleList(self.block() for _ in range(c.depth))
        self.head = Head(c.width, pixels * out)
        adaln_zero_(self, self.label.weight, self.time.inner.weight, self.time.outer.weight)

    @classmethod
    def preset(cls, name: str, convention: Convention = DDPM) -> Self:
        """Return a size of the paper, for 4 x 32 x 32 latents and 1000 classes: S, B, L or XL, with patch 2, 4 or 8.

        SiT's models are `DiT.preset(name, SIT)`.

        Raises:
            ConfigError: the name is none of them.
        """
        names = [f"{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
        if name not in names:
            raise ConfigError(unknown(f"{cls.__name__} preset", name, names))
        size, patch = name.split("/")
        depth, width, heads = SIZES[size]
        return cls(cls.Config(patch=int(patch), width=width, depth=depth, heads=heads, convention=convention))

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: DiTConfig, policies: Sequence[Policy] = ()
    ) -> Self:
        """Weights in the naming of the DiT and SiT repositories (`.safetensors`, or `.pt` of plain tensors).

        Args:
            policies: that the weights were trained under: DTR's, whose names are DiT's, under TaskRouting.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite. A table of DTR's masks
                is left over without its policy.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        named = source if isinstance(source, str | Path) else "state dict"
        return cls.holding(config, renamed(state), named, policies)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-2:]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def unconditional(self, cond: Cond) -> Cond:
        """Every label replaced by the null class."""
        return replace(cond, label=torch.full_like(label_of(self.config, cond), self.config.classes))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy samples.

        Args:
            x: [B, C, H, W]. t: [B], in the unit the convention names. cond: `label` [B].

        Returns:
            [B, C, H, W], or 2C channels where the convention has an extra half.

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by the patch.
        """
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ShapeError(f"DiT: input {list(x.shape)} should be [B, {self.config.channels}, H, W]")
        grid = Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        c_BD = run.site("time", partial(self.condition, run=run), t, cond)
        tokens: Tokens = run.site("tokens", self.tokenize, x)
        h_BLD = self.through(tokens.x, c_BD, t, run)
        return unpatchify(run.site("head", partial(self.head, run=run), h_BLD, c_BD), grid, self.config.patch)

    def block(self) -> Block:
        """Make one of the blocks."""
        return Block(self.config.width, self.config.heads)

    def through(self, x_BLD: Tensor, c_BD: Tensor, t: Tensor, run: Run) -> Tensor:
        """Run the blocks."""
        out: Tensor = run.site("blocks", Stack(self.blocks, run, checkpointing=self.recomputes), x_BLD, c_BD)
        return out

    def condition(self, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Compute c = time embedding + label embedding, [B, D]."""
        label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
        time: Tensor = run.site(TIMESTEP, self.time, t)
        return time + self.label(drop_labels(label, cond.drop, self.config.classes, rate))

    def tokenize(self, x: Tensor) -> Tokens:
        """Patches of x embedded, with their positions added, [B, L, D]."""
        grid = Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        h_BLD = self.embed(patchify(x, self.config.patch))
        return Tokens(h_BLD + sincos_table(grid, self.config.width, h_BLD.device).to(h_BLD.dtype))


ORIGINAL_NAMES = {
    r"x_embedder\.proj\.": "embed.",
    r"t_embedder\.mlp\.0\.": "time.inner.",
    r"t_embedder\.mlp\.2\.": "time.outer.",
    r"y_embedder\.embedding_table\.": "label.",
    r"final_layer\.adaLN_modulation\.1\.": "head.modulation.",
    r"final_layer\.linear\.": "head.out.",
    r"(blocks\.\d+\.)attn\.proj\.": r"\1attn.out.",
    r"(blocks\.\d+\.)mlp\.fc1\.": r"\1mlp.inner.",
    r"(blocks\.\d+\.)mlp\.fc2\.": r"\1mlp.outer.",
    r"(blocks\.\d+\.)adaLN_modulation\.1\.": r"\1modulation.",
}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the DiT or SiT repository to our names; its frozen position table is dropped."""
    ours = {_renamed(name): tensor for name, tensor in state.items() if name != "pos_embed"}
    kernel = ours.get("embed.weight")
    return ours if kernel is None or kernel.ndim != 4 else {**ours, "embed.weight": kernel.flatten(1)}


def _renamed(name: str) -> str:
    for pattern, ours in ORIGINAL_NAMES.items():
        name = re.sub("^" + pattern, ours, name)
    return name
