"""Between the stages of a network of several resolutions: rows [B, L, D] of one grid to rows of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def spread_channels(x_BLD: Tensor, grid: Grid, ratio: int) -> Tensor:
    """Cut rows [B, L, ratio^2 D] of `grid` into rows [B, ratio^2 L, D], channels fastest: not pixel-shuffle's order.

    Channel (i, j, d) of a row becomes channel d of the row i down and j to the right inside of it (DiMR).
    """
    x = x_BLD.unflatten(2, (ratio, ratio, -1)).unflatten(1, (grid.height, grid.width))
    return x.transpose(2, 3).flatten(1, 4)


class LongSkips(nn.ModuleList):
    """U-ViT's skips inside one stage of an odd number of blocks (arXiv 2209.12152, section 3): last in, first out.

    The first half of the blocks put their outputs on a pile; each block of the second half takes one off, joined to its
    input by a linear layer of 2 D to D.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(nn.Linear(2 * width, width) for _ in range(blocks // 2))

    def joined(self, i: int, x_BLD: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Return the input of block i: x, with the skip that it takes.

        Args:
            outputs: of the blocks before it, in order.
        """
        middle = len(self)
        if i <= middle:
            return x_BLD
        joined: Tensor = self[i - middle - 1](torch.cat([x_BLD, outputs[2 * middle - i]], -1))
        return joined
