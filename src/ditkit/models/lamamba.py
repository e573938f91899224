"""LaMamba-Diff (arXiv 2408.02615): a U-shaped denoiser of selective scans, window attention and MLPs under adaLN.

Three stages, at the token grid's resolution, at a half and at a quarter; nine levels of blocks, four down, one in the
middle and four up, of which the two before and the two after the middle share the last stage. Cost is linear in the
tokens.

B batch, L rows of a stage, D width of a level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

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
    divides_into_heads,
    names_every_class,
)
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, Tokens
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Stack
from ditkit.nn.convolution import to_map, to_rows
from ditkit.nn.embeddings import TimeEmbedding, drop_labels, sincos_table
from ditkit.nn.mlp import PlainMLP
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate
from ditkit.nn.scan import Paths, SelectiveScan2D
from ditkit.nn.stages import ExpandPatches, MergePatches
from ditkit.nn.windows import WindowAttention

STAGES = (0, 1, 2, 2, 2, 2, 2, 1, 0)
"""Stage of each level."""
MIDDLE = 4
"""The level in the middle; those before it leave their outputs for those after it, last in, first out."""
SIZES = {"S": (72, 8), "B": (144, 8), "L": (272, 16), "XL": (320, 16)}
"""Width and heads. XL is the paper's; the others keep its depth and match DiT's numbers of parameters."""
Mixer = Literal["both", "scan", "windows"]


@dataclass(frozen=True)
class LaMambaConfig(ModelConfig):
    """Architecture and convention of a LaMamba-Diff.

    Args:
        size: height and width of a picture; a table of positions ties the weights to it.
        patch: side of a token.
        channels: of a sample.
        width: of the first level; the others are two and four times as wide.
        depth: number of blocks of each level down.
        deeper: one block more in each level up.
        middle: number of blocks in the middle.
        heads: of window attention, at every level.
        window: side of a window in tokens; a level of no more tokens a side has one window.
        mixer: selective scans and window attention, or one of them alone, for comparison.
        classes: labels, without the null class.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    patch: Count = 1
    channels: Count = field(default=4, metadata=FROM_DATA)
    width: Count = 320
    depth: tuple[Depth, Depth, Depth, Depth] = (2, 2, 2, 2)
    deeper: bool = True
    middle: Depth = 2
    heads: Count = 16
    window: Count = 8
    mixer: Mixer = "both"
    classes: Count = field(default=1000, metadata=FROM_DATA)
    label_dropout: Share = 0.1
    convention: Convention = DDPM
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides_into_heads(self)
        divides_for_sincos(self)
        names_every_class(self)
        if self.size % (4 * self.patch):
            raise ShapeError(
                f"LaMamba: size={self.size} does not divide by 4 times patch={self.patch}, as its third stage has it"
            )
        for side in self.sides:
            if side > self.window and side % self.window and self.mixer != "scan":
                raise ShapeError(
                    f"LaMamba: size={self.size} has a stage of {side} x {side} tokens, which window={self.window} "
                    "does not divide"
                )

    @classmethod
    def tiny(cls) -> Self:
        depth = (2, 1, 1, 1)
        return cls(
            size=8, channels=3, width=8, depth=depth, deeper=False, middle=1, heads=4, window=4, classes=5
        )

    @property
    def sides(self) -> tuple[int, int, int]:
        """Tokens a side of each stage."""
        side = self.size // self.patch
        return side, side // 2, side // 4

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks of each level."""
        return (*self.depth, self.middle, *(count + self.deeper for count in self.depth[::-1]))

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each level."""
        return tuple(self.width << stage for stage in STAGES)


