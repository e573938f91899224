"""DiMR (arXiv 2406.09416): transformer blocks at a low resolution, ConvNeXt blocks at higher ones, time in the norms.

Every stage embeds the same noisy sample, the first in the largest patches, and predicts at its own resolution; the last
one's prediction is the network's. A stage is handed all features of the one before: its embedding and the output of
each of its blocks, side by side.

B batch, L rows of a stage, D width of a stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.cond import Cond, label_of
from ditkit.core.config import FROM_DATA, Count, Depth, ModelConfig, Share, names_every_class
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, Tokens
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Attention, Stack
from ditkit.nn.convolution import DepthwiseConv, MapConv, to_map, to_rows
from ditkit.nn.embeddings import drop_labels
from ditkit.nn.mlp import GEGLU
from ditkit.nn.stages import LongSkips, spread_channels
from ditkit.nn.time_norms import TimeDependentLayerNorm, TimeDependentRMSNorm

NOISE_SD = Convention("ddpm-sd", "noise", "index")
"""The published checkpoints': Stable Diffusion's betas, noise predicted, no learned variance."""
STEPS = 1000
"""Steps of every discrete path."""
SIZES = {
    "XL/2R": ((960, 480), (39, 20), (2, 1), 32),
    "G/2R": ((1152, 576), (57, 28), (2, 1), 32),
    "XL/3R": ((960, 480, 240), (39, 20, 20), (4, 2, 1), 64),
}
"""Width, blocks and patch of each stage, and the side of the latents. The third stage of XL/3R is inferred."""


@dataclass(frozen=True)
class DiMRConfig(ModelConfig):
    """Architecture and convention of a DiMR.

    Args:
        size: height and width of a picture.
        channels: of a sample.
        width: of a token's vector in each stage, lowest resolution first.
        depth: number of blocks of each stage; an even number is one more, since one stands in the middle.
        patch: side of a token in each stage.
        heads: of attention, in the first stage.
        ratio: width of the gated MLP, in widths of its stage.
        kernel: side of the depthwise convolutions of all stages but the first.
        clock: what the norms read: noise-time between -1 and 1, or a quarter of the log of the signal-to-noise ratio.
        classes: labels, without the null class.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    channels: Count = field(default=4, metadata=FROM_DATA)
    width: Annotated[tuple[Count, ...], MinLen(1)] = (960, 480)
    depth: Annotated[tuple[Depth, ...], MinLen(1)] = (39, 20)
    patch: Annotated[tuple[Count, ...], MinLen(1)] = (2, 1)
    heads: Count = 16
    ratio: Count = 2
    kernel: Count = 7
    clock: Literal["noise-time", "log-snr"] = "noise-time"
    classes: Count = field(default=1000, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = NOISE_SD
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.width) == len(self.depth) == len(self.patch):
            raise ConfigError(
                f"DiMR: width={self.width}, depth={self.depth} and patch={self.patch} should have one number a stage"
            )
        if any(low % high or low == high for low, high in zip(self.patch, self.patch[1:], strict=False)):
            raise ShapeError(
                f"DiMR: patch={self.patch} should fall from stage to stage, each dividing the last"
            )
        if self.size % self.patch[0]:
            raise ShapeError(f"DiMR: size={self.size} does not divide into patches of {self.patch[0]}")
        if self.width[0] % self.heads:
            raise ShapeError(
                f"DiMR: width={self.width} does not divide into heads={self.heads} in its first stage"
            )
        if self.kernel % 2 == 0:
            raise ShapeError(f"DiMR: kernel={self.kernel} should be odd")
        names_every_class(self)

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, channels=3, width=(16, 8), depth=(3, 2), heads=2, kernel=3, classes=5)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage: as many before its middle one as after."""
        return tuple(depth // 2 * 2 + 1 for depth in self.depth)


class TransformerBlock(nn.Module):
    """x + Attn(N(x)), then x + GEGLU(N(x)), N an RMS norm that depends on time; no bias in queries, keys, values."""

    def __init__(self, width: int, config: DiMRConfig) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = TimeDependentRMSNorm(width), TimeDependentRMSNorm(width)
        self.attn = Attention(width, config.heads, qkv_bias=False)
        self.mlp = GEGLU(width, config.ratio * width)

    def attend(self, run: Run, at: str, x_BLD: Tensor, tau_B11: Tensor) -> Tensor:
        """Return the attention's branch."""
        return self.attn(self.norm_attn(x_BLD, tau_B11), run, at)

    def feed(self, run: Run, at: str, x_BLD: Tensor, tau_B11: Tensor) -> Tensor:
        """Return the MLP's branch; row-wise."""
        return self.mlp(self.norm_mlp(x_BLD, tau_B11), run, at)

    def forward(
        self, x_BLD: Tensor, tau_B11: Tensor, grid: Grid, run: Run = DIRECT, at: str = "stages.0.0"
    ) -> Tensor:
        x_BLD = x_BLD + run.site(at + ".attn", partial(self.attend, run, at + ".attn"), x_BLD, tau_B11)
        return x_BLD + run.site(at + ".mlp", partial(self.feed, run, at + ".mlp"), x_BLD, tau_B11)

    def sites(self, at: str, stage: int) -> list[Site]:
        """Return its sites in the order of the call."""
        site = partial(Site, width=self.attn.out.in_features, stage=stage)
        attention = [site(f"{at}.attn", "branch"), *self.attn.sites(f"{at}.attn", stage=stage)]
        return [site(at, "block"), *attention, *_mlp_sites(self.mlp, at, stage)]


