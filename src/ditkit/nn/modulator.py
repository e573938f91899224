"""Spatio-temporal modulator of UniTS (arXiv 2512.04461): a bias on attention's logits from places, days and an image.

G lines (a frame in space, a place in time), L tokens of a line, N heads, K head width, E channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DENSE_BYTES = 2**26
"""Bias that is held at once; a larger one is generated for some queries at a time, and again in the backward pass."""
ABSENT = -1e9
"""Logit of a key that is padding: finite, so that a line of padding alone gives no NaN."""


class LineBias(NamedTuple):
    """Bias decay_n (w1 |place_i - place_j| + w2 |auxiliary_i - auxiliary_j|) of lines of tokens, sums over channels.

    It is symmetric with a zero diagonal, and never held whole unless `dense` is asked for.

    Args:
        place: [1 or G, L, A] rows and columns of patches, or days.
        auxiliary: [G, L, E] an image at the tokens, scaled so that the sum over channels is what counts.
        weight: [2], w1 and w2. decay: [N], negative.
        valid: [G, L], false at keys that are padding; None for none.
    """

    place: Tensor
    auxiliary: Tensor
    weight: Tensor
    decay: Tensor
    valid: Tensor | None = None

    def dense(self) -> Tensor:
        """Return all of it, [G or 1, N, L, L] in float32 or more."""
        return self.of_rows(0, self.place.shape[1])

    def of_rows(self, start: int, stop: int) -> Tensor:
        """Return the part of queries `start` to `stop`, [G or 1, N, stop - start, L]."""
        distance = self.weight[0] * _distance(self.place, start, stop)
        distance = distance + self.weight[1] * _distance(self.auxiliary, start, stop)
        bias = self.decay[:, None, None] * distance[:, None]
        return bias if self.valid is None else bias.masked_fill(~self.valid[:, None, None], ABSENT)

    def score(self, score: Tensor, g: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Add the bias of one pair to its score: a `score_mod` of torch's flex_attention."""
        line = g * 0 if len(self.place) == 1 else g
        distance = self.weight[0] * _pair(self.place, line, i, j)
        distance = distance + self.weight[1] * _pair(self.auxiliary, g, i, j)
        biased = score + self.decay[n] * distance
        return biased if self.valid is None else torch.where(self.valid[g, j], biased, ABSENT)


def _distance(x: Tensor, start: int, stop: int) -> Tensor:
    """Sum |x_i - x_j| over channels, for i from `start` to `stop`: [G, L, E] to [G, stop - start, L]."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    found = x.new_zeros(len(x), stop - start, x.shape[1])
    for channel in x.unbind(-1):  # torch.cdist is counted by no MAC counter
        found = found + (channel[:, start:stop, None] - channel[:, None]).abs()
    return found


def _pair(x: Tensor, g: Tensor, i: Tensor, j: Tensor) -> Any:
    return sum((x[g, i, e] - x[g, j, e]).abs() for e in range(x.shape[-1]))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: LineBias) -> Tensor:
    """Compute softmax(q k^T / sqrt(K) + bias) v, all [G, N, L, K]: the function of a `core` site.

    The bias is added before the softmax, and both are in float32 or more.
    """
    G, N, L = q.shape[:3]
    rows = max(1, DENSE_BYTES // (4 * G * N * L))
    if rows >= L:
        return _attend(q, k, v, bias.dense())
    again = torch.is_grad_enabled() and (q.requires_grad or bias.weight.requires_grad)
    parts = []
    for start in range(0, L, rows):
        args = q, k, v, bias, start, min(start + rows, L)
        parts.append(checkpoint(_some_rows, *args, use_reentrant=False) if again else _some_rows(*args))
    return torch.cat(parts, 2)


def flex_biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: LineBias) -> Tensor:
    """Compute the same by torch's flex_attention, which generates the bias inside of its kernel where it is compiled.

    On a CPU torch has no backward of it.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, score_mod=bias.score)


def _some_rows(q: Tensor, k: Tensor, v: Tensor, bias: LineBias, start: int, stop: int) -> Tensor:
    return _attend(q[:, :, start:stop], k, v, bias.of_rows(start, stop))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    # two products, as torch's fused kernels give a bias no gradient, and other bits without one
    with torch.autocast(
        q.device.type, enabled=False
    ):  # which would round the logits before the bias is added
        scores = q.to(bias.dtype) @ k.to(bias.dtype).mT * q.shape[-1] ** -0.5 + bias
    return scores.softmax(-1).to(v.dtype) @ v


class Modulator(nn.Module):
    """The learned weights of one axis of one layer: w1 of places or days, w2 of the auxiliary image, both 1 at first.

    Head n of N decays by lambda_n = log(1 - 2^-(2 + 4 n / N)) < 0, as the geometry prior of DFormerv2 has it.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, place: Tensor, auxiliary: Tensor, valid: Tensor | None = None) -> LineBias:
        """Return the bias of lines of tokens."""
        rates = [math.log1p(-(2.0 ** -(2 + 4 * n / self.heads))) for n in range(self.heads)]
        weight = self.weight.float() if self.weight.dtype in (torch.bfloat16, torch.float16) else self.weight
        decay = torch.tensor(rates, dtype=weight.dtype, device=weight.device)
        return LineBias(place, auxiliary, weight, decay, valid)
