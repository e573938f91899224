# mypy: disable-error-code="no-untyped-def"
# the functions under triton.jit are in Triton's language, whose values have no Python types
"""The selective scan of one state on a GPU: a program walks some channels of a sequence, forward or from the end.

Tokens come in tiles that are scanned as an associative operation, (a, b) then (a', b') being (a a', a' b + b'); a tile
hands its last state on to the next. With one state of a channel the work is bound by memory: a pass reads x, delta, B
and C once, in float32. Sums over channels go to places of their own and are added afterwards, so gradients repeat to
the bit.

G sequences (samples times groups), L tokens, D channels.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS, CHANNELS = 32, 32
"""Sides of a tile; not tuned, for want of a GPU."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(x: Tensor, states: int) -> str:
    """Why these kernels cannot take tensors like x [B, K, L, D]; empty if they can."""
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return f"tensors are on {x.device.type}, expected cuda"
    if x.dtype not in TYPES:
        return f"got {x.dtype}, expected bfloat16, float16 or float32"
    return "" if states == 1 else f"{states} states of a channel, expected 1"


def forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, K, L, D], and the states [B, K, L, D, 1] for the backward pass if `keep`, in float32."""
    given = tuple(v.contiguous() for v in (x, delta, A, B, C, D, bias))
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    states = torch.empty((*x.shape, 1) if keep else (0,), dtype=torch.float32, device=x.device)
    _forward[_grid(x)](*given, out, states, x.shape[1], *x.shape[2:], KEEP=keep, **_constants())
    return out, states


def backward(
    d_out: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Compute the gradients of all seven inputs."""
    inputs = (x, delta, A, B, C, D, bias)
    samples, groups, length, width = x.shape
    grid = _grid(x)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    d_x, d_delta = empty(*x.shape), empty(*x.shape)
    d_B, d_C = (empty(grid[1], samples, groups, length, 1) for _ in range(2))
    d_A, d_D, d_bias = (empty(samples, groups, width) for _ in range(3))
    of_channels = (d_A, d_D, d_bias)
    given = tuple(v.contiguous() for v in (d_out, *inputs, states))
    sizes = (samples * groups, groups, length, width)
    _backward[grid](*given, d_x, d_delta, d_B, d_C, *of_channels, *sizes, **_constants())
    grads = (
        d_x,
        d_delta,
        d_A.sum(0)[..., None],
        d_B.sum(0),
        d_C.sum(0),
        d_D.sum(0),
        d_bias.sum(0),
    )
    return tuple(grad.to(v.dtype) for grad, v in zip(grads, inputs, strict=True))


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0] * x.shape[1], triton.cdiv(x.shape[3], CHANNELS)


def _constants() -> dict[str, int]:
    return {"TOKENS": TOKENS, "CHANNELS": CHANNELS}


@triton.jit
def _then(a, b, a_next, b_next):
    """h -> a h + b, then h -> a' h + b'."""
    return a * a_next, a_next * b + b_next


@triton.jit
def _softplus(raw):
    return tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw)))


@triton.jit
def _forward(
    X, DELTA, A, B, C, D, BIAS, OUT, STATES,
    groups, length, width,
    KEEP: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sequence, block = tl.program_id(0), tl.program_id(1)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside, row = d < width, tl.arange(0, TOKENS)
    own = (sequence % groups) * width + d
    rate = tl.load(A + own, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + own, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + own, mask=inside, other=0.0).to(tl.float32)
    state = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, length, TOKENS):
        i = start + row
        token = sequence.to(tl.int64) * length + i
        at, real = token[:, None] * width + d[None, :], (i < length)[:, None] & inside[None, :]
        x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
        step = _softplus(tl.load(DELTA + at, mask=real, other=0.0).to(tl.float32) + bias[None, :])
        into = tl.load(B + token, mask=i < length, other=0.0).to(tl.float32)
        read = tl.load(C + token, mask=i < length, other=0.0).to(tl.float32)
        a, b = tl.exp(step * rate[None, :]), step * x * into[:, None]
        a, b = tl.associative_scan((a, b), 0, _then)
        h = a * state[None, :] + b
        tl.store(OUT + at, h * read[:, None] + skip[None, :] * x, mask=real)
        if KEEP:
            tl.store(STATES + at, h, mask=real)
        state = tl.sum(tl.where((row == TOKENS - 1)[:, None], h, 0.0), 0)


@triton.jit
def _backward(
    D_OUT, X, DELTA, A, B, C, D, BIAS, STATES, D_X, D_DELTA, D_B, D_C, D_A, D_D, D_BIAS,
    sequences, groups, length, width,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sequence, block = tl.program_id(0), tl.program_id(1)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside, row = d < width, tl.arange(0, TOKENS)
    own = (sequence % groups) * width + d
    rate = tl.load(A + own, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + own, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + own, mask=inside, other=0.0).to(tl.float32)
    later = tl.zeros([CHANNELS], tl.float32)
    d_rate, d_skip = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    d_shift = tl.zeros([CHANNELS], tl.float32)
    tiles = tl.cdiv(length, TOKENS)
    for tile in range(0, tiles):
        i = (tiles - 1 - tile) * TOKENS + row
        token = sequence.to(tl.int64) * length + i
        at, real = token[:, None] * width + d[None, :], (i < length)[:, None] & inside[None, :]
        follows = (i + 1 < length)[:, None] & inside[None, :]
        x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
        dy = tl.load(D_OUT + at, mask=real, other=0.0).to(tl.float32)
        raw = tl.load(DELTA + at, mask=real, other=0.0).to(tl.float32) + bias[None, :]
        next_raw = tl.load(DELTA + at + width, mask=follows, other=0.0).to(tl.float32) + bias[None, :]
        into = tl.load(B + token, mask=i < length, other=0.0).to(tl.float32)
        read = tl.load(C + token, mask=i < length, other=0.0).to(tl.float32)
        h = tl.load(STATES + at, mask=real, other=0.0)
        before = tl.load(STATES + at - width, mask=real & (i > 0)[:, None], other=0.0)
        step = _softplus(raw)
        a = tl.where(follows, tl.exp(_softplus(next_raw) * rate[None, :]), 0.0)
        a, g = tl.associative_scan((a, dy * read[:, None]), 0, _then, reverse=True)
        g = g + a * later[None, :]
        later = tl.sum(tl.where((row == 0)[:, None], g, 0.0), 0)
        exponent = g * before * tl.exp(step * rate[None, :])
        through = g * into[:, None]
        d_raw = tl.where(real, (exponent * rate[None, :] + through * x) / (1.0 + tl.exp(-raw)), 0.0)
        tl.store(D_X + at, through * step + dy * skip[None, :], mask=real)
        tl.store(D_DELTA + at, d_raw, mask=real)
        place = block.to(tl.int64) * sequences * length + token
        tl.store(D_B + place, tl.sum(g * step * x, 1), mask=i < length)
        tl.store(D_C + place, tl.sum(dy * h, 1), mask=i < length)
        d_rate += tl.sum(exponent * step, 0)
        d_skip += tl.sum(dy * x, 0)
        d_shift += tl.sum(d_raw, 0)
    to = sequence.to(tl.int64) * width + d
    tl.store(D_A + to, d_rate, mask=inside)
    tl.store(D_D + to, d_skip, mask=inside)
    tl.store(D_BIAS + to, d_shift, mask=inside)
