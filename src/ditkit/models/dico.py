"""DiCo (arXiv 2505.11196): a U-shaped denoiser of convolutions, with adaLN-Zero and a gate of its channels.

Three stages, at the sample's own resolution, at a half and at a quarter; five levels of blocks, down and up again. The
rows of a stage are its grid's, in row-major order.

B batch, L rows of a stage, D width of a level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.cond import Cond, label_of
from ditkit.core.config import FROM_DATA, Count, Depth, ModelConfig, Share, names_every_class
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, Tokens
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Stack
from ditkit.nn.convolution import DepthwiseBranch, MapConv, to_map, to_rows
from ditkit.nn.embeddings import TimeEmbedding, drop_labels
from ditkit.nn.mlp import PlainMLP
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate
from ditkit.nn.stages import Downsample, Upsample

STAGES = (0, 1, 2, 1, 0)
"""Stage of each level."""
STAGE_OF_LEVEL = (0, 1, 2, 1, 1)
"""Whose conditioning vector each level has: the last is as wide as the second, and is told the same."""
SIZES = {
    "S": (128, (5, 4, 4, 4, 4), 2),
    "B": (256, (5, 4, 4, 4, 4), 2),
    "L": (352, (9, 8, 9, 8, 9), 2),
    "XL": (416, (9, 9, 10, 9, 9), 2),
    "H": (416, (14, 12, 10, 12, 14), 4),
}
"""Width, blocks of each level, width of the MLP in widths of its level."""


@dataclass(frozen=True)
class DiCoConfig(ModelConfig):
    """Architecture and convention of a DiCo.

    Args:
        size: height and width of a picture.
        channels: of a sample.
        width: of the first level; the others are two and four times as wide.
        depth: number of blocks of each level, down and up.
        ratio: width of the MLP, in widths of its level.
        channel_attention: gate the channels of each convolution; without, the paper's ablation.
        classes: labels, without the null class.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    channels: Count = field(default=4, metadata=FROM_DATA)
    width: Count = 128
    depth: tuple[Depth, Depth, Depth, Depth, Depth] = (5, 4, 4, 4, 4)
    ratio: Count = 2
    channel_attention: bool = True
    classes: Count = field(default=1000, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = DDPM
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 4:
            raise ShapeError(f"DiCo: size={self.size} does not divide by 4, as its third stage has it")
        if self.width % 2:
            raise ShapeError(f"DiCo: width={self.width} should be even; a stage halves it on its way down")
        names_every_class(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, channels=3, width=8, depth=(1, 2, 1, 1, 1), classes=5)

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Widths of the levels; the last has the full resolution at twice the first one's width."""
        return self.width, 2 * self.width, 4 * self.width, 2 * self.width, 2 * self.width


class DiCoBlock(nn.Module):
    """x + a1 Conv(mod(LN x)), then x + a2 Mlp(mod(LN x)), all from c (DiCo, section 3.2); GELU is exact."""

    def __init__(self, width: int, ratio: int, attends: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.conv = DepthwiseBranch(width, attends)
        self.mlp = PlainMLP(width, ratio * width)
        self.modulation = nn.Linear(width, 6 * width)

    def convolve(self, x_BLD: Tensor, parts: Parts | Tensor, grid: Grid) -> Tensor:
        """Return the convolution's branch before its gate."""
        return self.conv(modulated(self.norm, x_BLD, *affine(parts, 0)), grid)

    def feed(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor) -> Tensor:
        """Return the MLP's branch before its gate; row-wise."""
        return self.mlp(modulated(self.norm, x_BLD, *affine(parts, 1)), run, at)

    def forward(
        self, x_BLD: Tensor, c_BD: Tensor, grid: Grid, run: Run = DIRECT, at: str = "levels.0.0"
    ) -> Tensor:
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), activated(c_BD))
        branch = run.site(at + ".conv", self.convolve, x_BLD, parts, grid)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0), branch)  # one pass over memory
        branch = run.site(at + ".mlp", partial(self.feed, run, at + ".mlp"), x_BLD, parts)
        return torch.addcmul(x_BLD, gate(parts, 1), branch)

    def sites(self, at: str, stage: int) -> list[Site]:
        """Return its sites in the order of the call."""
        site = partial(Site, width=self.norm.normalized_shape[0], stage=stage)
        return [
            site(at, "block", ordered=True),
            site(f"{at}.modulation", "modulation"),
            site(f"{at}.conv", "branch", ordered=True),
            site(f"{at}.mlp", "branch"),
            Site(f"{at}.mlp.inner", "inner", width=self.mlp.out.in_features, stage=stage),
        ]


