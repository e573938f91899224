"""DiT with a prompt: cross-attention to a frozen encoder's tokens in each block, as in PixArt-alpha (arXiv 2310.00426).

Beside it, the mean of the tokens joins the time in c, as in Hunyuan-DiT (arXiv 2405.08748). Both begin at zero, so that
a network taken from a class-conditional DiT (`recipes.emoji_text`) begins as that DiT without its class.

B batch, L image tokens, S text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ditkit.core.cond import Cond
from ditkit.core.condition import Condition
from ditkit.core.config import (
    FROM_DATA,
    Count,
    Depth,
    ModelConfig,
    Share,
    divides_for_sincos,
    divides_into_heads,
)
from ditkit.core.convention import Convention
from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Segment, Tokens, patchify, unpatchify
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Stacked
from ditkit.nn.blocks import Block, Head, Stack
from ditkit.nn.embeddings import TimeEmbedding, sincos_table
from ditkit.nn.init import adaln_zero_
from ditkit.nn.modulation import Parts, activated, gate
from ditkit.nn.prompt import Prompt, read_prompt
from ditkit.nn.temporal import CrossAttention


@dataclass(frozen=True)
class TextDiTConfig(ModelConfig):
    """Architecture and convention of a DiT with a prompt.

    Args:
        size: height and width of a picture.
        patch: side of a token.
        channels: of a sample.
        width: of a token's vector.
        depth: number of blocks.
        heads: of attention.
        text_encoder: frozen network that reads the prompt: minilm, or letters, which has no weights.
        text_width: channels of its tokens.
        text_tokens: the most tokens of a prompt; longer ones are cut.
        text_dropout: share of training samples whose prompt counts as absent.
    """

    task: ClassVar[str] = "image"

    size: Count = 32
    patch: Count = 4
    channels: Count = field(default=3, metadata=FROM_DATA)
    width: Count = 256
    depth: Depth = 9
    heads: Count = 4
    text_encoder: str = "minilm"
    text_width: Count = field(default=384, metadata=FROM_DATA)
    text_tokens: Count = 16
    text_dropout: Share = 0.1
    convention: Convention = field(default_factory=Convention)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ShapeError(f"TextDiT: size={self.size} does not divide into patches of {self.patch}")
        divides_into_heads(self)
        divides_for_sincos(self)

    @property
    def conditions(self) -> Mapping[str, Condition]:
        return {"text": Condition((None, self.text_width), self.text_dropout)}

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            size=8,
            patch=2,
            width=32,
            depth=2,
            heads=4,
            text_encoder="letters",
            text_width=30,
            text_tokens=6,
        )


class TextBlock(Block):
    """DiT's block with cross-attention to the prompt between its two branches, without modulation or gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.cross_attn = CrossAttention(width, heads)

    def forward(  # type: ignore[override]
        self, x_BLD: Tensor, c_BD: Tensor, prompt: Prompt, run: Run = DIRECT, at: str = "blocks.0"
    ) -> Tensor:
        attn, cross, mlp = at + ".attn", at + ".cross_attn", at + ".mlp"
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), activated(c_BD))
        branch = run.site(attn, partial(self.attend, run, attn), x_BLD, parts)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0), branch)
        x_BLD = x_BLD + run.site(cross, partial(self.cross_attn, run, cross), x_BLD, *prompt)
        branch = run.site(mlp, partial(self.feed, run, mlp), x_BLD, parts)
        return torch.addcmul(x_BLD, gate(parts, 1), branch)

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        cross = f"{at}.cross_attn"
        branch = Site(cross, "branch", stream, self.norm.normalized_shape[0], stage=stage)
        kv, core = self.cross_attn.sites(cross, stage, "text")
        added = [branch, kv, core._replace(stream=stream)]
        own = super().sites(at, stream, stage)
        place = next(i for i, site in enumerate(own) if site.name == f"{at}.mlp")
        return [*own[:place], *added, *own[place:]]


