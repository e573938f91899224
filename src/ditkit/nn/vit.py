"""A plain vision transformer (ViT, arXiv 2010.11929) with sites: an encoder whose attention others learn from.

B batch, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ditkit.core.config import Checked, Count, Depth, divides_into_heads, names_every_class
from ditkit.core.errors import ShapeError
from ditkit.core.grid import patchify
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Attention, Mlp, sites_of


@dataclass(frozen=True)
class ViTConfig(Checked):
    """Architecture of a `ViT`.

    Args:
        size: height and width of a picture. channels: its channels. patch: side of a token.
        width, depth, heads: of the transformer. classes: that it tells apart.
        class_names: one a class, or empty.
    """

    size: Count = 32
    patch: Count = 4
    channels: Count = 1
    width: Count = 128
    depth: Depth = 5
    heads: Count = 4
    classes: Count = 10
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ShapeError(f"ViT: size={self.size} does not divide into patches of {self.patch}")
        divides_into_heads(self)
        names_every_class(self)

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2


class ViTBlock(nn.Module):
    """x + Attn(LN x), then x + Mlp(LN x), at the sites of DiT's block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)

    def attend(self, run: Run, at: str, x_BLD: Tensor) -> Tensor:
        return self.attn(self.norm_attn(x_BLD), run, at)

    def feed(self, run: Run, at: str, x_BLD: Tensor) -> Tensor:
        return self.mlp(self.norm_mlp(x_BLD), run, at)

    def sites(self, at: str) -> list[Site]:
        """List the sites of the block named `at`, in the order of the call."""
        width = self.attn.out.out_features
        attn, mlp = Site(f"{at}.attn", "branch", width=width), Site(f"{at}.mlp", "branch", width=width)
        return [
            Site(at, "block", width=width),
            attn,
            *self.attn.sites(attn.name),
            mlp,
            self.mlp.site(mlp.name),
        ]

    def forward(self, x_BLD: Tensor, run: Run, at: str) -> Tensor:
        attn, mlp = f"{at}.attn", f"{at}.mlp"
        x_BLD = x_BLD + run.site(attn, partial(self.attend, run, attn), x_BLD)
        return x_BLD + run.site(mlp, partial(self.feed, run, mlp), x_BLD)


class ViT(nn.Module):
    """Tokens without a class token, so that row i of each attention is patch i; their mean is classified.

    Beside the classes it says where a patch belongs, of pictures whose tokens have no positions (Jigsaw-ViT, arXiv
    2207.11971). Queries and keys are arguments of the `core` sites.
    """

    Config = ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Linear(c.patch**2 * c.channels, c.width)
        self.position = nn.Parameter(torch.randn(c.tokens, c.width) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(c.width, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.classes)
        self.place_head = nn.Linear(c.width, c.tokens)

    def sites(self) -> tuple[Site, ...]:
        return tuple(sites_of(self.blocks))

    def patches(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] as patches [B, L, P].

        Raises:
            ShapeError: pictures of another size than the config's.
        """
        c = self.config
        if x.shape[1:] != (c.channels, c.size, c.size):
            raise ShapeError(f"ViT: input {list(x.shape)} should be [B, {c.channels}, {c.size}, {c.size}]")
        return patchify(x, c.patch)

    def encode(self, h_BLD: Tensor, run: Run = DIRECT) -> Tensor:
        """Embedded tokens [B, L, D] through all blocks and the last norm."""
        for i, block in enumerate(self.blocks):
            h_BLD = run.site(f"blocks.{i}", partial(block, run=run, at=f"blocks.{i}"), h_BLD)
        return self.norm(h_BLD)

    def features(self, x: Tensor, run: Run = DIRECT) -> Tensor:
        """Tokens [B, L, D] of pictures [B, C, H, W] in [-1, 1]. Raises as `patches` does."""
        return self.encode(self.embed(self.patches(x)) + self.position, run)

    def forward(self, x: Tensor, run: Run = DIRECT) -> Tensor:
        """Logits [B, classes]. Raises as `patches` does."""
        return self.head(self.features(x, run).mean(1))

    def places(self, x: Tensor, kept: Tensor) -> Tensor:
        """Logits [B, M, L] of where the patches `kept` [B, M] of each picture belong, told no positions.

        Raises as `patches` does.
        """
        patches = self.patches(x)
        chosen = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
        return self.place_head(self.encode(self.embed(chosen)))