def modulated(norm: nn.LayerNorm, x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise and modulate in float32 or more: at the widest level 16 bits lose steps of training."""
    exact = torch.promote_types(x_BLD.dtype, torch.float32)
    return modulate(norm(x_BLD.to(exact)), shift.to(exact), scale.to(exact)).to(x_BLD.dtype)


class DiCoHead(nn.Module):
    """Adaptive layer norm, then a 3 x 3 convolution to the channels of the prediction."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = MapConv(width, channels)

    def forward(self, run: Run, at: str, x_BLD: Tensor, c_BD: Tensor, grid: Grid) -> Tensor:
        shift, scale = run.site(at + ".modulation", self.modulation, activated(c_BD)).chunk(2, -1)
        return self.out(modulated(self.norm, x_BLD, shift, scale), grid)


class DiCo(Denoiser):
    """Convolutions in three resolutions with adaLN-Zero conditioning on time and class."""

    Config = DiCoConfig
    task = "image"
    config: DiCoConfig

    def __init__(self, config: DiCoConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = c.widths
        self.stem = nn.Conv2d(c.channels, c.width, 3, padding=1)
        self.time = nn.ModuleList(TimeEmbedding(width) for width in widths[:3])
        self.label = nn.ModuleList(nn.Embedding(c.classes + 1, width) for width in widths[:3])
        self.levels = nn.ModuleList(
            nn.ModuleList(DiCoBlock(width, c.ratio, c.channel_attention) for _ in range(depth))
            for width, depth in zip(widths, c.depth, strict=True)
        )
        self.down = nn.ModuleList(Downsample(width) for width in widths[:2])
        self.up = nn.ModuleList(Upsample(width) for width in widths[2:4])
        self.merge = nn.ModuleList(nn.Linear(width, 2 * c.width) for width in (4 * c.width, 2 * c.width))
        self.head = DiCoHead(widths[-1], c.channels * (1 if c.convention.extra == "none" else 2))
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, convention: Convention = DDPM) -> Self:
        """Build a size of the paper, for 4 x 32 x 32 latents and 1000 classes: S, B, L, XL or H.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in SIZES:
            raise ConfigError(unknown("DiCo preset", name, SIZES))
        width, depth, ratio = SIZES[name]
        return cls(DiCoConfig(width=width, depth=depth, ratio=ratio, convention=convention))

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: DiCoConfig) -> Self:
        """Build a model with weights in the naming of the DiCo repository.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        return cls.holding(config, renamed(state), source if isinstance(source, str | Path) else "state dict")

    def reset_parameters(self) -> None:
        """Xavier-uniform layers, N(0, 0.02) embeddings, zero modulation and output: the first output is 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.stem.weight.flatten(1).detach())  # as a layer of patches (the code)
        for part in self.modules():
            if isinstance(part, TimeEmbedding):
                nn.init.normal_(part.inner.weight, std=0.02)
                nn.init.normal_(part.outer.weight, std=0.02)
        gates = [part.modulation for part in self.modules() if isinstance(part, DiCoBlock | DiCoHead)]
        for weight in (p for layer in (*gates, self.head.out) for p in layer.parameters()):
            nn.init.zeros_(weight)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Return the segment of each stage.

        Raises:
            ShapeError: a side does not divide by 4.
        """
        grids = [Grid.of(tuple(shape[-2:]), side) for side in (4, 2, 1)][::-1]
        return tuple(Segment("image", grid, grid.length, None, stage) for stage, grid in enumerate(grids))

    def sites(self) -> tuple[Site, ...]:
        widths = self.config.widths
        found = [Site("time", "time"), Site("tokens", "tokens", width=widths[0], ordered=True)]
        for i, (stage, width) in enumerate(zip(STAGES, widths, strict=True)):
            if i:
                name = f"down.{i - 1}" if i < 3 else f"up.{i - 3}"
                found.append(Site(name, "tokens", width=width, stage=stage, ordered=True))
            found.append(Site(f"levels.{i}", "stack", width=width, stage=stage, ordered=True))
            for j, block in enumerate(self._blocks(i)):
                found += block.sites(f"levels.{i}.{j}", stage)
        head = Site("head", "head", width=widths[-1], ordered=True)
        return (*found, head, Site("head.modulation", "modulation", width=widths[-1]))

    def unconditional(self, cond: Cond) -> Cond:
        """Replace every label by the null class."""
        return replace(cond, label=torch.full_like(label_of(self.config, cond), self.config.classes))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy samples.

        Args:
            x: [B, C, H, W]. t: [B], in the unit the convention names. cond: `label` [B].

        Returns:
            [B, C, H, W], or 2C channels where the convention has an extra half.

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by 4.
        """
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ShapeError(f"DiCo: input {list(x.shape)} should be [B, {self.config.channels}, H, W]")
        grids = [segment.grid for segment in self.layout(tuple(x.shape[1:]))]
        c = run.site("time", self.condition, t, cond)
        rows = [run.site("tokens", self.tokenize, x).x]
        for i, stage in enumerate(STAGES):
            if i in (1, 2):
                rows.append(run.site(f"down.{i - 1}", partial(self.descend, i - 1), rows[-1], grids[i - 1]).x)
            elif i:
                lower, skip = rows.pop(), rows.pop()
                rows.append(
                    run.site(f"up.{i - 3}", partial(self.ascend, i - 3), lower, skip, grids[stage + 1]).x
                )
            stack = Stack(self._blocks(i), run, f"levels.{i}", self.recomputes)
            rows[-1] = run.site(f"levels.{i}", stack.beside, rows[-1], c[STAGE_OF_LEVEL[i]], grids[stage])
        head = partial(self.head, run, "head")
        return to_map(run.site("head", head, rows[-1], c[STAGE_OF_LEVEL[-1]], grids[0]), grids[0])

    def _blocks(self, level: int) -> Sequence[DiCoBlock]:
        return cast(Sequence[DiCoBlock], self.levels[level])

    def condition(self, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """c1, c2, c3: time embedding + label embedding, [B, D], [B, 2 D], [B, 4 D], with one drop for all three."""
        label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
        label = drop_labels(label, cond.drop, self.config.classes, rate)
        return tuple(time(t) + table(label) for time, table in zip(self.time, self.label, strict=True))

    def tokenize(self, x: Tensor) -> Tokens:
        """Embed each pixel with its neighbours, [B, H W, D]; there are no positions."""
        return Tokens(to_rows(self.stem(x)))

    def descend(self, i: int, x_BLD: Tensor, grid: Grid) -> Tokens:
        """Take rows of `grid` one stage down."""
        return Tokens(self.down[i](x_BLD, grid))

    def ascend(self, i: int, x_BLD: Tensor, skip_BLD: Tensor, grid: Grid) -> Tokens:
        """Take rows of `grid` one stage up, beside what that stage had on the way down."""
        return Tokens(self.merge[i](torch.cat([self.up[i](x_BLD, grid), skip_BLD], -1)))


ORIGINAL_LEVELS = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
ORIGINAL_NAMES = {
    r"x_embedder\.proj\.": "stem.",
    r"y_embedder\.embedding_table_(\d)\.": r"label.\1.",
    r"down1_2\.body\.0\.": "down.0.conv.",
    r"down2_3\.body\.0\.": "down.1.conv.",
    r"up3_2\.body\.0\.": "up.0.conv.",
    r"up2_1\.body\.0\.": "up.1.conv.",
    r"reduce_chan_level2\.": "merge.0.",
    r"reduce_chan_level1\.": "merge.1.",
    r"final_layer\.out_proj\.": "head.out.",
    r"final_layer\.adaLN_modulation\.1\.": "head.modulation.",
    **{
        rf"t_embedder_{i + 1}\.mlp\.{place}\.": f"time.{i}.{ours}."
        for i in range(3)
        for place, ours in ((0, "inner"), (2, "outer"))
    },
    **{
        rf"{level}\.(\d+)\.{theirs}\.": rf"levels.{i}.\1.{ours}."
        for i, level in enumerate(ORIGINAL_LEVELS)
        for theirs, ours in (
            ("conv1", "conv.inner"),
            ("conv2", "conv.depthwise"),
            (r"ca\.1", "conv.attention.project"),
            ("conv3", "conv.outer"),
            ("conv4", "mlp.inner"),
            ("conv5", "mlp.out"),
            (r"adaLN_modulation\.1", "modulation"),
        )
    },
}
LINEAR = re.compile(r".*(conv\.inner|conv\.outer|project|mlp\.inner|mlp\.out|merge\.\d)\.weight")
"""Our layers that are 1 x 1 convolutions there."""


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the DiCo repository under our names."""
    ours = {_renamed(name): tensor for name, tensor in state.items()}
    return {
        name: tensor.flatten(1) if LINEAR.fullmatch(name) and tensor.ndim == 4 else tensor
        for name, tensor in ours.items()
    }


def _renamed(name: str) -> str:
    for pattern, ours in ORIGINAL_NAMES.items():
        name, found = re.subn("^" + pattern, ours, name)
        if found:
            break
    return name
