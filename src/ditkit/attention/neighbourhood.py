"""CLEAR: each token of a picture attends to those within a circle, and to a pooled copy of all (arXiv 2412.16112).

B batch, N heads, K head width, L tokens of the image, P pooled keys, c side of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log, sqrt
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.grouped import group_order
from ditkit.attention.pattern import Pattern, SequencePlan, Sparse, append_dense_rows, sparse_sites
from ditkit.core.config import Count, Natural
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, image_of
from ditkit.core.policy import site_key
from ditkit.core.run import Call, Site
from ditkit.ops.block_sparse_attention import Allowed, BlockPlan, build_plan, near_blocks

Order = Literal["tiles", "raster"]
POOLED_SCALE = 10
"""The factor of the number of tokens in CLEAR's proportional scale where it pools."""


@dataclass(frozen=True)
class Neighbourhood(Pattern):
    """CLEAR. A model is fine-tuned for its radius (`ditkit train clear-video-dit`).

    Rows of text see all tokens and are seen by all; they see no pooled keys. A rotary base for large pictures
    (NTK) is the model's affair, not this pattern's.

    Args:
        radius: r: a token sees those with (y - y')^2 + (x - x')^2 < r^2.
        pooled: c of c x c cells, whose pooled keys and values all tokens see beside their circle: the paper's is 4;
            0 for none. Their weights are learned, one [c, c] an attention, and 1 / c^2 where none are given.
        span: of a clip, beyond the paper: a token sees the circle in all frames with |t - t'| < span, and cells are
            those of each frame. 0 refuses clips.
        order: of tokens in memory: "tiles" of a block each, or "raster", which gives the same and visits more blocks.
        scaled_from: n0 of the proportional scale sqrt(log_n0(n) / K) for n tokens, 10 n where it pools: the paper's
            for large pictures is 4608; 0 for 1 / sqrt(K).
    """

    radius: Count = 16
    pooled: Natural = 0
    span: Natural = 0
    order: Order = "tiles"
    scaled_from: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaled_from == 1:
            raise ConfigError(
                f"{type(self).__name__}: scaled_from=1, the base of a logarithm, expected 0 or at least 2"
            )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(radius=2, pooled=2, span=0 if grid.frames == 1 else 2, block=8, kernel="cpu")

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict | None:
        if not self.pooled:
            return None
        return nn.ModuleDict({site_key(name): Pooling(self.pooled) for name in sparse_sites(sites)})

    def upgraded(self, state: Mapping[str, Tensor], sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """Weights were one tensor [attentions, c, c]."""
        old = f"learned.{type(self).__name__}."
        whole = state.get(old + "weight")
        if whole is None or len(whole) != len(cores := sparse_sites(sites)):
            return state
        parts = {f"{old}{site_key(name)}.weight": part for name, part in zip(cores, whole, strict=True)}
        return {**{name: value for name, value in state.items() if name != old + "weight"}, **parts}

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Near:
        self._check(sites, total)
        own = self.modules(sites)
        if modules is None or own is None:
            return Near(self, sites, own)
        held, wanted = ({k: list(v.shape) for k, v in m.state_dict().items()} for m in (modules, own))
        if held != wanted:
            key = next(key for key in {**wanted, **held} if held.get(key) != wanted.get(key))
            raise ConfigError(
                f"Neighbourhood: pooled={self.pooled} takes weights {key!r} of {wanted.get(key)}, the model was "
                f"trained with {held.get(key)}"
            )
        return Near(self, sites, modules)

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        if grid.frames > 1 and not self.span:
            raise ConfigError(
                f"{type(self).__name__}: a clip of {grid.frames} frames, expected a picture; span=N lets a token see "
                "its circle in N - 1 frames before and after"
            )
        pooled = len(cells(grid, self.pooled)) if self.pooled else 0
        slots, places = self._slots(grid)
        kept = near_blocks(places, self.block, (max(self.span - 1, 0), self.radius - 1, self.radius - 1))
        order, kept = append_dense_rows(slots, kept, others, self.block, pooled)
        rows = len(slots) + others
        return build_plan(
            rows,
            rows + pooled,
            self.block,
            order=order,
            kept=kept,
            allowed=self._allowed(grid, others, pooled),
        )

    def scale(self, tokens: int) -> float:
        """Return the score's scale, relative to 1 / sqrt(K)."""
        if not self.scaled_from:
            return 1.0
        return sqrt(log(tokens * (POOLED_SCALE if self.pooled else 1), self.scaled_from))

    def _slots(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the token in each slot, -1 for padding, and the coordinates of each slot [slots, 3]."""
        if self.order == "raster":
            slots = F.pad(torch.arange(grid.length), (0, -grid.length % self.block), value=-1)
            return slots, grid.coordinates()[slots]  # padding stands at the last token
        sides = self._tile(grid)
        frames, height, width = (-(-n // side) * side for n, side in zip(grid.shape, sides, strict=True))
        padded = Grid(frames, height, width)
        return group_order(grid, sides), padded.coordinates()[group_order(padded, sides)]

    def _tile(self, grid: Grid) -> tuple[int, int, int]:
        """Frames, rows and columns of a block: 8 x 16 of a picture's 128, and no more frames than a token sees."""
        # the greatest power of two that divides them, so that no frame is padding
        whole = grid.frames & -grid.frames
        frames = min(whole, 1 << max(self.span.bit_length() - 1, 0), self.block)
        rows = 1 << ((self.block // frames).bit_length() - 1) // 2
        return frames, rows, self.block // frames // rows

    def _allowed(self, grid: Grid, others: int, pooled: int) -> Allowed:
        """By number: tokens of the image, rows of others, pooled keys. These come last, without coordinates."""
        image, seen_by_all = grid.length, grid.length + others
        frame, row, column = F.pad(grid.coordinates().int(), (0, 0, 0, others + pooled)).unbind(1)
        span, radius = max(self.span, 1), self.radius

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = (row[query] - row[key]) ** 2 + (column[query] - column[key]) ** 2 < radius**2
            near &= (frame[query] - frame[key]).abs() < span
            return torch.where(query < image, near | (key >= image), key < seen_by_all)

        return allowed


class Pooling(nn.Module):
    """Weights of the tokens of a cell of one attention, shared by keys and values, heads and channels.

    Args:
        cell: c.
    """

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((cell, cell), 1 / cell**2))

    def forward(self, x: Tensor, cells: Tensor) -> Tensor:
        """Rows of x [B, N, rows, K] at `cells` [P, c c], summed with the weights: [B, N, P, K]."""
        return self.weight.flatten().to(x) @ x[:, :, cells.flatten()].unflatten(2, cells.shape)


class Near(Sparse):
    """Attention to a neighbourhood, and to pooled keys where there are weights for them."""

    policy: Neighbourhood

    def __init__(self, policy: Neighbourhood, sites: Sequence[Site], pooling: nn.Module | None) -> None:
        super().__init__(policy, sites)
        self.pooling: Any = pooling

    def attending(self, call: Call, name: str, seat: SequencePlan) -> Callable[..., Tensor]:
        plan = seat.plan
        at, tokens, pooling = None, plan.tokens, None
        if self.pooling is not None:
            at = plan.inverse[cells(image_of(call.layout, self.stage).grid, self.policy.pooled)]
            tokens -= len(at)
            pooling = self.pooling[site_key(name)]
        return partial(self.near, plan, pooling, at, self.policy.scale(tokens))

    def near(
        self,
        plan: BlockPlan,
        pooling: Pooling | None,
        cells: Tensor | None,
        scale: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """Attention, pooled keys behind the others; `cells` [P, c c] are rows, the scale is relative."""
        if cells is not None and pooling is not None:
            at = cells.to(k.device)
            k, v = (torch.cat((x, pooling(x, at)), 2) for x in (k, v))
        return self.execute(plan, q if scale == 1 else q * scale, k, v, valid).out


def cells(grid: Grid, side: int) -> Tensor:
    """Tokens of each square cell of each frame, int64 [P, side side], cells and tokens in row-major order.

    Raises:
        ShapeError: the cells do not divide the grid.
    """
    if grid.height % side or grid.width % side:
        raise ShapeError(
            f"Neighbourhood: pooled={side} does not divide a grid of {grid.height} x {grid.width} tokens"
        )
    tokens = torch.arange(grid.length).view(grid.shape)
    cut = tokens.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return cut.transpose(2, 3).reshape(-1, side**2)
