"""The definition: softmax over the keys that a mask lets through, and its log-sum-exp.

B batch, N heads, L queries, M keys, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Attended(NamedTuple):
    """Attention and what it was divided by."""

    out: Tensor
    """[B, N, L, K], in the type of the queries; 0 where a query sees no key."""
    lse: Tensor
    """[B, N, L], float32 or float64: log of the sum of e^score over the keys seen; -inf for none."""


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Attended:
    """softmax(scale q k^T) v over the keys in `mask`, bool, broadcast to [B, N, L, M]; slow, the truth for tests."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weight = (scores - finite(lse)[..., None]).exp()
    return Attended((weight @ v.to(wide)).to(q.dtype), lse)


def merge(*parts: Attended) -> Attended:
    """Attention over the union of disjoint sets of keys, exactly, from that over each (text, halos, pooled keys)."""
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    shares = [(part.lse - finite(lse)).exp()[..., None] for part in parts]
    out = sum((share * part.out for share, part in zip(shares, parts, strict=True)), start=shares[0] * 0)
    return Attended(out.to(parts[0].out.dtype), lse)


def finite(lse: Tensor) -> Tensor:
    """`lse` with 0 for queries that see no key, so that e^(-inf - lse) is 0 and no NaN."""
    return lse.masked_fill(lse == -torch.inf, 0)