class TextDiT(Denoiser):
    """A transformer over patches: adaLN-Zero on time and the prompt's mean, cross-attention to the prompt's tokens."""

    Config = TextDiTConfig
    task = "image"
    config: TextDiTConfig

    def __init__(self, config: TextDiTConfig) -> None:
        super().__init__()
        self.config = c = config
        pixels = c.patch**2
        self.embed = nn.Linear(pixels * c.channels, c.width)
        self.time = TimeEmbedding(c.width)
        self.null = nn.Parameter(torch.zeros(c.text_width))
        self.text = nn.Sequential(
            nn.Linear(c.text_width, c.width), nn.GELU(approximate="tanh"), nn.Linear(c.width, c.width)
        )
        self.pooled = nn.Linear(c.text_width, c.width)
        self.blocks = nn.ModuleList(TextBlock(c.width, c.heads) for _ in range(c.depth))
        out = c.channels * (1 if c.convention.extra == "none" else 2)
        self.head = Head(c.width, pixels * out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As DiT, with cross-attention and the mean of the prompt at zero; the first output is 0."""
        adaln_zero_(self, self.time.inner.weight, self.time.outer.weight)
        nn.init.normal_(self.null, std=0.02)
        nn.init.zeros_(self.pooled.weight)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.out.weight)  # type: ignore[union-attr, arg-type]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.size, self.config.size)

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        grid = Grid.of(tuple(shape[-2:]), self.config.patch)
        return (Segment("image", grid, grid.length),)

    def stacks(self) -> Mapping[str, Stacked]:
        return {"blocks": Stacked("blocks", "depth")}

    def unconditional(self, cond: Cond) -> Cond:
        """No prompt: one learned token, whatever the prompt's length was."""
        if cond.text is None:
            return cond
        null = self.null.detach().to(cond.text).expand(len(cond.text), 1, -1)
        return replace(cond, text=null, text_mask=torch.ones_like(null[..., 0], dtype=torch.bool))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        """Predict from noisy samples.

        Args:
            x: [B, C, H, W]. t: [B], in the unit the convention names.
            cond: `text` [B, S, text_width] of any length, whose real tokens `text_mask` names; None is no prompt.

        Returns:
            [B, C, H, W], or 2C channels where the convention has an extra half.

        Raises:
            ShapeError: channels or the prompt differ from the config's, or the sides do not divide by the patch.
        """
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.channels:
            raise ShapeError(f"TextDiT: input {list(x.shape)} should be [B, {c.channels}, H, W]")
        grid = Grid.of((x.shape[2], x.shape[3]), c.patch)
        given = self.given(cond, len(x))
        c_BD = run.site("time", self.condition, t, given)
        tokens: Tokens = run.site("tokens", self.tokenize, x)
        prompt = Prompt(self.text(given.tokens), given.mask)
        stack = Stack(self.blocks, run, checkpointing=self.recomputes)
        h_BLD = run.site("blocks", stack.beside, tokens.x, c_BD, prompt)
        return unpatchify(run.site("head", partial(self.head, run=run), h_BLD, c_BD), grid, c.patch)

    def given(self, cond: Cond, batch: int) -> Prompt:
        """Return the prompts as the encoder has them, checked; of dropped samples the null token alone is left."""
        dropout = self.config.text_dropout if self.training else 0.0
        return read_prompt("TextDiT", cond, self.null, batch, dropout)

    def condition(self, t: Tensor, given: Prompt) -> Tensor:
        """Compute c = time embedding + projected mean of the prompt's tokens, [B, D]."""
        known = given.mask[..., None].to(given.tokens.dtype)
        return self.time(t) + self.pooled((given.tokens * known).sum(1) / known.sum(1))

    def tokenize(self, x: Tensor) -> Tokens:
        """Patches of x embedded, with their positions added, [B, L, D]."""
        grid = Grid.of((x.shape[2], x.shape[3]), self.config.patch)
        h_BLD = self.embed(patchify(x, self.config.patch))
        return Tokens(h_BLD + sincos_table(grid, self.config.width, h_BLD.device).to(h_BLD.dtype))
