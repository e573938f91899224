"""A backbone in one file: tokens that see only their mean."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond, label_of
from ditkit.core.config import FROM_DATA, Count, Depth, ModelConfig, Share, names_every_class
from ditkit.core.convention import Convention
from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment, Tokens, patchify, unpatchify
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Kind, Run, Site
from ditkit.nn.blocks import Head, Mlp, Stack
from ditkit.nn.embeddings import TimeEmbedding, drop_labels


@dataclass(frozen=True)
class ToyMixerConfig(ModelConfig):
    """Architecture of a toy.

    Args:
        size: height and width of a picture.
        patch: side of a token.
        channels: of a picture.
        width: of a token's vector.
        depth: number of blocks.
        classes: labels, without the null class.
        label_dropout: share of training samples trained without their class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    patch: Count = 4
    channels: Count = field(default=3, metadata=FROM_DATA)
    width: Count = 64
    depth: Depth = 4
    classes: Count = field(default=10, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = Convention()  # noqa: RUF009 - frozen
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ShapeError(f"ToyMixer: size={self.size} does not divide into patches of {self.patch}")
        names_every_class(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, patch=2, width=16, depth=2, classes=5)


class MixerBlock(nn.Module):
    """x + P mean(x), then x + Mlp(x + c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool, self.mlp = nn.Linear(width, width), Mlp(width)

    def mix(self, x_BLD: Tensor) -> Tensor:
        return self.pool(x_BLD.mean(1, keepdim=True)).expand_as(x_BLD)

    def feed(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        return self.mlp(x_BLD + c_BD[:, None])

    def forward(self, x_BLD: Tensor, c_BD: Tensor, run: Run = DIRECT, at: str = "blocks.0") -> Tensor:
        x_BLD = x_BLD + run.site(at + ".pool", self.mix, x_BLD)
        return x_BLD + run.site(at + ".mlp", self.feed, x_BLD, c_BD)

    def sites(self, at: str, stream: str = "image") -> list[Site]:
        kinds: dict[str, Kind] = {"": "block", ".pool": "branch", ".mlp": "branch"}
        width = self.pool.out_features
        return [Site(at + name, kind, stream, width) for name, kind in kinds.items()]


class ToyMixer(Denoiser):
    """Patches, a few blocks, and DiT's head."""

    Config = ToyMixerConfig
    config: ToyMixerConfig

    def __init__(self, config: ToyMixerConfig) -> None:
        super().__init__()
        self.config = config
        values = config.patch**2 * config.channels
        self.embed = nn.Linear(values, config.width)
        self.time = TimeEmbedding(config.width)
        self.label = nn.Embedding(config.classes + 1, config.width)
        self.blocks = nn.ModuleList(MixerBlock(config.width) for _ in range(config.depth))
        self.head = Head(config.width, values)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-2:]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def unconditional(self, cond: Cond) -> Cond:
        return replace(cond, label=torch.full_like(label_of(self.config, cond), self.config.classes))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        grid = Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        c_BD = run.site("time", self.condition, t, cond)
        tokens = run.site("tokens", self.tokenize, x)
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack, tokens.x, c_BD)
        return unpatchify(run.site("head", partial(self.head, run=run), h_BLD, c_BD), grid, self.config.patch)

    def condition(self, t: Tensor, cond: Cond) -> Tensor:
        rate = self.config.label_dropout if self.training else 0.0
        label = drop_labels(label_of(self.config, cond), cond.drop, self.config.classes, rate)
        return self.time(t) + self.label(label)

    def tokenize(self, x: Tensor) -> Tokens:
        return Tokens(self.embed(patchify(x, self.config.patch)))
