"""Norms whose scales and shifts are functions of time, through which alone a network is told it (DiMR, section 3.3).

The place in time, tau, is an argument of every call. A module that kept it would hand one branch of guidance the time
of another.

B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeDependentParameter(nn.Module):
    """p1 + sigmoid((1 + w) tau + b) (p0 - p1): from p1 at low tau to p0 at high (DiMR, eq. 2).

    It starts at one value for all tau, p0 = p1, with w = b = 0, whose gradients are 0 until p0 and p1 part.

    Args:
        width: numbers of the parameter. value: at the start.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Weight decay leaves w and b out; p0 and p1 decay."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.high = nn.Parameter(torch.full((width,), value))
        self.low = nn.Parameter(torch.full((width,), value))
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tau: Tensor) -> Tensor:
        """Return the value at `tau` [..., 1], [..., width]."""
        return self.low + torch.sigmoid((1 + self.weight) * tau + self.bias) * (self.high - self.low)


class TimeDependentRMSNorm(nn.Module):
    """scale(tau) x / (rms(x) + 1e-8), in float32 or more: 16 bits do not hold the 1e-8."""

    def __init__(self, width: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.scale, self.eps = TimeDependentParameter(width, 1.0), eps

    def forward(self, x_BLD: Tensor, tau_B11: Tensor) -> Tensor:
        """Normalise rows [B, L, D] at each sample's time."""
        exact = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        rms = torch.linalg.vector_norm(exact, dim=-1, keepdim=True) * exact.shape[-1] ** -0.5
        return (self.scale(tau_B11) * (exact / (rms + self.eps))).to(x_BLD.dtype)


class TimeDependentLayerNorm(nn.Module):
    """scale(tau) LN(x) + shift(tau), in float32 or more."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale, self.shift = TimeDependentParameter(width, 1.0), TimeDependentParameter(width, 0.0)
        self.eps = eps

    def forward(self, x_BLD: Tensor, tau_B11: Tensor) -> Tensor:
        """Normalise rows [B, L, D] at each sample's time."""
        exact = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        normal = F.layer_norm(exact, exact.shape[-1:], eps=self.eps)
        return torch.addcmul(self.shift(tau_B11), self.scale(tau_B11), normal).to(x_BLD.dtype)
