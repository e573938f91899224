"""The split of windows of a series into trend, season and residual by learned maps (TEMPO, arXiv 2310.04948).

N windows, L steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Components(NamedTuple):
    """Parts of windows, [N, L] each."""

    trend: Tensor
    season: Tensor
    residual: Tensor


def moving_average(x: Tensor, kernel: int) -> Tensor:
    """Mean of the `kernel` values around each of [N, L], its ends repeated beyond them; `kernel` is odd."""
    side = (kernel - 1) // 2
    return F.avg_pool1d(F.pad(x[:, None], (side, side), mode="replicate"), kernel, stride=1)[:, 0]


class Decomposition(nn.Module):
    """trend = W average(x), season = MLP(x - trend) with one ReLU layer of 4 L, and the residual is what is left.

    So the three sum to x, whatever the maps have learned.
    """

    def __init__(self, length: int, kernel: int = 25) -> None:
        super().__init__()
        self.kernel = kernel
        self.trend = nn.Linear(length, length)
        self.season = nn.Sequential(nn.Linear(length, 4 * length), nn.ReLU(), nn.Linear(4 * length, length))

    def forward(self, x: Tensor) -> Components:
        trend = self.trend(moving_average(x, self.kernel))
        season = self.season(x - trend)
        return Components(trend, season, x - trend - season)
