"""Token geometry: only here do sizes, strides and patches become lengths, coordinates or permutations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.core.errors import ShapeError

AXES = {1: ("frames",), 2: ("height", "width"), 3: ("frames", "height", "width")}
"""Axes of a grid that signals of one, two and three axes lie on."""


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
        """Return the grid of a signal of `size` (T,), (H, W) or (T, H, W) cut into patches of the same axes.

        One number is the length of a series' patch, or the side of a square patch of one frame.

        Raises:
            ShapeError: an axis does not divide by its patch.
        """
        if len(size) not in AXES:
            raise ShapeError(
                f"Grid.of: size {size} should be (frames,), (height, width) or (frames, height, width)"
            )
        patches = (1, patch, patch)[-len(size) :] if isinstance(patch, int) else patch
        if len(patches) != len(size):
            raise ShapeError(f"Grid.of: patch {patches} should have one side for each axis of {size}")
        counts: dict[str, int] = {}
        for name, length, step in zip(AXES[len(size)], size, patches, strict=True):
            if step < 1 or length % step:
                raise ShapeError(f"Grid.of: {name}={length} does not divide into patches of {step}")
            counts[name] = length // step
        frames, height, width = (counts.get(name, 1) for name in AXES[3])
        return cls(frames, height, width)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)

    @property
    def length(self) -> int:
        return prod(self.shape)

    def counts(self, axes: int) -> tuple[int, ...]:
        """Return the tokens along each axis of a signal: of the one of a series, two of a picture, three of a clip."""
        return tuple(getattr(self, name) for name in AXES[axes])

    def sides(self, size: Sequence[int]) -> tuple[int, ...]:
        """Sides of a token of a sample of `size` (T,), (H, W) or (T, H, W) on this grid.

        Raises:
            ShapeError: the grid does not divide the sample.
        """
        counts = self.counts(len(size))
        if self.length != prod(counts) or any(n % count for n, count in zip(size, counts, strict=True)):
            given = " x ".join(map(str, size))
            raise ShapeError(f"Grid: {given} does not divide into a grid of {self.shape} tokens")
        return tuple(n // count for n, count in zip(size, counts, strict=True))

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


def patchify(x: Tensor, patch: int | tuple[int, ...]) -> Tensor:
    """[B, C, T], [B, C, H, W] or [B, C, T, H, W] to row-major tokens [B, L, C P], channels slowest, as in a kernel.

    Args:
        patch: its sides, one for each axis after the channels, P their product; one number p is (p, p), or
            (1, p, p) for a clip.

    Raises:
        ShapeError: a side does not divide by the patch, or the patch has other axes.
    """
    B, C, *size = x.shape
    sides = (1, patch, patch)[-len(size) :] if isinstance(patch, int) else patch
    if len(sides) != len(size) or any(p < 1 or n % p for n, p in zip(size, sides, strict=True)):
        given = " x ".join(map(str, size))
        raise ShapeError(f"patchify: {given} does not divide into patches of {_times(patch)}")
    counts = [n // p for n, p in zip(size, sides, strict=True)]
    x = x.reshape(B, C, *(n for pair in zip(counts, sides, strict=True) for n in pair))
    axes = range(2, x.ndim)
    return x.permute(0, *axes[::2], 1, *axes[1::2]).reshape(B, prod(counts), C * prod(sides))


def unpatchify(tokens: Tensor, grid: Grid, patch: int | tuple[int, ...]) -> Tensor:
    """Row-major tokens [B, L, P C], channels fastest (DiT, final layer), to [B, C, T], [B, C, H, W] or [B, C, T, H, W].

    Args:
        patch: one number or (height, width) of a picture's; (frames, height, width) of a clip's, which has a
            time axis even where the grid has one frame; (frames,) of a series'.

    Raises:
        ShapeError: the tokens do not fill the grid, or their width is no number of whole patches.
    """
    sides = (patch, patch) if isinstance(patch, int) else patch
    if len(sides) not in AXES:
        raise ShapeError(
            f"unpatchify: patch {sides} should be (frames,), (height, width) or (frames, height, width)"
        )
    B, L, D = tokens.shape
    counts = grid.counts(len(sides))
    if prod(counts) != grid.length or grid.length != L:
        fill = "one frame of a grid" if len(sides) == 2 else "a grid"
        raise ShapeError(f"unpatchify: {L} tokens do not fill {fill} of {grid.shape}")
    if D % prod(sides):
        raise ShapeError(f"unpatchify: width {D} does not divide into patches of {_times(sides)}")
    k = len(sides)
    x = tokens.reshape(B, *counts, *sides, D // prod(sides))
    x = x.permute(0, -1, *(axis for i in range(1, k + 1) for axis in (i, i + k)))
    return x.reshape(B, D // prod(sides), *(n * p for n, p in zip(counts, sides, strict=True)))


def _times(sides: int | tuple[int, ...]) -> str:
    return str(sides) if isinstance(sides, int) else " x ".join(map(str, sides))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [R] of x [B, L, ...], or each sample's own [B, R]: [B, R, ...]; x may be [1, L, ...], for all."""
    return x[:, index] if index.ndim == 1 else x.expand(len(index), *x.shape[1:])[_samples(index), index]


def put_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write `rows` [B, R, ...] into x [B, L, ...] at `index`, as in `take_rows`, in place."""
    x[_samples(index), index] = rows
    return x


def _samples(index: Tensor) -> Any:
    every = slice(None)
    return every if index.ndim == 1 else torch.arange(len(index), device=index.device)[:, None]


class Segment(NamedTuple):
    """A run of tokens of one stream in a model call.

    Args:
        valid: [B, L], marks the rows that are not padding.
        stage: which resolution of a network with several.
    """

    stream: str
    grid: Grid
    length: int
    valid: Tensor | None = None
    stage: int = 0


class Tokens(NamedTuple):
    """Embedded tokens and whatever is aligned with them, so that a policy can take some rows of all of it."""

    x: Tensor
    """[B, L, D]"""
    position: Tensor | None = None
    """[L, ...] rotary table or coordinates, or each sample's own; None where positions are already added to `x`."""

    def rows(self, stream: str, index: Tensor) -> Tokens:
        """Only the rows `index` of `stream`, [R] or [B, R]; a single-stream model ignores the stream's name."""
        return Tokens(take_rows(self.x, index), None if self.position is None else self.position[index])


SEQUENCES: dict[str, tuple[str, ...]] = {
    "image": ("image", "context"),
    "joint": (),
}
"""Segments of the sequence that attention of a stream runs over; no names: all."""


def sequence(layout: Sequence[Segment], stream: str, stage: int = 0) -> list[Segment]:
    """List the segments of a stage that attention of `stream` runs over, in their order."""
    names = SEQUENCES[stream]
    return [s for s in layout if s.stage == stage and (not names or s.stream in names)]


def image_of(layout: Sequence[Segment], stage: int = 0) -> Segment:
    """Return the segment of the image's tokens in a stage.

    Raises:
        ShapeError: there is none, or more than one.
    """
    images = [segment for segment in layout if segment.stream == "image" and segment.stage == stage]
    if len(images) != 1:
        raise ShapeError(f"{len(images)} image segments in stage {stage} of a call's layout, expected 1")
    return images[0]
