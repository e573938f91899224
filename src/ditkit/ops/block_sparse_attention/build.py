"""Plans from block lists, from a function of tokens, or both; no N x N mask is ever made.

B batch, L tokens, E blocks looked at, R lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError
from ditkit.ops.block_sparse_attention.plan import FULL, BlockPlan, refuse_blind

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`allowed(batch, head, query, key)`: bool, for int64 tensors of tokens that broadcast to [E, queries, keys]."""

PAIRS = 2**18
"""Pairs of tokens that are looked at together: an int64 intermediate of 2 MB stays in the second-level cache."""


def build_plan(
    queries: int,
    keys: int | None = None,
    block: int | tuple[int, int] = 128,
    *,
    order: Tensor | None = None,
    kept: Tensor | None = None,
    allowed: Allowed | None = None,
    batches: int = 1,
    heads: int = 1,
    blind: bool = False,
) -> BlockPlan:
    """Build the plan that visits the blocks `kept`, and in them the pairs `allowed`; neither given, the dense plan.

    Args:
        queries, keys: slots; as many keys as queries unless said.
        block: side of a block, or those of queries and of keys.
        order: the token in each slot of queries, -1 for padding; keys beyond it are tokens beyond it.
        kept: bool, broadcast to [batches, heads, query blocks, key blocks]: blocks of slots. With `allowed` a bound
            that spares looking at the others.
        allowed: a function of tokens, in the model's order; None for all pairs.
        batches, heads: how many have lists of their own.
        blind: take queries that see no key, for parts that `merge` puts together: output 0, log-sum-exp -inf.

    Raises:
        ShapeError: lengths do not fit each other, or a query sees no key.
        ConfigError: a block's side is no power of two from 8 to 256.
    """
    keys = queries if keys is None else keys
    sides = (block, block) if isinstance(block, int) else block
    if min(queries, keys) < 1:
        raise ShapeError(f"block plan: {queries} queries and {keys} keys, expected at least one of each")
    if any(side & (side - 1) or not 8 <= side <= 256 for side in sides):
        raise ConfigError(f"block plan: block={block}, expected powers of two from 8 to 256")
    if order is not None:
        _check_order(order, queries, keys)
    empty = torch.empty(0, dtype=torch.int32)
    tiles = torch.ones(1, *sides, dtype=torch.bool)
    plan = BlockPlan(queries, keys, sides, batches, heads, empty, empty, empty, tiles, order, blind)
    flat, bank = _candidates(plan, kept), _Bank(tiles)
    tile = torch.full((len(flat),), FULL, dtype=torch.int32)
    look = torch.ones(len(flat), dtype=torch.bool) if allowed is not None else _with_padding(plan, flat)
    for some in look.nonzero().squeeze(1).split(max(1, PAIRS // (sides[0] * sides[1]))):
        tile[some] = _look(plan, flat[some], allowed, bank)
    visited = tile >= 0
    return refuse_blind(_listed(plan, flat[visited], tile[visited], bank.tiles()))


def dense_plan(plan: BlockPlan) -> BlockPlan:
    """Build the plan of the same slots in which every query sees every real key, once: for dense sums by a kernel."""
    if "dense" not in plan.derived:
        order = None if plan.order is None else plan.order.cpu()
        dense = build_plan(plan.queries, plan.keys, plan.block, order=order, blind=plan.blind)
        plan.derived["dense"] = dense.to(plan.device)
    return plan.derived["dense"]


def narrowed(plan: BlockPlan, kept: Tensor) -> BlockPlan:
    """Narrow the plan to those blocks that are also `kept`, under its own mask tiles, on its own device.

    For what is decided from queries and keys, anew in each evaluation: no pair is looked at.

    Args:
        kept: bool [B, N, query blocks, key blocks]; B and N are the new plan's batches and heads.

    Raises:
        ShapeError: another shape than the plan's, or a query sees no key.
    """
    if kept.ndim != 4 or kept.shape[2:] != plan.blocks or kept.dtype != torch.bool:
        raise ShapeError(
            f"block plan: kept {kept.dtype} {list(kept.shape)}, expected torch.bool [B, N, "
            f"{', '.join(map(str, plan.blocks))}]"
        )
    for what, own, given in (("batches", plan.batches, len(kept)), ("heads", plan.heads, kept.shape[1])):
        if own not in (1, given):
            raise ShapeError(f"block plan: kept {list(kept.shape)} for a plan of {own} {what}")
    tile = torch.where(kept, plan.tile_map, -1).flatten()
    flat = (tile >= 0).nonzero().squeeze(1)
    wide = replace(plan, batches=len(kept), heads=kept.shape[1])
    return refuse_blind(_listed(wide, flat, tile[flat], plan.tiles))


def block_map(index: Tensor, count: Tensor, key_blocks: int) -> Tensor:
    """Turn explicit lists into `kept`: `index` [..., W], of which the first `count` [...] are meant.

    Raises:
        ShapeError: an index beyond the key blocks, or a count beyond the lists.
    """
    meant = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    listed = index[meant]
    if int(count.amax()) > index.shape[-1] or (
        listed.numel() and not 0 <= int(listed.amin()) <= int(listed.amax()) < key_blocks
    ):
        raise ShapeError(
            f"block lists: up to {int(count.amax())} of {index.shape[-1]} indices, the greatest "
            f"{int(index.amax())}; expected blocks 0 to {key_blocks - 1}"
        )
    spare = torch.where(meant, index.long(), key_blocks)
    kept = torch.zeros(*index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=index.device)
    return kept.scatter_(-1, spare, True)[..., :key_blocks]


def near_blocks(places: Tensor, block: int | tuple[int, int], reach: tuple[int, ...]) -> Tensor:
    """Compute `kept` of a window: blocks with tokens that may lie within `reach` of each other on every axis.

    Args:
        places: coordinates of the token in each slot, [slots, axes].
        reach: the greatest distance on each axis.

    Returns:
        bool [query blocks, key blocks], by the boxes around blocks, so blocks that hold no such pair may be in it.
    """
    sides = (block, block) if isinstance(block, int) else block
    boxes = [[torch.stack(end) for end in zip(*map(_box, places.split(side)), strict=True)] for side in sides]
    (q_low, q_high), (k_low, k_high) = boxes
    gap = torch.maximum(k_low - q_high[:, None], q_low[:, None] - k_high)
    return (gap <= torch.tensor(reach)).all(-1)


def _box(places: Tensor) -> tuple[Tensor, Tensor]:
    return places.amin(0), places.amax(0)


def with_valid(plan: BlockPlan, valid: Tensor) -> BlockPlan:
    """`plan` for prompts of different length: keys that are padding are seen by nobody, so they change no bit.

    Args:
        valid: bool [B, M'], for the first M' key tokens in the model's order; those after them are all real.

    Raises:
        ShapeError: another batch than the plan's, more tokens than keys, or a query sees no key.
    """
    batch, length = valid.shape
    if plan.batches not in (1, batch) or length > plan.tokens:
        wanted = "B" if plan.batches == 1 else plan.batches
        raise ShapeError(f"block plan: valid {list(valid.shape)}, expected at most [{wanted}, {plan.tokens}]")
    if bool(valid.all()):
        return plan
    if plan.device.type != "cpu":
        return with_valid(plan.to("cpu"), valid).to(plan.device)
    tokens = _key_tokens(plan.order, plan.queries, plan.keys)
    rows, columns = plan.blocks
    every = torch.ones(batch, columns * plan.block[1] + 1, dtype=torch.bool)
    every[:, :length] = valid.cpu()
    real = torch.ones(batch, columns * plan.block[1], dtype=torch.bool)
    real[:, : plan.keys] = every[
        :, tokens
    ]  # -1, a pad slot, takes the last, which is true: its tile hides it
    real = real.view(batch, columns, -1)

    lists = plan.heads * rows
    copies = batch // plan.batches
    sample = plan.list_of // lists + torch.arange(copies)[:, None]
    row = (plan.list_of % lists + sample * lists).flatten()
    sample, index, tile = sample.flatten(), plan.index.repeat(copies).long(), plan.tile.repeat(copies)

    bank = _Bank(plan.tiles)
    some = real.any(-1)[sample, index] & ~real.all(-1)[sample, index]
    distinct = torch.stack((tile[some].long(), sample[some], index[some]), 1)
    distinct, where = distinct.unique(dim=0, return_inverse=True)
    cut = plan.tiles[distinct[:, 0]] & real[distinct[:, 1], distinct[:, 2]][:, None]
    tile[some] = torch.where(cut.any((1, 2)), bank.put(cut), -1)[where]
    tile[~real.any(-1)[sample, index]] = -1

    keep = tile >= 0
    wide = replace(plan, batches=batch)
    return refuse_blind(_listed(wide, (row * columns + index)[keep], tile[keep], bank.tiles()))


class _Bank:
    """Mask tiles, each kept once; the first lets every pair through."""

    def __init__(self, tiles: Tensor) -> None:
        self.block = tiles.shape[1:]
        self.ids: dict[bytes, int] = {}
        self.put(tiles)

    def put(self, tiles: Tensor) -> Tensor:
        """Store `tiles` [E, *block] and return the index of each, int32 [E]."""
        packed = np.packbits(tiles.flatten(1).numpy(), axis=1)
        ids = [self.ids.setdefault(bits.tobytes(), len(self.ids)) for bits in packed]
        return torch.tensor(ids, dtype=torch.int32)

    def tiles(self) -> Tensor:
        bits = np.unpackbits(np.frombuffer(b"".join(self.ids), dtype=np.uint8))
        return torch.from_numpy(bits.astype(bool)).view(-1, *self.block)


def _check_order(order: Tensor, queries: int, keys: int) -> None:
    held = order[order >= 0].sort().values
    if len(order) != queries or keys < queries or not torch.equal(held, torch.arange(len(held))):
        raise ShapeError(
            f"block plan: an order of {len(order)} slots for {queries} queries and {keys} keys, expected one slot a "
            "query, at least as many keys, and each token once"
        )


def _candidates(plan: BlockPlan, kept: Tensor | None) -> Tensor:
    """Places in [batches, heads, *blocks] of the blocks to look at, int64 [E]."""
    shape = (plan.batches, plan.heads, *plan.blocks)
    if kept is None:
        return torch.arange(shape[0] * shape[1] * shape[2] * shape[3])
    try:
        whole = kept.cpu().expand(shape)
    except RuntimeError as error:
        raise ShapeError(f"block plan: kept {list(kept.shape)}, expected {list(shape)}") from error
    return whole.flatten().nonzero().squeeze(1)


def _look(plan: BlockPlan, flat: Tensor, allowed: Allowed | None, bank: _Bank) -> Tensor:
    """Find the mask tile of each block of `flat` [E], -1 where no query sees a key: int32 [E]."""
    rows, columns = plan.blocks
    row, column = flat // columns, flat % columns
    queries, keys = _slots(plan)
    query, key = queries[row % rows, :, None], keys[column, None]
    pairs = (key >= 0).expand(-1, plan.block[0], -1)
    if allowed is not None:
        lists = row[:, None, None] // rows
        batch, head = lists // plan.heads, lists % plan.heads
        pairs = pairs & allowed(batch, head, query.clamp(min=0), key.clamp(min=0))
    met = (pairs & (query >= 0)).any((1, 2))
    # rows that nobody reads see what is real, so that they do not make a block PARTIAL
    pairs = torch.where(query >= 0, pairs, key >= 0)
    ids = torch.full((len(flat),), -1, dtype=torch.int32)
    ids[met] = FULL
    masked = met & ~pairs.all(2).all(1)
    ids[masked] = bank.put(pairs[masked])
    return ids


def _key_tokens(order: Tensor | None, queries: int, keys: int) -> Tensor:
    """Compute the token in each slot of keys, int64 [keys], -1 for padding."""
    if order is None:
        return torch.arange(keys)
    tokens = int((order >= 0).sum())
    return torch.cat((order.cpu(), torch.arange(tokens, tokens + keys - queries)))


def _slots(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Compute the token in each slot of each block of queries and of keys, int64 [blocks, block], -1 for padding."""
    queries = torch.arange(plan.queries) if plan.order is None else plan.order.cpu()
    return _cut(queries, plan.block[0]), _cut(_key_tokens(plan.order, plan.queries, plan.keys), plan.block[1])


def _cut(tokens: Tensor, side: int) -> Tensor:
    return F.pad(tokens, (0, -len(tokens) % side), value=-1).view(-1, side)


def _with_padding(plan: BlockPlan, flat: Tensor) -> Tensor:
    """Find the blocks of `flat` [E] with a key that is padding, or with queries that all are: bool [E]."""
    rows, columns = plan.blocks
    queries, keys = _slots(plan)
    return (keys < 0).any(1)[flat % columns] | (queries < 0).all(1)[flat // columns % rows]


def _listed(plan: BlockPlan, flat: Tensor, tile: Tensor, tiles: Tensor) -> BlockPlan:
    """`plan` with the blocks `flat` [E] of [batches, heads, *blocks] and their mask tiles, in the order of kernels."""
    rows, columns = plan.blocks
    row, column = flat // columns, flat % columns
    at = ((2 * row + (tile == FULL)) * columns + column).argsort()
    count = torch.bincount(row, minlength=plan.batches * plan.heads * rows)
    start = torch.cat((count.new_zeros(1), count.cumsum(0)))
    return replace(plan, start=start.int(), index=column[at].int(), tile=tile[at], tiles=tiles)
