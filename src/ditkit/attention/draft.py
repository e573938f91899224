"""DraftAttention: blocks are chosen by attention between the means of patches (arXiv 2505.14708).

B batch, N heads, K head width, g regions of a clip, R tokens of a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, prod
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ditkit.attention.dynamic import Dynamic, Selecting
from ditkit.attention.grouped import group_order
from ditkit.attention.pattern import append_dense_rows
from ditkit.core.config import Count, Fraction, Share
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid
from ditkit.core.run import Call, Site
from ditkit.ops.block_sparse_attention import BlockPlan, build_plan

Pooling = Literal["mean", "max"]
Threshold = Literal["head", "row"]
Filling = Literal["none", "diagonal", "best"]


@dataclass(frozen=True)
class Draft(Dynamic):
    """DraftAttention. Training-free; the exact softmax over the blocks that are kept.

    A region is a patch of one frame, whose tokens are neighbours in memory. The draft map is the softmax of the
    products of mean queries and mean keys; its greatest entries are the blocks that are visited. Rows of text see all
    and are seen by all. A grid that patches do not divide is padded inside: means are of the real tokens, and padding
    is seen by nobody.

    Args:
        sparsity: share of the map's entries that is left out: of g^2 entries the floor(sparsity g^2) smallest but one,
            as in the code; 0 for none. The paper's are 0.6, 0.8 and 0.9 for HunyuanVideo, 0.55 and 0.75 for Wan.
        patch: rows and columns of a region; its tokens fill whole kernel blocks.
        dense_share: share of the evaluations, at the start, that are dense: the paper's.
        dense_above: noise-time above which they are dense as well: the code's is 0.945 for HunyuanVideo, 0.925 for
            Wan, with the first two attentions, or the first, always dense: `dense=(0, 1)`.
        threshold: "head" compares all entries of a head's map, so that rows differ in what they keep; "row" keeps as
            many in every row, which is not the paper's.
        empty: rows that keep no block: "none" leaves them so, as the method does (where no text is seen they give 0);
            "diagonal" gives them their own block, "best" their greatest entry.
        pooling: "max" for the paper's ablation.
    """

    sparsity: Share = 0.75
    patch: tuple[Count, Count] = (8, 16)
    dense_share: Share = 0.25
    dense_above: Fraction = 1.0
    threshold: Threshold = "head"
    empty: Filling = "none"
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if prod(self.patch) % self.block:
            rows, columns = self.patch
            raise ConfigError(
                f"Draft: patch={rows}+{columns} of {rows * columns} tokens, expected a multiple of block={self.block}"
            )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(sparsity=0.5, patch=(2, 4), dense_share=0.0, block=8, kernel="cpu")

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        slots = region_order(grid, self.patch)
        blocks = len(slots) // self.block
        every = torch.ones(blocks, blocks, dtype=torch.bool)
        order, kept = append_dense_rows(slots, every, others, self.block)
        return build_plan(len(slots) + others, block=self.block, order=order, kept=kept, blind=True)

    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        real = None if plan.order is None else plan.order[:image] >= 0
        pooled = (pool_regions(x[:, :, :image], prod(self.patch), real, self.pooling) for x in (q, k))
        regions = self.chosen(draft_map(*pooled))
        each = prod(self.patch) // self.block
        blocks = image // self.block
        kept = torch.ones(*q.shape[:2], *plan.blocks, dtype=torch.bool, device=q.device)
        kept[:, :, :blocks, :blocks] = regions.repeat_interleave(each, 2).repeat_interleave(each, 3)
        return kept

    def chosen(self, draft: Tensor) -> Tensor:
        """Choose the regions that see each other, bool like the draft map [B, N, g, g]."""
        kept = strongest(draft, self.sparsity, self.threshold)
        if self.empty == "none":
            return kept
        lost = ~kept.any(-1, keepdim=True)
        if self.empty == "diagonal":
            own = torch.eye(draft.shape[-1], dtype=torch.bool, device=draft.device)
        else:
            own = torch.zeros_like(kept).scatter_(-1, draft.argmax(-1, keepdim=True), True)
        return kept | (lost & own)

    def share(self, plan: BlockPlan, image: int) -> float:
        rows, columns = plan.blocks
        regions, each = image // prod(self.patch), prod(self.patch) // self.block
        entries = regions if self.threshold == "row" else regions**2
        left = (entries - max(floor(self.sparsity * entries) - 1, 0)) / entries
        left_out = (1 - left) * (regions * each) ** 2
        return (1 - left_out / (rows * columns)) * plan.rows_ratio * (plan.keys / plan.tokens)

    def choosing_macs(self, image: int, q: Tensor) -> int:
        """Count the products of the draft map; means are sums."""
        return prod(q.shape[:2]) * (image // prod(self.patch)) ** 2 * q.shape[-1]

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Drafting:
        self._check(sites, total)
        if self.kernel != "none" and self.first_sparse(total) >= total:
            raise ConfigError(
                f"Draft: dense_share={self.dense_share:g} leaves none of total={total} evaluations sparse"
            )
        return Drafting(self, sites)

    def first_sparse(self, total: int) -> int:
        """Return how many of `total` evaluations begin within the dense share."""
        return ceil(self.dense_share * total - 1e-9)  # 0.1 of 30 is 3, and a bit more in floating point


class Drafting(Selecting):
    """Attention by draft maps, dense at the start."""

    policy: Draft

    def is_dense(self, call: Call, name: str) -> bool:
        policy = self.policy
        early = call.index < policy.first_sparse(call.total) or call.t > policy.dense_above
        return early or super().is_dense(call, name)


def region_order(grid: Grid, patch: tuple[int, int]) -> Tensor:
    """Order tokens frame by frame, patch by patch, row by row inside: the token in each slot, -1 for padding."""
    return group_order(grid, (1, *patch))


def pool_regions(x: Tensor, tokens: int, real: Tensor | None = None, pooling: Pooling = "mean") -> Tensor:
    """Pool each region of x [B, N, g R, K] over its real tokens: [B, N, g, K], at least float32.

    Args:
        tokens: R of a region. real: bool [g R], false for padding; None for none.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cut = x.unflatten(2, (-1, tokens))
    if pooling == "max":
        if real is not None:
            cut = cut.masked_fill(~real.view(-1, tokens, 1), -torch.inf)
        return cut.amax(3).to(wide)
    if real is None:
        return cut.mean(3, dtype=wide)
    held = real.view(-1, tokens, 1)
    return cut.masked_fill(~held, 0).sum(3, dtype=wide) / held.sum(1)


def draft_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) of pooled queries and keys [B, N, g, K]: [B, N, g, g]."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def strongest(draft: Tensor, sparsity: float, threshold: Threshold = "head") -> Tensor:
    """Keep what is at least the floor(sparsity n)-th smallest of the n entries of a head's map, or of a row.

    So one entry more than the others is kept, and all that equal it, as in the code.

    Args:
        draft: [B, N, g, g].
    """
    entries = draft.flatten(2) if threshold == "head" else draft
    dropped = floor(sparsity * entries.shape[-1])
    if dropped == 0:
        return torch.ones_like(draft, dtype=torch.bool)
    least = entries.kthvalue(dropped, -1, keepdim=True).values
    return (entries >= least).view_as(draft)
