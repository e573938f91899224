"""DiT^DH: a trunk of any width conditions, token by token, a shallow head that is wide (RAE, arXiv 2510.11690).

B batch, L tokens, D width of the trunk, W width of the head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.cond import Cond, label_of
from ditkit.core.config import (
    FROM_DATA,
    Count,
    Depth,
    ModelConfig,
    Share,
    divides_for_sincos,
    names_every_class,
)
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, patchify, take_rows, unpatchify
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.nn.blocks import Attention, RMSNorm, Stack
from ditkit.nn.embeddings import drop_labels, sincos_table
from ditkit.nn.mlp import SwiGLU
from ditkit.nn.modulation import Parts, affine, gate, modulate
from ditkit.nn.rotary import Rotary, RotaryTokens, axial_angles, rotary_table

FLOW = Convention()
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the trunk; the head is 2 blocks of width 2048 with 16 heads."""


@dataclass(frozen=True)
class DiTDHConfig(ModelConfig):
    """Architecture and convention of a DiT^DH.

    Args:
        size: height and width of a sample, of a codec's latents.
        patch: side of a token, in trunk and head.
        channels: of a sample.
        width: of the trunk.
        depth: blocks of the trunk.
        heads: of attention in the trunk.
        head_width: of the head, at least the values of a token, or its loss has a floor.
        head_depth: blocks of the head.
        head_heads: of attention in the head.
        classes: labels, without the null class.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 16
    patch: Count = 1
    channels: Count = field(default=768, metadata=FROM_DATA)
    width: Count = 384
    depth: Depth = 12
    heads: Count = 6
    head_width: Count = 2048
    head_depth: Depth = 2
    head_heads: Count = 16
    classes: Count = field(default=1000, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = FLOW
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ShapeError(f"DiTDH: size={self.size} does not divide into patches of {self.patch}")
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("head_width", self.head_width, self.head_heads),
        ):
            if width % (4 * heads):
                raise ShapeError(
                    f"DiTDH: {name}={width} should divide into {heads} heads of whole pairs on two axes, by "
                    f"{4 * heads}"
                )
        divides_for_sincos(self)
        names_every_class(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            size=8,
            patch=2,
            channels=3,
            width=16,
            depth=2,
            heads=2,
            head_width=24,
            head_depth=1,
            head_heads=3,
            classes=5,
        )


class TokenParts(Parts):
    """Modulation parts of each token, [B, L, 6 D], of which rows can be taken."""

    def rows(self, stream: str, index: Tensor) -> TokenParts:
        return TokenParts(self.layer, take_rows(self.c, index))


class DDTBlock(nn.Module):
    """x + a1 Attn(mod(RMS x)), then x + a2 SwiGLU(mod(RMS x)), from c [B, D] of a sample or [B, L, D] of its tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width, int(2 / 3 * 4 * width))
        self.modulation = nn.Linear(width, 6 * width)

    def attend(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, rotary: Rotary) -> Tensor:
        """Compute the attention branch before its gate."""
        return self.attn(modulate(self.norm_attn(x_BLD), *affine(parts, 0)), run, at, rotary)

    def feed(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor) -> Tensor:
        """Compute the MLP branch before its gate, row by row."""
        return self.mlp(modulate(self.norm_mlp(x_BLD), *affine(parts, 1)), run, at)

    def forward(
        self, x_BLD: Tensor, c: Tensor, rotary: Rotary, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        attn, mlp = at + ".attn", at + ".mlp"
        kind = TokenParts if c.ndim == x_BLD.ndim else Parts
        parts = run.site(at + ".modulation", partial(kind, self.modulation), _activated(c))
        branch = run.site(attn, partial(self.attend, run, attn), x_BLD, parts, rotary)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0), branch)
        branch = run.site(mlp, partial(self.feed, run, mlp), x_BLD, parts)
        return torch.addcmul(x_BLD, gate(parts, 1), branch)

    def sites(self, at: str, stage: int = 0) -> list[Site]:
        """Its sites in the order of the call."""
        width = self.attn.out.out_features
        site = partial(Site, stream="image", width=width, stage=stage)
        return [
            site(at, "block"),
            site(f"{at}.modulation", "modulation"),
            site(f"{at}.attn", "branch"),
            *self.attn.sites(f"{at}.attn", "image", stage),
            site(f"{at}.mlp", "branch"),
            site(f"{at}.mlp.inner", "inner"),
        ]


