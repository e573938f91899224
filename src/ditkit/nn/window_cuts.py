"""Windows of a clip's or a picture's rows, of any sides and shifted by any (Swin, arXiv 2103.14030).

B batch, L rows of a grid, D width, n windows, M rows of a window. The sides of a window, and what it is
shifted by, are tokens along frames, height and width; one number is the same along height and width, within a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid

Sides = int | Sequence[int]
AXES = (1, 2, 3)


def cut_windows(x_BLD: Tensor, grid: Grid, window: Sides, shift: Sides = 0) -> Tensor:
    """Rows [B, L, D] of `grid` in windows, [B, n, M, D], both row-major.

    Args:
        shift: by which the grid is first rolled towards its origin.

    Raises:
        ShapeError: the windows do not divide the grid.
    """
    frames, height, width = sides_of(window, 1)
    counts, shifts = window_counts(grid, window), sides_of(shift, 0)
    x = x_BLD.unflatten(1, grid.shape)
    if any(shifts):
        x = x.roll([-n for n in shifts], AXES)
    x = x.unflatten(3, (counts[2], width)).unflatten(2, (counts[1], height)).unflatten(1, (counts[0], frames))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def join_windows(x_BnMD: Tensor, grid: Grid, window: Sides, shift: Sides = 0) -> Tensor:
    """Undo `cut_windows`."""
    counts, shifts = window_counts(grid, window), sides_of(shift, 0)
    x = x_BnMD.unflatten(2, sides_of(window, 1)).unflatten(1, counts)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if any(shifts):
        x = x.roll(shifts, AXES)
    return x.flatten(1, 3)


def sides_of(sides: Sides, frames: int) -> tuple[int, int, int]:
    """Return the three sides that one number, or three, stand for; `frames` is one number's along frames."""
    if isinstance(sides, int):
        return (frames, sides, sides)
    time, height, width = sides
    return (time, height, width)


def window_counts(grid: Grid, window: Sides) -> tuple[int, int, int]:
    """Return the windows along frames, height and width.

    Raises:
        ShapeError: they do not divide the grid.
    """
    sides = sides_of(window, 1)
    if any(n % side for n, side in zip(grid.shape, sides, strict=True)):
        flat = grid.frames == sides[0] == 1
        cut, whole = (" x ".join(map(str, one[1 if flat else 0 :])) for one in (sides, grid.shape))
        raise ShapeError(f"windows of {cut} do not divide a grid of {whole} tokens")
    frames, height, width = (n // side for n, side in zip(grid.shape, sides, strict=True))
    return frames, height, width


def seam_mask(grid: Grid, window: Sides, shift: Sides, device: torch.device | str | None = None) -> Tensor:
    """Whether rows of a window were neighbours before the roll, bool [n, M, M]: what it joined does not meet."""
    region = torch.zeros(grid.shape, dtype=torch.long, device=device)
    for axis, (n, side, moved) in enumerate(
        zip(grid.shape, sides_of(window, 1), sides_of(shift, 0), strict=True)
    ):
        place = torch.arange(n, device=device)
        part = (place >= n - side).long() + (place >= n - moved)
        region = 3 * region + part.view([-1 if i == axis else 1 for i in range(3)])
    region_nM = cut_windows(region.reshape(1, -1, 1), grid, window).squeeze(-1)[0]
    return region_nM[:, :, None] == region_nM[:, None, :]