class ConvNeXtBlock(nn.Module):
    """x + DW(x), with neither norm nor activation before it, then x + GEGLU(N(x))."""

    def __init__(self, width: int, config: DiMRConfig) -> None:
        super().__init__()
        self.conv = DepthwiseConv(width, config.kernel)
        self.norm_mlp = TimeDependentRMSNorm(width)
        self.mlp = GEGLU(width, config.ratio * width)

    def feed(self, run: Run, at: str, x_BLD: Tensor, tau_B11: Tensor) -> Tensor:
        """Return the MLP's branch; row-wise."""
        return self.mlp(self.norm_mlp(x_BLD, tau_B11), run, at)

    def forward(
        self, x_BLD: Tensor, tau_B11: Tensor, grid: Grid, run: Run = DIRECT, at: str = "stages.1.0"
    ) -> Tensor:
        x_BLD = x_BLD + run.site(at + ".conv", self.conv, x_BLD, grid)
        return x_BLD + run.site(at + ".mlp", partial(self.feed, run, at + ".mlp"), x_BLD, tau_B11)

    def sites(self, at: str, stage: int) -> list[Site]:
        """Return its sites in the order of the call."""
        site = partial(Site, width=self.conv.out_channels, stage=stage)
        conv = site(f"{at}.conv", "branch", ordered=True)
        return [site(at, "block", ordered=True), conv, *_mlp_sites(self.mlp, at, stage)]


def _mlp_sites(mlp: GEGLU, at: str, stage: int) -> list[Site]:
    width = mlp.out.out_features, mlp.out.in_features
    return [
        Site(f"{at}.mlp", "branch", width=width[0], stage=stage),
        Site(f"{at}.mlp.inner", "inner", width=width[1], stage=stage),
    ]


class Stage(nn.Module):
    """One resolution: an embedding, blocks with U-ViT's skips, and a head.

    Args:
        index: of the stage. lower: width of all features of the stage below, side by side; 0 for the first.
    """

    def __init__(self, config: DiMRConfig, index: int, lower: int) -> None:
        super().__init__()
        width, self.patch = config.width[index], config.patch[index]
        self.side = config.size // self.patch
        self.embed = nn.Conv2d(config.channels, width, self.patch, self.patch)
        self.position = nn.Parameter(torch.zeros(self.side**2, width))
        self.blocks = nn.ModuleList(
            (ConvNeXtBlock if index else TransformerBlock)(width, config) for _ in range(config.blocks[index])
        )
        self.skips = LongSkips(width, len(self.blocks))
        self.norm = TimeDependentLayerNorm(width)
        channels = config.channels * (1 if config.convention.extra == "none" else 2)
        self.cut = self.patch if index + 1 == len(config.width) else 1
        self.out = MapConv(width, channels * self.cut**2)
        if index:
            self.ratio = config.patch[index - 1] // self.patch
            self.norm_lower = TimeDependentLayerNorm(lower)
            self.expand = nn.Linear(lower, width * self.ratio**2)
            self.norm_expanded = TimeDependentLayerNorm(width)
        else:
            self.label = nn.Embedding(config.classes + 1, width)

    def tokenize(self, x: Tensor, grid: Grid) -> Tensor:
        """Embed patches of x and add their positions, [B, L, D].

        Raises:
            ShapeError: the picture is larger than the table of positions.
        """
        if max(grid.height, grid.width) > self.side:
            raise ShapeError(
                f"DiMR: {grid.height} x {grid.width} tokens, expected at most {self.side} a side"
            )
        place = torch.arange(grid.height, device=x.device)[:, None] * self.side
        place = place + torch.arange(grid.width, device=x.device)
        return to_rows(self.embed(x)) + self.position[place.flatten()]

    def begin(self, x: Tensor, label: Tensor, grid: Grid) -> Tokens:
        """Embed the first stage: a class token, then the picture's, [B, 1 + L, D]; the class token has no position."""
        return Tokens(torch.cat([self.label(label)[:, None], self.tokenize(x, grid)], 1))

    def refine(self, x: Tensor, features: Tensor, tau_B11: Tensor, grid: Grid, lower: Grid) -> Tokens:
        """Embed a later stage: what it reads itself, and all features of the stage below at its resolution."""
        expanded = spread_channels(self.expand(self.norm_lower(features, tau_B11)), lower, self.ratio)
        return Tokens(self.tokenize(x, grid) + self.norm_expanded(expanded, tau_B11))

    def predict(self, x_BLD: Tensor, tau_B11: Tensor, grid: Grid) -> Tensor:
        """Predict at the stage's resolution, [B, C, h, w], from the picture's rows; the last stage at the sample's."""
        rows = self.out(self.norm(x_BLD[:, -grid.length :], tau_B11), grid)
        fine = Grid(1, grid.height * self.cut, grid.width * self.cut)
        return to_map(spread_channels(rows, grid, self.cut) if self.cut > 1 else rows, fine)