class FourierTime(nn.Module):
    """[sin, cos] of 2 pi t w for frozen w ~ N(0, 1), then two layers: [B] to [B, D]."""

    frequency: Tensor

    def __init__(self, width: int, channels: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.randn(channels))
        self.inner, self.outer = nn.Linear(2 * channels, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t.to(self.frequency.dtype)[:, None] * self.frequency
        wave = torch.cat([angle.sin(), angle.cos()], -1)
        out: Tensor = self.outer(F.silu(self.inner(wave)))
        return out


class WideHead(nn.Module):
    """RMS norm, shift and scale of each token, then one layer to the values of a token."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm, self.modulation = RMSNorm(width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, values)

    def forward(self, x_BLW: Tensor, s_BLW: Tensor, run: Run = DIRECT, at: str = "head") -> Tensor:
        shift, scale = run.site(at + ".modulation", self.modulation, _activated(s_BLW)).chunk(2, -1)
        return self.out(modulate(self.norm(x_BLW), shift, scale))


class DiTDH(Denoiser):
    """The trunk reaches the output only through s, what it says of each token; the head embeds the same sample anew.

    Time is noise-time as it is. Trunk and head are two stages of one grid: what moves or leaves out rows is of one
    stage, and refused.
    """

    Config = DiTDHConfig
    task = "image"
    config: DiTDHConfig

    def __init__(self, config: DiTDHConfig) -> None:
        super().__init__()
        self.config = c = config
        values = c.patch**2 * c.channels
        self.embed = nn.Linear(values, c.width)
        self.time = FourierTime(c.width)
        self.label = nn.Embedding(c.classes + 1, c.width)
        self.blocks = nn.ModuleList(DDTBlock(c.width, c.heads) for _ in range(c.depth))
        self.project = nn.Linear(c.width, c.head_width)
        self.wide_embed = nn.Linear(values, c.head_width)
        self.wide = nn.ModuleList(DDTBlock(c.head_width, c.head_heads) for _ in range(c.head_depth))
        out = values * (1 if c.convention.extra == "none" else 2)
        self.head = WideHead(c.head_width, out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Layers as torch has them; embeddings N(0, 0.02); every gate and the output zero."""
        for table in (self.label.weight, self.time.inner.weight, self.time.outer.weight):
            nn.init.normal_(table, std=0.02)
        gates = [part.modulation for part in (*self.blocks, *self.wide, self.head)]
        for layer in (*gates, self.head.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def preset(cls, name: str, size: int = 16) -> Self:
        """Return a size of the paper, for latents 768 x 16 x 16, or 32 x 32 at 512 pixels, and 1000 classes.

        Raises:
            ConfigError: the name is not S, B, L or XL.
        """
        if name not in SIZES:
            raise ConfigError(unknown("DiTDH preset", name, SIZES))
        depth, width, heads = SIZES[name]
        return cls(DiTDHConfig(size=size, width=width, depth=depth, heads=heads))

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: DiTDHConfig) -> Self:
        """Weights in the naming of the RAE repository (`.safetensors`, or `.pt` of plain tensors).

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        named = source if isinstance(source, str | Path) else "state dict"
        return cls.holding(config, renamed(state, config.depth), named)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-2:]), self.config.patch)
        return tuple(Segment("image", grid, grid.length, stage=stage) for stage in (0, 1))

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth"), "wide": Stacked("wide", "head_depth")}

    def sites(self) -> tuple[Site, ...]:
        """List the sites of the trunk, stage 0, then those of the head, stage 1."""
        c = self.config
        wide = partial(Site, stream="image", width=c.head_width, stage=1)
        trunk: list[DDTBlock] = list(self.blocks)  # type: ignore[arg-type]
        head: list[DDTBlock] = list(self.wide)  # type: ignore[arg-type]
        return (
            Site("time", "time", width=c.width),
            Site("tokens", "tokens", "image", c.width),
            Site("blocks", "stack", "image", c.width),
            *(site for i, block in enumerate(trunk) for site in block.sites(f"blocks.{i}")),
            wide("wide_tokens", "tokens"),
            wide("wide", "stack"),
            *(site for i, block in enumerate(head) for site in block.sites(f"wide.{i}", 1)),
            wide("head", "head"),
            wide("head.modulation", "modulation"),
        )

    def unconditional(self, cond: Cond) -> Cond:
        """Every label replaced by the null class."""
        return replace(cond, label=torch.full_like(label_of(self.config, cond), self.config.classes))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy samples.

        Args:
            x: [B, C, H, W]. t: [B] noise-time. cond: `label` [B].

        Returns:
            [B, C, H, W].

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by the patch.
        """
        return self.refine(x, self.condition_tokens(x, t, cond, run), run)

    def condition_tokens(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Compute s = SiLU(T(t) + trunk(x)), [B, L, D]: all that the head is told beside x. Raises as `forward`."""
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ShapeError(f"DiTDH: input {list(x.shape)} should be [B, {self.config.channels}, H, W]")
        time, c_BD = run.site("time", self.condition, t, cond)
        tokens: RotaryTokens = run.site("tokens", self.tokenize, x)
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack.beside, tokens.x, c_BD, tokens.rotary)
        return F.silu(time[:, None] + h_BLD)

    def refine(self, x: Tensor, s_BLD: Tensor, run: Run = DIRECT) -> Tensor:
        """Predict from x [B, C, H, W] and s: the head alone."""
        grid = Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        s_BLW = self.project(s_BLD)
        tokens: RotaryTokens = run.site("wide_tokens", self.tokenize_wide, x)
        stack = Stack(self.wide, run, "wide", checkpointing=self.recomputes)
        h_BLW = run.site("wide", stack.beside, tokens.x, s_BLW, tokens.rotary)
        return unpatchify(
            run.site("head", partial(self.head, run=run), h_BLW, s_BLW), grid, self.config.patch
        )

    def condition(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Compute T(t) and c = SiLU(T(t) + Y(y)), [B, D] each."""
        label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
        time = self.time(t)
        return time, F.silu(time + self.label(drop_labels(label, cond.drop, self.config.classes, rate)))

    def tokenize(self, x: Tensor) -> RotaryTokens:
        """Patches embedded for the trunk, with fixed positions added, and their rotary table."""
        c, grid = self.config, Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        h_BLD = self.embed(patchify(x, c.patch))
        positions = sincos_table(grid, c.width, h_BLD.device).to(h_BLD.dtype)
        return RotaryTokens(h_BLD + positions, _rotary(grid, c.width // c.heads, h_BLD.device))

    def tokenize_wide(self, x: Tensor) -> RotaryTokens:
        """Patches embedded for the head, which has no positions but the rotary table."""
        c, grid = self.config, Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        h_BLW = self.wide_embed(patchify(x, c.patch))
        return RotaryTokens(h_BLW, _rotary(grid, c.head_width // c.head_heads, h_BLW.device))


def _activated(c: Tensor) -> Tensor:
    """silu(c), [B, 1, D] or [B, L, D]."""
    return F.silu(c) if c.ndim == 3 else F.silu(c).unsqueeze(1)


def _rotary(grid: Grid, head: int, device: torch.device) -> Rotary:
    """Rows on the first half of a head's channels, columns on the second."""
    return rotary_table(axial_angles(grid, (0, head // 2, head // 2), device=device))


ORIGINAL_NAMES = {
    r"s_embedder\.proj\.": "embed.",
    r"x_embedder\.proj\.": "wide_embed.",
    r"s_projector\.": "project.",
    r"t_embedder\.W$": "time.frequency",
    r"t_embedder\.mlp\.0\.": "time.inner.",
    r"t_embedder\.mlp\.2\.": "time.outer.",
    r"y_embedder\.embedding_table\.": "label.",
    r"final_layer\.norm_final\.": "head.norm.",
    r"final_layer\.adaLN_modulation\.1\.": "head.modulation.",
    r"final_layer\.linear\.": "head.out.",
    r"(blocks\.\d+\.)norm1\.": r"\1norm_attn.",
    r"(blocks\.\d+\.)norm2\.": r"\1norm_mlp.",
    r"(blocks\.\d+\.)attn\.proj\.": r"\1attn.out.",
    r"(blocks\.\d+\.)mlp\.w3\.": r"\1mlp.out.",
    r"(blocks\.\d+\.)adaLN_modulation\.1\.": r"\1modulation.",
}
TABLES = (
    "pos_embed",
    "enc_feat_rope.freqs_cos",
    "enc_feat_rope.freqs_sin",
    "dec_feat_rope.freqs_cos",
    "dec_feat_rope.freqs_sin",
)
"""Frozen tables in a published state dict, which follow from the config."""


def renamed(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename a state dict of the RAE repository to our names; its blocks from number `depth` on are the head's."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in TABLES:
            continue
        ours = name
        for pattern, instead in ORIGINAL_NAMES.items():
            ours = re.sub("^" + pattern, instead, ours)
        ours = re.sub(r"^blocks\.(\d+)\.", lambda match: _placed(int(match[1]), depth), ours)
        if ".mlp.w12." in ours:
            for part, half in zip(("gate", "value"), value.chunk(2), strict=True):
                found[ours.replace("w12", part)] = half
        else:
            found[ours] = value.flatten(1) if value.ndim == 4 else value
    return found


def _placed(block: int, depth: int) -> str:
    return f"blocks.{block}." if block < depth else f"wide.{block - depth}."
