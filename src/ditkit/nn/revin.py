"""Reversible instance normalisation: each window by its own mean and deviation, and back (RevIN, Kim et al. 2022).

N windows, L steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

EPS = 1e-5


class WindowScale(NamedTuple):
    """Mean and deviation of each window, [N, 1], float32 or finer, which carry no gradient."""

    mean: Tensor
    std: Tensor


class RevIN(nn.Module):
    """z = (x - mean) / sqrt(var + eps) w + b of windows [N, L], and its inverse.

    The statistics are returned, not kept: a second call, a copy on another device or a compiled graph sees its own
    alone. Both ways are computed in float32 or finer, under autocast too.
    """

    def __init__(self, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def normalise(self, x: Tensor) -> tuple[Tensor, WindowScale]:
        """Windows [N, L] of mean b and deviation w, in the type of x, with what `restore` needs."""
        x_fine, weight, bias = self._fine(x)
        scale = window_scale(x_fine, self.eps)
        return (((x_fine - scale.mean) / scale.std) * weight + bias).to(x.dtype), scale

    def restore(self, y: Tensor, scale: WindowScale, dtype: torch.dtype | None = None) -> Tensor:
        """Bring normalised values [N, ...] back to the level and the scale of their windows.

        As in the published code, the weight is kept from 0 by eps^2.

        Args:
            dtype: of the result; by default that of y.
        """
        y_fine, _, bias = self._fine(y)
        found = (y_fine - bias) * self.spread(scale) + scale.mean
        return found.to(y.dtype if dtype is None else dtype)

    def spread(self, scale: WindowScale) -> Tensor:
        """Return what a difference of 1 in normalised values is in the unit of each window: [N, 1]."""
        return scale.std / (self.weight.to(scale.std.dtype) + self.eps**2)

    def _fine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = torch.promote_types(x.dtype, torch.float32)
        return x.to(kind), self.weight.to(kind), self.bias.to(kind)


def window_scale(x: Tensor, eps: float = EPS) -> WindowScale:
    """Mean and sqrt(biased variance + eps) of windows [N, L]; without a gradient."""
    x = x.detach()
    return WindowScale(x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + eps).sqrt())


def standardised(x: Tensor, eps: float = EPS) -> Tensor:
    """Windows [N, L] of mean 0 and deviation 1."""
    scale = window_scale(x, eps)
    return (x - scale.mean) / scale.std
