"""Tokens of two streams that meet in joint attention, and what is aligned with them.

B batch, L image rows, S text rows, D width, K head width. Whatever is aligned with tokens is an argument of a
site's function: argument 0, or one that has `rows(stream, index)`; so a policy can run it on some rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ditkit.core.grid import take_rows


class Streams(NamedTuple):
    """Features of both streams: [B, L, D] and [B, S, D]."""

    image: Tensor
    text: Tensor

    def rows(self, stream: str, index: Tensor) -> Streams:
        return self._replace(**{stream: take_rows(getattr(self, stream), index)})


class Rotary(NamedTuple):
    """Rotary table of a joint sequence, whose first `text` rows are text.

    Both tables are [S + L, K], or [B, S + R, K] of rows that were chosen for each sample.
    """

    cos: Tensor
    sin: Tensor
    text: int = 0

    @classmethod
    def of(cls, table: tuple[Tensor, Tensor], text: int = 0) -> Self:
        return cls(table[0], table[1], text)

    def rows(self, stream: str, index: Tensor) -> Rotary:
        """Select some tokens of one stream, all of the other; without text there is one stream, of any name."""
        every = torch.arange(len(self.cos), device=index.device).expand(*index.shape[:-1], -1)
        if stream == "text":
            at, text = torch.cat((index, every[..., self.text :]), -1), index.shape[-1]
        else:
            at, text = torch.cat((every[..., : self.text], self.text + index), -1), self.text
        return Rotary(self.cos[at], self.sin[at], text)


class ImageRotary(NamedTuple):
    """Rotary table of the image's rows, [L, K] each, or [B, R, K] of rows chosen for each sample; text has none."""

    cos: Tensor
    sin: Tensor

    def rows(self, stream: str, index: Tensor) -> ImageRotary:
        return self if stream == "text" else ImageRotary(self.cos[index], self.sin[index])


class Modulation(NamedTuple):
    """Shift and scale of a branch, [B, 1, D] or, where every token has its own time, [B, L, D]."""

    shift: Tensor
    scale: Tensor

    def rows(self, stream: str, index: Tensor) -> Modulation:
        if self.shift.shape[1] == 1:
            return self
        return Modulation(take_rows(self.shift, index), take_rows(self.scale, index))


class Control(NamedTuple):
    """ControlNet residuals of the image rows, [B, L, D]; `place[i]` is the one added after block i."""

    residuals: tuple[Tensor, ...]
    place: tuple[int | None, ...]

    @classmethod
    def of(
        cls, double: Sequence[Tensor], single: Sequence[Tensor], depths: tuple[int, int], repeat: bool
    ) -> Self:
        """Residuals spread over `depths` blocks of each kind; `repeat` cycles through the double blocks'."""
        place = _spread(len(double), depths[0], repeat)
        place += [None if i is None else len(double) + i for i in _spread(len(single), depths[1], False)]
        return cls((*double, *single), tuple(place))

    def rows(self, stream: str, index: Tensor) -> Control:
        if stream != "image":
            return self
        return self._replace(residuals=tuple(take_rows(residual, index) for residual in self.residuals))

    def add(self, x: Streams, block: int) -> Streams:
        place = self.place[block]
        return x if place is None else x._replace(image=x.image + self.residuals[place])


class JointTokens(NamedTuple):
    """Embedded tokens and all that is aligned with them: what a `tokens` site returns."""

    x: Streams
    rotary: Any
    """Positions that know their rows; None where they are already added to `x`."""
    control: Control

    def rows(self, stream: str, index: Tensor) -> JointTokens:
        rotary = self.rotary and self.rotary.rows(stream, index)
        return JointTokens(self.x.rows(stream, index), rotary, self.control.rows(stream, index))


def _spread(samples: int, depth: int, cycle: bool) -> list[int | None]:
    """Assign one of `samples` residuals to each of `depth` blocks: in turn, or each for an equal span."""
    if not samples:
        return [None] * depth
    span = ceil(depth / samples)
    return [i % samples if cycle else i // span for i in range(depth)]
