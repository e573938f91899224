"""UniTS (arXiv 2512.04461): one space-time flow network of satellite series; its conditions say what it makes of them.

No code of the paper is published. B batch, T dates, n places (patches of a frame), L = T n tokens in row-major order,
D width, G lines: a frame in space, a place in time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.condition import Condition
from ditkit.core.config import (
    FROM_DATA,
    Count,
    Depth,
    Finite,
    ModelConfig,
    Natural,
    Share,
    divides_for_sincos,
    divides_into_heads,
)
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment, patchify, unpatchify
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.nn.axes import ALONG, Clip
from ditkit.nn.blocks import KV, Head, Mlp, Stack, attention, keep
from ditkit.nn.embeddings import TimeEmbedding, dtype_of, sincos_table, sinusoid
from ditkit.nn.init import adaln_zero_
from ditkit.nn.injector import ConditionInjector
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate
from ditkit.nn.modulator import LineBias, Modulator, biased_attention, flex_biased_attention

Job = Literal["reconstruction", "cloud-removal", "change-detection", "forecasting"]
Injector = Literal["acor", "concat"]
Positions = Literal["days", "frames", "none"]
Kernel = Literal["rows", "flex"]
Odd = Annotated[int, Interval(ge=1, le=9)]
CLOUD = 1.0
"""The value, in [-1, 1], of all that is hidden: white, as clouds are."""
VELOCITY = Convention(time="data")
"""t = 0 is noise and t = 1 data; the network says data - noise."""


@dataclass(frozen=True)
class UniTSConfig(ModelConfig):
    """Architecture of a UniTS; the defaults are our reading of the paper's size, 54.5 M.

    Args:
        channels: of what is made: bands, or classes of land cover.
        optical_channels: bands of the optical condition.
        radar_channels: bands of the second sensor; 0 for none.
        frames: dates of a series.
        size: height and width of a frame; one number for both. Any others run, too.
        patch: side of a token.
        width: of a token's vector.
        depth: blocks, each a half along space and a half along time.
        heads: of attention.
        kernel: side of the injectors' convolutions, odd.
        groups: of channels, in the injectors' norm.
        job: for which it is trained; the network is the same for all.
        injector: "acor", or "concat": conditions are added to the first tokens alone (the paper's ablation).
        modulator: bias attention by place, day and an auxiliary image.
        positions: along time, by days, by the number of the frame, or none.
        dates: the day of the year is embedded.
        places: longitude and latitude are embedded.
        radar_dropout: share of training samples in which the second sensor counts as absent.
        attention: the bias is generated for some rows of queries at a time, or inside torch's flex_attention.
        radar_mean: of each band of the second sensor in its unit, usually decibels. radar_std: its deviation.
        bands: names of the optical bands. land_cover: names of the classes, where those are made.
    """

    task: ClassVar[str] = "remote_sensing"

    channels: Count = field(default=10, metadata=FROM_DATA)
    optical_channels: Count = field(default=10, metadata=FROM_DATA)
    radar_channels: Natural = field(default=2, metadata=FROM_DATA)
    frames: Count = 8
    size: Count | tuple[Count, Count] = 128
    patch: Count = 4
    width: Count = 384
    depth: Depth = 6
    heads: Count = 6
    kernel: Odd = 3
    groups: Count = 32
    job: Job = "reconstruction"
    injector: Injector = "acor"
    modulator: bool = True
    positions: Positions = "days"
    dates: bool = True
    places: bool = True
    radar_dropout: Share = 0.0
    attention: Kernel = "rows"
    radar_mean: tuple[Finite, ...] = field(default=(), metadata=FROM_DATA)
    radar_std: tuple[Finite, ...] = field(default=(), metadata=FROM_DATA)
    bands: tuple[str, ...] = field(default=(), metadata=FROM_DATA)
    land_cover: tuple[str, ...] = field(default=(), metadata=FROM_DATA)
    convention: Convention = VELOCITY

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n % self.patch for n in self.shape[1:]):
            raise ShapeError(f"UniTS: size={self.size} does not divide into patches of {self.patch}")
        divides_into_heads(self)
        divides_for_sincos(self)
        if self.width % self.groups:
            raise ShapeError(f"UniTS: width={self.width} does not divide into groups={self.groups}")
        if self.kernel % 2 == 0:
            raise ConfigError(f"UniTS: kernel={self.kernel} should be odd")
        for name in ("radar_mean", "radar_std"):
            if len(getattr(self, name)) not in (0, self.radar_channels):
                given = len(getattr(self, name))
                raise ConfigError(
                    f"UniTS: {name} has {given} numbers for radar_channels={self.radar_channels}"
                )

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            channels=3,
            optical_channels=3,
            frames=4,
            size=8,
            width=32,
            depth=2,
            heads=4,
            groups=8,
            radar_dropout=0.5,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a sample."""
        return (self.frames, *((self.size, self.size) if isinstance(self.size, int) else self.size))

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """List the streams: images in [-1, 1], `clouds` 1 where they are hidden, `days` since any day, and so on."""
        found = {
            "optical": Condition((self.optical_channels, *self.shape), optional=False),
            "clouds": Condition((1, *self.shape)),
            "days": Condition((self.frames,)),
            "present": Condition((self.frames,)),
        }
        if self.radar_channels:
            found["radar"] = Condition((self.radar_channels, *self.shape), self.radar_dropout)
        if self.dates:
            found["day_of_year"] = Condition((self.frames,))
        if self.places:
            found["place"] = Condition((2,))
        return found


class Setting(NamedTuple):
    """All that the blocks know of a series beside its noisy tokens; none of it depends on the noise-time.

    Args:
        grid: of the tokens.
        space, time: [B, L, D] condition tokens of either half; None where nothing is injected.
        places: [1, L / T, D] positions within a frame. moments: [B, T, D] positions along time; None for none.
        days: [B, T]. present: [B, T] bool, false at padding; None where there is none.
        auxiliary: [B, L, E] patch means of the auxiliary image.
    """

    grid: Grid
    space: Tensor | None
    time: Tensor | None
    places: Tensor
    moments: Tensor | None
    days: Tensor
    auxiliary: Tensor
    present: Tensor | None = None

    @property
    def clip(self) -> Clip:
        return Clip(self.grid.frames, self.grid.height * self.grid.width)

    def positions(self, axis: Literal["S", "T"]) -> Tensor | None:
        """Return what a half adds to the tokens for their positions, broadcast to [B, T, n, D]."""
        if axis == "S":
            return self.places[:, None]
        return None if self.moments is None else self.moments[:, :, None]

    def valid(self, axis: Literal["S", "T"]) -> Tensor | None:
        """Return the tokens [G, T] of each place that are no padding; a frame has none inside."""
        if axis == "S" or self.present is None:
            return None
        return self.present.repeat_interleave(self.clip.places, 0)

    def bias(self, axis: Literal["S", "T"], modulator: Modulator) -> LineBias:
        """Return the bias of attention along an axis: of rows and columns, or of days, and of the auxiliary image."""
        auxiliary = self.clip.fold(self.auxiliary, axis)
        if axis == "S":
            frame = Grid(1, self.grid.height, self.grid.width)
            place = frame.coordinates()[None, :, 1:].to(auxiliary)
        else:
            place = self.days.repeat_interleave(self.clip.places, 0)[..., None].to(auxiliary)
        return modulator(place, auxiliary, self.valid(axis))


class SettingTokens(NamedTuple):
    """Embedded tokens [B, L, D] and their setting: what the `tokens` site returns."""

    x: Tensor
    setting: Setting


class UniTS(Denoiser):
    """Flow matching on pixels: blocks along space, then time, each told at every token what is known there."""

    Config = UniTSConfig
    task = "remote_sensing"
    config: UniTSConfig

    def __init__(self, config: UniTSConfig) -> None:
        super().__init__()
        self.config = c = config
        area = c.patch**2
        self.embed = nn.Linear(area * c.channels, c.width)
        self.condition_embed = nn.Linear(area * (c.optical_channels + c.radar_channels), c.width)
        self.no_radar = nn.Parameter(torch.zeros(c.width)) if c.radar_channels else None
        self.time = TimeEmbedding(c.width)
        self.date = TimeEmbedding(c.width) if c.dates else None
        self.place = PlaceEmbedding(c.width) if c.places else None
        self.blocks = nn.ModuleList(UniTSBlock(c) for _ in range(c.depth))
        self.head = MlpHead(c.width, area * c.channels)
        adaln_zero_(self, self.time.inner.weight, self.time.outer.weight)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return one of the paper's four networks by what it is told, with `changes` to the config.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in PRESETS:
            raise ConfigError(unknown("UniTS preset", name, PRESETS))
        return cls(replace(PRESETS[name], **changes))

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (self.config.channels, *self.config.shape)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-3:]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def unconditional(self, cond: Cond) -> Cond:
        """Nothing of the series: every date is hidden, without radar, dates or place; the paper does not guide."""
        return replace(cond, streams={}, absent={})

    branches: ClassVar[tuple[str, ...]] = ("cond",)

    def branch(self, cond: Cond, name: str) -> Cond:
        """Return the conditioning of the one branch that there is.

        Raises:
            ConfigError: another is asked for, as guidance does.
        """
        if name != "cond":
            raise ConfigError(
                f"UniTS: guidance by its branch {name!r}, which it has not; expected guidance=1"
            )
        return cond

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy series; any number of dates and any size that the patch divides will do.

        Args:
            x: [B, C, T, H, W]. t: [B], in the unit the convention names.
            cond: streams as `conditions` lists them, of x's dates and size. What `optical` holds where `clouds` is 1
                is never read, nor what `radar` holds in a sample in which it is absent.

        Returns:
            [B, C, T, H, W].

        Raises:
            ShapeError: the series or a stream is not as it should be.
        """
        self._check(x, cond)
        c_BD = run.site("time", self.time, t)
        tokens: SettingTokens = run.site("tokens", self.tokenize, x, cond)
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack.beside, tokens.x, c_BD, tokens.setting)
        out = run.site("head", partial(self.head, run=run), h_BLD, c_BD)
        return unpatchify(out, tokens.setting.grid, (1, self.config.patch, self.config.patch))

    def tokenize(self, x: Tensor, cond: Cond) -> SettingTokens:
        """Embed the noisy patches, and gather what is known of the series."""
        config, grid = self.config, Grid.of(tuple(x.shape[2:]), self.config.patch)
        h_BLD = self.embed(patchify(x, config.patch))
        setting = self.setting(x, cond, grid)
        if config.injector == "concat":  # the sum is a linear map of both, side by side on channels
            h_BLD, setting = h_BLD + setting.space, setting._replace(space=None, time=None)
        return SettingTokens(h_BLD, setting)

    def setting(self, x: Tensor, cond: Cond, grid: Grid) -> Setting:
        """Gather condition tokens, positions and the auxiliary image of series shaped as `x`."""
        B, frames, streams = len(x), grid.frames, cond.streams
        z_BLD, auxiliary = self._condition(x, cond)
        present = None if "present" not in streams else streams["present"] > 0.5
        days = streams.get("days", torch.arange(frames, device=x.device).expand(B, -1)).float()
        space, time, dtype = z_BLD, z_BLD, z_BLD.dtype
        if self.place is not None and "place" in streams:
            space = space + self.place(streams["place"])[:, None]
        if self.config.injector == "concat":
            time = space = space + self._dates(streams, grid)
        else:
            time = time + self._dates(streams, grid)
        if present is not None:
            time = time * present.repeat_interleave(grid.height * grid.width, 1)[..., None].to(dtype)
        places = sincos_table(Grid(1, grid.height, grid.width), self.config.width, x.device)[None]
        return Setting(
            grid, space, time, places.to(dtype), self._moments(days, dtype), days, auxiliary, present
        )

    def _dates(self, streams: Mapping[str, Tensor], grid: Grid) -> Any:
        """Embed the day of the year of every token, [B, L, D]; 0 where it is not known."""
        if self.date is None or "day_of_year" not in streams:
            return 0
        of_year = streams["day_of_year"]
        dates = self.date(of_year.flatten()).unflatten(0, of_year.shape)
        return dates.repeat_interleave(grid.height * grid.width, 1)

    def _moments(self, days: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return sinusoids of the days since a series' first, or of the numbers of its frames, [B, T, D]."""
        if self.config.positions == "none":
            return None
        since = days - days.amin(1, keepdim=True)
        if self.config.positions == "frames":
            since = torch.arange(days.shape[1], device=days.device).expand_as(days).float()
        return sinusoid(since.flatten(), self.config.width).unflatten(0, days.shape).to(dtype)

    def _condition(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Embed all condition images of a date as one, [B, L, D]; average the auxiliary one by patch, [B, L, E]."""
        config, dtype = self.config, dtype_of(self.condition_embed)
        optical, hidden = self.filled(x, cond)
        radar, keep_B = self.radar(cond)
        if not config.radar_channels:
            z_BLD = self.condition_embed(patchify(optical.to(dtype), config.patch))
            return z_BLD, patch_means(last_clear(optical, hidden), config.patch)
        assert self.no_radar is not None
        history = last_clear(optical, hidden) if keep_B is not None or radar is None else None
        if radar is None:
            radar = optical.new_zeros(len(x), config.radar_channels, *x.shape[2:])
            keep_B = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if keep_B is not None:
            radar = torch.where(keep_B[:, None, None, None, None], radar, 0.0)
        images = torch.cat([optical, radar], 1).to(dtype)
        z_BLD = self.condition_embed(patchify(images, config.patch))
        auxiliary = patch_means(radar, config.patch)
        if keep_B is not None and history is not None:
            lone = (~keep_B).to(z_BLD.dtype)[:, None, None]
            z_BLD = z_BLD + lone * self.no_radar
            instead = patch_means(history, config.patch) * lone.to(history.dtype)
            auxiliary = torch.cat([auxiliary, instead], -1)
        return z_BLD, auxiliary

    def filled(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Return the optical condition with white where it is hidden, [B, C, T, H, W], and where that is."""
        optical = cond.streams.get("optical")
        if optical is None:
            shape = (len(x), self.config.optical_channels, *x.shape[2:])
            return torch.full(shape, CLOUD, device=x.device), torch.ones_like(x[:, :1], dtype=torch.bool)
        if "clouds" not in cond.streams:
            return optical, torch.zeros_like(optical[:, :1], dtype=torch.bool)
        hidden = cond.streams["clouds"] > 0.5
        return torch.where(hidden, CLOUD, optical), hidden

    def radar(self, cond: Cond) -> tuple[Tensor | None, Tensor | None]:
        """Return the second sensor standardised, None without one; and the samples [B] that have it, None for all."""
        radar, absent, c = cond.streams.get("radar"), cond.dropped("radar"), self.config
        if radar is not None and c.radar_mean:
            mean, std = (radar.new_tensor(v).view(-1, 1, 1, 1) for v in (c.radar_mean, c.radar_std))
            radar = (radar - mean) / std
        return radar, None if absent is None else ~absent.bool()

    def _check(self, x: Tensor, cond: Cond) -> None:
        c = self.config
        if x.ndim != 5 or x.shape[1] != c.channels:
            raise ShapeError(f"UniTS: input {list(x.shape)} should be [B, {c.channels}, T, H, W]")
        images = {"optical": c.optical_channels, "clouds": 1, "radar": c.radar_channels}
        for name, value in cond.streams.items():
            if name in images:
                expected = [len(x), images[name], *x.shape[2:]]
            else:
                expected = [len(x), 2 if name == "place" else x.shape[2]]
            if list(value.shape) != expected:
                raise ShapeError(f"UniTS: {name} {list(value.shape)} should be {expected}")


class UniTSBlock(nn.Module):
    """One half along space, then one along time."""

    def __init__(self, config: UniTSConfig) -> None:
        super().__init__()
        self.space, self.time = Half("S", config), Half("T", config)

    def forward(
        self, x_BLD: Tensor, c_BD: Tensor, setting: Setting, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        x_BLD = self.space(x_BLD, c_BD, setting, run, at + ".space")
        return self.time(x_BLD, c_BD, setting, run, at + ".time")

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call."""
        width = self.space.mlp.outer.out_features
        halves = [
            *self.space.sites(f"{at}.space", stream, stage),
            *self.time.sites(f"{at}.time", stream, stage),
        ]
        return [Site(at, "block", stream, width, stage=stage), *halves]


class Half(nn.Module):
    """adaLN-Zero attention along one axis, and an MLP: z + a1 Attn(mod(LN ACor(z; q)), bias), then + a2 Mlp(mod(LN z)).

    Positions are added first, and stay in the residual (the paper's figure).
    """

    def __init__(self, axis: Literal["S", "T"], config: UniTSConfig) -> None:
        super().__init__()
        width = config.width
        self.axis, self.heads = axis, config.heads
        self.biased = biased_attention if config.attention == "rows" else flex_biased_attention
        acor = config.injector == "acor"
        self.injector = ConditionInjector(axis, width, config.kernel, config.groups) if acor else None
        self.modulator = Modulator(config.heads) if config.modulator else None
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def attend(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, setting: Setting) -> Tensor:
        """Compute the attention branch before its gate: it mixes the tokens of a line, and none of two lines."""
        clip, valid = setting.clip, setting.valid(self.axis)
        if self.injector is not None:
            q_BLD = setting.space if self.axis == "S" else setting.time
            assert q_BLD is not None
            x_BLD = self.injector(x_BLD, q_BLD, setting.grid, valid)
        h_BLD = modulate(self.norm(x_BLD), *affine(parts, 0))
        qkv = self.qkv(clip.fold(h_BLD, self.axis)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [G, N, L / lines, K]
        kv = run.site(at + ".kv", keep, KV(k, v))
        if self.modulator is None:
            mask = () if valid is None else (valid[:, None, None],)
            o = run.site(at + ".core", attention, q, kv.k, kv.v, *mask)
        else:
            o = run.site(at + ".core", self.biased, q, kv.k, kv.v, setting.bias(self.axis, self.modulator))
        return clip.unfold(self.out(o.transpose(1, 2).flatten(2)), self.axis)

    def feed(self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor) -> Tensor:
        """Compute the MLP branch before its gate, row by row."""
        return self.mlp(modulate(self.norm(x_BLD), *affine(parts, 1)), run, at)

    def forward(self, x_BLD: Tensor, c_BD: Tensor, setting: Setting, run: Run, at: str) -> Tensor:
        attn, mlp = at + ".attn", at + ".mlp"
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), activated(c_BD))
        if (positions := setting.positions(self.axis)) is not None:
            x_BLD = (x_BLD.unflatten(1, (setting.grid.frames, -1)) + positions).flatten(1, 2)
        branch = run.site(attn, partial(self.attend, run, attn), x_BLD, parts, setting)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0), branch)
        branch = run.site(mlp, partial(self.feed, run, mlp), x_BLD, parts)
        return torch.addcmul(x_BLD, gate(parts, 1), branch)

    def sites(self, at: str, stream: str, stage: int) -> list[Site]:
        """Its sites in the order of the call; attention reads its rows as a grid, which the injector's norm is over."""
        width = self.out.in_features
        site = partial(Site, stream=stream, width=width, stage=stage)
        kv = site(f"{at}.attn.kv", "kv", heads=self.heads)
        return [
            site(f"{at}.modulation", "modulation"),
            site(f"{at}.attn", "branch", ordered=True),
            kv,
            kv._replace(name=f"{at}.attn.core", kind="core", attention="axial", axis=ALONG[self.axis]),
            site(f"{at}.mlp", "branch"),
            self.mlp.site(f"{at}.mlp", stream, stage),
        ]


class MlpHead(Head):
    """AdaLN, then two layers to p p C channels a token."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(width, channels)
        self.inner = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, c_BD: Tensor, run: Run = DIRECT, at: str = "head") -> Tensor:
        shift, scale = run.site(at + ".modulation", self.modulation, activated(c_BD)).chunk(2, -1)
        return self.out(F.gelu(self.inner(modulate(self.norm(x_BLD), shift, scale)), approximate="tanh"))


class PlaceEmbedding(TimeEmbedding):
    """Sinusoids of longitude and latitude in degrees, 128 channels each, then two layers: [B, 2] to [B, D]."""

    def forward(self, place: Tensor) -> Tensor:
        wave = sinusoid(place.flatten(), self.channels // 2).unflatten(0, place.shape).flatten(1)
        return self.outer(F.silu(self.inner(wave.to(dtype_of(self)))))


def patch_means(images: Tensor, patch: int) -> Tensor:
    """Average images [B, C, T, H, W] over each patch, [B, L, C], divided by C: so that sums over channels are means."""
    means = F.avg_pool3d(images.float(), (1, patch, patch))
    return means.flatten(2).mT / images.shape[1]


def last_clear(optical: Tensor, hidden: Tensor) -> Tensor:
    """Return at each date the last clear value of each pixel, the first later one before that, 0 where there is none.

    Args:
        optical: [B, C, T, H, W]. hidden: [B, 1, T, H, W] bool.
    """
    frames = optical.shape[2]
    number = torch.arange(frames, device=optical.device).view(1, 1, -1, 1, 1)
    before = torch.where(hidden, -1, number).cummax(2).values
    first = torch.where(hidden, frames, number).amin(2, keepdim=True)
    source = torch.where(before < 0, first, before).clamp_max(frames - 1)
    found = optical.gather(2, source.expand_as(optical))
    return torch.where(first < frames, found, 0.0)


_OPTICAL = UniTSConfig(radar_channels=0)
PRESETS: Mapping[str, UniTSConfig] = {
    "S2": _OPTICAL,
    "S1+S2": UniTSConfig(),
    "forecast": replace(_OPTICAL, job="forecasting"),
    "change": replace(
        _OPTICAL, job="change-detection", channels=6, optical_channels=4, dates=False, places=False
    ),
}
"""The networks whose sizes the paper states; `change` is DynamicEarthNet's, four bands to six classes."""
