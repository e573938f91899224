# mypy: disable-error-code="no-untyped-def"
# the functions under triton.jit are in Triton's language, whose values have no Python types
"""Block-sparse attention on a GPU: one program a query block walks its list, forward and backward.

FULL blocks are walked without a mask; a PARTIAL one reads its mask tile. Products are in the type of the queries
(float32 as three of TF32), sums and softmax in float32. The backward pass makes the weights again from the
log-sum-exp: one kernel over the lists for the queries' gradient, one over the transposed lists for those of keys and
values, so nothing is added atomically and gradients repeat to the bit.

B batch, N heads, L queries, M keys, K head width.
"""

from __future__ import annotations

import os
from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.ops.block_sparse_attention.plan import BlockPlan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIDES = (64, 128)
WIDEST = 128
WIDEST_FLOAT32 = 64 * 128
"""Head width times block: with more, a float32 block and its gradients exceed an H100's shared memory."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKWARD = (4, 3)
"""Products of width K and of width Kv in the backward pass: each of its two kernels makes the scores again."""
LOG2_E = tl.constexpr(1 / log(2))


def refusal(q: Tensor, plan: BlockPlan) -> str:
    """Why these kernels cannot execute the plan for queries like `q`; empty if they can."""
    if q.device.type != "cuda" and not (INTERPRETED and q.device.type == "cpu"):
        return f"queries are on {q.device.type}, expected cuda"
    if q.dtype not in TYPES:
        return f"got {q.dtype}, expected bfloat16, float16 or float32"
    if not all(side in SIDES for side in plan.block):
        return f"blocks of {plan.block[0]} x {plan.block[1]}, expected sides of 64 or 128"
    if q.shape[-1] > WIDEST:
        return f"heads of width {q.shape[-1]}, expected at most {WIDEST}"
    if q.dtype == torch.float32 and q.shape[-1] * max(plan.block) > WIDEST_FLOAT32:
        return f"float32 heads of width {q.shape[-1]} in blocks of {max(plan.block)}, expected blocks of 64"
    return ""


def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, L, K] and log-sum-exp [B, N, L] of a plan.

    Raises:
        ShapeError: values of another width than keys.
    """
    if v.shape[-1] != q.shape[-1]:
        raise ShapeError(f"kernel triton: values of width {v.shape[-1]}, expected {q.shape[-1]} as keys")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lists = (plan.start, plan.counts[1].int(), plan.index, plan.tile, plan.tiles.view(torch.uint8))
    grid = (plan.blocks[0], q.shape[0] * q.shape[1])
    _forward[grid](q, k, v, out, lse, *lists, scale, *_sizes(q, plan), **_constants(q, plan, 64))
    return out, lse


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
    """Compute gradients; a score's is weight (d_out v^T - (d_out . out) + d_lse)."""
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    inner = (d_out.float() * out.float()).sum(-1) - d_lse
    shift = (lse * LOG2_E.value).masked_fill(lse == -torch.inf, torch.inf)
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    heads, masks = q.shape[0] * q.shape[1], (plan.tile, plan.tiles.view(torch.uint8))
    settings = (scale, *_sizes(q, plan))
    constants = _constants(q, plan, 32)
    given = (q, k, v, d_out, shift, inner)
    lists = (plan.start, plan.counts[1].int(), plan.index, *masks)
    _queries_backward[(plan.blocks[0], heads)](*given, d_q, *lists, *settings, **constants)
    start, partial, entry = plan.transposed
    row = (plan.list_of % plan.blocks[0]).int()
    by_key = (start, partial, entry, row, *masks)
    _keys_backward[(plan.blocks[1], heads)](*given, d_k, d_v, *by_key, *settings, **constants)
    return d_q, d_k, d_v


def _sizes(q: Tensor, plan: BlockPlan) -> tuple[int, ...]:
    return (q.shape[1], plan.queries, plan.keys, plan.batches, plan.heads)


def _constants(q: Tensor, plan: BlockPlan, step: int) -> dict[str, Any]:
    """`step`: how much of the block that is walked is held at once; registers and shared memory hold no more."""
    width = q.shape[-1]
    exact = q.dtype == torch.float32
    return {
        "BQ": plan.block[0],
        "BK": plan.block[1],
        "STEP": step // 2 if exact else step,
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "PRECISION": "tf32x3" if exact else "tf32",
        "num_warps": 8 if exact or max(plan.block) == SIDES[1] else 4,
        "num_stages": 1 if exact else 2,
    }


