"""Block-sparse attention on a processor: by the compiled kernel of `native`, where it can be had, or by torch.

By torch lists of equal length come in chunks, their key blocks gathered for two products.

A chunk's scores stay in the second-level cache, so gathering costs a few per cent, and dense blocks of them are what
`torch.bmm` is fast at. All arithmetic is float32 (float64 for float64): bf16 is widened while it is gathered.

B batch, N heads, C lists of a chunk, n key blocks of each, K head width; a list is one query block of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.ops.block_sparse_attention import native
from ditkit.ops.block_sparse_attention.plan import BlockPlan

SCORES = 2**19
"""Scores of a chunk: 2 MB. Chunks of 2**18 to 2**20 measured alike, longer ones leave the cache."""


BACKWARD = (3, 2)
"""Products of width K and of width Kv in the backward pass: scores, d_q, d_k; d_v and the gradient of the weights."""


class Chunk(NamedTuple):
    """Lists of equal length."""

    rows: Tensor
    """[C] of the query blocks of all heads."""
    blocks: Tensor
    """[C n] of the key blocks of all heads."""
    hidden: Tensor | None
    """bool [C, query block, p, key block]: pairs not allowed, in the first p blocks of each list; None for none."""


def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, L, Kv] and log-sum-exp [B, N, L] of a plan."""
    if native.is_there(q.dtype):
        return native.forward(q, k, v, plan, scale)
    (bq, bk), wide = plan.block, torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = _blocks(q, bq), _blocks(k, bk), _blocks(v, bk)
    out = q.new_zeros(len(queries), bq, v.shape[-1])
    lse = torch.full((len(queries), bq, 1), -torch.inf, dtype=wide)
    for rows, blocks, hidden in _chunks(plan, *q.shape[:2]):
        scores = _scores(queries, keys, rows, blocks, hidden, scale, wide)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        lse[rows] = top + total.log()
        weighted = torch.bmm(scores, _gather(values, blocks, len(rows), wide))
        out[rows] = weighted.div_(total.masked_fill_(total == 0, 1)).to(out.dtype)
    return _tokens(out, q), _tokens(lse, q).squeeze(-1)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients, given those of both outputs.

    A score's is weight (d_out v^T - (d_out . out) + d_lse), so the output needs no second pass.
    """
    if native.is_there(q.dtype):
        return native.backward(d_out, d_lse, q, k, v, out, lse, plan, scale)
    (bq, bk), wide = plan.block, lse.dtype
    queries, keys, values, d_outs = _blocks(q, bq), _blocks(k, bk), _blocks(v, bk), _blocks(d_out, bq)
    shift = _blocks(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None], bq)
    inner = _blocks((d_out.to(wide) * out.to(wide)).sum(-1, keepdim=True) - d_lse[..., None], bq)
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=wide) for x in (queries, keys, values))
    for rows, blocks, hidden in _chunks(plan, *q.shape[:2]):
        weight = _scores(queries, keys, rows, blocks, hidden, scale, wide).sub_(shift[rows]).exp_()
        d_row = d_outs[rows].to(wide)
        d_v.index_add_(0, blocks, torch.bmm(weight.mT, d_row).view(len(blocks), bk, -1))
        d_scores = torch.bmm(d_row, _gather(values, blocks, len(rows), wide).mT)
        d_scores.sub_(inner[rows]).mul_(weight)
        d_q[rows] = torch.bmm(d_scores, _gather(keys, blocks, len(rows), wide))
        d_k.index_add_(0, blocks, torch.bmm(d_scores.mT, queries[rows].to(wide)).view(len(blocks), bk, -1))
    d_q, d_k, d_v = _tokens(d_q.mul_(scale), q), _tokens(d_k.mul_(scale), k), _tokens(d_v, v)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _chunks(plan: BlockPlan, batch: int, heads: int) -> Iterator[Chunk]:
    """All lists of all heads that are not empty, longest first."""
    rows, columns = plan.blocks
    batches, own = torch.arange(batch) % plan.batches, torch.arange(heads) % plan.heads
    lists = (batches[:, None, None] * plan.heads + own[:, None]) * rows + torch.arange(rows)
    lists = lists.flatten()
    total, partial = plan.counts[:, lists]
    ordered = (total * (columns + 1) + partial).argsort(descending=True, stable=True)
    lengths, sizes = total[ordered].unique_consecutive(return_counts=True)
    for length, group in zip(lengths.tolist(), ordered.split(sizes.tolist()), strict=True):
        if length == 0:
            continue
        for some in group.split(max(1, SCORES // (length * plan.block[0] * plan.block[1]))):
            entry = plan.start[lists[some], None] + torch.arange(length)
            blocks = plan.index[entry] + some[:, None] // rows * columns
            masked = int(partial[some].amax())
            yield Chunk(some, blocks.flatten().long(), _hidden(plan, plan.tile[entry[:, :masked]]))


def _hidden(plan: BlockPlan, tile: Tensor) -> Tensor | None:
    return None if tile.numel() == 0 else ~plan.tiles[tile.long()].transpose(1, 2)


def _scores(
    queries: Tensor,
    keys: Tensor,
    rows: Tensor,
    blocks: Tensor,
    hidden: Tensor | None,
    scale: float,
    wide: torch.dtype,
) -> Tensor:
    """Scores of a chunk, [C, query block, n key block], -inf for pairs that are hidden."""
    gathered = _gather(keys, blocks, len(rows), wide)
    scores = torch.bmm(queries[rows].to(wide).mul_(scale), gathered.mT)
    if hidden is not None:
        split = scores.unflatten(-1, (-1, hidden.shape[-1]))
        split[:, :, : hidden.shape[2]].masked_fill_(hidden, -torch.inf)
    return scores


def _gather(blocks_of: Tensor, blocks: Tensor, lists: int, wide: torch.dtype) -> Tensor:
    """[C, n key block, K] of key blocks [.., key block, K]."""
    return blocks_of.index_select(0, blocks).to(wide).view(lists, -1, blocks_of.shape[-1])


def _blocks(x: Tensor, side: int) -> Tensor:
    """[B, N, L, K] to the blocks of all heads [B N blocks, side, K], the last of a head filled with zeros."""
    spare = -x.shape[2] % side
    return (F.pad(x, (0, 0, 0, spare)) if spare else x).reshape(-1, side, x.shape[-1])


def _tokens(blocks: Tensor, like: Tensor) -> Tensor:
    """Blocks of all heads back to [B, N, L, K], with the heads and length of `like`."""
    batch, heads, length, _ = like.shape
    return blocks.view(batch, heads, -1, blocks.shape[-1])[:, :, :length]
