"""A video DiT with full attention over frames, rows and columns, and rotary positions on all three.

The plain network of today's large video models (CogVideoX arXiv 2408.06072, HunyuanVideo 2412.03603, Wan
2503.20314), and none of them to the letter: Wan brings text in by cross-attention, and the others give text
rows weights of their own. Here one sequence, text rows first, runs through DiT's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Gt
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.config import (
    FROM_DATA,
    Count,
    Depth,
    ModelConfig,
    Natural,
    Share,
    divides_into_heads,
    names_every_class,
)
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, patchify, unpatchify
from ditkit.core.model import TIMESTEP, Denoiser
from ditkit.core.run import DIRECT, Run
from ditkit.core.transform import Stacked
from ditkit.nn.blocks import Block, Head, Stack
from ditkit.nn.embeddings import TimeEmbedding
from ditkit.nn.init import adaln_zero_
from ditkit.nn.rotary import RotaryTokens, axial_angles, rotary_table, wan_split


@dataclass(frozen=True)
class VideoDiTConfig(ModelConfig):
    """Architecture and convention of a video DiT.

    Args:
        channels: of a clip.
        frames: of a clip.
        size: height and width of a frame; one number for both.
        patch: frames, height and width of a token; one number p is 1, p, p.
        width: of a token's vector.
        depth: number of blocks.
        heads: of attention.
        classes: labels, without the null class; 0 for none.
        text_width: of the prompt's tokens; 0 for none.
        text_tokens: of the prompt, whose rows come first in the sequence; 0 for none.
        qk_norm: RMS norm of queries and keys in each head.
        rotary_base: of the frequencies; 10,000 in Wan, 256 in HunyuanVideo.
        rotary_split: channels of a head for frames, rows and columns; empty for Wan's. HunyuanVideo takes
            16, 56, 56 of 128, CogVideoX 16, 24, 24 of 64.
        label_dropout: share of training samples whose label and text count as absent.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "video"

    channels: Count = field(default=3, metadata=FROM_DATA)
    frames: Count = 16
    size: Count | tuple[Count, Count] = 64
    patch: Count | tuple[Count, Count, Count] = 8
    width: Count = 192
    depth: Depth = 6
    heads: Count = 3
    classes: Natural = field(default=0, metadata=FROM_DATA)
    text_width: Natural = field(default=0, metadata=FROM_DATA)
    text_tokens: Natural = field(default=0, metadata=FROM_DATA)
    qk_norm: bool = True
    rotary_base: Annotated[float, Gt(1)] = 10_000.0
    rotary_split: tuple[int, ...] = ()
    label_dropout: Share = 0.1
    convention: Convention = field(default_factory=Convention)
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n % p for n, p in zip(self.shape, self.sides, strict=True)):
            raise ShapeError(
                f"VideoDiT: frames={self.frames}, size={self.size} do not divide into patches of {self.sides}"
            )
        divides_into_heads(self)
        head = self.width // self.heads
        split = self.rotary_split or wan_split(head)
        if len(split) != 3 or sum(split) != head or any(n < 2 or n % 2 for n in split):
            raise ShapeError(
                f"VideoDiT: rotary_split={split} should be three even numbers, at least 2, "
                f"which sum to the head's {head} channels"
            )
        if bool(self.text_width) != bool(self.text_tokens):
            raise ConfigError(
                f"VideoDiT: text_width={self.text_width} and text_tokens={self.text_tokens} "
                "should both be 0, or neither"
            )
        names_every_class(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(channels=3, frames=4, size=8, patch=2, width=32, depth=2, heads=4, classes=5)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return (self.frames, *((self.size, self.size) if isinstance(self.size, int) else self.size))

    @property
    def sides(self) -> tuple[int, int, int]:
        """Frames, height and width of a token."""
        return (1, self.patch, self.patch) if isinstance(self.patch, int) else self.patch


PRESETS = {
    "small": VideoDiTConfig(),
    "base": VideoDiTConfig(patch=4, width=384, depth=12, heads=6),
}
"""Clips of 16 x 64 x 64 pixels in RGB. small: 1,024 tokens, 5.2 GMACs. base: 4,096 tokens, 242 GMACs."""


class VideoDiT(Denoiser):
    """A transformer over space-time patches with adaLN-Zero conditioning on time and class; text is a prefix."""

    Config = VideoDiTConfig
    task = "video"
    embeds_time = True
    completes = True
    config: VideoDiTConfig

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = c = config
        values = c.channels * c.sides[0] * c.sides[1] * c.sides[2]
        self.split = c.rotary_split or wan_split(c.width // c.heads)
        self.embed = nn.Linear(values, c.width)
        self.time = TimeEmbedding(c.width)
        self.label = nn.Embedding(c.classes + 1, c.width) if c.classes else None
        self.text = nn.Linear(c.text_width, c.width) if c.text_width else None
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.qk_norm) for _ in range(c.depth))
        self.head = Head(c.width, values * (1 if c.convention.extra == "none" else 2))
        adaln_zero_(self, self.time.inner.weight, self.time.outer.weight)

    @classmethod
    def preset(cls, name: str) -> Self:
        """One of `PRESETS`: small, for a CPU, or base.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in PRESETS:
            raise ConfigError(unknown("VideoDiT preset", name, PRESETS))
        return cls(PRESETS[name])

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (self.config.channels, *self.config.shape)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid, text = Grid.of(tuple(shape[-3:]), self.config.sides), self.config.text_tokens
        prefix = (Segment("text", Grid(text), text),) if text else ()
        return (*prefix, Segment("image", grid, grid.length))

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def unconditional(self, cond: Cond) -> Cond:
        """Null class, absent text, and all of the clip to be made."""
        fields = {"label": self.config.classes, "text": 0, "text_mask": True, "mask": 1}
        given = {name: getattr(cond, name) for name in fields}
        absent: dict[str, Any] = {
            name: torch.full_like(v, fields[name]) for name, v in given.items() if v is not None
        }
        return replace(cond, **absent)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy clips; any length and size that the patch divides will do.

        Args:
            x: [B, C, T, H, W]; where `cond.mask` is 0, `cond.context` takes its place (VDT, section 3.3).
            t: [B], in the unit the convention names.
            cond: `label` [B] of a model with classes; `text` [B, S, text_width] of one with text, whose padded
                rows `text_mask` names. An absent text is a text of zeros, without padding.

        Returns:
            [B, C, T, H, W], or 2C channels where the convention has an extra half.

        Raises:
            ConfigError: the label or the text is missing.
            ShapeError: the clip or the text is not as the config says, or the patch does not divide the clip.
        """
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ShapeError(
                f"VideoDiT: input {list(x.shape)} should be [B, {self.config.channels}, T, H, W]"
            )
        grid = Grid.of(tuple(x.shape[2:]), self.config.sides)
        prepared = self.prepare_cond(cond, len(x))
        c_BD = run.site("time", partial(self.condition, run=run), t, prepared)
        tokens: RotaryTokens = run.site("tokens", self.tokenize, prepared.given(x), prepared)
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack.beside, tokens.x, c_BD, tokens.rotary)
        h_BLD = run.site("head", partial(self.head, run=run), h_BLD[:, tokens.rotary.text :], c_BD)
        return unpatchify(h_BLD, grid, self.config.sides)

    def prepare_cond(self, cond: Cond, batch: int) -> Cond:
        """`cond` with what the model needs, checked; nothing is left of the label and text of dropped samples."""
        label, text, valid, drop = cond.label, cond.text, cond.text_mask, cond.drop
        if self.label and label is None:
            raise ConfigError("VideoDiT: a class label is needed; Cond.label is None")
        self._check_text(text, valid, batch)
        if drop is None and self.training and self.config.label_dropout:
            drop = torch.rand(batch, device=next(self.parameters()).device) < self.config.label_dropout
        if text is not None and valid is not None:
            text = text.masked_fill(~valid[..., None], 0)
        if drop is not None:
            label = None if label is None else label.masked_fill(drop, self.config.classes)
            text = None if text is None else text.masked_fill(drop[:, None, None], 0)
            valid = None if valid is None else valid | drop[:, None]
        return replace(cond, label=label, text=text, text_mask=valid)

    def condition(self, t: Tensor, prepared: Cond, run: Run = DIRECT) -> Tensor:
        """Compute c = time embedding + label embedding, [B, D]."""
        time: Tensor = run.site(TIMESTEP, self.time, t)
        return time + self.label(prepared.label) if self.label else time

    def tokenize(self, x: Tensor, prepared: Cond) -> RotaryTokens:
        """Text and patches of x embedded, [B, S + L, D], with their positions; a text row has none."""
        c, grid = self.config, Grid.of(tuple(x.shape[2:]), self.config.sides)
        h_BLD = self.embed(patchify(x, c.sides))
        angles = axial_angles(grid, self.split, c.rotary_base, h_BLD.device)
        if not self.text or prepared.text is None:
            return RotaryTokens(h_BLD, rotary_table(angles))
        prefix = self.text(prepared.text.to(h_BLD.dtype))
        return RotaryTokens(
            torch.cat([prefix, h_BLD], 1), rotary_table(angles, c.text_tokens, prepared.text_mask)
        )

    def _check_text(self, text: Tensor | None, valid: Tensor | None, batch: int) -> None:
        if not self.text:
            return
        if text is None:
            raise ConfigError("VideoDiT: text tokens are needed; Cond.text is None")
        expected = (batch, self.config.text_tokens, self.config.text_width)
        if text.shape != expected:
            raise ShapeError(f"VideoDiT: text {list(text.shape)} should be {list(expected)}")
        if valid is not None and (valid.shape != expected[:2] or valid.dtype != torch.bool):
            raise ShapeError(
                f"VideoDiT: text_mask {list(valid.shape)} of {valid.dtype} should be {list(expected[:2])} of bool"
            )