class DiMR(Denoiser):
    """Stages of rising resolution, each told what the one below found; time enters through the norms alone."""

    Config = DiMRConfig
    task = "image"
    config: DiMRConfig

    def __init__(self, config: DiMRConfig) -> None:
        super().__init__()
        self.config = config
        features = [
            0,
            *(width * (count + 1) for width, count in zip(config.width, config.blocks, strict=True)),
        ]
        self.stages = nn.ModuleList(Stage(config, i, features[i]) for i in range(len(config.width)))
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, convention: Convention = NOISE_SD) -> Self:
        """Build a size of the paper, for latents of 4 channels and 1000 classes: XL/2R, G/2R or XL/3R.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in SIZES:
            raise ConfigError(unknown("DiMR preset", name, SIZES))
        width, depth, patch, size = SIZES[name]
        return cls(DiMRConfig(width=width, depth=depth, patch=patch, size=size, convention=convention))

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: DiMRConfig) -> Self:
        """Build a model with weights in the naming of the DiMR repository.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        ours = {renamed(name): tensor for name, tensor in state.items()}
        return cls.holding(config, ours, source if isinstance(source, str | Path) else "state dict")

    def reset_parameters(self) -> None:
        """N(0, 0.02) cut off at +-2 for layers and tables, torch's own for convolutions; nothing is zero but biases."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if isinstance(part, nn.Linear) and part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, Stage):
                nn.init.trunc_normal_(part.position, std=0.02)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Return the class token's segment and the picture's of the first stage, then the picture's of the others.

        Raises:
            ShapeError: a side does not divide by the first stage's patch.
        """
        grids = [Grid.of(tuple(shape[-2:]), patch) for patch in self.config.patch]
        pictures = [Segment("image", grid, grid.length, None, stage) for stage, grid in enumerate(grids)]
        return (Segment("context", Grid(), 1), *pictures)

    def sites(self) -> tuple[Site, ...]:
        found = [Site("time", "time")]
        for i, (width, stage) in enumerate(
            zip(self.config.width, cast(Sequence[Stage], self.stages), strict=True)
        ):
            at, site = f"stages.{i}", partial(Site, width=width, stage=i, ordered=True)
            found.append(site(f"{at}.tokens", "tokens"))
            for j, block in enumerate(cast(Sequence[TransformerBlock], stage.blocks)):
                found += block.sites(f"{at}.{j}", i)
            found.append(site(f"{at}.head", "head"))
        return tuple(found)

    def unconditional(self, cond: Cond) -> Cond:
        """Replace every label by the null class."""
        return replace(cond, label=torch.full_like(label_of(self.config, cond), self.config.classes))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy samples.

        What the lower stages predict is what their `head` sites return, [B, C, h, w] (`MultiScale`).

        Args:
            x: [B, C, H, W]. t: [B], in the unit the convention names. cond: `label` [B].

        Returns:
            The last stage's prediction, [B, C, H, W], or 2C channels where the convention has an extra half.

        Raises:
            ShapeError: channels differ from the config's, or the sides do not divide by the first stage's patch.
        """
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise ShapeError(f"DiMR: input {list(x.shape)} should be [B, {self.config.channels}, H, W]")
        grids = [segment.grid for segment in self.layout(tuple(x.shape[1:])) if segment.stream == "image"]
        label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
        label = drop_labels(label, cond.drop, self.config.classes, rate)
        tau = run.site("time", self.place, t)
        features: Tensor | None = None
        stages = cast(Sequence[Stage], self.stages)
        for i, (stage, grid) in enumerate(zip(stages, grids, strict=True)):
            at = f"stages.{i}"
            if features is None:
                rows = run.site(f"{at}.tokens", stage.begin, x, label, grid).x
            else:
                rows = run.site(f"{at}.tokens", stage.refine, x, features, tau, grid, grids[i - 1]).x
            outputs = self._through(stage, run, at, rows, tau, grid)
            out: Tensor = run.site(f"{at}.head", stage.predict, outputs[-1], tau, grid)
            if i + 1 < len(self.stages):
                features = torch.cat([one[:, -grid.length :] for one in (rows, *outputs)], -1)
        return out

    def _through(
        self, stage: Stage, run: Run, at: str, rows: Tensor, tau: Tensor, grid: Grid
    ) -> Sequence[Tensor]:
        """Return the output of each block of a stage: all are features of the next."""
        stack = Stack(stage.blocks, run, at, self.recomputes)
        outputs: list[Tensor] = []
        for i in range(len(stack)):
            rows = stage.skips.joined(i, rows, outputs)
            rows = stack.beside(rows, tau, grid, i, i + 1)
            outputs.append(rows)
        return outputs

    def place(self, t: Tensor) -> Tensor:
        """Return tau, where the model's times stand for the norms, [B, 1, 1].

        From -1 at the data to 1 at the noise: the published 8 n / 1000 - 4 over 4, n = index + 1. The other clock is
        log(alpha^2 / sigma^2) / 4, which falls where this one rises.
        """
        convention = self.config.convention
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        if not convention.discrete:
            t = (1 - t if convention.time == "data" else t) / convention.unit
        if self.config.clock == "log-snr":
            c = convention.make_path().at(t)
            tau = 0.5 * (c.alpha / c.sigma).log()
        else:
            tau = 2 * ((t + 1) / STEPS if convention.discrete else t) - 1
        return tau[:, None, None]


ORIGINAL_NAMES = (
    (r"^(stages\.\d+)\.input_layer\.1\.", r"\1.embed."),
    (r"^(stages\.\d+)\.input_layer\.3\.position_embeddings\.weight", r"\1.position"),
    (r"^(stages\.\d+)\.class_embeds\.", r"\1.label."),
    (r"^(stages\.\d+)\.upsample\.0\.", r"\1.norm_lower."),
    (r"^(stages\.\d+)\.upsample\.1\.kernel\.", r"\1.expand."),
    (r"^(stages\.\d+)\.upsample\.2\.", r"\1.norm_expanded."),
    (r"^(stages\.\d+)\.skip_denses\.", r"\1.skips."),
    (r"^(stages\.\d+)\.output_layer\.0\.", r"\1.norm."),
    (r"^(stages\.\d+)\.output_layer\.2\.", r"\1.out."),
    (r"\.block1\.norm\.", ".norm_attn."),
    (r"\.block1\.query_key_value\.", ".attn.qkv."),
    (r"\.block1\.dense\.", ".attn.out."),
    (r"\.block1\.1\.", ".conv."),
    (r"\.block2\.norm\.", ".norm_mlp."),
    (r"\.block2\.w0\.", ".mlp.gate."),
    (r"\.block2\.w1\.", ".mlp.value."),
    (r"\.block2\.w2\.", ".mlp.out."),
    (r"\.(norm_lower|norm_expanded|norm)\.weight\.", r".\1.scale."),
    (r"\.(norm_lower|norm_expanded|norm)\.bias\.", r".\1.shift."),
    (r"\.param0$", ".high"),
    (r"\.param1$", ".low"),
    (r"\.nodecay_weight$", ".weight"),
    (r"\.nodecay_bias$", ".bias"),
)


def renamed(name: str) -> str:
    """Return our name of a tensor of the DiMR repository."""
    for pattern, ours in ORIGINAL_NAMES:
        name = re.sub(pattern, ours, name)
    return name
