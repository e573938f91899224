"""Between the stages of a network of several resolutions: rows [B, L, D] of one grid to rows of another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.grid import Grid, patchify
from ditkit.nn.convolution import MapConv, to_map, to_rows


class Downsample(nn.Module):
    """A 3 x 3 convolution to half the channels, then 2 x 2 pixels into channels: [B, L, D] to [B, L / 4, 2 D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = MapConv(width, width // 2, bias=False)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """Pixel-unshuffle; `grid` is that of the rows that come in, of even sides."""
        return patchify(to_map(self.conv(x_BLD, grid), grid), 2)


class Upsample(nn.Module):
    """A 3 x 3 convolution to twice the channels, then channels into 2 x 2 pixels: [B, L, D] to [B, 4 L, D / 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = MapConv(width, 2 * width, bias=False)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """Pixel-shuffle; `grid` is that of the rows that come in."""
        return to_rows(F.pixel_shuffle(to_map(self.conv(x_BLD, grid), grid), 2))
