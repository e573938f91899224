"""Block plans: the keys that each query sees, block by block, as a pattern decides and every kernel executes.

Tokens are numbered as the model gives them; a plan may put them in another order, its slots, so that tokens which
attend to each other lie in the same blocks. Kernels see slots only.

B batch, N heads, R lists (one for each batch row, head and query block), E blocks listed, M mask tiles.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError

FULL = 0
"""The mask tile that lets every pair through: kernels never read it."""

_ALIVE: WeakValueDictionary[int, BlockPlan] = WeakValueDictionary()
"""Plans by handle. A plan never changes and no handle is given twice, so what is looked up is no state."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Lists of key blocks, the PARTIAL ones of a list before the FULL ones; made by `build_plan`.

    It is compared by identity: a planner is a function of frozen arguments under `functools.lru_cache`, so that equal
    layouts share one plan and what kernels derive from it.

    Args:
        queries, keys: slots of either; the last block may be shorter.
        block: slots of a block of queries, and of keys.
        batches, heads: how many have lists of their own; 1 where all share them.
        start: int32 [R + 1], where each list begins; lists are in the order of [batches, heads, query blocks].
        index: int32 [E], key blocks.
        tile: int32 [E], `FULL`, or which of `tiles` says the pairs of a PARTIAL block.
        tiles: bool [M, *block], each once: the blocks of a periodic pattern are few.
        order: int64 [queries], the token in each slot, -1 for padding that nobody sees; None for the model's order.
            Slots of keys beyond it hold tokens beyond it (pooled keys).
        blind: whether queries may see no key.
        handle: an integer for `plan_of`.
    """

    queries: int
    keys: int
    block: tuple[int, int]
    batches: int
    heads: int
    start: Tensor
    index: Tensor
    tile: Tensor
    tiles: Tensor
    order: Tensor | None = None
    blind: bool = False
    handle: int = field(init=False, default_factory=count().__next__)

    def __post_init__(self) -> None:
        _ALIVE[self.handle] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy in this process or another has a handle of its own
        return BlockPlan, tuple(getattr(self, part.name) for part in fields(self) if part.init)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.queries // self.block[0]), -(-self.keys // self.block[1])

    @property
    def visited(self) -> int:
        """Blocks listed, over all lists."""
        return len(self.index)

    @property
    def partial(self) -> int:
        """PARTIAL blocks listed."""
        return int((self.tile != FULL).sum())

    @property
    def rows_ratio(self) -> float:
        """Slots of queries over their tokens: what layers that work row by row pay for; 1 without padding."""
        return self.queries / len(self.inverse)

    @property
    def density(self) -> float:
        """The share of dense attention that a kernel pays for; without padding, the share of blocks visited."""
        rows, columns = self.blocks
        share = self.visited / (self.batches * self.heads * rows * columns)
        return share * self.rows_ratio * (self.keys / self.tokens)

    @cached_property
    def tokens(self) -> int:
        """Key tokens, without padding."""
        return self.keys if self.order is None else len(self.inverse) + self.keys - self.queries

    @property
    def device(self) -> torch.device:
        return self.index.device

    @cached_property
    def counts(self) -> Tensor:
        """Key blocks of each list, and how many of them are PARTIAL: int64 [2, R]."""
        total = self.start.diff().long()
        partial = torch.zeros_like(total).index_add_(0, self.list_of, (self.tile != FULL).long())
        return torch.stack((total, partial))

    @cached_property
    def list_of(self) -> Tensor:
        """The list that each listed block stands in, int64 [E]."""
        lists = torch.arange(len(self.start) - 1, device=self.device)
        return lists.repeat_interleave(self.start.diff().long())

    @cached_property
    def real(self) -> Tensor:
        """Slots of queries that hold a token, bool [query blocks, block]."""
        rows, _ = self.blocks
        slots = torch.zeros(rows * self.block[0], dtype=torch.bool, device=self.device)
        slots[: self.queries] = True if self.order is None else self.order >= 0
        return slots.view(rows, -1)

    @cached_property
    def visible_keys(self) -> Tensor:
        """Keys that each query sees, int64 [batches, heads, queries]; 0 for padding."""
        rows, _ = self.blocks
        each = self.tiles.sum(-1)[self.tile.long()]
        lists = each.new_zeros(len(self.start) - 1, self.block[0]).index_add_(0, self.list_of, each)
        visible_keys = lists.view(self.batches, self.heads, rows, -1) * self.real
        return visible_keys.flatten(2)[..., : self.queries]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over all lists."""
        return int(self.visible_keys.sum())

    @cached_property
    def inverse(self) -> Tensor:
        """The slot of each token, int64 [tokens]: what brings outputs back to the model's order."""
        if self.order is None:
            return torch.arange(self.queries, device=self.device)
        held = self.order >= 0
        inverse = torch.empty(int(held.sum()), dtype=torch.long, device=self.device)
        inverse[self.order[held]] = held.nonzero().squeeze(1)
        return inverse

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same blocks by key block, PARTIAL ones first, for the gradients of keys and values.

        Returns:
            start: int32 [batches heads (key blocks) + 1].
            partial: int32 [batches heads (key blocks)], how many of each are PARTIAL.
            entry: int32 [E], places in `index`; their query block is `list_of` modulo the query blocks.
        """
        rows, columns = self.blocks
        column, full = self.list_of // rows * columns + self.index, (self.tile == FULL).long()
        count = torch.zeros(2, self.batches * self.heads * columns, dtype=torch.long, device=self.device)
        count[0].index_add_(0, column, torch.ones_like(column))
        count[1].index_add_(0, column, 1 - full)
        start = F.pad(count[0].cumsum(0), (1, 0))
        return start.int(), count[1].int(), (2 * column + full).argsort(stable=True).int()

    @cached_property
    def tile_map(self) -> Tensor:
        """The mask tile of every block, -1 where it is not visited: int32 [batches, heads, *blocks]."""
        rows, columns = self.blocks
        tiles = self.tile.new_full((len(self.start) - 1, columns), -1)
        tiles[self.list_of, self.index.long()] = self.tile
        return tiles.view(self.batches, self.heads, rows, columns)

    def allowed(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether slots see each other, for index tensors that broadcast: FlexAttention's `mask_mod`.

        Within blocks that are visited; of others it says nothing.
        """
        batch, head = batch % self.batches, head % self.heads
        tile = self.tile_map[batch, head, query // self.block[0], key // self.block[1]]
        return self.tiles[tile.clamp(min=0), query % self.block[0], key % self.block[1]]

    def mask(self) -> Tensor:
        """Every pair of slots, bool [batches, heads, queries, keys]: for tests and drawings of short sequences."""
        tiles = self.tile_map
        pairs = self.tiles[tiles.clamp(min=0).long()] & (tiles >= 0)[..., None, None]
        pairs = pairs.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return pairs[:, :, : self.queries, : self.keys]

    @cached_property
    def derived(self) -> dict[Hashable, BlockPlan]:
        """Plans made of this one, which are kept as long as it is."""
        return {}

    @cached_property
    def padded(self) -> dict[tuple[int, bytes], BlockPlan]:
        """This plan for prompts of different length, by the number of prompts and which of their tokens are real."""
        return {}

    def to(self, device: torch.device | str) -> BlockPlan:
        """Return this plan with its tensors on `device`, copied once."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if device not in self.derived:
            order = None if self.order is None else self.order.to(device)
            moved = {name: getattr(self, name).to(device) for name in ("start", "index", "tile", "tiles")}
            self.derived[device] = replace(self, **moved, order=order)
        return self.derived[device]

    def bytes(self) -> int:
        """Memory of the lists and tiles."""
        return sum(t.numel() * t.element_size() for t in (self.start, self.index, self.tile, self.tiles))


def plan_of(handle: int) -> BlockPlan:
    """Look up the plan of a handle.

    Raises:
        ConfigError: nobody keeps it any more.
    """
    plan = _ALIVE.get(handle)
    if plan is None:
        raise ConfigError(f"block plan {handle} is gone; keep a plan as long as compiled functions use it")
    return plan


def refuse_blind(plan: BlockPlan) -> BlockPlan:
    """Return the plan if its queries all see a key, or it is declared that some may not.

    Raises:
        ShapeError: a query sees none; its softmax would be over nothing.
    """
    if plan.blind:
        return plan
    blind = (plan.visible_keys == 0) & plan.real.flatten()[: plan.queries]
    if blind.any():
        batch, head, slot = blind.nonzero()[0].tolist()
        token = slot if plan.order is None else int(plan.order[slot])
        raise ShapeError(
            f"block plan: query {token} (batch row {batch}, head {head}) sees no key, and so do "
            f"{int(blind.sum()) - 1} others of {blind.numel()}; each needs one"
        )
    return plan
