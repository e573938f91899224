"""Cosines of a time difference, with frequencies over nine decades (TGAT; as in DyGLib's TimeEncoder)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DECADES = 9


class TimeEncoding(nn.Module):
    """phi(dt) = cos(w dt + b), w_k = 10^(-9 k / (D - 1)), both trained: times [...] to [..., D].

    Times are differences: seconds since 1970 in float32 are 128 s apart.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(10.0 ** -torch.linspace(0, DECADES, width))
        self.phase = nn.Parameter(torch.zeros(width))

    def forward(self, difference: Tensor) -> Tensor:
        return torch.cos(difference[..., None] * self.frequency + self.phase)
