"""PredFormer (arXiv 2410.04733): a space-time transformer that says T later frames from T observed ones.

One network; along which axis each block attends is a text, `PredFormerConfig.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.config import FROM_DATA, Count, ModelConfig, Share, divides_into_heads
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, patchify, unpatchify
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.axes import ALONG, Axis, AxisAttention, Clip, ClipTokens, Layer, drop_lines, layers_of, spans
from ditkit.nn.blocks import Stack, sites_of
from ditkit.nn.mlp import PlainMLP, SwiGLU


@dataclass(frozen=True)
class PredFormerConfig(ModelConfig):
    """Architecture of a PredFormer; the defaults are the paper's for Moving MNIST.

    Other lengths and sizes that divide into patches run too: positions are computed, not learned.

    Args:
        channels: of a frame.
        frames: observed, and forecast at once.
        size: height and width of a frame, one number for both; fields keep their own grid, padded to whole patches.
        patch: side of a token, in pixels of one frame.
        width: of a token's vector.
        heads: of attention.
        hidden: width of the SwiGLU.
        gated: a SwiGLU, or else two layers with GELU (the paper's ablation; 1.5 times `hidden` has its matrices' size).
        layout: axis of each block (`ditkit.nn.axes.layers_of`): "F24", "S12T12", "TSST*6", "+STS*4" ...
        attn_dropout: after attention's output layer.
        mlp_dropout: within and after the SwiGLU.
        drop_path: chance that a block's branch is left out for a frame or a place, the same in every block.
        open_gates: start the SwiGLU's gates at SiLU(1). Not the paper's, though its code can.
    """

    task: ClassVar[str] = "forecast"

    channels: Count = field(default=1, metadata=FROM_DATA)
    frames: Count = 10
    size: tuple[Count, Count] = (64, 64)
    patch: Count = 8
    width: Count = 256
    heads: Count = 8
    hidden: Count = 1024
    gated: bool = True
    layout: str = "TSST*6"
    attn_dropout: Share = 0.0
    mlp_dropout: Share = 0.0
    drop_path: Share = 0.0
    open_gates: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        super().__post_init__()
        height, width = self.size
        if height % self.patch or width % self.patch:
            raise ShapeError(
                f"PredFormer: size={height}x{width} does not divide into patches of {self.patch}"
            )
        divides_into_heads(self)
        if self.open_gates and not self.gated:
            raise ConfigError("PredFormer: open_gates=True has no gates to open, expected gated=True")
        layers_of(self.layout)

    @classmethod
    def tiny(cls) -> Self:
        return cls(channels=3, frames=4, size=(8, 8), patch=2, width=32, heads=4, hidden=48, layout="TS")


class PredFormer(Model):
    """Patches embedded, gated transformer blocks along time, space or both, and one linear layer out."""

    Config = PredFormerConfig
    task = "forecast"
    config: PredFormerConfig

    def __init__(self, config: PredFormerConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch**2
        self.layers = layers_of(config.layout)
        self.embed = nn.Linear(pixels, config.width)
        self.blocks = nn.ModuleList(
            GatedBlock(stage.axis, config, closing=i == stage.depth - 1)
            for layer in self.layers
            for stage in layer.stages
            for i in range(stage.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, pixels)
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, data: str = "mmnist") -> Self:
        """One of the paper's nine variants ("Quadruplet-TSST" ...) at the size that it has for `data`.

        Raises:
            ConfigError: the name or the data is none of the paper's.
        """
        if data not in PUBLISHED:
            raise ConfigError(unknown("PredFormer data", data, PUBLISHED))
        blocks, config = PUBLISHED[data]
        return cls(replace(config, layout=published_layout(name, blocks, skip=data == "human")))

    def reset_parameters(self) -> None:
        """Blocks: N(0, 0.02) cut at +-2, biases 0. Embedding and output: torch's own."""
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for mlp in self.modules() if self.config.open_gates else ():
            if isinstance(mlp, SwiGLU):
                nn.init.normal_(mlp.gate.weight, std=1e-6)
                nn.init.ones_(mlp.gate.bias)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (self.config.channels, self.config.frames, *self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-3:]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def sites(self) -> tuple[Site, ...]:
        blocks = sites_of(self.blocks)
        ends = (Site(*pair, width=self.config.width) for pair in (("tokens", "tokens"), ("blocks", "stack")))
        return (*ends, *blocks, Site("head", "head", width=self.config.width))

    def forward(self, x: Tensor, run: Run = DIRECT) -> Tensor:
        """Predict the frames that follow.

        Args:
            x: [B, C, T, H, W] observed frames.

        Returns:
            [B, C, T, H, W]; other horizons: `ditkit.sample.forecast`.

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by the patch.
        """
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ShapeError(
                f"PredFormer: input {list(x.shape)} should be [B, {self.config.channels}, T, H, W]"
            )
        grid = Grid.of(tuple(x.shape[2:]), self.config.patch)
        tokens: ClipTokens = run.site("tokens", self.tokenize, x)
        stack = LayerStack(Stack(self.blocks, run, checkpointing=self.recomputes), self.layers)
        h_BLD = run.site("blocks", stack, tokens.x, tokens.clip)
        return unpatchify(run.site("head", self.head, h_BLD), grid, (1, self.config.patch, self.config.patch))

    def tokenize(self, x: Tensor) -> ClipTokens:
        """Patches of x embedded, with their positions added."""
        grid = Grid.of(tuple(x.shape[2:]), self.config.patch)
        h_BLD = self.embed(patchify(x, self.config.patch))
        table = sequence_table(grid.length, self.config.width, h_BLD.device).to(h_BLD.dtype)
        return ClipTokens(h_BLD + table, Clip(grid.frames, grid.height * grid.width))

    def head(self, h_BLD: Tensor) -> Tensor:
        """[B, L, D] to p p C numbers a token."""
        return self.out(self.norm(h_BLD))


