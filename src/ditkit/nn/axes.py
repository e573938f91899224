"""Attention along one axis of a clip, and the text that says along which axis each block of a stack attends.

B batch, T frames, n places of a frame, L = T n tokens, D width, N heads, K head width. A line is a set of tokens
that attend to one another: those of a frame ("S", space), of a place ("T", time), or all of them ("F", full).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ditkit.core.config import DEEPEST
from ditkit.core.errors import ConfigError, ShapeError, nearest
from ditkit.core.run import Run
from ditkit.nn.blocks import KV, attention, keep

Axis = Literal["T", "S", "F"]
ALONG: dict[Axis, Literal["", "time", "space"]] = {"T": "time", "S": "space", "F": ""}
"""The words of `Site.axis` for them: attention over all rows runs along none."""
GROUP = re.compile(r"(\+?)((?:[TSF](?:[1-9]\d{0,3})?)+)(?:\*([1-9]\d{0,3}))?")
EXAMPLES = ("TSST*6", "STTS*6", "TST*8", "STS*8", "+STS*4", "TS*12", "ST*12", "T12S12", "S12T12", "F24")


class Stage(NamedTuple):
    """`depth` blocks along one axis, then one layer norm (PredFormer's "GatedTransformer")."""

    axis: Axis
    depth: int


class Layer(NamedTuple):
    """Stages after one another; with `skip`, the layer's input is added to its output."""

    stages: tuple[Stage, ...]
    skip: bool

    @property
    def depth(self) -> int:
        return sum(stage.depth for stage in self.stages)


@lru_cache(maxsize=64)
def layers_of(text: str) -> tuple[Layer, ...]:
    """Parse the layers of a layout: groups `[+]STAGES[*COUNT]`, separated by spaces.

    A stage is an axis, T, S or F, and its depth, 1 if not given: `F24` is 24 blocks and one layer norm, `TSST*6`
    six layers of four blocks with a layer norm after each, `S12T12` twelve blocks a norm. `+` adds each layer's
    input to its output.

    Raises:
        ConfigError: the text is not of this form, or names more than `DEEPEST` blocks.
    """
    layers: list[Layer] = []
    for group in text.split():
        match = GROUP.fullmatch(group)
        if match is None:
            at = f" at {group!r}" if group != text else ""
            raise ConfigError(
                f"layout={text!r}{at} should be groups such as 'TSST*6': axes T, S or F, each with its depth, "
                f"and '*' with a count{nearest(group, EXAMPLES)}"
            )
        plus, axes, count = match.groups()
        stages = tuple(Stage(cast(Axis, a), int(d or 1)) for a, d in re.findall(r"([TSF])(\d*)", axes))
        layer = Layer(stages, bool(plus))
        if sum(done.depth for done in layers) + layer.depth * int(count or 1) > DEEPEST:
            raise ConfigError(f"layout={text!r} should name at most {DEEPEST} blocks")
        layers += [layer] * int(count or 1)
    if not layers:
        raise ConfigError(f"layout={text!r} names no block; one of PredFormer's is {EXAMPLES[0]!r}")
    return tuple(layers)


class Clip(NamedTuple):
    """The arrangement of a clip's tokens: row k of all rows is place k mod n of frame k // n."""

    frames: int
    places: int
    kept: Tensor | None = None
    """[R] the rows that are there; None for all, in order."""

    def rows(self, stream: str, index: Tensor) -> Clip:
        return self._replace(kept=index if self.kept is None else self.kept[index])

    def lines(self, axis: Axis) -> int:
        """Count the lines."""
        return {"T": self.places, "S": self.frames, "F": 1}[axis]

    def line(self, axis: Axis, device: torch.device) -> Tensor:
        """Return the line of each row, [L]."""
        row = torch.arange(self.frames * self.places, device=device) if self.kept is None else self.kept
        return {"T": row % self.places, "S": row // self.places, "F": row * 0}[axis]

    def fold(self, x_BLD: Tensor, axis: Axis) -> Tensor:
        """Lines as the batch: [B n, T, D], [B T, n, D] or [B, L, D]. Some rows only stay where they are.

        Raises:
            ShapeError: the rows are not the clip's; `rows` says which of them are there.
        """
        rows = self.frames * self.places if self.kept is None else len(self.kept)
        if x_BLD.shape[1] != rows:
            raise ShapeError(f"Clip: {x_BLD.shape[1]} tokens, expected {rows}: some only go with Clip.rows")
        if axis == "F" or self.kept is not None:
            return x_BLD
        x_BTnD = x_BLD.unflatten(1, (self.frames, self.places))
        return (x_BTnD.transpose(1, 2) if axis == "T" else x_BTnD).flatten(0, 1)

    def unfold(self, x: Tensor, axis: Axis) -> Tensor:
        """Invert `fold`: [B, L, D]."""
        if axis == "F" or self.kept is not None:
            return x
        if axis == "S":
            return x.unflatten(0, (-1, self.frames)).flatten(1, 2)
        return x.unflatten(0, (-1, self.places)).transpose(1, 2).flatten(1, 2)

    def mask(self, axis: Axis) -> Tensor | None:
        """[R, R], true where two rows share a line; None where folding has seen to that."""
        if axis == "F" or self.kept is None:
            return None
        line = self.line(axis, self.kept.device)
        return line[:, None] == line


class ClipTokens(NamedTuple):
    """Embedded tokens [B, L, D] and where they lie: what a `tokens` site returns."""

    x: Tensor
    clip: Clip

    def rows(self, stream: str, index: Tensor) -> ClipTokens:
        return ClipTokens(self.x[:, index], self.clip.rows(stream, index))


class AxisAttention(nn.Module):
    """Multi-head self-attention within the lines of one axis; no bias on q, k and v (PredFormer)."""

    def __init__(self, axis: Axis, width: int, heads: int) -> None:
        super().__init__()
        self.axis, self.heads = axis, heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, clip: Clip, run: Run, at: str) -> Tensor:
        qkv = self.qkv(clip.fold(x_BLD, self.axis)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B n, N, T, K] along time
        kv = run.site(at + ".kv", keep, KV(k, v))
        mask = clip.mask(self.axis)
        o = run.site(at + ".core", attention, q, kv.k, kv.v, *(() if mask is None else (mask,)))
        return clip.unfold(self.out(o.transpose(1, 2).flatten(2)), self.axis)


def drop_lines(x_BLD: Tensor, clip: Clip, axis: Axis, rate: float) -> Tensor:
    """Stochastic depth: each line of each sample is zero with chance `rate`, the others are scaled to the mean."""
    kept = x_BLD.new_empty(x_BLD.shape[0], clip.lines(axis)).bernoulli_(1 - rate) / (1 - rate)
    return x_BLD * kept[:, clip.line(axis, x_BLD.device), None]


def spans(layers: tuple[Layer, ...]) -> Iterator[tuple[int, int, bool]]:
    """First block, block after the last, and skip of each layer."""
    start = 0
    for layer in layers:
        yield start, start + layer.depth, layer.skip
        start += layer.depth
