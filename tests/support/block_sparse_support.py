"""Tensors and plans for tests of block-sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.ops.block_sparse_attention import Attended, BlockPlan, build_plan

K = 8


def qkv(
    queries: int,
    keys: int,
    batch: int = 2,
    heads: int = 3,
    width: int = K,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    lengths = (queries, keys, keys)
    return [torch.randn(batch, heads, n, width, dtype=dtype, requires_grad=True) for n in lengths]


def random_pairs(queries: int, keys: int, batches: int, heads: int, share: float) -> Tensor:
    """Pairs of tokens [batches, heads, queries, keys]: whole empty and full corners, the rest at random."""
    pairs = torch.rand(batches, heads, queries, keys) < share
    pairs[..., : queries // 2, : keys // 2] = False
    pairs[..., queries // 2 :, keys // 2 :] = True
    pairs[..., -1] = True
    return pairs


def of_pairs(pairs: Tensor, block: int | tuple[int, int], **more: object) -> BlockPlan:
    batches, heads, queries, keys = pairs.shape

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pairs[batch, head, query, key]

    return build_plan(queries, keys, block, allowed=allowed, batches=batches, heads=heads, **more)  # type: ignore[arg-type]


def gradients(attended: Attended, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of the output and of the log-sum-exp, the same for equal shapes."""
    generator = torch.Generator().manual_seed(1)
    out, lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in attended)
    return torch.autograd.grad((attended.out * out).sum() + (attended.lse * lse).sum(), inputs)
