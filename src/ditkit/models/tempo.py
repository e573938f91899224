"""TEMPO (arXiv 2310.04948): a language model's body reads trend, season and residual of a series, and forecasts it.

N windows, L steps observed, H steps forecast, P patches, m tokens of a prompt, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.checkpoint import read_state
from ditkit.core.config import FROM_DATA, Count, Depth, ModelConfig, Natural, Share, divides_into_heads
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, Segment
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked, Transform
from ditkit.nn.blocks import Stack, sites_of
from ditkit.nn.causal import CausalBlock, Shape, line_rotary, norm_of
from ditkit.nn.decomposition import Components, Decomposition
from ditkit.nn.language_body import LanguageBody, of_gpt2, turned
from ditkit.nn.laws import Law, NegativeBinomial, StudentT
from ditkit.nn.prompt_pool import PromptPool
from ditkit.nn.revin import RevIN, WindowScale
from ditkit.nn.rotary import Rotary

Prompt = Literal["semi-soft", "pool", "none"]
Distribution = Literal["none", "student-t", "negative-binomial"]
COMPONENTS = Components._fields
WHOLE = ("whole",)
"""The one part of a network that does not decompose."""
BODY = ("words", "positions", "blocks", "norm")
"""Modules of the language model."""
PROMPTS = tuple((0, 1, 2, 3, 4, 5, 1, last) for last in (6, 7, 8))
"""The words of `SENTENCES`, numbered as they occur, of a table that holds no others."""
GPT2_PROMPTS = tuple((47, 17407, 262, 2003, 640, 2239, 1813, 262, last) for last in (5182, 1622, 29598))
"""The same in GPT-2's own table, by its byte pairs: "P", "redict", " the" and on."""
SENTENCES = tuple(f"Predict the future time step given the {name}" for name in COMPONENTS)
"""The paper's prompts."""
LEAST_SCALE, LEAST_NU, LEAST_COUNT = 1e-6, 2.0, 1e-4
"""Least scale and degrees of freedom of Student's t, least mean and dispersion of a negative binomial (published)."""