class GatedBlock(nn.Module):
    """x + DP(Attn(LN x)), then x + DP(SwiGLU(LN x)), along one axis; the last of its stage ends in a LN."""

    def __init__(self, axis: Axis, config: PredFormerConfig, closing: bool) -> None:
        super().__init__()
        c = config
        self.axis, self.drop_path = axis, c.drop_path
        self.attn_dropout, self.mlp_dropout = c.attn_dropout, c.mlp_dropout
        self.attn_norm, self.mlp_norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attn = AxisAttention(axis, c.width, c.heads)
        self.mlp = (SwiGLU if c.gated else PlainMLP)(c.width, c.hidden, c.mlp_dropout)
        self.close = nn.LayerNorm(c.width) if closing else nn.Identity()

    def attend(self, run: Run, at: str, x_BLD: Tensor, clip: Clip) -> Tensor:
        """Compute the attention branch."""
        out = self.attn(self.attn_norm(x_BLD), clip, run, at)
        return F.dropout(out, self.attn_dropout, self.training)

    def feed(self, run: Run, at: str, x_BLD: Tensor) -> Tensor:
        """Compute the feed-forward branch, row by row."""
        return F.dropout(self.mlp(self.mlp_norm(x_BLD), run, at), self.mlp_dropout, self.training)

    def forward(self, x_BLD: Tensor, clip: Clip, run: Run = DIRECT, at: str = "blocks.0") -> Tensor:
        attn, mlp = at + ".attn", at + ".mlp"
        x_BLD = x_BLD + self.thinned(run.site(attn, partial(self.attend, run, attn), x_BLD, clip), clip)
        x_BLD = x_BLD + self.thinned(run.site(mlp, partial(self.feed, run, mlp), x_BLD), clip)
        return self.close(x_BLD)

    def thinned(self, branch_BLD: Tensor, clip: Clip) -> Tensor:
        """DP: stochastic depth, in training."""
        if not (self.training and self.drop_path):
            return branch_BLD
        return drop_lines(branch_BLD, clip, self.axis, self.drop_path)

    def sites(self, at: str) -> list[Site]:
        """Its sites in the order of the call, as wide as its layers are."""
        width = self.attn_norm.normalized_shape[0]
        kv = Site(f"{at}.attn.kv", "kv", width=width, heads=self.attn.heads)
        return [
            Site(at, "block", width=width),
            Site(f"{at}.attn", "branch", width=width),
            kv,
            kv._replace(name=f"{at}.attn.core", kind="core", attention="axial", axis=ALONG[self.axis]),
            Site(f"{at}.mlp", "branch", width=width),
            Site(f"{at}.mlp.inner", "inner", width=self.mlp.out.in_features),
        ]


