"""Attention in windows of a picture, shifted or not (Swin, arXiv 2103.14030).

B batch, L rows of a grid, D width, n windows, M rows of a window, N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid


def cut_windows(x_BLD: Tensor, grid: Grid, window: int, shift: int = 0) -> Tensor:
    """Rows [B, L, D] of `grid` in windows of window x window, [B, n, M, D], both row-major.

    Args:
        shift: rows and columns by which the picture is first rolled up and to the left.

    Raises:
        ShapeError: the windows do not divide the grid.
    """
    x = x_BLD.unflatten(1, (grid.height, grid.width))
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    rows, columns = _counts(grid, window)
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(x_BnMD: Tensor, grid: Grid, window: int, shift: int = 0) -> Tensor:
    """Undo `cut_windows`."""
    rows, columns = _counts(grid, window)
    x = x_BnMD.unflatten(2, (window, window)).unflatten(1, (rows, columns)).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x.flatten(1, 2)


def _counts(grid: Grid, window: int) -> tuple[int, int]:
    """Windows along height and width."""
    if grid.frames != 1 or grid.height % window or grid.width % window:
        raise ShapeError(
            f"windows of {window} x {window} do not divide a grid of {grid.height} x {grid.width} tokens"
        )
    return grid.height // window, grid.width // window


def seam_mask(grid: Grid, window: int, shift: int, device: torch.device | str | None = None) -> Tensor:
    """Whether rows of a window were neighbours before the roll, bool [n, M, M]: what it joined does not meet."""

    def part(side: int) -> Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - window).long() + (place >= side - shift)

    region = 3 * part(grid.height)[:, None] + part(grid.width)
    region_nM = cut_windows(region.reshape(1, -1, 1), grid, window).squeeze(-1)[0]
    return region_nM[:, :, None] == region_nM[:, None, :]


def relative_places(window: int, device: torch.device | str | None = None) -> Tensor:
    """Return the number of the offset between each two rows of a window, int64 [M, M] below (2 window - 1)^2."""
    cells = Grid(1, window, window).coordinates()[:, 1:].to(device)
    offset = cells[:, None] - cells + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


class WindowAttention(nn.Module):
    """Multi-head attention inside of windows, a learned bias for each offset and head added to the scores.

    Args:
        window: its side. shift: of the windows, half of it in every second block of Swin; where the roll joins opposite
            borders, they do not see each other.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int = 0) -> None:
        if width % heads:
            raise ShapeError(f"WindowAttention: width={width} does not divide into heads={heads}")
        if not 0 <= shift < window:
            raise ShapeError(f"WindowAttention: shift={shift}, expected less than window={window}")
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """Attend among rows of `grid`, which the windows divide."""
        windows = cut_windows(x_BLD, grid, self.window, self.shift)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + self.scores_bias(grid)  # [B, n, N, M, M]
        o_BnMD = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)
        return join_windows(self.out(o_BnMD), grid, self.window, self.shift)

    def scores_bias(self, grid: Grid) -> Tensor:
        """Return what is added to scores, [1 or n, N, M, M]: the bias of offsets, -inf across a seam."""
        bias = self.bias[relative_places(self.window, self.bias.device)].permute(2, 0, 1)[None]
        if not self.shift:
            return bias
        inside = seam_mask(grid, self.window, self.shift, self.bias.device)
        return bias.masked_fill(~inside[:, None], -torch.inf)
