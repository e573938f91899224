"""A denoiser of two stages: convolutions on a fine grid, attention on a coarse one, and a skip between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.convention import SIT, Convention
from ditkit.core.grid import Grid, Segment, Tokens
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Block, Stack
from ditkit.nn.embeddings import TimeEmbedding


class ConvBlock(nn.Module):
    """x + a depth-wise convolution of rows [B, L, D] on their grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mix = nn.Linear(width, width)

    def convolve(self, shape: tuple[int, int], x: Tensor, c: Tensor) -> Tensor:
        grid = x.mT.unflatten(2, shape)
        return self.mix(nn.functional.silu(self.deep(grid).flatten(2).mT + c[:, None]))

    def forward(
        self, x: Tensor, c: Tensor, shape: tuple[int, int], run: Run = DIRECT, at: str = ""
    ) -> Tensor:
        return x + run.site(at + ".conv", partial(self.convolve, shape), x, c)

    def sites(self, at: str) -> list[Site]:
        conv = Site(at + ".conv", "branch", width=self.width, ordered=True)
        return [Site(at, "block", width=self.width), conv]


@dataclass(frozen=True)
class TwoStagesConfig:
    size: int = 16
    channels: int = 2
    fine: int = 16
    coarse: int = 32
    depth: int = 2
    convention: Convention = SIT


class TwoStages(Denoiser):
    Config = TwoStagesConfig
    config: TwoStagesConfig

    def __init__(self, config: TwoStagesConfig) -> None:
        super().__init__()
        self.config = c = config
        self.time = TimeEmbedding(c.coarse)
        self.to_fine = nn.Linear(c.coarse, c.fine)
        self.embed = nn.Linear(c.channels, c.fine)
        self.down = nn.ModuleList(ConvBlock(c.fine) for _ in range(c.depth))
        self.merge = nn.Conv2d(c.fine, c.coarse, 2, 2)
        self.mid = nn.ModuleList(Block(c.coarse, 2) for _ in range(c.depth))
        self.split = nn.ConvTranspose2d(c.coarse, c.fine, 2, 2)
        self.up = nn.ModuleList(ConvBlock(c.fine) for _ in range(c.depth))
        self.out = nn.Linear(c.fine, c.channels)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        h, w = shape[-2:]
        grids = Grid(1, h, w), Grid(1, h // 2, w // 2)
        return tuple(Segment("image", grid, grid.length, None, stage) for stage, grid in enumerate(grids))

    def sites(self) -> tuple[Site, ...]:
        fine, coarse = self.config.fine, self.config.coarse
        down, up = (
            [site for i, block in enumerate(getattr(self, name)) for site in block.sites(f"{name}.{i}")]
            for name in ("down", "up")
        )
        mid = [site for i, block in enumerate(self.mid) for site in block.sites(f"mid.{i}", stage=1)]
        return (
            Site("time", "time", width=coarse),
            Site("tokens", "tokens", width=fine),
            Site("down", "stack", width=fine),
            *down,
            Site("merge", "tokens", width=coarse, stage=1),
            Site("mid", "stack", width=coarse, stage=1),
            *mid,
            Site("split", "head", width=coarse, stage=1),
            Site("up", "stack", width=fine),
            *up,
            Site("head", "head", width=fine),
        )

    def unconditional(self, cond: Cond) -> Cond:
        return cond

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        shape, c = (x.shape[2], x.shape[3]), run.site("time", self.time, t)
        half, fine = (shape[0] // 2, shape[1] // 2), self.to_fine(c)
        rows = run.site("tokens", lambda x: Tokens(self.embed(x.flatten(2).mT)), x).x
        down = run.site("down", self._stack("down", shape, run), rows, fine)
        coarse = run.site("merge", partial(self._merged, shape), down).x
        coarse = run.site("mid", Stack(self.mid, run, "mid", self.recomputes), coarse, c)
        coarse = run.site("split", lambda rows: rows, coarse)  # rows leave the stage in the model's order
        rows = down + self.split(coarse.mT.unflatten(2, half)).flatten(2).mT
        rows = run.site("up", self._stack("up", shape, run), rows, fine)
        return run.site("head", self.out, rows).mT.unflatten(2, shape)

    def _merged(self, shape: tuple[int, int], rows: Tensor) -> Tokens:
        return Tokens(self.merge(rows.mT.unflatten(2, shape)).flatten(2).mT)

    def _stack(self, name: str, shape: tuple[int, int], run: Run) -> Stack:
        def placed(block: nn.Module) -> Any:
            return lambda x, c, **given: block(x, c, shape, **given)

        return Stack([placed(block) for block in getattr(self, name)], run, name, self.recomputes)


def two_stages(seed: int = 0) -> TwoStages:
    """Random everywhere, so that no branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    model = TwoStages(TwoStagesConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model
