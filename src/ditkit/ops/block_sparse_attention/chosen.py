"""Attention over blocks that are chosen from its own queries and keys, as one operation of torch.

How many blocks are chosen only data say. Inside one operation that breaks no graph of torch's compiler.

B batch, N heads, L queries, M keys, K width of queries and keys, Kv of values.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ditkit.ops.block_sparse_attention.build import narrowed
from ditkit.ops.block_sparse_attention.operation import _module, for_valid
from ditkit.ops.block_sparse_attention.plan import BlockPlan, plan_of


class Chooser(Protocol):
    """A frozen value that chooses blocks; equal ones are one to a compiler."""

    def kept(self, plan: BlockPlan, image: int, q: Tensor, k: Tensor) -> Tensor:
        """Blocks that are visited, bool [B, N, query blocks, key blocks]; those beyond the plan do not count."""
        ...

    def choosing_macs(self, image: int, q: Tensor) -> int:
        """Products that `kept` takes."""
        ...


_CHOOSERS: list[Chooser] = []
"""Choosers by handle, each value once: what a graph can hold in place of an object."""


@cache
def chooser_handle(chooser: Chooser) -> int:
    """Return an integer that stands for a chooser and all that are equal to it."""
    _CHOOSERS.append(chooser)
    return len(_CHOOSERS) - 1


def chooser_of(handle: int) -> Chooser:
    """Look up the chooser of a handle."""
    return _CHOOSERS[handle]


def chosen_plan(
    plan: BlockPlan, chooser: Chooser, image: int, q: Tensor, k: Tensor, valid: Tensor | None
) -> BlockPlan:
    """Narrow a plan to the blocks that are chosen from q and k [B, N, slots, K], in its order.

    Args:
        image: slots of the image, which come first and fill whole blocks.
        valid: as in `for_valid`.
    """
    bound = for_valid(plan, valid).to(q.device)
    return narrowed(bound, chooser.kept(bound, image, q, k))


@torch.library.custom_op("ditkit::chosen_attention", mutates_args=())
def chosen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    handle: int,
    chooser: int,
    image: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, N, L, Kv], log-sum-exp [B, N, L], and `measures` of what was visited; differentiable in the first two.

    The gradient takes the choice as given: blocks are chosen again from the same q and k.
    """
    plan = chosen_plan(plan_of(handle), _CHOOSERS[chooser], image, q, k, valid)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _module(kernel).forward(q, k, v, plan, scale)
    return out.contiguous(), lse.contiguous(), measures(plan)


@torch.library.custom_op("ditkit::chosen_attention_backward", mutates_args=())
def chosen_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    handle: int,
    chooser: int,
    image: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, and `measures`."""
    plan = chosen_plan(plan_of(handle), _CHOOSERS[chooser], image, q, k, valid)
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_v = _module(kernel).backward(d_out, d_lse, q, k, v, out, lse, plan, scale)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), measures(plan)


def measures(plan: BlockPlan) -> Tensor:
    """Measure a plan: its density, the share of its lists that are empty, its blocks; float64 [3], on the CPU."""
    empty = (plan.counts[0] == 0).double().mean().item()
    return torch.tensor([plan.density, empty, plan.visited], dtype=torch.float64)


@chosen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide)
    return out, lse, torch.empty(3, dtype=torch.float64)


@chosen_attention_backward.register_fake
def _(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *grads, torch.empty(3, dtype=torch.float64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, valid, *ctx.rest = inputs
    out, lse, _ = output
    ctx.save_for_backward(q, k, v, out, lse, valid)
    # the plan has to outlive this graph; a compiler that traces one for all plans has a symbol for the handle
    ctx.plan = plan_of(ctx.rest[0]) if isinstance(ctx.rest[0], int) else None


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, _ = chosen_attention_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None, None, None, None, None


chosen_attention.register_autograd(_backward, setup_context=_keep)


def chosen_macs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    handle: int,
    chooser: int,
    image: int,
    *_: Any,
    out_val: tuple[Tensor, ...],
) -> int:
    """Count the MACs of `chosen_attention`: two products over the blocks it visited, and those of choosing them."""
    return _pairs(handle, out_val) * (q.shape[-1] + v.shape[-1]) + _CHOOSERS[chooser].choosing_macs(image, q)


def chosen_backward_macs(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    handle: int,
    chooser: int,
    image: int,
    scale: float,
    kernel: str,
    *,
    out_val: tuple[Tensor, ...],
) -> int:
    """Count the MACs of `chosen_attention_backward`, in which blocks are chosen again."""
    of_keys, of_values = _module(kernel).BACKWARD
    products = _pairs(handle, out_val) * (of_keys * q.shape[-1] + of_values * v.shape[-1])
    return products + _CHOOSERS[chooser].choosing_macs(image, q)


def _pairs(handle: int, out_val: tuple[Tensor, ...]) -> int:
    rows, columns = plan_of(handle).block
    return int(out_val[-1][2]) * rows * columns
