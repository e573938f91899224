"""FlexAttention with a plan's own lists: the second backend, and a cross-check that shares no code with the others.

Its `BlockMask` is made from the lists, not by evaluating a mask function on all pairs, and it runs compiled only: in
eager mode FlexAttention ignores the lists and makes the dense scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.ops.block_sparse_attention.plan import FULL, BlockPlan

_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")

SHAPES = 128
"""Shapes of tensors and plans that one process may compile for."""


def attend_flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, L, K] and log-sum-exp [B, N, L], on a GPU; differentiable in both."""
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _call(q, k, v, block_mask=block_mask(plan), scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def flex_out(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> Tensor:
    """Compute the output alone, without gradients: all that FlexAttention gives on a CPU (torch 2.13)."""
    return _call(q.detach(), k.detach(), v.detach(), block_mask=block_mask(plan), scale=scale)


@lru_cache(maxsize=32)
def block_mask(plan: BlockPlan) -> Any:
    """Convert the plan to a `BlockMask`."""
    from torch.nn.attention.flex_attention import BlockMask

    tiles = plan.tile_map
    return BlockMask.from_kv_blocks(
        *_lists(tiles > FULL),
        *_lists(tiles == FULL),
        BLOCK_SIZE=plan.block,
        mask_mod=_mask_mod(plan),
        seq_lengths=(plan.queries, plan.keys),
    )


def _lists(visited: Tensor) -> tuple[Tensor, Tensor]:
    """Build counts and indices, of full width because FlexAttention transposes them."""
    indices = visited.int().argsort(dim=-1, descending=True, stable=True)
    return visited.sum(-1).int(), indices.int()


def _mask_mod(plan: BlockPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`plan.allowed` over plain tensors, which FlexAttention's compiler can lift out of a closure."""
    tile_map, tiles, (bq, bk) = plan.tile_map.clamp(min=0), plan.tiles, plan.block
    batches, heads = plan.batches, plan.heads

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        tile = tile_map[batch % batches, head % heads, query // bq, key // bk]
        return tiles[tile, query % bq, key % bk]

    return allowed


@lru_cache(maxsize=1)
def _whole() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: at the limit of recompilations an error, where the default would go on in eager mode; not dynamic:
    # what torch 2.13 writes for a processor and lengths that vary does not compile
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _call(*args: Any, **kwargs: Any) -> Any:
    off = [name for name in _SWITCHES if os.environ.get(name, "0") not in ("", "0")]
    if off:
        raise ConfigError(
            f"flex: {off[0]}={os.environ[off[0]]} switches torch.compile off, and FlexAttention would make dense "
            "scores; unset it or choose another kernel"
        )
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES):
        return _whole()(*args, **kwargs)