@dataclass(frozen=True)
class TempoConfig(ModelConfig):
    """Architecture of a TEMPO; the defaults are the paper's, whose body is GPT-2's first six blocks.

    Args:
        frames: steps observed.
        horizon: steps forecast in one pass.
        patch: steps of a token of a component.
        stride: steps from one token to the next.
        kernel: steps of the moving average from which the trend is learned.
        decomposed: read trend, season and residual; else the window as it is (GPT4TS).
        prompt: tokens before each component's: "semi-soft", a sentence's, through a layer; "pool", learned ones
            chosen by likeness; or "none". Without, each component also passes through the body alone at first, as in
            the published code.
        prompt_read: the heads read the prompts' tokens, too.
        mixed_query: the pool's query as the published code has it, which mixes places and channels.
        distribution: of each later value: "none", its value alone; "student-t"; or "negative-binomial", of counts.
        equivariant: the layers of Student's t work on normalised values, so that its location and scale follow those of
            the window; false is the published code.
        shape: of the body: "gpt2" or "llama".
        width: of a token. heads: of attention. depth: blocks. hidden: width inside of an MLP.
        kv_heads: heads of keys and values.
        words: rows of the table of words.
        positions: rows of the table of positions, of gpt2.
        rotary_base: of the rotary positions, of llama.
        dropout: of the body's embedding, attention and branches.
        prompts: numbers of the words of each component's sentence, in the table of words; GPT-2's without.
        steps: of time between two values, of the series that it was trained on.
    """

    task: ClassVar[str] = "forecast"
    per_series: ClassVar[bool] = True

    frames: Count = 336
    horizon: Count = 96
    patch: Count = 16
    stride: Count = 8
    kernel: Count = 25
    decomposed: bool = True
    prompt: Prompt = "semi-soft"
    prompt_read: bool = False
    mixed_query: bool = False
    distribution: Distribution = "none"
    equivariant: bool = True
    shape: Shape = "gpt2"
    width: Count = 768
    heads: Count = 12
    kv_heads: Count = 12
    depth: Depth = 6
    hidden: Count = 3072
    words: Count = 50257
    positions: Natural = 1024
    rotary_base: float = 10_000.0
    dropout: Share = 0.1
    prompts: tuple[tuple[int, ...], ...] = field(default=GPT2_PROMPTS, metadata=FROM_DATA)
    steps: tuple[str, ...] = field(default=(), metadata=FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        divides_into_heads(self)
        if self.frames < self.patch or (self.frames - self.patch) % self.stride:
            raise ShapeError(
                f"Tempo: frames={self.frames} are no whole number of strides={self.stride} after a patch={self.patch}"
            )
        if self.kernel % 2 == 0:
            raise ConfigError(f"Tempo: kernel={self.kernel} should be odd")
        fitting = [words for words in self.prompts if words and max(words) < self.words and min(words) >= 0]
        if len(self.prompts) != len(COMPONENTS) or len(fitting) < len(COMPONENTS):
            raise ConfigError(
                f"Tempo: prompts={self.prompts} should be one a component ({', '.join(COMPONENTS)}), each of numbers "
                f"below words={self.words}"
            )
        if self.shape == "gpt2" and self.positions < self.length:
            raise ShapeError(
                f"Tempo: frames={self.frames} make {self.length} tokens, expected at most the body's "
                f"positions={self.positions}"
            )

    @property
    def patches(self) -> int:
        """Tokens of a component: the window is lengthened by one stride, in which its last value stands."""
        return (self.frames - self.patch) // self.stride + 2

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what the body reads, in its order."""
        return COMPONENTS if self.decomposed else WHOLE

    def prompt_length(self, part: int) -> int:
        """Tokens of the prompt of part number `part`."""
        if self.prompt == "none":
            return 0
        return POOLED * POOL_LENGTH if self.prompt == "pool" else len(self.prompts[part])

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.patches + self.prompt_length(i) for i in range(len(self.parts)))

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            frames=16, horizon=6, patch=4, stride=2, kernel=5, width=32, heads=4, kv_heads=4, depth=2, hidden=48,
            words=9, positions=64, dropout=0.0, prompts=PROMPTS,
        )  # fmt: skip


POOL_SIZE, POOL_LENGTH, POOLED = 30, 3, 3
"""Prompts in the pool, tokens of each, and how many of them a component takes (published)."""


class Sentence(NamedTuple):
    """The sequence that the body reads, [N, L, D], its rotary table, and how like the pool's keys were, [N]."""

    x: Tensor
    rotary: Rotary | None = None
    similarity: Tensor | None = None


class Tempo(Model):
    """RevIN, a learned decomposition, prompted patches of its parts in one causal body, one linear head a part."""

    Config = TempoConfig
    task = "forecast"
    config: TempoConfig

    def __init__(self, config: TempoConfig) -> None:
        super().__init__()
        self.config = c = config
        self.revin = RevIN()
        self.decomposition = Decomposition(c.frames, c.kernel) if c.decomposed else None
        self.embed = nn.ModuleDict({name: nn.Linear(c.patch, c.width) for name in c.parts})
        self.words = nn.Embedding(c.words, c.width)
        self.positions = nn.Embedding(c.positions, c.width) if c.shape == "gpt2" else None
        self.blocks = nn.ModuleList(
            CausalBlock(c.shape, c.width, c.heads, c.kv_heads, c.hidden, c.dropout) for _ in range(c.depth)
        )
        self.norm = norm_of(c.shape, c.width)
        soft, pool = c.prompt == "semi-soft", c.prompt == "pool"
        self.prompt = nn.ModuleDict({n: nn.Linear(c.width, c.width) for n in c.parts}) if soft else None
        self.pool = (
            PromptPool(c.patches, c.width, POOL_SIZE, POOL_LENGTH, POOLED, c.mixed_query) if pool else None
        )
        read = [c.patches + (c.prompt_length(i) if c.prompt_read else 0) for i in range(len(c.parts))]
        self.out = nn.ModuleDict(
            {name: nn.Linear(rows * c.width, c.horizon) for name, rows in zip(c.parts, read, strict=True)}
        )
        self.law = nn.ModuleDict({n: nn.Linear(c.horizon, c.horizon) for n in LAWS[c.distribution]})
        self.reset_body()

    def reset_body(self) -> None:
        """Draw the body as GPT-2 is: N(0, 0.02), biases 0; the layers around it are torch's own."""
        for name in BODY:
            for part in getattr(self, name).modules() if getattr(self, name) is not None else ():
                if isinstance(part, nn.Linear | nn.Embedding):
                    nn.init.normal_(part.weight, std=0.02)
                if isinstance(part, nn.Linear) and part.bias is not None:
                    nn.init.zeros_(part.bias)

    def take_body(self, body: LanguageBody) -> None:
        """Put the weights of a language model in the place of the body's.

        Raises:
            CheckpointError: a tensor is missing, left over or of another shape, as where transforms changed the body.
        """
        own = {k: v for k, v in self.state_dict().items() if k.partition(".")[0] in BODY}
        for name in {**own, **body.state}:
            given, wanted = body.state.get(name), own.get(name)
            if given is None or wanted is None or given.shape != wanted.shape:
                shapes = [None if x is None else list(x.shape) for x in (given, wanted)]
                raise CheckpointError(f"language body: {name!r} is {shapes[0]}, Tempo needs {shapes[1]}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(body.state[name])

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return a published size, "gpt2-6", with random weights; or "smollm2-N", N blocks of SmolLM2-135M's shape.

        Raises:
            ConfigError: there is no such size.
        """
        if name not in PRESETS:
            raise ConfigError(unknown("Tempo preset", name, PRESETS))
        return cls(PRESETS[name])

    @classmethod
    def from_original(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: TempoConfig,
        transforms: Sequence[Transform] = (),
    ) -> Self:
        """Weights in the naming of the published code.

        Args:
            transforms: that the weights were trained under: `ditkit.recipes.tempo.published_lora()`.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape or not finite.
        """
        state = source if isinstance(source, Mapping) else read_state(Path(source))
        named = source if isinstance(source, str | Path) else "state dict"
        return cls.holding(config, renamed(state), named, transforms=transforms)

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        return (1, self.config.frames, 1, 1)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return (Segment("series", Grid(self.config.length), self.config.length),)

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def parts(self) -> Mapping[str, set[str]]:
        """Names of the weights of parts that can be trained apart: positions, and all that is not of the body."""
        names = [name for name, _ in self.named_parameters()]
        own = {n for n in names if n.partition(".")[0] not in (*BODY, "learned")}
        return {"positions": {n for n in names if n.startswith("positions.")}, "own": own}

    def sites(self) -> tuple[Site, ...]:
        place = partial(Site, stream="series", width=self.config.width)
        blocks = sites_of(self.blocks, "series")
        return (place("tokens", "tokens"), place("blocks", "stack"), *blocks, Site("head", "head", "series"))

    def forward(self, x: Tensor, run: Run = DIRECT) -> Tensor:
        """Forecast each series by itself; of a distribution, its mean.

        Args:
            x: [B, C, L, H, W] observed; other lengths: `as_window`.

        Returns:
            [B, C, H', H, W], H' steps.

        Raises:
            ShapeError: another number of steps than the config's.
        """
        found = self.forecast(x, run)
        return self._back(found if isinstance(found, Tensor) else found.mean, x)

    def law_of(self, x: Tensor, run: Run = DIRECT) -> Law:
        """Return the distribution of each later value of x [B, C, L, H, W]; parameters [B, C, H', H, W].

        Raises:
            ConfigError: the network has none.
        """
        found = self.forecast(x, run)
        if isinstance(found, Tensor):
            raise ConfigError(
                "Tempo: distribution='none' gives values alone, expected student-t or negative-binomial"
            )
        return type(found)(*(self._back(part, x) for part in found))

    def components(self, x: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Split what is observed, and the forecast, into trend, season and residual; each sums to the whole.

        Of a distribution, those of its location.

        Returns:
            By name, [B, C, L, H, W] and [B, C, H', H, W], in the unit of x; nothing of a network that does not split.
        """
        if not self.config.decomposed:
            return {}
        z, scale = self.revin.normalise(self._series(x))
        learned = self._split(z)
        sentence = self.tokenize(learned)
        h_NLD = Stack(self.blocks, DIRECT)(sentence.x, sentence.rotary)
        later, spread = self.shares(self.norm(h_NLD)), self.revin.spread(scale)
        mix: Any = dict(self.law.items()).get("mu")
        own_units = (
            mix is not None and self.config.distribution == "student-t" and not self.config.equivariant
        )

        def of(part: Tensor, first: bool) -> Tensor:
            return self.revin.restore(part, scale) if first else part * spread

        def mixed(part: Tensor, first: bool) -> Tensor:
            return part if mix is None else F.linear(part, mix.weight, mix.bias if first else None)

        found = {}
        for i, name in enumerate(COMPONENTS):
            first = not i
            ahead = mixed(of(later[i], first), first) if own_units else of(mixed(later[i], first), first)
            found[name] = (self._back(of(learned[i], first), x), self._back(ahead, x))
        return found

    def forecast(self, x: Tensor, run: Run = DIRECT) -> Tensor | Law:
        """Forecast [N, H'], or its distribution: N is B C H W, in the order of x's axes without its steps."""
        z, scale = self.revin.normalise(self._series(x))
        sentence: Sentence = run.site("tokens", self.tokenize, self._split(z))
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_NLD = run.site("blocks", stack, sentence.x, sentence.rotary)
        found: Tensor | Law = run.site("head", self.head, h_NLD, scale, x.dtype)
        return found

    def _series(self, x: Tensor) -> Tensor:
        """[B, C, L, H, W] as windows [N, L]."""
        if x.ndim != 5 or x.shape[2] != self.config.frames:
            raise ShapeError(
                f"Tempo: input {list(x.shape)} should be [B, C, {self.config.frames}, H, W]; see as_window"
            )
        return x.movedim(2, -1).flatten(0, -2)

    def _split(self, z_NL: Tensor) -> tuple[Tensor, ...]:
        """Return what the body reads of normalised windows, a component after the other."""
        return (z_NL,) if self.decomposition is None else self.decomposition(z_NL)

    def tokenize(self, components: tuple[Tensor, ...]) -> Sentence:
        """Embed the patches of each component after its prompt, one component after the other."""
        c = self.config
        rows: list[Tensor] = []
        likeness: list[Tensor] = []
        for i, (name, part) in enumerate(zip(c.parts, components, strict=True)):
            x_NPD = self.embed[name](self.patches(part))
            if c.prompt == "semi-soft":
                words = torch.tensor(c.prompts[i], device=part.device)
                assert self.prompt is not None
                rows.append(self.prompt[name](self.words(words)).expand(len(part), -1, -1).to(x_NPD.dtype))
            elif self.pool is not None:
                chosen = self.pool(x_NPD)
                rows.append(chosen.prompts.to(x_NPD.dtype))
                likeness.append(chosen.similarity)
            elif c.decomposed:
                x_NPD = self._alone(x_NPD)
            rows.append(x_NPD)
        x, rotary = self._placed(torch.cat(rows, 1))
        return Sentence(x, rotary, torch.stack(likeness).sum(0) if likeness else None)

    def patches(self, x_NL: Tensor) -> Tensor:
        """Overlapping patches [N, P, p], the last of which ends in `stride` copies of the last value."""
        longer = F.pad(x_NL[:, None], (0, self.config.stride), mode="replicate")[:, 0]
        return longer.unfold(1, self.config.patch, self.config.stride)

    def head(self, h_NLD: Tensor, scale: WindowScale, dtype: torch.dtype) -> Tensor | Law:
        """Sum the linear heads of the components' tokens, bring it back to the windows' units, and spread it out."""
        total = torch.stack(self.shares(self.norm(h_NLD))).sum(0)
        if self.config.distribution == "none":
            return self.revin.restore(total, scale, dtype)
        return self._law(total, scale, dtype)

    def shares(self, h_NLD: Tensor) -> list[Tensor]:
        """Return each component's part of the normalised forecast, [N, H']."""
        c, start, found = self.config, 0, []
        for i, name in enumerate(c.parts):
            stop = start + c.prompt_length(i) + c.patches
            first = start if c.prompt_read else stop - c.patches
            found.append(self.out[name](h_NLD[:, first:stop].flatten(1)))
            start = stop
        return found

    def _law(self, total: Tensor, scale: WindowScale, dtype: torch.dtype) -> Law:
        fine = torch.promote_types(total.dtype, torch.float32)
        restored = self.revin.restore(total, scale, fine)
        if self.config.distribution == "negative-binomial":
            mean = self.revin.restore(self.law["mu"](total), scale, fine)
            alpha = F.softplus(self.law["alpha"](total).to(fine))
            return NegativeBinomial(
                *(x.to(dtype) for x in (F.softplus(mean) + LEAST_COUNT, alpha + LEAST_COUNT))
            )
        given = total if self.config.equivariant else restored.to(total.dtype)
        mu, sigma, nu = (self.law[name](given).to(fine) for name in LAWS["student-t"])
        sigma, nu = F.softplus(sigma) + LEAST_SCALE, F.softplus(nu) + LEAST_NU
        if self.config.equivariant:
            mu, sigma = self.revin.restore(mu, scale), sigma * self.revin.spread(scale).abs()
        return StudentT(mu.to(dtype), sigma.to(dtype), nu.to(dtype))

    def _placed(self, x_NLD: Tensor) -> tuple[Tensor, Rotary | None]:
        """Add the places of the tokens, or return them as a table; then the embedding's dropout."""
        c, rotary = self.config, None
        if self.positions is None:
            rotary = line_rotary(x_NLD.shape[1], c.width // c.heads, c.rotary_base, x_NLD.device)
        else:
            x_NLD = x_NLD + self.positions.weight[: x_NLD.shape[1]]
        return F.dropout(x_NLD, c.dropout, self.training), rotary

    def _alone(self, x_NPD: Tensor) -> Tensor:
        """Pass one component through the body by itself, under no policy: its sites are those of the second pass."""
        x, rotary = self._placed(x_NPD)
        return self.norm(Stack(self.blocks, DIRECT, checkpointing=self.recomputes)(x, rotary))

    def _back(self, y_NH: Tensor, x: Tensor) -> Tensor:
        """[N, H'] in the axes of x: [B, C, H', H, W]."""
        return y_NH.unflatten(0, (*x.shape[:2], *x.shape[3:])).movedim(-1, 2)


LAWS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "student-t": ("mu", "sigma", "nu"),
    "negative-binomial": ("mu", "alpha"),
}
"""Layers of each distribution."""
PRESETS: Mapping[str, TempoConfig] = {
    "gpt2-6": TempoConfig(),
    **{
        f"smollm2-{depth}": TempoConfig(
            shape="llama", width=576, heads=9, kv_heads=3, depth=depth, hidden=1536, words=9, positions=0,
            rotary_base=100_000.0, dropout=0.0, prompts=PROMPTS,
        )
        for depth in range(1, 31)
    },
}  # fmt: skip
"""GPT-2's first six blocks, and SmolLM2-135M's first N (shape read from its file: data/language_body.py), of which the
table of words holds those of the prompts."""
TRAINED = "norms+positions+lora+own"
"""The parts trained beside a frozen GPT-2; a llama has no table of positions: "norms+lora+own"."""


def as_window(x: Tensor, frames: int) -> Tensor:
    """Bring observed [B, C, T, ...] to `frames` steps as the published code does, with a warning.

    Longer ones are cut to their last steps. Those of at least half the length are repeated, and this is cut at its end;
    shorter ones follow their mean, which is 0 of the normalised values that the published code lengthens.

    Raises:
        ShapeError: there are no steps.
    """
    steps = x.shape[2]
    if not steps:
        raise ShapeError(f"as_window: observed {list(x.shape)} hold no steps")
    if steps == frames:
        return x
    if steps > frames:
        warnings.warn(f"{steps} steps are cut to the last {frames}", stacklevel=2)
        return x[:, :, -frames:]
    if frames - steps <= steps:
        warnings.warn(f"{steps} steps are repeated to {frames}", stacklevel=2)
        return torch.cat([x] * (frames // steps + 1), 2)[:, :, :frames]
    warnings.warn(f"{steps} steps follow {frames - steps} of their mean", stacklevel=2)
    mean = x.mean(2, keepdim=True)
    return torch.cat([mean.expand(-1, -1, frames - steps, *x.shape[3:]), x], 2)


RENAMED: Mapping[str, str] = {
    "rev_in_trend.affine_": "revin.",
    "map_trend.": "decomposition.trend.",
    "map_season.": "decomposition.season.",
    "in_layer_": "embed.",
    "prompt_layer_": "prompt.",
    "out_layer_": "out.",
    "summary_map.": "pool.query.",
    "gpt2_trend.base_model.model.": "",
    "mu.": "law.mu.",
    "sigma.": "law.sigma.",
    "nu.": "law.nu.",
    "alpha.": "law.alpha.",
}
"""Published beginnings of names, and ours; one after another."""
UNUSED = ("map_resid.", "mul_season.", "rev_in_season.", "rev_in_noise.", "gpt2_")
"""Beginnings of published tensors that no forecast reads; `gpt2_` apart from the body's own."""
KEY, VALUE = "prompt_key_dict.prompt_key_", "prompt_value_dict.prompt_value_"


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published tensors under our names; GPT-2's layers have their matrices the other way round."""
    found: dict[str, Tensor] = {}
    pooled: dict[str, dict[int, Tensor]] = {KEY: {}, VALUE: {}}
    for name, value in state.items():
        if kind := next((kind for kind in pooled if name.startswith(kind)), None):
            pooled[kind][int(name.removeprefix(kind))] = value
            continue
        if name.startswith(UNUSED) and not name.startswith("gpt2_trend."):
            continue
        if own := of_gpt2(_begun(name)):
            found[own] = turned(own, value)
    for kind, own in ((KEY, "pool.keys"), (VALUE, "pool.values")):
        if pooled[kind]:
            found[own] = torch.stack([pooled[kind][i] for i in sorted(pooled[kind])])
    return found


def _begun(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            if ours in ("embed.", "prompt.", "out."):
                name = name.replace(".noise.", ".residual.")
    return name
