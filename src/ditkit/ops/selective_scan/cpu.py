"""The selective scan on a processor: an associative scan of radix 8, all chunks of a level at once.

(a, b) then (a', b') is (a a', a' b + b'). A level cuts the tokens into chunks of eight, combines inside of all chunks
at once, scans the chunks' ends the same way, and carries these into the chunks: about three passes over memory, and a
number of torch's calls that grows with the logarithm of the length. Only products of decays in [0, 1] are formed, so
nothing overflows however long the sequence is.

G groups (a sequence of a sample), L tokens, D channels, S states of a channel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

RADIX = 8
"""Tokens of a chunk."""
HELD = 2**19
"""States that are worked on at a time, 2 MB of float32: the second-level cache holds the few tensors of them."""


def forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, K, L, D], and the states [B, K, L, D, S] for the backward pass if `keep`, in float32 or more."""
    wide = torch.promote_types(x.dtype, torch.float32)
    A, D, bias = A.to(wide)[:, None], D.to(wide)[:, None], bias.to(wide)[:, None]
    out = torch.empty(x.shape, dtype=wide)
    states = torch.empty((*x.shape, A.shape[-1]) if keep else (0,), dtype=wide)
    for b, d in _parts(x, A.shape[-1]):
        own, c_S = x[b, ..., d].to(wide), C[b, :, :, None].to(wide)
        step = F.softplus(delta[b, ..., d].to(wide) + bias[..., d])
        h = (step * own)[..., None] * B[b, :, :, None].to(wide)
        recur_(torch.exp_(step[..., None] * A[:, :, d]), h)
        y = h[..., 0] * c_S[..., 0] if A.shape[-1] == 1 else (h * c_S).sum(-1)
        out[b, ..., d] = y.addcmul_(own, D[..., d])
        if keep:
            states[b, ..., d, :] = h
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
    """Compute the gradients of all seven inputs; g_l = C_l dy_l + exp(Delta_{l+1} A) g_{l+1} is a scan from the end."""
    wide, inputs = states.dtype, (x, delta, A, B, C, D, bias)
    d_x, d_delta = torch.empty(x.shape, dtype=wide), torch.empty(x.shape, dtype=wide)
    d_A, d_B, d_C, d_D, d_bias = (torch.zeros(v.shape, dtype=wide) for v in inputs[2:])
    A, D, bias = A.to(wide)[:, None], D.to(wide)[:, None], bias.to(wide)[:, None]
    for b, d in _parts(x, A.shape[-1]):
        own, dy, h, a = x[b, ..., d].to(wide), d_out[b, ..., d].to(wide), states[b, ..., d, :], A[:, :, d]
        b_S, c_S = B[b, :, :, None].to(wide), C[b, :, :, None].to(wide)
        raw = delta[b, ..., d].to(wide) + bias[..., d]
        step = F.softplus(raw)
        decay = torch.exp(step[..., None] * a)
        back = torch.cat([decay[:, :, :1], decay[:, :, 1:].flip(2)], 2)
        g = recur_(back, (dy[..., None] * c_S).flip(2)).flip(2)
        d_C[b] += torch.einsum("bkld,bklds->bkls", dy, h)
        d_B[b] += torch.einsum("bkld,bklds->bkls", step * own, g)
        d_D[:, d] += (dy * own).sum((0, 2))
        exponent = decay.mul_(g)  # the gradient of Delta A: what the decay of the state before it changes
        exponent[:, :, 0] = 0
        exponent[:, :, 1:].mul_(h[:, :, :-1])
        d_A[:, d] += torch.einsum("bklds,bkld->kds", exponent, step)
        through = (g * b_S).sum(-1)
        d_raw = (exponent * a).sum(-1).addcmul_(through, own).mul_(raw.sigmoid_())
        d_delta[b, ..., d] = d_raw
        d_bias[:, d] += d_raw.sum((0, 2))
        d_x[b, ..., d] = through.mul_(step).addcmul_(dy, D[..., d])
    grads = (d_x, d_delta, d_A, d_B, d_C, d_D, d_bias)
    return tuple(grad.to(v.dtype) for grad, v in zip(grads, inputs, strict=True))


def recur_(a: Tensor, b: Tensor) -> Tensor:
    """Turn b [B, K, L, ...] into h in place, h_l = a_l h_{l-1} + b_l with h_{-1} = 0; a is used up."""
    whole = a.shape[2] // RADIX * RADIX
    if whole > RADIX:
        a_C, h_C = (v[:, :, :whole].unflatten(2, (-1, RADIX)) for v in (a, b))
        for i in range(1, RADIX):
            h_C[:, :, :, i].addcmul_(a_C[:, :, :, i], h_C[:, :, :, i - 1])
            a_C[:, :, :, i].mul_(a_C[:, :, :, i - 1])
        ends = recur_(a_C[:, :, :, -1].clone(), h_C[:, :, :, -1].clone())
        h_C[:, :, 1:].addcmul_(a_C[:, :, 1:], ends[:, :, :-1, None])
    for i in range(whole if whole > RADIX else 1, a.shape[2]):
        b[:, :, i].addcmul_(a[:, :, i], b[:, :, i - 1])
    return b


def _parts(x: Tensor, states: int) -> Iterator[tuple[slice, slice]]:
    """Cut the work: as many samples as `HELD` allows; of one that is larger, as many channels."""
    samples, groups, length, width = x.shape
    of_channel = groups * length * states
    some = max(1, HELD // (of_channel * width))
    channels = max(1, min(width, HELD // of_channel))
    for b in range(0, samples, some):
        for d in range(0, width, channels):
            yield slice(b, b + some), slice(d, d + channels)
