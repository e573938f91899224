"""Kernels as one operation of torch: a single node for its compiler, for autograd and for counters.

An operation takes tensors and numbers. So a plan goes by its handle, and padding, which is data, is resolved inside.

B batch, N heads, L queries, M keys, K width of queries and keys, Kv of values.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ditkit.ops.block_sparse_attention.build import with_valid
from ditkit.ops.block_sparse_attention.plan import BlockPlan, plan_of

PROMPTS = 16
"""Plans that a plan keeps for the `valid` it met last: the lanes and batches of one trajectory, not of a data set."""


@torch.library.custom_op("ditkit::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, handle: int, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Output [B, N, L, Kv] and log-sum-exp [B, N, L]; differentiable in both."""
    plan = for_valid(plan_of(handle), valid).to(q.device)
    with torch.autocast(q.device.type, enabled=False):  # kernels choose their own types
        out, lse = _module(kernel).forward(q, k, v, plan, scale)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("ditkit::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    handle: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    plan = for_valid(plan_of(handle), valid).to(q.device)
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_v = _module(kernel).backward(d_out, d_lse, q, k, v, out, lse, plan, scale)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@block_sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide)


@block_sparse_attention_backward.register_fake
def _(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, valid, ctx.handle, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, valid)
    # the plan has to outlive this graph; a compiler that traces one for all plans has a symbol for the handle
    ctx.plan = plan_of(ctx.handle) if isinstance(ctx.handle, int) else None


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = block_sparse_attention_backward(
        d_out, d_lse, *ctx.saved_tensors, ctx.handle, ctx.scale, ctx.kernel
    )
    return *grads, None, None, None, None


block_sparse_attention.register_autograd(_backward, setup_context=_keep)


def for_valid(plan: BlockPlan, valid: Tensor | None) -> BlockPlan:
    """`with_valid`, kept by value: all layers and steps with the same prompts share one plan."""
    if valid is None:
        return plan
    key = len(valid), valid.cpu().numpy().tobytes()
    found = plan.padded.get(key)
    if found is None:
        found = with_valid(plan, valid)
        if found is not plan:
            plan.padded[key] = found
            for old in list(plan.padded)[:-PROMPTS]:
                plan.padded.pop(old, None)
    return found


def forward_macs(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, handle: int, scale: float, kernel: str, **_: Any
) -> int:
    """Count the MACs of `block_sparse_attention` on these arguments: two products over the blocks visited."""
    return _pairs(q, handle, valid) * (q.shape[-1] + v.shape[-1])


def backward_macs(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    handle: int,
    scale: float,
    kernel: str,
    **_: Any,
) -> int:
    """Count the MACs of `block_sparse_attention_backward`."""
    of_keys, of_values = _module(kernel).BACKWARD
    return _pairs(q, handle, valid) * (of_keys * q.shape[-1] + of_values * v.shape[-1])


def _pairs(q: Tensor, handle: int, valid: Tensor | None) -> int:
    """Pairs of all heads in blocks that are visited: kernels multiply whole blocks, the last of a row as well."""
    plan = for_valid(plan_of(handle), valid)
    copies = q.shape[0] // plan.batches * (q.shape[1] // plan.heads)
    return plan.visited * plan.block[0] * plan.block[1] * copies


def _module(kernel: str) -> ModuleType:
    """Import the module of a kernel, with its `forward`, `backward`, and `BACKWARD` products of width K and Kv."""
    if kernel == "cpu":
        from ditkit.ops.block_sparse_attention import cpu

        return cpu
    from ditkit.ops.block_sparse_attention import triton

    return triton
