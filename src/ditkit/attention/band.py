"""A plain diagonal band: what most sliding windows are, and what corrected attention is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from ditkit.attention.pattern import Pattern, append_dense_rows
from ditkit.core.grid import Grid
from ditkit.ops.block_sparse_attention import BlockPlan, build_plan, near_blocks


@dataclass(frozen=True)
class Band(Pattern):
    """A token sees those at most w // 2 places away in the raster order of a frame, w = int(keep H W), in all frames.

    Training-free; rows of text see all and are seen by all. The mask of Re-ttention (arXiv 2505.22918), without its
    correction. Tokens of a clip are ordered by their place, then by frame, so that the bands of its frames are one.

    Args:
        keep: the share of a frame that the band is wide.
    """

    keep: Annotated[float, Interval(gt=0, le=1)] = 1 / 32

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(keep=0.2, block=8, kernel="cpu")

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        area, length = grid.height * grid.width, grid.length
        reach = int(area * self.keep) // 2
        places = torch.arange(length).view(grid.frames, area).T.flatten()
        near = near_blocks(places[:, None] % area, self.block, (reach,))

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            apart = (query % area - key % area).abs()
            return (apart <= reach) | (query >= length) | (key >= length)

        slots = F.pad(places, (0, -length % self.block), value=-1)
        order, kept = append_dense_rows(slots, near, others, self.block)
        return build_plan(len(slots) + others, block=self.block, order=order, kept=kept, allowed=allowed)
