"""Rotary positions (Su et al. 2021, arXiv 2104.09864) on the three axes of a clip.

B batch, L rows of the grid, S text rows before them, K head width. Channels 2i and 2i + 1 are a pair, which is
turned as one complex number (Su et al., equation 34; Wan).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, take_rows


class Rotary(NamedTuple):
    """Rotary table of a sequence whose first `text` rows are text, and which of these are no padding."""

    cos: Tensor
    """[S + L, K / 2], as is `sin`: of the angle of each pair. Rows chosen for each sample: [B, S + R, K / 2]."""
    sin: Tensor
    text: int = 0
    valid: Tensor | None = None
    """[B, S] bool; None where every text row is real."""

    def places(self, stream: str, index: Tensor) -> Tensor:
        """Return the positions in the sequence of some rows of one stream and all of the other, in its order."""
        every = torch.arange(len(self.cos), device=index.device).expand(*index.shape[:-1], -1)
        if stream == "text":
            return torch.cat((index, every[..., self.text :]), -1)
        return torch.cat((every[..., : self.text], self.text + index), -1)

    def rows(self, stream: str, index: Tensor) -> Rotary:
        """Only the rows `index` of `stream`, [R] or [B, R], all of the other."""
        at, text, valid = self.places(stream, index), self.text, self.valid
        if stream == "text":
            text, valid = index.shape[-1], None if valid is None else take_rows(valid, index)
        return Rotary(self.cos[at], self.sin[at], text, valid)

    def mask(self) -> tuple[Tensor, ...]:
        """Return what a `core` site takes after q, k and v: nothing without padding, else [B, 1, 1, S] bool."""
        return () if self.valid is None else (self.valid[:, None, None],)


class RotaryTokens(NamedTuple):
    """Embedded tokens [B, S + L, D] and their positions: what a `tokens` site returns."""

    x: Tensor
    rotary: Rotary

    def rows(self, stream: str, index: Tensor) -> RotaryTokens:
        at = self.rotary.places(stream, index)
        return RotaryTokens(take_rows(self.x, at), self.rotary.rows(stream, index))


def wan_split(head_width: int) -> tuple[int, int, int]:
    """Channels of a head for frames, rows and columns, as Wan (2025) cuts them: 44, 42, 42 of 128.

    Raises:
        ShapeError: the head is odd, or too narrow for a pair on each axis.
    """
    if head_width % 2 or head_width < 6:
        raise ShapeError(
            f"rotary positions on three axes: head width {head_width} should be even, at least 6"
        )
    each = 2 * (head_width // 6)
    return head_width - 2 * each, each, each


def axial_angles(
    grid: Grid,
    split: tuple[int, ...],
    base: float = 10_000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """[L, K / 2] float64: place x base^(-2i / n) for the n channels of each axis (Su et al., equation 15)."""
    angles = []
    for axis, (count, channels) in enumerate(zip(grid.shape, split, strict=True)):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        angle = torch.arange(count, device=device)[:, None] * base**-exponent
        shape = [count if i == axis else 1 for i in range(3)]
        angles.append(angle.reshape(*shape, -1).expand(*grid.shape, -1))
    return torch.cat(angles, -1).flatten(0, 2)


def rotary_table(angles: Tensor, text: int = 0, valid: Tensor | None = None) -> Rotary:
    """Make the float32 table of `angles` [L, K / 2], after `text` rows that are not turned."""
    angles = F.pad(angles, (0, 0, text, 0))
    return Rotary(angles.cos().float(), angles.sin().float(), text, valid)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys [B, N, S + L, K] by their angles, in float32 or more, returned in their own type."""
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table.unsqueeze(-3) for table in (rotary.cos, rotary.sin))  # the same for all heads
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)
