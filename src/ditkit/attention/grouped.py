"""GRAT: groups of neighbouring tokens attend to surrounding groups, or to a criss-cross of them (arXiv 2505.14687)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.attention.pattern import Pattern, append_dense_rows
from ditkit.core.config import Count, Natural
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid
from ditkit.ops.block_sparse_attention import BlockPlan, build_plan
from ditkit.ops.block_sparse_attention.dispatch import MOST_ROWS

Meeting = Literal["blocks", "crisscross"]
PICTURE, CLIP = (1, 16, 16), (4, 8, 8)
"""Frames, rows and columns of a group: the paper's for FLUX, and its code's for HunyuanVideo."""


@dataclass(frozen=True)
class Grouped(Pattern):
    """GRAT. Training-free; the exact softmax over the keys that are kept.

    Rows of text see all and are seen by all. A grid that the groups do not divide is padded inside. Groups that are
    not given end where a shorter axis does.

    Args:
        meeting: "blocks" lets a group see those at most `reach` groups away on every axis (GRAT-B), fewer at a
            border; "crisscross" those in its own row or column of groups, and of a clip in its own planes (GRAT-X, as
            the code has it: the union of three planes, not lines).
        reach: beta, of "blocks".
        group: frames, rows and columns of a group, or rows and columns; none: 16 x 16 of a picture, 4 x 8 x 8 of a
            clip. Its tokens fill whole kernel blocks.

    Raises:
        ShapeError: of `plan`, where the grid has an axis so short that such a group no longer fills whole blocks.
    """

    meeting: Meeting = "blocks"
    reach: Natural = 1
    group: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.group) not in (0, 2, 3):
            raise ConfigError(f"Grouped: group={self.group!r}, expected two or three positive integers")
        for sides in (self.group,) if self.group else (PICTURE, CLIP):
            if prod(sides) % self.block:
                raise ConfigError(
                    f"Grouped: a group of {_times(sides)} tokens, expected a multiple of block={self.block}"
                )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(group=(2, 4) if grid.frames == 1 else (2, 2, 2), reach=0, block=8, kernel="cpu")

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        sides = self._sides(grid)
        slots = group_order(grid, sides)
        frames, height, width = (-(-n // side) for n, side in zip(grid.shape, sides, strict=True))
        kept = self.meets(Grid(frames, height, width), grid.frames > 1)
        each = prod(sides) // self.block
        kept = kept.repeat_interleave(each, 0).repeat_interleave(each, 1)
        order, kept = append_dense_rows(slots, kept, others, self.block)
        return build_plan(len(slots) + others, block=self.block, order=order, kept=kept)

    def meets(self, groups: Grid, is_clip: bool) -> Tensor:
        """Return which groups see which, bool [G, G], for groups in row-major order."""
        at = groups.coordinates()
        apart = (at[:, None] - at).abs()
        if self.meeting == "blocks":
            return (apart <= self.reach).all(-1)
        return (apart[..., 0 if is_clip else 1 :] == 0).any(-1)

    def _sides(self, grid: Grid) -> tuple[int, ...]:
        if self.group:
            return (1, *self.group)[-3:]
        sides = tuple(map(min, PICTURE if grid.frames == 1 else CLIP, grid.shape))
        if prod(sides) % self.block:
            raise ShapeError(
                f"Grouped: groups of {_times(sides)} tokens on a grid of {_times(grid.shape)}, expected a multiple of "
                f"block={self.block}; group={'+'.join(map(str, self._fitting(grid)))} is one"
            )
        return sides

    def _fitting(self, grid: Grid) -> tuple[int, ...]:
        """Return the most compact group of a block of tokens whose padding may pay."""

        def compactness(sides: tuple[int, ...]) -> tuple[float, int, int]:
            slots = prod(-(-n // side) * side for n, side in zip(grid.shape, sides, strict=True))
            return max(slots, MOST_ROWS * grid.length), sum(sides), slots

        powers = [1 << n for n in range(self.block.bit_length())]
        return min((s for s in product(powers, repeat=3) if prod(s) == self.block), key=compactness)


def group_order(grid: Grid, sides: tuple[int, ...]) -> Tensor:
    """Order tokens group by group: int64 [slots], -1 where a group reaches beyond the grid."""
    tokens = torch.arange(grid.length).view(grid.shape)
    tokens = F.pad(
        tokens,
        [n for count, side in zip(grid.shape[::-1], sides[::-1], strict=True) for n in (0, -count % side)],
        value=-1,
    )
    cut = tokens.unflatten(2, (-1, sides[2])).unflatten(1, (-1, sides[1])).unflatten(0, (-1, sides[0]))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten()


def _times(sides: tuple[int, ...]) -> str:
    return " x ".join(map(str, sides))