class LayerStack:
    """A `Stack` whose layers may have a skip around them: `stack(x, clip, start, stop)` counts blocks."""

    def __init__(self, stack: Stack, layers: tuple[Layer, ...]) -> None:
        self.stack, self.layers = stack, layers

    def __len__(self) -> int:
        return len(self.stack)

    def __call__(self, x: Tensor, clip: Clip, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks `start` to `stop`.

        Raises:
            ConfigError: the cut goes through a layer that has a skip: its input would be lost.
        """
        stop = len(self) if stop is None else stop
        for first, last, skip in spans(self.layers):
            begin, end = max(first, start), min(last, stop)
            if begin >= end:
                continue
            if skip and (begin, end) != (first, last):
                raise ConfigError(f"PredFormer: blocks {first} to {last - 1} have one skip, not to be cut")
            out = self.stack(x, clip, begin, end)
            x = x + out if skip else out
        return x


def sequence_table(length: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Frozen positions [L, D], float32: entry (k, i) is sin or cos, i even or odd, of k / 10000^(2 (i // 2) / D).

    k counts the tokens of all frames. Computed in float64 at each call, so that no model has to keep the table.
    """
    i = torch.arange(width, dtype=torch.float64, device=device)
    angle = torch.arange(length, device=device)[:, None] / 10_000.0 ** (2 * (i // 2) / width)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos()).float()


VARIANTS = {
    "Full": "F",
    "Fac-S-T": "S-T",
    "Fac-T-S": "T-S",
    "Binary-ST": "ST",
    "Binary-TS": "TS",
    "Triplet-STS": "STS",
    "Triplet-TST": "TST",
    "Quadruplet-TSST": "TSST",
    "Quadruplet-STTS": "STTS",
}
"""The paper's variants: a layer's axes; with a dash, all blocks of one axis before all of the other."""

PUBLISHED = {
    "mmnist": (24, PredFormerConfig()),
    "taxibj": (
        8,
        PredFormerConfig(
            channels=2, frames=4, size=(32, 32), patch=4, attn_dropout=0.1, mlp_dropout=0.1, drop_path=0.1
        ),
    ),
    "weatherbench": (
        8,
        PredFormerConfig(
            frames=12, size=(32, 64), patch=4, hidden=512, attn_dropout=0.1, mlp_dropout=0.1, drop_path=0.25
        ),
    ),
    "human": (
        12,
        PredFormerConfig(
            channels=3, frames=4, size=(256, 256), attn_dropout=0.1, mlp_dropout=0.1, drop_path=0.1
        ),
    ),
}
"""Blocks and sizes for each of the paper's data sets (table 1); three do not go into 8, so triplets have 6."""


def published_layout(name: str, blocks: int, skip: bool = False) -> str:
    """Return the layout of a variant with `blocks` blocks.

    `skip`: around each layer of a triplet (Human3.6M).

    Raises:
        ConfigError: there is no such variant.
    """
    if name not in VARIANTS:
        raise ConfigError(unknown("PredFormer variant", name, VARIANTS))
    axes = VARIANTS[name]
    if name == "Full":
        return f"F{blocks}"
    if "-" in axes:
        return "".join(f"{axis}{blocks // 2}" for axis in axes.split("-"))
    return ("+" if skip and len(axes) == 3 else "") + f"{axes}*{blocks // len(axes)}"
