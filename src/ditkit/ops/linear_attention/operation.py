"""Kernels of linear attention over blocks as one operation of torch: a node for its compiler, autograd and counters.

B batch, N heads, L queries, M keys, K width of features, Kv of values, r query blocks, n key blocks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.ops.linear_attention.aggregate import Aggregation
from ditkit.ops.linear_attention.reference import Sums, sums_reference

Kernel = Literal["cpu", "triton", "reference"]
"""That called "cpu" is of torch's operations, and runs on any device."""


@torch.library.custom_op("ditkit::linear_sums", mutates_args=())
def linear_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taken: Tensor,
    query_side: int,
    key_side: int,
    how: str,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Numerator [B, N, L, Kv] and denominator [B, N, L]; differentiable in both."""
    with torch.autocast(q.device.type, enabled=False):
        return _module(kernel).forward(q, k, v, taken, (query_side, key_side), how)


@torch.library.custom_op("ditkit::linear_sums_backward", mutates_args=())
def linear_sums_backward(
    d_numerator: Tensor,
    d_denominator: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taken: Tensor,
    query_side: int,
    key_side: int,
    how: str,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features and values."""
    with torch.autocast(q.device.type, enabled=False):
        grads = _module(kernel).backward(
            d_numerator, d_denominator, q, k, v, taken, (query_side, key_side), how
        )
    d_q, d_k, d_v = (grad.contiguous() for grad in grads)
    return d_q, d_k, d_v


@linear_sums.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[-1], dtype=wide), q.new_empty(q.shape[:3], dtype=wide)


@linear_sums_backward.register_fake
def _(d_numerator: Tensor, d_denominator: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, taken, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, taken)


def _backward(ctx: Any, d_numerator: Tensor, d_denominator: Tensor) -> tuple[Tensor | None, ...]:
    grads = linear_sums_backward(d_numerator, d_denominator, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None, None, None, None


linear_sums.register_autograd(_backward, setup_context=_keep)


def block_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taken: Tensor,
    block: tuple[int, int],
    *,
    how: Aggregation = "auto",
    kernel: Kernel = "cpu",
) -> Sums:
    """Sum phi(q) . phi(k) v and phi(q) . phi(k), for each query over the key blocks that its block takes in.

    Args:
        q, k: features [B, N, L, K] and [B, N, M, K], none negative; those of keys that are padding are 0.
        v: [B, N, M, Kv].
        taken: bool [B, N, r, n].
        block: sides of a block of queries and of keys; the last of either may be shorter.
        how: states of key blocks are summed; see `aggregate`. Triton's kernel adds or subtracts, whichever is less.

    Raises:
        ShapeError: a map of other blocks than the tokens'. ConfigError: an unknown kernel.
    """
    if kernel not in get_args(Kernel):
        raise ConfigError(unknown("kernel", kernel, get_args(Kernel)))
    expected = (*q.shape[:2], -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    if taken.shape != expected or taken.dtype != torch.bool:
        raise ShapeError(
            f"linear attention: a map {taken.dtype} {list(taken.shape)}, expected torch.bool {list(expected)}"
        )
    if kernel == "reference":
        return sums_reference(q, k, v, taken, block)
    return Sums(*linear_sums(q, k, v, taken, *block, how, kernel))


def divide(sums: Sums) -> Tensor:
    """Return the fraction [B, N, L, Kv]; 0, not NaN, where the denominator is 0, as where no block is taken in."""
    blank = sums.denominator == 0
    return sums.numerator / sums.denominator.masked_fill(blank, torch.inf)[..., None]


def sums_macs(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Count the MACs of `linear_sums`: two products a token, with a column for the denominator; sums are additions."""
    return (q[..., 0].numel() + k[..., 0].numel()) * q.shape[-1] * (v.shape[-1] + 1)


def sums_backward_macs(_: Tensor, __: Tensor, q: Tensor, k: Tensor, v: Tensor, *___: Any, **____: Any) -> int:
    """Count the MACs of `linear_sums_backward`: two products a query, three a key."""
    return (2 * q[..., 0].numel() + 3 * k[..., 0].numel()) * q.shape[-1] * (v.shape[-1] + 1)


def _module(kernel: str) -> ModuleType:
    if kernel == "cpu":
        from ditkit.ops.linear_attention import cpu

        return cpu
    from ditkit.ops.linear_attention import triton

    return triton
