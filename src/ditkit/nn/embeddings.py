"""Embeddings of time, class and place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ditkit.core.grid import Grid


def sinusoid(t: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """[B] times to [B, width] as [cos, sin], frequencies period^(-i / (width / 2)) (DiT), in float32."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbedding(nn.Module):
    """Sinusoid of 256 channels, then two layers (DiT): [B] to [B, D]."""

    channels = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(self.channels, width)
        self.outer = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        wave = sinusoid(t, self.channels).to(self.inner.weight.dtype)
        return self.outer(nn.functional.silu(self.inner(wave)))


def sincos_table(grid: Grid, width: int, device: torch.device | str | None = None) -> Tensor:
    """Frozen 2-D positions [L, width], float32: the column in the first half of the channels, then the row.

    Each half is [sin, cos] of all frequencies 10000^(-2i / (width / 2)); DiT calls meshgrid with width first.
    Angles are taken in float64, once a row and once a column, so that no model has to keep the table.
    """
    quarter = width // 4
    frequency = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def waves(count: int) -> Tensor:
        angle = torch.arange(count, device=device)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], -1).float()

    shape = (*grid.shape, width // 2)
    columns, rows = waves(grid.width), waves(grid.height)[:, None]
    return torch.cat([columns.expand(shape), rows.expand(shape)], -1).reshape(grid.length, width)
