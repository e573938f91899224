"""What attention patterns are measured against: blocks without a thought, the best blocks, attention not computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.dynamic import Dynamic
from ditkit.attention.pattern import Pattern, append_dense_rows
from ditkit.core.grid import Grid
from ditkit.core.policy import Claim, Key, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.ops.block_sparse_attention import BlockPlan, build_plan


@dataclass(frozen=True)
class Blocks(Pattern):
    """`each` blocks of keys for every block of queries, in raster order; rows of text see all and are seen by all."""

    each: int = 1

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        blocks = -(-grid.length // self.block)
        kept = torch.zeros(blocks, blocks, dtype=torch.bool).scatter_(1, self.chosen(blocks), True)
        return raster_plan(grid, others, self.block, kept)

    @abstractmethod
    def chosen(self, blocks: int) -> Tensor:
        """Key blocks of each block of queries, its own among them: int64 [blocks, each]."""


@dataclass(frozen=True)
class RandomBlocks(Blocks):
    """A block's own keys, and others drawn at random."""

    def chosen(self, blocks: int) -> Tensor:
        draw = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
        return draw.fill_diagonal_(1).topk(self.each).indices


@dataclass(frozen=True)
class Diagonal(Blocks):
    """The nearest in the order of the sequence; at its ends, where one side has too few, more of the other."""

    def chosen(self, blocks: int) -> Tensor:
        first = (torch.arange(blocks) - self.each // 2).clamp(0, blocks - self.each)
        return first[:, None] + torch.arange(self.each)


@dataclass(frozen=True)
class BestBlocks(Dynamic):
    """The `each` blocks to which a block's queries give most weight, sample by sample and head by head; of text too.

    No pattern with as many for each block of queries in this order of tokens can keep more of the softmax. It makes all
    scores to know them: a bound, not a method.
    """

    each: int = 1

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        blocks = -(-grid.length // self.block)
        return raster_plan(grid, others, self.block, torch.ones(blocks, blocks, dtype=torch.bool))

    def share(self, plan: BlockPlan, image: int) -> float:
        return min(1.0, self.each / plan.blocks[1])

    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        rows, columns = plan.blocks
        hidden = ~(plan.mask() & plan.real.flatten()[: plan.queries, None])
        scores = (q @ k.mT * q.shape[-1] ** -0.5).float().masked_fill(hidden, -torch.inf)
        spare = (0, columns * self.block - plan.keys, 0, rows * self.block - plan.queries)
        weight = F.pad(scores.softmax(-1).nan_to_num(0), spare)
        mass = weight.unflatten(-1, (columns, -1)).unflatten(2, (rows, -1)).sum((3, 5))
        best = mass.topk(min(self.each, columns)).indices
        return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)


def raster_plan(grid: Grid, others: int, block: int, kept: Tensor) -> BlockPlan:
    """The plan of tokens in the model's order, the last block of the image filled with padding."""
    slots = F.pad(torch.arange(grid.length), (0, -grid.length % block), value=-1)
    order, kept = append_dense_rows(slots, kept, others, block)
    return build_plan(len(slots) + others, block=block, order=order, kept=kept)


@dataclass(frozen=True)
class Reuse(Policy):
    """Dense attention in `calls` evaluations, evenly spread, whose output the others take over; 0 is in all."""

    calls: int

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(attended(sites), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Reusing:
        return Reusing(list(attended(sites)), {i * total // self.calls for i in range(self.calls)})

    def exact(self) -> Reuse:
        return replace(self, calls=0)


class Reusing(Session):
    """The latest output of each attention.

    Args:
        due: evaluations that are dense; none: all.
    """

    verb = "reused"

    def __init__(self, names: Sequence[str], due: set[int]) -> None:
        super().__init__()
        self.names, self.due = names, due

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if not self.due:
            return {}
        handler = self.compute if call.index in self.due else self.reuse
        return {name: partial(handler, (call.net, call.lane, name)) for name in self.names}

    def compute(self, key: Key, fn: Handler, *args: Tensor) -> Tensor:
        out: Tensor = fn(*args)
        self.put(key, out)
        return out

    def reuse(self, key: Key, fn: Handler, *args: Tensor) -> Tensor:
        kept: Tensor = self.state[key]
        return kept
