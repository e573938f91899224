"""VDT (arXiv 2305.13311): a video diffusion transformer, factorised in space and time, told by a mask what to make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
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
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, patchify, unpatchify
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run
from ditkit.core.transform import Stacked
from ditkit.models.dit import DiT
from ditkit.nn.axes import Clip
from ditkit.nn.blocks import Head, Stack
from ditkit.nn.embeddings import TimeEmbedding, drop_labels, dtype_of, sincos_axis, sincos_table
from ditkit.nn.init import adaln_zero_
from ditkit.nn.temporal import Scene, SceneTokens, SpaceTimeBlock, TemporalAttention

Mode = Literal["video", "image"]
Conditioning = Literal["mask", "concat", "adaln", "cross"]

SIZES = {"S": (12, 384, 6), "L": (28, 1152, 16)}
"""Depth, width, heads (VDT, table 1)."""


@dataclass(frozen=True)
class VDTConfig(ModelConfig):
    """Architecture and convention of a VDT.

    Args:
        channels: of a sample.
        frames: of a clip.
        size: height and width of a frame; one number for both. Any others run, too.
        patch: side of a token, within a frame.
        width: of a token's vector.
        depth: number of blocks.
        heads: of attention.
        classes: labels, without the null class; the paper's models have one, which need not be given.
        mode: "image" leaves time out, attention and positions: every frame is a DiT's picture.
        conditioning: how given content comes in. "mask" puts it in the place of the noise (section 3.3); on whole
            frames that is the paper's choice among the others, concatenation in token space, at half its tokens.
            "concat" is that concatenation, spelled out: clean tokens precede the noisy ones along time.
            "adaln" adds the mean of the clean tokens to c; "cross" attends to them in every block.
        label_dropout: share of training samples whose label is replaced by the null class.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "video"

    channels: Count = field(default=4, metadata=FROM_DATA)
    frames: Count = 16
    size: Count | tuple[Count, Count] = 32
    patch: Count = 2
    width: Count = 384
    depth: Depth = 12
    heads: Count = 6
    classes: Count = field(default=1, metadata=FROM_DATA)
    mode: Mode = "video"
    conditioning: Conditioning = "mask"
    label_dropout: Share = 0.1
    convention: Convention = DDPM
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n % self.patch for n in self.shape[1:]):
            raise ShapeError(f"VDT: size={self.size} does not divide into patches of {self.patch}")
        divides_into_heads(self)
        divides_for_sincos(self)
        names_every_class(self)
        if self.mode == "image" and self.conditioning == "concat":
            raise ConfigError(
                "VDT: conditioning='concat' joins frames along time, which mode='image' has not"
            )

    @classmethod
    def tiny(cls) -> Self:
        return cls(channels=3, frames=4, size=8, width=32, depth=2, heads=4, classes=5)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a sample."""
        return (self.frames, *((self.size, self.size) if isinstance(self.size, int) else self.size))


class VDT(Denoiser):
    """DiT's blocks with attention along time before each, and given content in the place of noise."""

    Config = VDTConfig
    task = "video"
    completes = True
    config: VDTConfig

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        self.config = c = config
        video, cross = c.mode == "video", c.conditioning == "cross"
        pixels = c.patch**2 * c.channels
        self.embed = nn.Linear(pixels, c.width)
        self.time = TimeEmbedding(c.width)
        self.label = nn.Embedding(c.classes + 1, c.width)
        self.blocks = nn.ModuleList(SpaceTimeBlock(c.width, c.heads, video, cross) for _ in range(c.depth))
        self.head = Head(c.width, pixels * (1 if c.convention.extra == "none" else 2))
        self.pool = nn.Linear(c.width, c.width) if c.conditioning == "adaln" else None
        self.nothing = nn.Parameter(torch.zeros(c.width)) if cross else None
        adaln_zero_(self, self.label.weight, self.time.inner.weight, self.time.outer.weight)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """S/2 or L/2, the paper's sizes, with `changes` to the config.

        Raises:
            ConfigError: the name is neither.
        """
        names = [f"{size}/2" for size in SIZES]
        if name not in names:
            raise ConfigError(unknown("VDT preset", name, names))
        depth, width, heads = SIZES[name.split("/", maxsplit=1)[0]]
        return cls(VDTConfig(**{"width": width, "depth": depth, "heads": heads, **changes}))

    @classmethod
    def from_image(cls, image: DiT, **changes: Any) -> Self:
        """Build a VDT with the weights of a DiT, whose temporal branches all give 0 at first (ours; W_fc = 0).

        Args:
            changes: to the config, such as `frames`.
        """
        model = cls(VDTConfig(**{**asdict(image.config), "convention": image.config.convention, **changes}))
        model.load_state_dict({**model.state_dict(), **image.state_dict()})
        for part in model.modules():
            if isinstance(part, TemporalAttention):
                nn.init.zeros_(part.fc.weight)
        return model

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (self.config.channels, *self.config.shape)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-3:]), self.config.patch)
        image = Segment("image", grid, grid.length)
        return (image._replace(stream="context"), image) if self.config.conditioning == "concat" else (image,)

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def unconditional(self, cond: Cond) -> Cond:
        """All to be made, of the null class.

        Raises:
            ConfigError: there is neither a label nor a mask to take away.
        """
        given_rows = cond.mask if cond.label is None else cond.label
        if given_rows is None:
            raise ConfigError("VDT: Cond has neither a label nor a mask that guidance could leave out")
        label = torch.full((len(given_rows),), self.config.classes, device=given_rows.device)
        return replace(cond, label=label, mask=None if cond.mask is None else torch.ones_like(cond.mask))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy clips; any length and size that the patch divides will do.

        Args:
            x: [B, C, T, H, W]. t: [B], in the unit the convention names.
            cond: `label` [B], by default 0; `context` and `mask`, without which all is to be made. What x holds
                where content is given counts for nothing. The network is not told the mask itself.

        Returns:
            [B, C, T, H, W], or 2C channels where the convention has an extra half.

        Raises:
            ConfigError: a mask without context.
            ShapeError: the clip, the context or the mask is not as it should be, or a policy took
                some rows of "concat".
        """
        self._check(x, cond)
        grid = self._grid(x)
        c_BD = run.site("time", self.condition, t, cond)
        tokens: SceneTokens = run.site("tokens", self.tokenize, x, cond)
        if self.config.conditioning == "concat" and tokens.scene.clip.kept is not None:
            raise ShapeError("VDT: conditioning='concat' needs every row, a policy left some out")
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack.beside, tokens.x, c_BD, tokens.scene)
        out = run.site("head", partial(self.head, run=run), h_BLD[:, -grid.length :], c_BD)
        return unpatchify(out, grid, (1, self.config.patch, self.config.patch))

    def condition(self, t: Tensor, cond: Cond) -> Tensor:
        """Compute c = time embedding + label embedding (+ pooled clean tokens: adaln), [B, D]; all frames share it."""
        label = torch.zeros(len(t), dtype=torch.long, device=t.device) if cond.label is None else cond.label
        rate = self.config.label_dropout if self.training else 0.0
        c_BD = self.time(t) + self.label(drop_labels(label, cond.drop, self.config.classes, rate))
        return c_BD if self.pool is None else c_BD + self.pool(self.mean_clean(c_BD, cond))

    def mean_clean(self, c_BD: Tensor, cond: Cond) -> Tensor:
        """Mean of the clean tokens that hold given content, [B, D]; 0 where nothing is given."""
        if cond.mask is None:
            return torch.zeros_like(c_BD)
        clean, some = self.clean(cond)
        known = some.to(clean.dtype)[..., None]
        return (clean * known).sum(1) / known.sum(1).clamp_min(1)

    def tokenize(self, x: Tensor, cond: Cond) -> SceneTokens:
        """Patches of x embedded, [B, L, D]: given content in its place, or 0 there where it comes another way."""
        how, mask = self.config.conditioning, cond.mask
        noisy = cond.given(x) if how == "mask" or mask is None else x.masked_fill(~mask.bool(), 0)
        h_BLD, grid = self._embed(noisy), self._grid(x)
        T, n = grid.frames, grid.height * grid.width
        if how == "concat":
            clean = torch.zeros_like(h_BLD) if mask is None else self.clean(cond)[0]
            return SceneTokens(torch.cat([clean, h_BLD], 1), Scene(Clip(2 * T, n), self._visible(x, mask)))
        if self.nothing is None:
            return SceneTokens(h_BLD, Scene(Clip(T, n)))
        memory, known = self.nothing.expand(len(x), 1, -1), x.new_ones(len(x), 1, dtype=torch.bool)
        if mask is not None:
            clean, some = self.clean(cond)
            memory, known = torch.cat([memory, clean], 1), torch.cat([known, some], 1)
        return SceneTokens(h_BLD, Scene(Clip(T, n), memory=memory, known=known))

    def clean(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Tokens of the given content, [B, L, D], and which of them hold any, [B, L]."""
        assert cond.context is not None and cond.mask is not None
        hidden = cond.mask.bool()
        tokens = self._embed(cond.context.to(dtype_of(self.embed)).masked_fill(hidden, 0))
        return tokens, ~patchify(hidden, self.config.patch).all(-1)

    def _visible(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, 2 T]: a frame is seen in its clean tokens if some of it is given, in its noisy ones if some is not."""
        made_BTL = x.new_ones(x.shape[0], x.shape[2], 1, dtype=torch.bool)
        if mask is not None:
            made_BTL = mask.bool().transpose(1, 2).flatten(2)
        return torch.cat([~made_BTL.all(-1), made_BTL.any(-1)], 1)

    def _embed(self, x: Tensor) -> Tensor:
        """Embedded patches of x [B, C, T, H, W] with their positions in space and time, [B, L, D]."""
        grid, width = self._grid(x), self.config.width
        h_BLD = self.embed(patchify(x, self.config.patch))
        table = sincos_table(grid, width, x.device)
        if self.config.mode == "video":
            over_time = sincos_axis(grid.frames, width, x.device)
            table = table + over_time.repeat_interleave(grid.height * grid.width, 0)
        return (h_BLD + table).to(h_BLD.dtype)  # summed in float32 or more

    def _grid(self, x: Tensor) -> Grid:
        return Grid.of(tuple(x.shape[2:]), self.config.patch)

    def _check(self, x: Tensor, cond: Cond) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ShapeError(f"VDT: input {list(x.shape)} should be [B, {self.config.channels}, T, H, W]")
        if cond.mask is None:
            return
        if cond.context is None:
            raise ConfigError("VDT: Cond.mask says what is given, but Cond.context is None")
        for name, given, channels in (("context", cond.context, x.shape[1]), ("mask", cond.mask, 1)):
            expected = [len(x), channels, *x.shape[2:]]
            if list(given.shape) != expected:
                raise ShapeError(f"VDT: Cond.{name} {list(given.shape)} should be {expected}")