@triton.jit
def _load(X, head, rows, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of one head of [B N, length, WIDTH], zeros beyond either."""
    d = tl.arange(0, PADDED)
    at = (head.to(tl.int64) * length + rows)[:, None] * WIDTH + d[None, :]
    return tl.load(X + at, mask=(rows < length)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(X, head, rows, length, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    at = (head.to(tl.int64) * length + rows)[:, None] * WIDTH + d[None, :]
    mask = (rows < length)[:, None] & (d < WIDTH)[None, :]
    tl.store(X + at, value.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _list(block, blocks, head, heads, batches, own):
    """Find the list of a block: batch rows and heads beyond those with lists of their own share them."""
    return ((head // heads % batches) * own + head % heads % own) * blocks + block


@triton.jit
def _masked(scores, TILES, tile, query, key, BQ: tl.constexpr, BK: tl.constexpr):
    """Scores with -inf where the mask tile lets no pair through; `query` and `key` count within the block."""
    at = tile.to(tl.int64) * BQ * BK + query[:, None] * BK + key[None, :]
    return tl.where(tl.load(TILES + at) != 0, scores, float("-inf"))


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, START, PARTIAL, INDEX, TILE, TILES,
    scale, heads, queries, keys, batches, own,
    BQ: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    row = _list(block, tl.num_programs(0), head, heads, batches, own)
    inside, step = tl.arange(0, BQ), tl.arange(0, STEP)
    rows = block * BQ + inside
    q = _load(Q, head, rows, queries, WIDTH, PADDED)
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    out = tl.zeros([BQ, PADDED], tl.float32)
    first, last = tl.load(START + row), tl.load(START + row + 1)
    masked = first + tl.load(PARTIAL + row)
    for entry in range(first, masked):
        column, tile = tl.load(INDEX + entry), tl.load(TILE + entry)
        for offset in range(0, BK, STEP):
            k = _load(K, head, column * BK + offset + step, keys, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            scores = _masked(scores, TILES, tile, inside, offset + step, BQ, BK)
            v = _load(V, head, column * BK + offset + step, keys, WIDTH, PADDED)
            top, total, out = _add(top, total, out, scores, v, PRECISION)
    for entry in range(masked, last):
        column = tl.load(INDEX + entry)
        for offset in range(0, BK, STEP):
            k = _load(K, head, column * BK + offset + step, keys, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            v = _load(V, head, column * BK + offset + step, keys, WIDTH, PADDED)
            top, total, out = _add(top, total, out, scores, v, PRECISION)
    blind = total == 0
    out = out / tl.where(blind, 1.0, total)[:, None]
    _store(OUT, head, rows, queries, out, WIDTH, PADDED)
    lse = tl.where(blind, float("-inf"), top + tl.log2(tl.where(blind, 1.0, total))) / LOG2_E
    tl.store(LSE + head.to(tl.int64) * queries + rows, lse, mask=rows < queries)


@triton.jit
def _add(top, total, out, scores, v, PRECISION: tl.constexpr):
    """Update the running softmax of FlashAttention 2 in base 2 (Dao 2023, algorithm 1); rows may see no key yet."""
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weight, keep = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
    out = out * keep[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return new, total * keep + tl.sum(weight, 1), out


@triton.jit
def _queries_backward(
    Q, K, V, D_OUT, SHIFT, INNER, D_Q, START, PARTIAL, INDEX, TILE, TILES,
    scale, heads, queries, keys, batches, own,
    BQ: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    row = _list(block, tl.num_programs(0), head, heads, batches, own)
    inside, step = tl.arange(0, BQ), tl.arange(0, STEP)
    rows = block * BQ + inside
    q, d_out = _load(Q, head, rows, queries, WIDTH, PADDED), _load(D_OUT, head, rows, queries, WIDTH, PADDED)
    shift = tl.load(SHIFT + head.to(tl.int64) * queries + rows, mask=rows < queries, other=float("inf"))
    inner = tl.load(INNER + head.to(tl.int64) * queries + rows, mask=rows < queries, other=0.0)
    d_q = tl.zeros([BQ, PADDED], tl.float32)
    first, last = tl.load(START + row), tl.load(START + row + 1)
    masked = first + tl.load(PARTIAL + row)
    for entry in range(first, last):
        column, tile = tl.load(INDEX + entry), tl.load(TILE + entry)
        for offset in range(0, BK, STEP):
            k = _load(K, head, column * BK + offset + step, keys, WIDTH, PADDED)
            v = _load(V, head, column * BK + offset + step, keys, WIDTH, PADDED)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            if entry < masked:
                scores = _masked(scores, TILES, tile, inside, offset + step, BQ, BK)
            weight = tl.exp2(scores - shift[:, None])
            d_scores = weight * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - inner[:, None])
            d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    _store(D_Q, head, rows, queries, d_q * scale, WIDTH, PADDED)


@triton.jit
def _keys_backward(
    Q, K, V, D_OUT, SHIFT, INNER, D_K, D_V, START, PARTIAL, ENTRY, ROW, TILE, TILES,
    scale, heads, queries, keys, batches, own,
    BQ: tl.constexpr, BK: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    column = _list(block, tl.num_programs(0), head, heads, batches, own)
    inside, step = tl.arange(0, BK), tl.arange(0, STEP)
    columns = block * BK + inside
    k, v = _load(K, head, columns, keys, WIDTH, PADDED), _load(V, head, columns, keys, WIDTH, PADDED)
    d_k, d_v = tl.zeros([BK, PADDED], tl.float32), tl.zeros([BK, PADDED], tl.float32)
    first, last = tl.load(START + column), tl.load(START + column + 1)
    masked = first + tl.load(PARTIAL + column)
    for place in range(first, last):
        entry = tl.load(ENTRY + place)
        row, tile = tl.load(ROW + entry), tl.load(TILE + entry)
        for offset in range(0, BQ, STEP):
            rows = row * BQ + offset + step
            at = head.to(tl.int64) * queries + rows
            q = _load(Q, head, rows, queries, WIDTH, PADDED)
            d_out = _load(D_OUT, head, rows, queries, WIDTH, PADDED)
            shift = tl.load(SHIFT + at, mask=rows < queries, other=float("inf"))
            inner = tl.load(INNER + at, mask=rows < queries, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            if place < masked:
                scores = _masked(scores, TILES, tile, offset + step, inside, BQ, BK)
            weight = tl.exp2(scores - shift[:, None])
            d_v += tl.dot(tl.trans(weight.to(d_out.dtype)), d_out, input_precision=PRECISION)
            d_scores = weight * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - inner[:, None])
            d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision=PRECISION)
    _store(D_K, head, columns, keys, d_k * scale, WIDTH, PADDED)
    _store(D_V, head, columns, keys, d_v, WIDTH, PADDED)