class LaMambaBlock(nn.Module):
    """x + a1 Scan(mod(LN x)), then x + a2 Attn(mod(LN x)), then x + a3 Mlp(mod(LN x)), all from c.

    The layer norms have weights of their own, beside the modulation; GELU is exact.

    Args:
        width_c: of the conditioning vector, which a layer brings to the block's; none where `projects` is false.
        side: tokens a side, of its stage. odd: shift the windows by a half, unless there is but one.
    """

    def __init__(
        self, width: int, width_c: int, projects: bool, config: LaMambaConfig, side: int, odd: bool
    ) -> None:
        super().__init__()
        window = min(config.window, side)
        shift = config.window // 2 if odd and side > window else 0
        self.project = nn.Linear(width_c, width) if projects else nn.Identity()
        kinds = {"both": ("scan", "attn"), "scan": ("scan",), "windows": ("attn",)}[config.mixer]
        self.branches = (*kinds, "mlp")
        self.norms = nn.ModuleDict({kind: nn.LayerNorm(width) for kind in self.branches})
        if "scan" in kinds:
            self.scan = SelectiveScan2D(width)
        if "attn" in kinds:
            self.attn = WindowAttention(width, config.heads, window, shift)
        self.mlp = PlainMLP(width, 4 * width)
        self.modulation = nn.Linear(width, 3 * len(self.branches) * width)

    def branch(
        self, kind: str, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, *place: Any
    ) -> Tensor:
        """Return a branch before its gate.

        Args:
            place: of a scan its grid and paths, of attention its grid; the MLP is row-wise.
        """
        shift, scale = affine(parts, self.branches.index(kind), len(self.branches))
        h_BLD = modulate(self.norms[kind](x_BLD), shift, scale)
        out: Tensor = self.mlp(h_BLD, run, at) if kind == "mlp" else getattr(self, kind)(h_BLD, *place)
        return out

    def forward(
        self,
        x_BLD: Tensor,
        c_BD: Tensor,
        place: tuple[Grid, Paths],
        run: Run = DIRECT,
        at: str = "levels.0.0",
    ) -> Tensor:
        c_BD = activated(self.project(c_BD))
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), c_BD)
        of_branch: dict[str, tuple[Any, ...]] = {"scan": place, "attn": place[:1], "mlp": ()}
        for i, kind in enumerate(self.branches):
            name = f"{at}.{kind}"
            branch = run.site(name, partial(self.branch, kind, run, name), x_BLD, parts, *of_branch[kind])
            x_BLD = torch.addcmul(x_BLD, gate(parts, i, len(self.branches)), branch)  # one pass over memory
        return x_BLD

    def sites(self, at: str, stage: int) -> list[Site]:
        """Return its sites in the order of the call."""
        site = partial(Site, width=self.mlp.out.out_features, stage=stage)
        return [
            site(at, "block", ordered=True),
            site(f"{at}.modulation", "modulation"),
            *(site(f"{at}.{kind}", "branch", ordered=kind != "mlp") for kind in self.branches),
            Site(f"{at}.mlp.inner", "inner", width=self.mlp.out.in_features, stage=stage),
        ]


class LaMambaHead(nn.Module):
    """Tokens spread over their pixels, an adaptive layer norm, then one layer to the channels of the prediction."""

    def __init__(self, width: int, width_c: int, patch: int, channels: int) -> None:
        super().__init__()
        self.expand = ExpandPatches(width, width, patch)
        self.project = nn.Linear(width_c, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)

    def forward(self, run: Run, at: str, x_BLD: Tensor, c_BD: Tensor, grid: Grid) -> Tensor:
        c_BD = activated(self.project(c_BD))
        shift, scale = run.site(at + ".modulation", self.modulation, c_BD).chunk(2, -1)
        out: Tensor = self.out(modulate(self.norm(self.expand(x_BLD, grid)), shift, scale))
        return out


