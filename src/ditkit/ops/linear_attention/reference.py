"""The definition: for each query, sums over the keys of the blocks that its own block takes in.

B batch, N heads, L queries, M keys, K width of features, Kv of values, r query blocks, n key blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FeatureMap = Literal["softmax", "elu", "relu"]


class Sums(NamedTuple):
    """Both sides of the fraction that linear attention is; at least float32."""

    numerator: Tensor
    """phi(q) sum_j phi(k_j)^T v_j, [B, N, L, Kv]."""
    denominator: Tensor
    """phi(q) . sum_j phi(k_j), [B, N, L]."""


def feature_map(x: Tensor, kind: FeatureMap) -> Tensor:
    """phi(x) [..., K]: softmax over the width, elu + 1, or relu; none is negative."""
    if kind == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if kind == "elu" else F.relu(x)


def sums_reference(q: Tensor, k: Tensor, v: Tensor, taken: Tensor, block: tuple[int, int]) -> Sums:
    """Sum over every pair, slowly: the truth for tests, differentiable by autograd.

    Args:
        q, k: features [B, N, L, K] and [B, N, M, K]. v: [B, N, M, Kv].
        taken: bool [B, N, r, n], whether the queries of a block take in the keys of another.
        block: sides of a block of queries and of keys; the last of either may be shorter.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    pairs = taken.repeat_interleave(block[0], 2)[:, :, : q.shape[2]]
    pairs = pairs.repeat_interleave(block[1], 3)[..., : k.shape[2]]
    weight = (q.to(wide) @ k.to(wide).mT) * pairs
    return Sums(weight @ v.to(wide), weight.sum(-1))
