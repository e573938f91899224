"""Token geometry: only here do sizes, strides and patches become lengths, coordinates or permutations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ShapeError


@dataclass(frozen=True)
class Grid:
    """Tokens of one stream on (frames, height, width) axes, in row-major order.

    A picture has one frame; a series of length T is `Grid(T)`; a set times a sequence is `Grid(1, S, T)`.

    Args:
        frames, height, width: tokens along each axis.
        tile: height and width, in tokens, of the tiles whose tokens `tile_order` makes neighbours in memory.

    Raises:
        ShapeError: an axis is empty, or the tile does not divide the grid.
    """

    frames: int = 1
    height: int = 1
    width: int = 1
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ShapeError(f"Grid: every axis needs at least one token, got {self.shape}")
        if self.tile is not None:
            rows, columns = self.tile
            if min(self.tile) < 1 or self.height % rows or self.width % columns:
                raise ShapeError(
                    f"Grid: tile {self.tile} does not divide {self.height} x {self.width} tokens"
                )

    @classmethod
    def of(cls, size: tuple[int, ...], patch: int | tuple[int, ...]) -> Grid:
        """The grid of a signal of `size` (H, W) or (T, H, W) cut into patches of the same axes.

        One number is the side of a square patch of one frame.

        Raises:
            ShapeError: an axis does not divide by its patch.
        """
        if len(size) not in (2, 3):
            raise ShapeError(f"Grid.of: size {size} should be (height, width) or (frames, height, width)")
        patches = (1, patch, patch)[-len(size) :] if isinstance(patch, int) else patch
        if len(patches) != len(size):
            raise ShapeError(f"Grid.of: patch {patches} should have one side for each axis of {size}")
        for name, length, step in zip(
            ("frames", "height", "width")[-len(size) :], size, patches, strict=True
        ):
            if step < 1 or length % step:
                raise ShapeError(f"Grid.of: {name}={length} does not divide into patches of {step}")
        counts = tuple(length // step for length, step in zip(size, patches, strict=True))
        return cls(frames=counts[-3] if len(counts) == 3 else 1, height=counts[-2], width=counts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)

    @property
    def length(self) -> int:
        return prod(self.shape)

    def coordinates(self) -> Tensor:
        """Integer (frame, row, column) of each token, [L, 3]."""
        axes = [torch.arange(n) for n in self.shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    def tile_order(self) -> Tensor:
        """Permutation [L]: place i of the tiled order holds row-major token `order[i]`."""
        order = torch.arange(self.length)
        if self.tile is None:
            return order
        rows, columns = self.tile
        cut = (self.frames, self.height // rows, rows, self.width // columns, columns)
        return order.reshape(cut).permute(0, 1, 3, 2, 4).reshape(-1)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] to row-major tokens [B, L, C p p], channels slowest, as a convolution's kernel flattens.

    Raises:
        ShapeError: a side does not divide by the patch.
    """
    B, C, H, W = x.shape
    if H % patch or W % patch:
        raise ShapeError(f"patchify: {H} x {W} does not divide into patches of {patch}")
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def unpatchify(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """Row-major tokens [B, L, p p C], channels fastest (DiT, final layer), to [B, C, H, W].

    Raises:
        ShapeError: the tokens do not fill the grid, or their width is no number of whole patches.
    """
    B, L, D = tokens.shape
    if (1, grid.height, grid.width) != grid.shape or grid.length != L:
        raise ShapeError(f"unpatchify: {L} tokens do not fill one frame of a grid of {grid.shape}")
    if D % patch**2:
        raise ShapeError(f"unpatchify: width {D} does not divide into patches of {patch} x {patch}")
    x = tokens.reshape(B, grid.height, grid.width, patch, patch, D // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, grid.height * patch, grid.width * patch)


class Segment(NamedTuple):
    """A run of tokens of one stream in a model call; `valid` [B, L] marks the rows that are not padding."""

    stream: str
    grid: Grid
    length: int
    valid: Tensor | None = None


class Tokens(NamedTuple):
    """Embedded tokens and whatever is aligned with them, so that a policy can take some rows of all of it."""

    x: Tensor
    """[B, L, D]"""
    position: Tensor | None = None
    """[L, ...] rotary table or coordinates; None where positions are already added to `x`."""

    def rows(self, stream: str, index: Tensor) -> Tokens:
        """Only the rows `index` [R] of `stream`; a single-stream model ignores the stream's name."""
        return Tokens(self.x[:, index], None if self.position is None else self.position[index])