class LaMamba(Denoiser):
    """Selective scans and window attention in three resolutions, conditioned on time and class."""

    Config = LaMambaConfig
    task = "image"
    config: LaMambaConfig

    def __init__(self, config: LaMambaConfig) -> None:
        super().__init__()
        self.config = c = config
        widths, width_c = c.widths, 4 * c.width
        self.embed = nn.Conv2d(c.channels, c.width, c.patch, c.patch)
        self.embed_norm = nn.LayerNorm(c.width)
        self.positions = nn.Parameter(torch.empty(c.sides[0] ** 2, c.width))
        self.time = TimeEmbedding(width_c)
        self.label = nn.Embedding(c.classes + 1, width_c)
        self.levels = nn.ModuleList(
            nn.ModuleList(
                LaMambaBlock(
                    width, width_c, i > MIDDLE or width != width_c, c, c.sides[STAGES[i]], j % 2 == 1
                )
                for j in range(blocks)
            )
            for i, (width, blocks) in enumerate(zip(widths, c.blocks, strict=True))
        )
        self.down = nn.ModuleList(MergePatches(width, 2 * width) for width in widths[:2])
        self.up = nn.ModuleList(ExpandPatches(width, width // 2) for width in widths[6:8])
        self.head = LaMambaHead(
            c.width, width_c, c.patch, c.channels * (1 if c.convention.extra == "none" else 2)
        )
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, convention: Convention = DDPM, size: int = 32) -> Self:
        """Build S, B, L or XL for 4 x 32 x 32 latents and 1000 classes; the paper's are of 32 and 64 a side.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in SIZES:
            raise ConfigError(unknown("LaMamba preset", name, SIZES))
        width, heads = SIZES[name]
        return cls(LaMambaConfig(size=size, width=width, heads=heads, convention=convention))

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: LaMambaConfig) -> Self:
        """Build a model with weights in the naming of the LaMamba-Diff repository.

        Raises:
            CheckpointError: it is of another resolution than `config`; or a tensor is missing, left over, of another
                shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        name = source if isinstance(source, str | Path) else "state dict"
        table = state.get("pos_embed")
        side = config.sides[0]
        if table is not None and table.ndim == 4 and table.shape[1:3] != (side, side):
            size = table.shape[1] * config.patch
            raise CheckpointError(
                f"{name}: made for size={size} ('pos_embed' and the masks of its windows are of that size), expected "
                f"size={config.size}; load it with size={size}, then `resized({config.size})`"
            )
        return cls.holding(config, renamed(state), name)

    def resized(self, size: int) -> Self:
        """Return a copy for pictures of another size: the table of positions is interpolated, all else stays.

        Raises:
            ShapeError: the windows, of which each has a table of offsets, would have other sides.
        """
        config = replace(self.config, size=size)
        own, other = ([min(c.window, side) for side in c.sides] for c in (self.config, config))
        if own != other and config.mixer != "scan":
            raise ShapeError(
                f"LaMamba: size={size} would have windows of {other} tokens a side, expected {own} as the weights have"
            )
        before, after = self.config.sides[0], config.sides[0]
        table = self.positions.detach().mT.reshape(1, -1, before, before)
        table = F.interpolate(table, (after, after), mode="bicubic", align_corners=False)
        state = {**self.state_dict(), "positions": table.flatten(2)[0].mT.contiguous()}
        copy = self.holding(
            config, state, f"LaMamba of size={self.config.size}", self.policies, self.transforms
        )
        copy.history, copy.task = self.history, self.task
        return copy

    def reset_parameters(self) -> None:
        """Xavier-uniform layers, N(0, 0.02) embeddings, zero modulation: blocks are the identity at first.

        The last layer is not zero (as in the code), so neither is the first output.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1).detach())  # as a layer of patches (the code)
        nn.init.zeros_(cast(Tensor, self.embed.bias))
        grid = Grid(1, self.config.sides[0], self.config.sides[0])
        with torch.no_grad():
            self.positions.copy_(sincos_table(grid, self.config.width, self.positions.device))
        for table in (self.label, self.time.inner, self.time.outer):
            nn.init.normal_(table.weight, std=0.02)
        gates = [part.modulation for part in self.modules() if isinstance(part, LaMambaBlock | LaMambaHead)]
        for weight in (p for layer in gates for p in layer.parameters()):
            nn.init.zeros_(weight)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Return the segment of each stage.

        Raises:
            ShapeError: a side does not divide by the patch and the stages.
        """
        patch = self.config.patch
        grids = [Grid.of(tuple(shape[-2:]), side * patch) for side in (4, 2, 1)][::-1]
        return tuple(Segment("image", grid, grid.length, None, stage) for stage, grid in enumerate(grids))

    def sites(self) -> tuple[Site, ...]:
        widths = self.config.widths
        found = [Site("time", "time", width=4 * self.config.width)]
        found.append(Site("tokens", "tokens", width=widths[0], ordered=True))
        for i, (stage, width) in enumerate(zip(STAGES, widths, strict=True)):
            if name := _crossing(i):
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
            x: [B, C, size, size]. t: [B], in the unit the convention names. cond: `label` [B].

        Returns:
            [B, C, size, size], or 2C channels where the convention has an extra half.

        Raises:
            ShapeError: x is of another shape than the config's.
        """
        if tuple(x.shape[1:]) != self.sample_shape:
            raise ShapeError(
                f"LaMamba: input {list(x.shape)} should be {['B', *self.sample_shape]}; `resized` makes a model of "
                "another size"
            )
        grids = [segment.grid for segment in self.layout(tuple(x.shape[1:]))]
        places = [(grid, Paths.of(grid, x.device)) for grid in grids]
        c = run.site("time", self.condition, t, cond)
        h = run.site("tokens", self.tokenize, x).x
        skips: list[Tensor] = []
        for i, stage in enumerate(STAGES):
            if name := _crossing(i):
                step, before = self.descend if i < MIDDLE else self.ascend, grids[STAGES[i - 1]]
                h = run.site(name, partial(step, int(name[-1])), h, before).x
            if i > MIDDLE:
                h = h + skips.pop()
            stack = Stack(self._blocks(i), run, f"levels.{i}", self.recomputes)
            out = run.site(f"levels.{i}", stack.beside, h, c, places[stage])
            h = h + out if i == MIDDLE else out
            if i < MIDDLE:
                skips.append(h)
        rows = run.site("head", partial(self.head, run, "head"), h, c, grids[0])
        return to_map(rows, Grid(1, *x.shape[2:]))

    def _blocks(self, level: int) -> Sequence[LaMambaBlock]:
        return cast(Sequence[LaMambaBlock], self.levels[level])

    def condition(self, t: Tensor, cond: Cond) -> Tensor:
        """Compute c = time embedding + label embedding, [B, 4 D]."""
        label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
        c_BD: Tensor = self.time(t) + self.label(drop_labels(label, cond.drop, self.config.classes, rate))
        return c_BD

    def tokenize(self, x: Tensor) -> Tokens:
        """Embed and norm patches of x, with learned positions, [B, L, D]."""
        return Tokens(self.embed_norm(to_rows(self.embed(x))) + self.positions)

    def descend(self, i: int, x_BLD: Tensor, grid: Grid) -> Tokens:
        """Take rows of `grid` one stage down."""
        return Tokens(self.down[i](x_BLD, grid))

    def ascend(self, i: int, x_BLD: Tensor, grid: Grid) -> Tokens:
        """Take rows of `grid` one stage up."""
        return Tokens(self.up[i](x_BLD, grid))


def _crossing(level: int) -> str:
    """Name of the site that takes rows to a level from one of another stage; empty where both share it."""
    return {1: "down.0", 2: "down.1", 7: "up.0", 8: "up.1"}.get(level, "")


BLOCK_NAMES = {
    r"condition_projection\.": "project.",
    r"norm\.": "norms.scan.",
    r"norm_swin\.": "norms.attn.",
    r"norm2\.": "norms.mlp.",
    r"attn\.relative_position_bias_table": "attn.bias",
    r"attn\.proj\.": "attn.out.",
    r"op\.x_proj_weight": "scan.project",
    r"op\.dt_projs_weight": "scan.step",
    r"op\.dt_projs_bias": "scan.step_bias",
    r"op\.A_logs": "scan.log_decay",
    r"op\.Ds": "scan.skip",
    r"op\.out_norm\.": "scan.norm.",
    r"op\.in_proj\.": "scan.inner.",
    r"op\.conv2d\.": "scan.conv.",
    r"op\.out_proj\.": "scan.outer.",
    r"mlp\.fc1\.": "mlp.inner.",
    r"mlp\.fc2\.": "mlp.out.",
    r"adaLN_modulation\.1\.": "modulation.",
}
ORIGINAL_NAMES = {
    r"patch_embed\.proj\.": "embed.",
    r"patch_embed\.norm\.": "embed_norm.",
    r"t_embedder\.mlp\.0\.": "time.inner.",
    r"t_embedder\.mlp\.2\.": "time.outer.",
    r"y_embedder\.embedding_table\.": "label.",
    **{rf"layers\.{i}\.downsample\.reduction\.": f"down.{i}.outer." for i in (0, 1)},
    **{rf"layers\.{i}\.downsample\.norm\.": f"down.{i}.norm." for i in (0, 1)},
    **{rf"layers_up\.{i + 2}\.upsample\.expand\.": f"up.{i}.inner." for i in (0, 1)},
    **{rf"layers_up\.{i + 2}\.upsample\.norm\.": f"up.{i}.norm." for i in (0, 1)},
    r"final_up\.expand\.": "head.expand.inner.",
    r"final_up\.norm\.": "head.expand.norm.",
    r"final_condition_projection\.": "head.project.",
    r"final_adaLN_modulation\.1\.": "head.modulation.",
    r"final_linear\.": "head.out.",
}
TABLES = re.compile(r".*\.(attn_mask|relative_position_index)")
"""Tables that follow from the sizes, which published checkpoints hold."""


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the LaMamba-Diff repository under our names, without the tables that follow from sizes."""
    ours = {}
    for name, tensor in state.items():
        if TABLES.fullmatch(name):
            continue
        if name == "pos_embed":
            ours["positions"] = tensor.flatten(0, -2)
        elif name.endswith((".op.A_logs", ".op.Ds")):
            ours[_renamed(name)] = tensor.unflatten(0, (4, -1))
        else:
            ours[_renamed(name)] = tensor
    return ours


def _renamed(name: str) -> str:
    if found := re.fullmatch(r"(layers|mid_layer|layers_up)(?:\.(\d+))?\.blocks\.(\d+)\.(.*)", name):
        part, level, block, rest = found.groups()
        place = {"layers": 0, "mid_layer": MIDDLE, "layers_up": MIDDLE + 1}[part] + int(level or 0)
        return f"levels.{place}.{block}.{_first(BLOCK_NAMES, rest)}"
    return _first(ORIGINAL_NAMES, name)


def _first(names: Mapping[str, str], name: str) -> str:
    for pattern, ours in names.items():
        name, found = re.subn("^" + pattern, ours, name)
        if found:
            break
    return name
