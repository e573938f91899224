"""Adaptive condition injector of UniTS (arXiv 2512.04461): an affine map of every token, from its own condition token.

B batch, L tokens of a clip, G lines (a frame in space, a place in time), D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid
from ditkit.nn.axes import Clip
from ditkit.nn.convolution import MapConv


class ConditionInjector(nn.Module):
    """ACor(h; q) = h + gamma(q) * GroupNorm(h) + beta(q), [gamma, beta] = Conv(q), all token by token.

    Along "S" a square kernel runs over the patches of each frame, along "T" one over the dates of each place. The
    convolution is zero at first, so that ACor(h) = h.

    Args:
        kernel: odd. groups: of channels, which share mean and deviation over their line.
    """

    def __init__(self, axis: Literal["S", "T"], width: int, kernel: int, groups: int) -> None:
        if width % groups:
            raise ShapeError(f"ConditionInjector: width={width} does not divide into groups={groups}")
        super().__init__()
        self.axis, self.groups = axis, groups
        self.conv: nn.Module = (
            MapConv(width, 2 * width, kernel)
            if axis == "S"
            else nn.Conv1d(width, 2 * width, kernel, padding=kernel // 2)
        )
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def terms(self, q_BLD: Tensor, grid: Grid) -> Tensor:
        """Compute gamma and beta of each token from condition tokens, [B, L, 2 D]; they know no noise and no time."""
        clip = Clip(grid.frames, grid.height * grid.width)
        lines = clip.fold(q_BLD, self.axis)
        frame = Grid(1, grid.height, grid.width)
        found = self.conv(lines, frame) if self.axis == "S" else self.conv(lines.mT).mT
        return clip.unfold(found, self.axis)

    def forward(self, h_BLD: Tensor, q_BLD: Tensor, grid: Grid, valid_GL: Tensor | None = None) -> Tensor:
        """Inject condition tokens [B, L, D], aligned with `h`.

        Args:
            valid_GL: of each line, the tokens that count for its mean and deviation.
        """
        clip = Clip(grid.frames, grid.height * grid.width)
        gamma, beta = self.terms(q_BLD, grid).chunk(2, -1)
        normed = clip.unfold(group_norm(clip.fold(h_BLD, self.axis), self.groups, valid_GL), self.axis)
        return h_BLD + gamma * normed + beta


def group_norm(h_GLD: Tensor, groups: int, valid_GL: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise each group of channels over its line, without an affine part; padding does not count."""
    if valid_GL is None:
        return F.group_norm(h_GLD.mT, groups, eps=eps).mT
    parts = h_GLD.unflatten(-1, (groups, -1))  # [G, L, groups, D / groups]
    share = valid_GL.to(parts.dtype)[..., None, None]
    count = share.sum(1, keepdim=True).clamp_min(1) * parts.shape[-1]
    mean = (parts * share).sum((1, 3), keepdim=True) / count
    variance = ((parts - mean).square() * share).sum((1, 3), keepdim=True) / count
    return ((parts - mean) * torch.rsqrt(variance + eps)).flatten(2)
