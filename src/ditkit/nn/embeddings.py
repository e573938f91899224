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


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of a module's first floating-point tensor: layers may be wrapped, or hold whole numbers."""
    tensors = (*module.parameters(), *module.buffers())
    return next((v.dtype for v in tensors if v.is_floating_point()), torch.float32)


class TimeEmbedding(nn.Module):
    """Sinusoid of 256 channels, then two layers (DiT): [B] to [B, D]."""

    channels = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(self.channels, width)
        self.outer = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        wave = sinusoid(t, self.channels).to(dtype_of(self))
        return self.outer(nn.functional.silu(self.inner(wave)))


def drop_labels(label: Tensor, drop: Tensor | None, null: int, rate: float) -> Tensor:
    """Labels [B] with the null class where `drop` [B] says so; without it, a share `rate` drawn here."""
    if drop is None and rate:
        drop = torch.rand(label.shape, device=label.device) < rate
    return label if drop is None else label.masked_fill(drop, null)


def sincos_axis(
    count: int, width: int, device: torch.device | str | None = None, step: float = 1.0
) -> Tensor:
    """Frozen 1-D positions [count, width], float32: [sin, cos] of frequencies 10000^(-2i / width).

    Angles are taken in float64, once a place, so that no model has to keep the table.

    Args:
        step: from one place to the next.
    """
    half = width // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = torch.arange(count, device=device)[:, None] * (step * frequency)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def sincos_table(grid: Grid, width: int, device: torch.device | str | None = None) -> Tensor:
    """Frozen 2-D positions [L, width], float32: the column in the first half of the channels, then the row.

    Each half is a `sincos_axis`; DiT calls meshgrid with width first. Every frame has the same positions.
    """
    shape = (*grid.shape, width // 2)
    columns = sincos_axis(grid.width, width // 2, device)
    rows = sincos_axis(grid.height, width // 2, device)[:, None]
    return torch.cat([columns.expand(shape), rows.expand(shape)], -1).reshape(grid.length, width)
