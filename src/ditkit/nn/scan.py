"""Selective scans along paths through a picture whose neighbours touch (LaMamba-Diff, arXiv 2408.02615; VMamba's SS2D).

B batch, L rows of a grid, D width, E inner width, K paths, S states of a channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid
from ditkit.nn.convolution import MapConv
from ditkit.ops.selective_scan import selective_scan

PATHS = 4
STEPS = (1e-3, 1e-1)
"""Between which the steps of a fresh scan lie, evenly in the logarithm; none is below `LEAST`."""
LEAST = 1e-4


def snake_paths(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Row-major tokens in the order of each path, int64 [4, L].

    Rows from the top left, to the right at first, and its reverse; columns from the bottom left, upwards at first, and
    its reverse. Each turns around at the end of a row or column, so that consecutive tokens touch, whatever the sides.

    Raises:
        ShapeError: the grid has several frames.
    """
    if grid.frames != 1:
        raise ShapeError(f"snake_paths: a grid of {grid.shape}, expected one frame")
    cells = torch.arange(grid.length, device=device).view(grid.height, grid.width)
    rows, columns = turning(cells).flatten(), turning(cells.flip(0).mT).flatten()
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])


def turning(cells: Tensor) -> Tensor:
    """Reverse every second row of [R, C]."""
    odd = torch.arange(len(cells), device=cells.device)[:, None] % 2 == 1
    return torch.where(odd, cells.flip(1), cells)


class Paths(NamedTuple):
    """The paths through a grid, made once a call for all blocks of its stage."""

    order: Tensor
    """int64 [K L]: the row at each place, path after path."""
    back: Tensor
    """int64 [K L]: where each row is among the places of all paths, path after path."""

    @classmethod
    def of(cls, grid: Grid, device: torch.device | str | None = None) -> Self:
        """Return the four snakes."""
        order = snake_paths(grid, device)
        back = order.argsort(1) + grid.length * torch.arange(PATHS, device=device)[:, None]
        return cls(order.flatten(), back.flatten())

    def split(self, x_BLE: Tensor) -> Tensor:
        """Read rows along each path, [B, K, L, E]."""
        return x_BLE.index_select(1, self.order).unflatten(1, (PATHS, -1))

    def sum(self, x_BKLE: Tensor) -> Tensor:
        """Add what stands along the paths, row by row, [B, L, E]."""
        return x_BKLE.flatten(1, 2).index_select(1, self.back).unflatten(1, (PATHS, -1)).sum(1)


class SelectiveScan2D(nn.Module):
    """Four selective scans of a picture, summed: Wo (SiLU(z) * LN(sum_k scan_k(SiLU(DW3x3(u))))), (u, z) = Wi x.

    A path has its own projection to step, B and C, its own decay and its own D. The step is of low rank,
    softplus(W_dt r + b) of r with ceil(D / 16) channels. Work and memory are linear in the rows.

    Args:
        states: of a channel; one in LaMamba-Diff, so that each channel is a gated recurrence of its own.
        ratio: inner width, in widths. conv_bias: of the convolution.
    """

    def __init__(self, width: int, states: int = 1, ratio: int = 2, conv_bias: bool = False) -> None:
        super().__init__()
        inner, self.rank, self.states = ratio * width, math.ceil(width / 16), states
        self.inner = nn.Linear(width, 2 * inner, bias=False)
        self.conv = MapConv(inner, inner, groups=inner, bias=conv_bias)
        self.project = nn.Parameter(torch.empty(PATHS, self.rank + 2 * states, inner))
        self.step = nn.Parameter(torch.empty(PATHS, inner, self.rank))
        self.step_bias = nn.Parameter(torch.empty(PATHS, inner))
        self.log_decay = nn.Parameter(torch.empty(PATHS, inner, states))
        self.skip = nn.Parameter(torch.empty(PATHS, inner))
        self.norm = nn.LayerNorm(inner)
        self.outer = nn.Linear(inner, width, bias=False)
        self.reset_scan()

    def reset_scan(self) -> None:
        """Initialise what is no layer: decays exp(-step s) of state s, steps between 0.001 and 0.1, D = 1."""
        bound = self.project.shape[-1] ** -0.5
        nn.init.uniform_(self.project, -bound, bound)
        nn.init.uniform_(self.step, -(self.rank**-0.5), self.rank**-0.5)
        low, high = (math.log(end) for end in STEPS)
        with torch.no_grad():
            steps = (torch.rand_like(self.step_bias) * (high - low) + low).exp().clamp_min(LEAST)
            self.step_bias.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
            decays = torch.arange(
                1, self.states + 1, dtype=self.log_decay.dtype, device=self.log_decay.device
            )
            self.log_decay.copy_(decays.log().expand_as(self.log_decay))
        nn.init.ones_(self.skip)

    def forward(self, x_BLD: Tensor, grid: Grid, paths: Paths | None = None) -> Tensor:
        """Scan rows of `grid` along its `paths`, which are made here unless given."""
        u_BLE, z_BLE = self.inner(x_BLD).chunk(2, -1)
        paths = Paths.of(grid, x_BLD.device) if paths is None else paths
        y_BLE = self.scan(F.silu(self.conv(u_BLE, grid)), paths).to(x_BLD.dtype)
        out: Tensor = self.outer(self.norm(y_BLE) * F.silu(z_BLE))
        return out

    def scan(self, u_BLE: Tensor, paths: Paths) -> Tensor:
        """Return the sum of the four scans in the order of the rows, [B, L, E], in float32 or more."""
        u_BKLE = paths.split(u_BLE)
        parts = u_BKLE @ self.project.mT
        r_BKLR, in_BKLS, out_BKLS = parts.split((self.rank, self.states, self.states), -1)
        decay = -torch.exp(self.log_decay.to(torch.promote_types(self.log_decay.dtype, torch.float32)))
        step_BKLE = r_BKLR @ self.step.mT
        y_BKLE = selective_scan(u_BKLE, step_BKLE, decay, in_BKLS, out_BKLS, self.skip, self.step_bias)
        return paths.sum(y_BKLE)
