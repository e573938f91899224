# mypy: disable-error-code="no-untyped-def"
# the functions under triton.jit are in Triton's language, whose values have no Python types
"""Linear attention over blocks on a GPU: states of key blocks, their sums, and products with these.

A program walks the list of a query block, or of a key block in the backward pass, so nothing is added atomically and
gradients repeat to the bit. Lists are of the blocks taken in, or of the others, which are then subtracted from the sum
of all, whichever are fewer (pre-aggregation of arXiv 2509.24006). States and sums are float32.

B batch, N heads, L queries, M keys, K width of features, Kv of values, r query blocks, n key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ditkit.ops.block_sparse_attention.triton import _load, _store

Block = tuple[int, int]


class State(NamedTuple):
    """X^T Y and X^T w of blocks of rows, float32."""

    matrix: Tensor
    """[B N, blocks, K, Kv]"""
    vector: Tensor
    """[B N, blocks, K]"""


def forward(q: Tensor, k: Tensor, v: Tensor, taken: Tensor, block: Block, how: str) -> tuple[Tensor, Tensor]:
    """Numerator [B, N, L, Kv] and denominator [B, N, L]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    summed = _sum(_state(k, v, None, block[1]), taken, how)
    return _product(q, summed, block[0])


def backward(
    d_numerator: Tensor,
    d_denominator: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taken: Tensor,
    block: Block,
    how: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients; those of a block's state are summed over the query blocks that take it in."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    d_numerator, d_denominator = d_numerator.contiguous(), d_denominator.contiguous()
    summed = _sum(_state(k, v, None, block[1]), taken, how)
    d_summed = _state(q, d_numerator, d_denominator, block[0])
    d_state = _sum(d_summed, taken.mT.contiguous(), how)
    d_q = _transposed(d_numerator, d_denominator, summed, block[0], q)
    d_k = _transposed(v, None, d_state, block[1], k)
    d_v = _product(k, d_state, block[1])[0]
    return d_q, d_k, d_v.to(v.dtype)


def _state(x: Tensor, y: Tensor, w: Tensor | None, side: int) -> State:
    """X^T Y and X^T w of every block of `side` rows; w is all ones if it is None."""
    heads, blocks = x.shape[0] * x.shape[1], -(-x.shape[2] // side)
    matrix = x.new_empty(heads, blocks, x.shape[-1], y.shape[-1], dtype=torch.float32)
    vector = x.new_empty(heads, blocks, x.shape[-1], dtype=torch.float32)
    weight = vector if w is None else w
    _states[(blocks, heads)](
        x, y, weight, matrix, vector, x.shape[2], HAS_WEIGHT=w is not None, SIDE=side, **_widths(x, y)
    )
    return State(matrix, vector)


def _sum(state: State, taken: Tensor, how: str) -> State:
    """Sum the states that each list of a map [B, N, lists, blocks] takes in."""
    flat = taken.flatten(0, 1)
    held = flat.sum(2)
    subtract = how == "subtract" or (how != "direct" and 2 * int(held.sum()) > flat.numel())
    listed = ~flat if subtract else flat
    start = F.pad(listed.sum(2).flatten().cumsum(0), (1, 0)).int()
    index = listed.nonzero()[:, 2].int()
    total = State(*(x.sum(1) for x in state)) if subtract else state
    lists, (matrix, vector) = flat.shape[1], state
    out = State(
        matrix.new_empty(len(flat), lists, *matrix.shape[2:]),
        vector.new_empty(len(flat), lists, vector.shape[2]),
    )
    _sums[(lists, len(flat))](
        *state, *total, *out, start, index, (held > 0).int(), matrix.shape[1],
        SUBTRACT=subtract, **_widths(vector, matrix),
    )  # fmt: skip
    return out


def _product(x: Tensor, state: State, side: int) -> tuple[Tensor, Tensor]:
    """X H and X . Z of every block, float32."""
    out = x.new_empty(*x.shape[:3], state.matrix.shape[-1], dtype=torch.float32)
    inner = x.new_empty(x.shape[:3], dtype=torch.float32)
    grid = (state.matrix.shape[1], len(state.matrix))
    _products[grid](x, *state, out, inner, x.shape[2], SIDE=side, **_widths(x, out))
    return out, inner


def _transposed(x: Tensor, w: Tensor | None, state: State, side: int, like: Tensor) -> Tensor:
    """X H^T + w Z^T of every block, in the shape and type of `like`; w is all ones if it is None."""
    out = torch.empty_like(like)
    grid = (state.matrix.shape[1], len(state.matrix))
    weight = state.vector if w is None else w
    _products_transposed[grid](
        x, weight, *state, out, like.shape[2], HAS_WEIGHT=w is not None, SIDE=side, **_widths(like, x)
    )
    return out


def _widths(x: Tensor, y: Tensor) -> dict[str, int]:
    """Widths of features and of values, and the powers of two that hold them."""
    widths = {"K": x.shape[-1], "KV": y.shape[-1]}
    return widths | {f"{name}P": max(16, triton.next_power_of_2(width)) for name, width in widths.items()}


@triton.jit
def _square(X, at, K: tl.constexpr, KV: tl.constexpr, KP: tl.constexpr, KVP: tl.constexpr):
    """Load the matrix number `at` of [.., K, KV], zeros beyond it."""
    row, column = tl.arange(0, KP)[:, None], tl.arange(0, KVP)[None, :]
    place = at.to(tl.int64) * K * KV + row * KV + column
    return tl.load(X + place, mask=(row < K) & (column < KV), other=0.0)


@triton.jit
def _put_square(X, at, value, K: tl.constexpr, KV: tl.constexpr, KP: tl.constexpr, KVP: tl.constexpr):
    row, column = tl.arange(0, KP)[:, None], tl.arange(0, KVP)[None, :]
    place = at.to(tl.int64) * K * KV + row * KV + column
    tl.store(X + place, value, mask=(row < K) & (column < KV))


@triton.jit
def _line(X, at, K: tl.constexpr, KP: tl.constexpr):
    """Load the vector number `at` of [.., K], zeros beyond it."""
    d = tl.arange(0, KP)
    return tl.load(X + at.to(tl.int64) * K + d, mask=d < K, other=0.0)


@triton.jit
def _weights(W, head, rows, length, HAS_WEIGHT: tl.constexpr):
    """Load the weights of rows, or ones; 0 beyond the last row."""
    if HAS_WEIGHT:
        return tl.load(W + head.to(tl.int64) * length + rows, mask=rows < length, other=0.0)
    return (rows < length).to(tl.float32)


@triton.jit
def _states(
    X, Y, W, MATRIX, VECTOR, length, HAS_WEIGHT: tl.constexpr, SIDE: tl.constexpr,
    K: tl.constexpr, KV: tl.constexpr, KP: tl.constexpr, KVP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * SIDE + tl.arange(0, SIDE)
    x = _load(X, head, rows, length, K, KP).to(tl.float32)
    y = _load(Y, head, rows, length, KV, KVP).to(tl.float32)
    w = _weights(W, head, rows, length, HAS_WEIGHT)
    at = head * tl.num_programs(0) + block
    _put_square(MATRIX, at, tl.dot(tl.trans(x), y, input_precision="ieee"), K, KV, KP, KVP)
    d = tl.arange(0, KP)
    tl.store(VECTOR + at.to(tl.int64) * K + d, tl.sum(x * w[:, None], 0), mask=d < K)


@triton.jit
def _sums(
    MATRIX, VECTOR, ALL_MATRIX, ALL_VECTOR, OUT_MATRIX, OUT_VECTOR, START, INDEX, HOLDS, blocks,
    SUBTRACT: tl.constexpr, K: tl.constexpr, KV: tl.constexpr, KP: tl.constexpr, KVP: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    at = head * tl.num_programs(0) + row
    matrix, vector = tl.zeros([KP, KVP], tl.float32), tl.zeros([KP], tl.float32)
    for entry in range(tl.load(START + at), tl.load(START + at + 1)):
        other = head * blocks + tl.load(INDEX + entry)
        matrix += _square(MATRIX, other, K, KV, KP, KVP)
        vector += _line(VECTOR, other, K, KP)
    if SUBTRACT:
        holds = tl.load(HOLDS + at) != 0
        matrix = tl.where(holds, _square(ALL_MATRIX, head, K, KV, KP, KVP) - matrix, 0.0)
        vector = tl.where(holds, _line(ALL_VECTOR, head, K, KP) - vector, 0.0)
    _put_square(OUT_MATRIX, at, matrix, K, KV, KP, KVP)
    d = tl.arange(0, KP)
    tl.store(OUT_VECTOR + at.to(tl.int64) * K + d, vector, mask=d < K)


@triton.jit
def _products(
    X, MATRIX, VECTOR, OUT, INNER, length, SIDE: tl.constexpr,
    K: tl.constexpr, KV: tl.constexpr, KP: tl.constexpr, KVP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * SIDE + tl.arange(0, SIDE)
    at = head * tl.num_programs(0) + block
    x = _load(X, head, rows, length, K, KP).to(tl.float32)
    out = tl.dot(x, _square(MATRIX, at, K, KV, KP, KVP), input_precision="ieee")
    _store(OUT, head, rows, length, out, KV, KVP)
    inner = tl.sum(x * _line(VECTOR, at, K, KP)[None, :], 1)
    tl.store(INNER + head.to(tl.int64) * length + rows, inner, mask=rows < length)


@triton.jit
def _products_transposed(
    X, W, MATRIX, VECTOR, OUT, length, HAS_WEIGHT: tl.constexpr, SIDE: tl.constexpr,
    K: tl.constexpr, KV: tl.constexpr, KP: tl.constexpr, KVP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * SIDE + tl.arange(0, SIDE)
    at = head * tl.num_programs(0) + block
    x = _load(X, head, rows, length, KV, KVP).to(tl.float32)
    w = _weights(W, head, rows, length, HAS_WEIGHT)
    matrix = _square(MATRIX, at, K, KV, KP, KVP)
    out = tl.dot(x, tl.trans(matrix), input_precision="ieee") + w[:, None] * _line(VECTOR, at, K, KP)[None, :]
    _store(OUT, head, rows, length, out, K, KP)
