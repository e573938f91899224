"""Attention over blocks that a map names, which some operation before has made, as one operation of torch.

Like that of `chosen`, for a router whose map others need as well.

B batch, N heads, L queries, M keys, K width of queries and keys, Kv of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkit.ops.block_sparse_attention.build import narrowed
from ditkit.ops.block_sparse_attention.operation import _module, for_valid
from ditkit.ops.block_sparse_attention.plan import BlockPlan, plan_of


def mapped_plan(plan: BlockPlan, kept: Tensor, valid: Tensor | None) -> BlockPlan:
    """Narrow a plan to the blocks of a map, on the map's device; `valid` as in `for_valid`."""
    return narrowed(for_valid(plan, valid).to(kept.device), kept)


@torch.library.custom_op("ditkit::mapped_attention", mutates_args=())
def mapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    valid: Tensor | None,
    handle: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, L, Kv] and log-sum-exp [B, N, L]; differentiable in both. The map is taken as given."""
    plan = mapped_plan(plan_of(handle), kept, valid)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _module(kernel).forward(q, k, v, plan, scale)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("ditkit::mapped_attention_backward", mutates_args=())
def mapped_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    valid: Tensor | None,
    handle: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    plan = mapped_plan(plan_of(handle), kept, valid)
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_v = _module(kernel).backward(d_out, d_lse, q, k, v, out, lse, plan, scale)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@mapped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide)


@mapped_attention_backward.register_fake
def _(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kept, valid, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, kept, valid)
    # the plan has to outlive this graph; a compiler that traces one for all plans has a symbol for the handle
    ctx.plan = plan_of(ctx.rest[0]) if isinstance(ctx.rest[0], int) else None


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = mapped_attention_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None, None, None, None


mapped_attention.register_autograd(_backward, setup_context=_keep)


def mapped_macs(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, valid: Tensor | None, handle: int, *_: Any, **__: Any
) -> int:
    """Count the MACs of `mapped_attention`: two products over the blocks of the map."""
    return _pairs(handle, kept, valid) * (q.shape[-1] + v.shape[-1])


def mapped_backward_macs(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    valid: Tensor | None,
    handle: int,
    scale: float,
    kernel: str,
    **_: Any,
) -> int:
    """Count the MACs of `mapped_attention_backward`."""
    of_keys, of_values = _module(kernel).BACKWARD
    return _pairs(handle, kept, valid) * (of_keys * q.shape[-1] + of_values * v.shape[-1])


def _pairs(handle: int, kept: Tensor, valid: Tensor | None) -> int:
    plan = plan_of(handle)
    return mapped_plan(plan, kept, valid).visited * plan.block[0] * plan.block[1]
