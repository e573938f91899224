"""PT-DiT (arXiv 2409.04005): attention of all tokens replaced by that of a few proxy tokens, and of windows.

In each block the means of windows, the proxies, attend to each other, and all tokens read them by cross-attention (the
global information interaction module, GIIM); then tokens attend inside of windows, and of shifted ones (the texture
complement module, TCM). For pictures and clips, told a class or a text.

B batch, L rows of the grid, n windows, M rows of a window, R proxies, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from annotated_types import Gt
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.cond import Cond, label_of
from ditkit.core.config import (
    FROM_DATA,
    Count,
    Depth,
    ModelConfig,
    Natural,
    Share,
    divides_into_heads,
    names_every_class,
    network,
)
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, Tokens, patchify, unpatchify
from ditkit.core.model import TIMESTEP, Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.nn.added_modulation import AddedHead, AddedModulation
from ditkit.nn.blocks import Attention, Head, Mlp, Stack
from ditkit.nn.embeddings import TimeEmbedding, drop_labels, sincos_axis
from ditkit.nn.init import adaln_zero_
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate
from ditkit.nn.prompt import Prompt, read_prompt
from ditkit.nn.proxies import drawn, fitting_window, members
from ditkit.nn.temporal import CrossAttention
from ditkit.nn.window_cuts import cut_windows, join_windows, seam_mask, sides_of, window_counts

FLOW = Convention("linear", "velocity", "noise", "unused")
SIZES = {
    "S-Class": (10, 288, 6),
    "B": (12, 640, 10),
    "L": (28, 864, 12),
    "XL": (28, 1152, 16),
    "H": (30, 1440, 20),
}
"""Depth, width and heads. S-Class is told one of 1000 classes, the others a text."""
T5_WIDTH = 4096
Mixer = Literal["both", "proxies", "windows"]
Pooling = Literal["mean", "first", "random"]


@dataclass(frozen=True)
class PTDiTConfig(ModelConfig):
    """Architecture and convention of a PT-DiT of pictures.

    Args:
        size: height and width of a picture; any others run, too.
        patch: side of a token.
        channels: of a sample.
        width: of a token's vector.
        depth: number of blocks.
        heads: of each attention.
        window: tokens of a window along frames, height and width; one number p is 1, p, p. 0 for about 64 windows a
            frame of four frames each, whatever the grid.
        proxies: of a window, along height and width; of several each has every second, third ... row and column.
        pooling: what a proxy is: the mean of its tokens; the first of them; or one at random, drawn anew at each time
            from the time itself, so that guidance's branches agree and a second run is equal.
        mixer: proxies and windows, or one of them alone, for comparison.
        shift: attend in shifted windows, too.
        classes: labels, without the null class; 0 for none.
        text_encoder: frozen network that reads the prompt: minilm, or letters, which has no weights; empty where
            tokens are given.
        text_width: channels of the prompt's tokens; 0 for none. A text shares one modulation between blocks.
        text_tokens: the most tokens of a prompt; longer ones are cut.
        time_scale: of the time that is embedded; 1000 in the released model, whose path is continuous.
        label_dropout: share of training samples whose label, or prompt, counts as absent.
        class_names: one a class, or empty.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    patch: Count = 2
    channels: Count = field(default=4, metadata=FROM_DATA)
    width: Count = 288
    depth: Depth = 10
    heads: Count = 6
    window: Natural | tuple[Count, Count, Count] = 0
    proxies: Count | tuple[Count, Count] = 1
    pooling: Pooling = "mean"
    mixer: Mixer = "both"
    shift: bool = True
    classes: Natural = field(default=1000, metadata=FROM_DATA)
    text_encoder: str = ""
    text_width: Natural = field(default=0, metadata=FROM_DATA)
    text_tokens: Count = 120
    time_scale: Annotated[float, Gt(0)] = 1.0
    label_dropout: Share = 0.1
    convention: Convention = DDPM
    class_names: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides_into_heads(self)
        if self.width % 16:
            raise ShapeError(
                f"{network(self)}: width={self.width} should divide by 16 for sines and cosines on three axes"
            )
        if self.classes and self.text_width:
            raise ConfigError(
                f"{network(self)}: classes={self.classes} and text_width={self.text_width}, expected one of them 0"
            )
        names_every_class(self)
        try:
            self.window_of(Grid.of(self.sides, self.patch))
        except ShapeError as error:
            raise ShapeError(f"{network(self)}: size={self.size}, patch={self.patch}: {error}") from error

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8, channels=3, width=32, depth=2, heads=4, window=2, classes=5)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of a sample, without its channels."""
        return (self.size, self.size)

    @property
    def per_window(self) -> tuple[int, int]:
        """Proxies of a window along height and width."""
        return (self.proxies, self.proxies) if isinstance(self.proxies, int) else self.proxies

    def window_of(self, grid: Grid) -> tuple[int, int, int]:
        """Return the sides of the windows of a grid.

        Raises:
            ShapeError: they do not divide the grid, or the proxies of a window do not divide it.
        """
        window = sides_of(self.window, 1) if self.window else fitting_window(grid)
        window_counts(grid, window)
        if window[1] % self.per_window[0] or window[2] % self.per_window[1]:
            raise ShapeError(
                f"proxies={self.proxies} along height and width do not divide windows of {window[1]} x {window[2]}"
            )
        return window


@dataclass(frozen=True)
class VideoPTDiTConfig(PTDiTConfig):
    """Architecture and convention of a PT-DiT of clips.

    Args:
        size: height and width of a frame; one number for both.
        frames: of a clip.
    """

    task: ClassVar[str] = "video"

    size: Count | tuple[Count, Count] = 32  # type: ignore[assignment]
    frames: Count = 16
    classes: Natural = field(default=0, metadata=FROM_DATA)

    @classmethod
    def tiny(cls) -> Self:
        text: dict[str, Any] = {"text_encoder": "letters", "text_width": 30, "text_tokens": 6}
        return cls(
            frames=4,
            size=8,
            channels=3,
            width=32,
            depth=2,
            heads=4,
            window=(2, 2, 2),
            convention=FLOW,
            **text,
        )

    @property
    def sides(self) -> tuple[int, ...]:
        return (self.frames, *((self.size, self.size) if isinstance(self.size, int) else self.size))


class Place(NamedTuple):
    """The place of a call's rows, and what stands beside them: given to each block.

    Args:
        seam: [n, M, M] bool, of shifted windows, false between rows that the roll brought together; None: none.
        salt: [B] int64 from which proxies are drawn; None where they are not.
        prompt: None where nothing is said.
    """

    grid: Grid
    window: tuple[int, int, int]
    seam: Tensor | None = None
    salt: Tensor | None = None
    prompt: Prompt | None = None

    @property
    def shift(self) -> tuple[int, int, int]:
        """By how much windows are shifted: by a half, rounded down."""
        return self.window[0] // 2, self.window[1] // 2, self.window[2] // 2


class PTDiTBlock(nn.Module):
    """x + Z1 Cross(LN x, LN p), x + a1 Attn(x), x + Z2 a2 Attn(x shifted), x + Cross(x, text), x + a3 Mlp(x).

    p are the proxies after attention to each other; Attn is inside of windows. Told a class, the proxies' attention is
    modulated too; told a text it is not (the code). Norms have no weights.

    Args:
        number: of the block, from which random proxies are drawn.
    """

    def __init__(self, config: PTDiTConfig, number: int) -> None:
        super().__init__()
        c, self.number = config, number
        self.pooling, self.per_window = c.pooling, c.per_window
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        attentions = ["attn", *(["shifted_attn"] if c.shift else [])] if c.mixer != "proxies" else []
        proxies = ["proxies"] if c.mixer != "windows" else []
        self.branches = (*proxies, *attentions, *(["cross_attn"] if c.text_width else []), "mlp")
        self.modulated = (*(proxies if not c.text_width else []), *attentions, "mlp")
        if proxies:
            self.proxy_attn = Attention(c.width, c.heads)
            self.inject = CrossAttention(c.width, c.heads, norm=False)
            self.inject_out = nn.Linear(c.width, c.width)
        for name in attentions:
            setattr(self, name, Attention(c.width, c.heads))
        if "shifted_attn" in attentions:
            self.shifted_out = nn.Linear(c.width, c.width)
        if c.text_width:
            self.cross_attn = CrossAttention(c.width, c.heads, norm=False)
        self.mlp = Mlp(c.width)
        self.modulation = (
            AddedModulation(c.width, len(self.modulated))
            if c.text_width
            else nn.Linear(c.width, 3 * len(self.modulated) * c.width)
        )

    def forward(
        self, x_BLD: Tensor, c: Tensor, place: Place, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        """Run on rows of a grid; c is [B, D], or [B, 6 D] common to all blocks where a text is told."""
        modulation = self.modulation
        if isinstance(modulation, AddedModulation):
            parts = run.site(at + ".modulation", modulation, c[:, None])
        else:
            parts = run.site(at + ".modulation", partial(Parts, modulation), activated(c))
        for kind in self.branches:
            name = f"{at}.{kind}"
            if kind == "cross_attn":
                assert place.prompt is not None
                look = partial(self.cross_attn, run, name)
                x_BLD = x_BLD + run.site(name, look, x_BLD, *place.prompt)
            elif kind == "proxies":
                x_BLD = x_BLD + run.site(name, partial(self.interact, run, name), x_BLD, parts, place)
            elif kind == "shifted_attn":
                x_BLD = x_BLD + run.site(name, partial(self.attend_shifted, run, name), x_BLD, parts, place)
            elif kind == "attn":
                branch = run.site(name, partial(self.attend, run, name), x_BLD, parts, place)
                x_BLD = torch.addcmul(x_BLD, self.gate(parts, kind), branch)
            else:
                branch = run.site(name, partial(self.feed, run, name), x_BLD, parts)
                x_BLD = torch.addcmul(x_BLD, self.gate(parts, kind), branch)
        return x_BLD

    def normed(self, x_BLD: Tensor, parts: Parts | Tensor, kind: str) -> Tensor:
        """Norm and modulate what a branch reads."""
        shift, scale = affine(parts, self.modulated.index(kind), len(self.modulated))
        return modulate(self.norm(x_BLD), shift, scale)

    def gate(self, parts: Parts | Tensor, kind: str) -> Tensor:
        """Return the gate of a branch, [B, 1, D]."""
        return gate(parts, self.modulated.index(kind), len(self.modulated))

    def pooled(self, x_BLD: Tensor, place: Place) -> Tensor:
        """Return the proxies of a grid's windows, [B, R, D]."""
        own = members(cut_windows(x_BLD, place.grid, place.window), place.window, self.per_window)
        if self.pooling == "mean":
            return own.mean(2).flatten(1, 2)
        if self.pooling == "first":
            return own[:, :, 0].flatten(1, 2)
        assert place.salt is not None
        _, windows, rows, proxies, _ = own.shape
        index = drawn(place.salt, self.number, windows, proxies, rows)
        return torch.take_along_dim(own, index[..., None], 2).flatten(1, 3)

    def interact(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, place: Place) -> Tensor:
        """Compute what tokens read from the proxies, after these attended to each other (GIIM)."""
        p_BRD = self.pooled(x_BLD, place)
        if "proxies" in self.modulated:
            branch = self.proxy_attn(self.normed(p_BRD, parts, "proxies"), run, at + ".among")
            p_BRD = torch.addcmul(p_BRD, self.gate(parts, "proxies"), branch)
        else:
            p_BRD = p_BRD + self.proxy_attn(self.norm(p_BRD), run, at + ".among")
        return self.inject_out(self.inject(run, at + ".inject", self.norm(x_BLD), self.norm(p_BRD)))

    def attend(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, place: Place) -> Tensor:
        """Compute attention inside of windows, before its gate."""
        windows = cut_windows(self.normed(x_BLD, parts, "attn"), place.grid, place.window)
        o_BnMD = self.attn(windows.flatten(0, 1), run, at).unflatten(0, windows.shape[:2])  # type: ignore[operator]
        return join_windows(o_BnMD, place.grid, place.window)

    def attend_shifted(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, place: Place) -> Tensor:
        """Compute attention inside of shifted windows, its gate and the layer that is zero at first."""
        where = (place.grid, place.window, place.shift)
        windows = cut_windows(self.normed(x_BLD, parts, "shifted_attn"), *where)
        mask = (
            ()
            if place.seam is None
            else (place.seam.expand(len(windows), -1, -1, -1).flatten(0, 1)[:, None],)
        )
        attend: Any = self.shifted_attn
        o_BnMD = attend(windows.flatten(0, 1), run, at, mask=mask).unflatten(0, windows.shape[:2])
        return self.shifted_out(self.gate(parts, "shifted_attn") * join_windows(o_BnMD, *where))

    def feed(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor) -> Tensor:
        """Compute the MLP branch before its gate, row by row."""
        return self.mlp(self.normed(x_BLD, parts, "mlp"), run, at)

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call."""
        site = partial(Site, stream=stream, width=self.norm.normalized_shape[0], stage=stage)
        found = [site(at, "block", ordered=True), site(f"{at}.modulation", "modulation")]
        for kind in self.branches:
            name = f"{at}.{kind}"
            found.append(site(name, "branch", ordered=kind not in ("cross_attn", "mlp")))
            if kind == "proxies":
                found += self.proxy_attn.sites(f"{name}.among", "proxy", stage)
                found += self.inject.sites(f"{name}.inject", stage, "proxy")
            elif kind == "cross_attn":
                found += self.cross_attn.sites(name, stage, "text")
            elif kind != "mlp":
                attention: Any = getattr(self, kind)
                found += attention.sites(name, stream, stage, attention="windowed")
        return [*found, self.mlp.site(f"{at}.mlp", stream, stage)]


class PTDiT(Denoiser):
    """A transformer of pictures whose tokens see each other through proxies and in windows."""

    Config = PTDiTConfig
    task = "image"
    embeds_time = True
    config: PTDiTConfig

    def __init__(self, config: PTDiTConfig) -> None:
        super().__init__()
        self.config = c = config
        pixels = c.patch**2
        out = pixels * c.channels * (1 if c.convention.extra == "none" else 2)
        self.embed = nn.Linear(pixels * c.channels, c.width)
        self.time = TimeEmbedding(c.width)
        self.label = nn.Embedding(c.classes + 1, c.width) if c.classes else None
        if c.text_width:
            self.text = nn.Sequential(
                nn.Linear(c.text_width, c.width), nn.GELU(approximate="tanh"), nn.Linear(c.width, c.width)
            )
            self.common = nn.Linear(c.width, 6 * c.width)
        self.blocks = nn.ModuleList(PTDiTBlock(c, number) for number in range(c.depth))
        self.head = AddedHead(c.width, out) if c.text_width else Head(c.width, out)
        self.reset_parameters()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Build S-Class, of 1000 classes, or B, L, XL or H, told a text in tokens of T5's width, for 4 channels.

        Args:
            changes: to the config, such as `size`: 32 latents a side for 256 pixels.

        Raises:
            ConfigError: the name is none of them.
        """
        if name not in SIZES:
            raise ConfigError(unknown(f"{cls.__name__} preset", name, SIZES))
        depth, width, heads = SIZES[name]
        text = {"classes": 0, "text_width": T5_WIDTH, "time_scale": 1000.0, "convention": FLOW}
        given: dict[str, Any] = {"classes": 1000} if name == "S-Class" else text
        sizes = {"depth": depth, "width": width, "heads": heads}
        return cls(cls.Config(**{**sizes, **given, **changes}))

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: PTDiTConfig) -> Self:
        """Build a model that is told a text, with weights in the naming of the released code.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        named = source if isinstance(source, str | Path) else "state dict"
        return cls.holding(config, renamed(state, named), named)

    def reset_parameters(self) -> None:
        """As DiT; the layers after the injection, the shifted windows and the text are zero at first."""
        late = [self.time.inner.weight, self.time.outer.weight]
        if self.config.text_width:
            late += [self.common.weight, self.text[0].weight, self.text[2].weight]  # type: ignore[list-item]
        adaln_zero_(self, *([self.label.weight] if self.label else []), *late)
        zero = [getattr(block, name, None) for block in self.blocks for name in ("inject_out", "shifted_out")]
        zero += [block.cross_attn.out for block in self.blocks if self.config.text_width]  # type: ignore[union-attr]
        for weight in (p for layer in zero if layer is not None for p in layer.parameters()):
            nn.init.zeros_(weight)
        for part in self.modules():
            if isinstance(part, AddedModulation | AddedHead):
                nn.init.normal_(part.table, std=self.config.width**-0.5)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.config.channels, *self.config.sides)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[1 - len(self.sample_shape) :]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def unconditional(self, cond: Cond) -> Cond:
        """Null class, no prompt, and all of a clip to be made."""
        given: dict[str, Any] = {}
        if self.label is not None:
            given["label"] = torch.full_like(label_of(self.config, cond), self.config.classes)
        if cond.text is not None:
            null = torch.zeros_like(cond.text[:, :1])
            given |= {"text": null, "text_mask": torch.ones_like(null[..., 0], dtype=torch.bool)}
        if cond.mask is not None:
            given["mask"] = torch.ones_like(cond.mask)
        return replace(cond, **given)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy samples of any size that the patch and the windows divide.

        Args:
            x: [B, C, H, W], of clips [B, C, T, H, W]; where `cond.mask` is 0, `cond.context` takes its place.
            t: [B], in the unit the convention names.
            cond: `label` [B] of a model with classes; `text` [B, S, text_width] of any length of one with text, whose
                real tokens `text_mask` names; no text is one token of zeros.

        Returns:
            As x, or 2C channels where the convention has an extra half.

        Raises:
            ConfigError: the label is missing.
            ShapeError: channels or the prompt differ from the config's, or a side does not divide.
        """
        shape, c = self.sample_shape, self.config
        if x.ndim != len(shape) + 1 or x.shape[1] != c.channels:
            sides = ["H", "W"] if len(shape) == 3 else ["T", "H", "W"]
            expected = f"[B, {', '.join([str(c.channels), *sides])}]"
            raise ShapeError(f"{type(self).__name__}: input {list(x.shape)} should be {expected}")
        grid = Grid.of(tuple(x.shape[2:]), c.patch)
        place = self.place(grid, t, cond, x.device)
        c_BD, common = run.site("time", partial(self.condition, run=run), t, cond)
        tokens: Tokens = run.site("tokens", self.tokenize, cond.given(x))
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack.beside, tokens.x, common, place)
        h_BLD = run.site("head", partial(self.head, run=run), h_BLD, c_BD)
        return unpatchify(h_BLD, grid, (1, c.patch, c.patch)[2 - x.ndim :])

    def place(self, grid: Grid, t: Tensor, cond: Cond, device: torch.device) -> Place:
        """Return what the blocks of a call are given beside their rows.

        Raises:
            ShapeError: the windows do not divide the grid, or the prompt is of another shape.
        """
        c, salt, prompt = self.config, None, None
        try:
            place = Place(grid, c.window_of(grid))
        except ShapeError as error:
            raise ShapeError(f"{type(self).__name__}: {error}") from error
        shifts = c.shift and c.mixer != "proxies" and any(place.shift)
        seam = seam_mask(grid, place.window, place.shift, device) if shifts else None
        if c.pooling == "random":
            bits = t.float().view(torch.int32).long()
            salt = torch.randint_like(bits, 2**31) if self.training else bits
        if c.text_width:
            null = self.embed.weight.new_zeros(c.text_width)
            dropout = c.label_dropout if self.training else 0.0
            words = read_prompt(type(self).__name__, cond, null, len(t), dropout)
            prompt = Prompt(self.text(words.tokens), words.mask)
        return place._replace(seam=seam, salt=salt, prompt=prompt)

    def condition(self, t: Tensor, cond: Cond, run: Run = DIRECT) -> tuple[Tensor, Tensor]:
        """Return c [B, D] for the head and what blocks are modulated by: c, or [B, 6 D] common to them of a text."""
        c_BD: Tensor = run.site(TIMESTEP, self.time, t * self.config.time_scale)
        if self.config.text_width:
            return c_BD, self.common(nn.functional.silu(c_BD))
        if self.label is not None:
            label, rate = label_of(self.config, cond), self.config.label_dropout if self.training else 0.0
            c_BD = c_BD + self.label(drop_labels(label, cond.drop, self.config.classes, rate))
        return c_BD, c_BD

    def tokenize(self, x: Tensor) -> Tokens:
        """Embed patches of x and add their positions, [B, L, D]."""
        h_BLD = self.embed(patchify(x, self.config.patch))
        grid, step = (
            Grid.of(tuple(x.shape[2:]), self.config.patch),
            1 / max(1, max(self.config.sides[-2:]) // 64),
        )
        return Tokens(h_BLD + positions(grid, self.config.width, step, h_BLD.device).to(h_BLD.dtype))


def positions(grid: Grid, width: int, step: float, device: torch.device | str | None = None) -> Tensor:
    """Frozen positions [L, width], float32: frames in the first quarter of the channels, columns, then rows.

    Args:
        step: from one row or column to the next.
    """
    quarter, half = width // 4, 3 * width // 8
    frames = sincos_axis(grid.frames, quarter, device)[:, None, None].expand(*grid.shape, -1)
    columns = sincos_axis(grid.width, half, device, step).expand(*grid.shape, -1)
    rows = sincos_axis(grid.height, half, device, step)[:, None].expand(*grid.shape, -1)
    return torch.cat([frames, columns, rows], -1).flatten(0, 2)


class VideoPTDiT(PTDiT):
    """A PT-DiT of clips, with the weights of one of pictures: windows have several frames, and all else is equal."""

    Config = VideoPTDiTConfig
    task = "video"
    completes = True
    config: VideoPTDiTConfig


ORIGINAL_NAMES = {
    r"pos_embed\.proj\.": "embed.",
    r"adaln_single\.emb\.timestep_embedder\.linear_1\.": "time.inner.",
    r"adaln_single\.emb\.timestep_embedder\.linear_2\.": "time.outer.",
    r"adaln_single\.linear\.": "common.",
    r"caption_projection\.linear_1\.": "text.0.",
    r"caption_projection\.linear_2\.": "text.2.",
    r"scale_shift_table$": "head.table",
    r"proj_out\.": "head.out.",
    r"transformer_blocks\.": "blocks.",
    r"(blocks\.\d+\.)proxy_attn1\.": r"\1proxy_attn.",
    r"(blocks\.\d+\.)pvisual_attn2\.": r"\1inject.",
    r"(blocks\.\d+\.)attn1\.": r"\1attn.",
    r"(blocks\.\d+\.)attn2\.": r"\1cross_attn.",
    r"(blocks\.\d+\.)attn3\.": r"\1shifted_attn.",
    r"(blocks\.\d+\.)linear_1_visual\.": r"\1inject_out.",
    r"(blocks\.\d+\.)linear_2\.": r"\1shifted_out.",
    r"(blocks\.\d+\.)ff\.net\.0\.proj\.": r"\1mlp.inner.",
    r"(blocks\.\d+\.)ff\.net\.2\.": r"\1mlp.outer.",
}
JOINED = {
    "qkv": r"(blocks\.\d+\.(?:proxy_attn|attn|shifted_attn)\.)to_q\.(.*)",
    "kv": r"(blocks\.\d+\.(?:inject|cross_attn)\.)to_k\.(.*)",
}
"""Layers of ours that are several of theirs, by the first of them."""


def renamed(state: Mapping[str, Tensor], source: object = "state dict") -> dict[str, Tensor]:
    """Return a state dict of the released code under our names, its frozen position table dropped.

    Raises:
        CheckpointError: one of several tensors that are one of ours is missing.
    """
    theirs = {_renamed(name): tensor for name, tensor in state.items() if name != "pos_embed.pos_embed"}
    ours: dict[str, Tensor] = {}
    try:
        for name, tensor in theirs.items():
            joined = next((m for pattern in JOINED.values() if (m := re.fullmatch(pattern, name))), None)
            if joined:
                at, rest = joined.groups()
                parts = "qkv" if name.startswith(f"{at}to_q") else "kv"
                ours[f"{at}{parts}.{rest}"] = torch.cat([theirs[f"{at}to_{one}.{rest}"] for one in parts])
            elif found := re.fullmatch(r"(blocks\.\d+\.)scale_shift_table", name):
                shifted = theirs.get(f"{found[1]}proxy_scale_shift_table", tensor[:0])
                ours[f"{found[1]}modulation.table"] = torch.cat([tensor[:3], shifted, tensor[3:]])
            elif not re.search(r"\.(to_[kv]\.\w+|proxy_scale_shift_table)$", name):
                ours[re.sub(r"\.to_q\.", ".q.", name)] = tensor
    except KeyError as error:
        raise CheckpointError(f"{source}: {error} is missing") from error
    if (kernel := ours.get("embed.weight")) is not None and kernel.ndim == 4:
        ours["embed.weight"] = kernel.flatten(1)
    return ours


def _renamed(name: str) -> str:
    for pattern, ours in ORIGINAL_NAMES.items():
        name = re.sub("^" + pattern, ours, name)
    return name.replace(".to_out.0.", ".out.")
