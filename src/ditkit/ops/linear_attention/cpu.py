"""Linear attention over blocks by dense products: a state for each key block, summed for each query block.

The state of a block is phi(K)^T [V 1], so that its last column is the denominator's. Sums are float32 (float64 for
float64).

B batch, N heads, L queries, M keys, K width of features, Kv of values, r query blocks, n key blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.ops.linear_attention.aggregate import Aggregation, aggregate

Block = tuple[int, int]


def forward(
    q: Tensor, k: Tensor, v: Tensor, taken: Tensor, block: Block, how: Aggregation
) -> tuple[Tensor, Tensor]:
    """Numerator [B, N, L, Kv] and denominator [B, N, L]."""
    states = _states(_blocks(k, block[1]), _with_ones(_blocks(v, block[1])), taken)
    found = _blocks(q, block[0]) @ aggregate(states, taken.flatten(0, 1), how).view(-1, *_sides(k, v))
    whole = _tokens(found, q)
    return whole[..., :-1].contiguous(), whole[..., -1].contiguous()


def backward(
    d_numerator: Tensor,
    d_denominator: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taken: Tensor,
    block: Block,
    how: Aggregation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients; those of a block's state are summed over the query blocks that take it in."""
    queries, keys = _blocks(q, block[0]), _blocks(k, block[1])
    values = _with_ones(_blocks(v, block[1]))
    d_out = _blocks(torch.cat((d_numerator, d_denominator[..., None]), -1), block[0])
    sides, flat = _sides(k, v), taken.flatten(0, 1)
    summed = aggregate(_states(keys, values, taken), flat, how).view(-1, *sides)
    d_q = d_out @ summed.mT
    d_summed = (queries.mT @ d_out).view(len(flat), flat.shape[1], -1)
    d_states = aggregate(d_summed, flat.mT.contiguous(), how).view(-1, *sides)
    d_k, d_v = values @ d_states.mT, (keys @ d_states)[..., :-1]
    return _tokens(d_q, q).to(q.dtype), _tokens(d_k, k).to(k.dtype), _tokens(d_v, v).to(v.dtype)


def _states(keys: Tensor, values: Tensor, taken: Tensor) -> Tensor:
    """phi(K)^T [V 1] of every key block, [B N, n, K (Kv + 1)]."""
    return (keys.mT @ values).view(-1, taken.shape[3], keys.shape[-1] * values.shape[-1])


def _sides(k: Tensor, v: Tensor) -> tuple[int, int]:
    return k.shape[-1], v.shape[-1] + 1


def _blocks(x: Tensor, side: int) -> Tensor:
    """[B, N, L, K] to the blocks of all heads [B N blocks, side, K], the last of a head filled with zeros."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.pad(x, (0, 0, 0, -x.shape[2] % side)).reshape(-1, side, x.shape[-1])


def _with_ones(blocks: Tensor) -> Tensor:
    """Append the column of ones; rows beyond the last key have features of 0."""
    return F.pad(blocks, (0, 1), value=1.0)


def _tokens(blocks: Tensor, like: Tensor) -> Tensor:
    batch, heads, length, _ = like.shape
    return blocks.reshape(batch, heads, -1, blocks.shape[-1])[:, :, :length]
