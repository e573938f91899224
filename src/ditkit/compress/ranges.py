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
SEEN = 2**13
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


def search(x: Tensor, bits: int, *, positive: bool = False, seen: int = 0) -> Range:
    """Search the range of least error ("mse"), of each row of `x` [N, K].

    Of 80 candidates that narrow the range by one per cent each, the one of least mean |x - x^|^2.4; ties go to the widest.
    Zero need not be inside.

    Args:
        positive: from 0 up. seen: numbers of each row of which errors are averaged, evenly spaced; 0 for all.
    """
    low, high = x.amin(1), x.amax(1)
    x = x[:, :: max(1, x.shape[1] // seen)] if seen else x
    best, found = None, torch.full_like(low, torch.inf)
    for i in range(CANDIDATES):
        tried = fit(low * (1 - 0.01 * i), high * (1 - 0.01 * i), bits, positive=positive)
        scale, zero = tried.scale[:, None], tried.zero[:, None]
        error = (x - dequantise(quantise(x, scale, zero, bits), scale, zero)).abs().pow(POWER).mean(1)
        better = error < found
        found = torch.where(better, error, found)
        best = tried if best is None else Range(*map(torch.where, (better, better), tried, best))
    assert best is not None
    return best


class Running:
    """The range of one step's activations: searched on the first batch, then between running ends.

    Each end is 0.95 of what it was and 0.05 of the batch's; refitted, the range always has 0 in it.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.range: Range | None = None
        self.ends: tuple[Tensor, Tensor] | None = None

    def see(self, x: Tensor) -> Range:
        """Take in a batch, flattened; return the range."""
        row = x.detach().reshape(1, -1)
        if self.range is None:
            self.range = search(row, self.bits, seen=SEEN)
            return self.range
        new = row.amin(1), row.amax(1)
        if self.ends is None:
            self.ends = new
        else:
            low, high = (MOMENTUM * old + (1 - MOMENTUM) * one for old, one in zip(self.ends, new, strict=True))
            self.ends = low, high
        low, high = self.ends
        self.range = fit(low.clamp(max=0), high.clamp(min=0), self.bits)
        return self.range
