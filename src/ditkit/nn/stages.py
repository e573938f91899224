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


class MergePatches(nn.Module):
    """Four neighbours side by side, normed, then one layer: [B, L, D] to [B, L / 4, out] (Swin, arXiv 2103.14030).

    The order of the four is down before right: (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.outer = nn.Linear(4 * width, out, bias=False)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """Merge rows of `grid`, which has even sides."""
        cells = x_BLD.unflatten(1, (grid.height // 2, 2, grid.width // 2, 2))
        out: Tensor = self.outer(self.norm(cells.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))
        return out


class ExpandPatches(nn.Module):
    """One layer, then its channels spread over ratio x ratio pixels and normed: [B, L, D] to [B, ratio^2 L, out]."""

    def __init__(self, width: int, out: int, ratio: int = 2) -> None:
        super().__init__()
        self.ratio = ratio
        self.inner = nn.Linear(width, ratio**2 * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """Expand rows of `grid`."""
        out: Tensor = self.norm(spread_channels(self.inner(x_BLD), grid, self.ratio))
        return out


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
