"""Ranges of affine quantisers: x^ = s (clamp(round(x / s) + z, 0, 2^b - 1) - z)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.ops.int8_linear import dequantise, quantise

LEAST = 1e-8
"""The smallest scale."""
CANDIDATES = 80
"""Ranges that are tried, each one per cent of the first narrower than the one before."""
POWER = 2.4
"""The power of the errors whose mean is lowest."""
SAMPLED = 2**11
"""Numbers of a batch of activations by which candidates are judged; their ends are those of all."""
MOMENTUM = 0.95
"""The weight of the ends so far in a running range."""


class Range(NamedTuple):
    """Scale and zero point, of one range or of several, [N]."""

    scale: Tensor
    zero: Tensor


def span(x: Tensor, bits: int, *, symmetric: bool = False, positive: bool = False) -> Range:
    """Fit the range from the least to the largest value, with 0 in it ("minmax"), of each row of `x` [N, K].

    Args:
        symmetric: around 0, with one level fewer. positive: from 0 up.
    """
    return fit(x.amin(1).clamp(max=0), x.amax(1).clamp(min=0), bits, symmetric=symmetric, positive=positive)


def fit(low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False, positive: bool = False) -> Range:
    """Fit the range with ends `low` and `high`, [N] each."""
    levels = 2**bits
    if positive:
        scale, zero = high / (levels - 1), torch.zeros_like(high)
    elif symmetric:
        scale, zero = 2 * torch.maximum(-low, high) / (levels - 2), torch.zeros_like(high)
    else:
        scale = (high - low) / (levels - 1)
        zero = (-low / scale.clamp(min=LEAST)).round()
    return Range(scale.clamp(min=LEAST), zero)


def search(x: Tensor, bits: int, *, positive: bool = False, sampled: int = 0) -> Range:
    """Search the range of least error ("mse"), of each row of `x` [N, K].

    Of 80 candidates that narrow the range by one per cent each, the one of least mean |x - x^|^2.4; ties go to the
    widest. Zero need not be inside.

    Args:
        positive: from 0 up. sampled: numbers of each row of which errors are averaged, evenly spaced; 0 for all.
    """
    low, high = x.amin(1), x.amax(1)
    x = x[:, :: max(1, x.shape[1] // sampled)] if sampled else x
    shares = 1 - 0.01 * torch.arange(CANDIDATES, dtype=x.dtype, device=x.device)
    if len(x) == 1:  # all at once
        every = fit(low * shares, high * shares, bits, positive=positive)
        best = _errors(x, every, bits).argmin()
        return Range(every.scale[best, None], every.zero[best, None])
    found = fit(low, high, bits, positive=positive)
    least = _errors(x, found, bits)
    for share in shares[1:]:
        tried = fit(low * share, high * share, bits, positive=positive)
        errors = _errors(x, tried, bits)
        better = errors < least
        least = torch.where(better, errors, least)
        found = Range(*(torch.where(better, new, old) for new, old in zip(tried, found, strict=True)))
    return found


def _errors(x: Tensor, tried: Range, bits: int) -> Tensor:
    """Return mean |x - x^|^2.4 of each row."""
    scale, zero = tried.scale[:, None], tried.zero[:, None]
    return (x - dequantise(quantise(x, scale, zero, bits), scale, zero)).abs().pow(POWER).mean(1)


class Running:
    """The range of one step's activations: searched on the first batch, then between running ends.

    Each end is 0.95 of what it was and 0.05 of the batch's; refitted, the range always has 0 in it.

    Args:
        whole: hold the least and the largest of all batches instead, for inputs of which there are finitely many.
    """

    def __init__(self, bits: int, whole: bool = False) -> None:
        self.bits, self.whole = bits, whole
        self.range: Range | None = None
        self.ends: tuple[Tensor, Tensor] | None = None

    def see(self, x: Tensor) -> Range:
        """Take in a batch; return the range."""
        row = x.detach().reshape(1, -1)
        if self.range is None and not self.whole:
            self.range = search(row, self.bits, sampled=SAMPLED)
            return self.range
        low, high = row.amin(1), row.amax(1)
        if self.ends is not None and self.whole:
            low, high = torch.minimum(self.ends[0], low), torch.maximum(self.ends[1], high)
        elif self.ends is not None:
            before = self.ends
            low, high = (
                MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(before, (low, high), strict=True)
            )
        self.ends = low, high
        self.range = fit(low.clamp(max=0), high.clamp(min=0), self.bits)
        return self.range
