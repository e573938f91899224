"""A vision transformer from tokens to pixels: MAE's decoder, as RAE has it (arXiv 2510.11690).

B batch, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditkit.core.config import Checked, Count, Depth, divides_for_sincos, divides_into_heads
from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, unpatchify
from ditkit.core.run import DIRECT
from ditkit.nn.blocks import Attention
from ditkit.nn.embeddings import sincos_table

EPS = 1e-12
"""Added to variances in the norms, as published."""


@dataclass(frozen=True)
class ViTDecoderConfig(Checked):
    """Architecture of a `ViTDecoder`.

    Args:
        latent_channels: values of a token. channels: of a picture. grid: rows and columns of tokens. patch: pixels
            along a token's side.
        width, depth, heads: of the transformer. hidden: width of its MLPs.
        step: distance of neighbouring positions; 16 / side in diffusers' copy.
    """

    latent_channels: Count = 768
    channels: Count = 3
    grid: tuple[Count, Count] = (16, 16)
    patch: Count = 16
    width: Count = 1152
    hidden: Count = 4096
    heads: Count = 16
    depth: Depth = 28
    step: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        divides_into_heads(self)
        divides_for_sincos(self)


class DecoderBlock(nn.Module):
    """x + Attn(LN x), then x + MLP(LN x), with exact GELU."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"inner": nn.Linear(width, hidden), "outer": nn.Linear(hidden, width)})

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm_attn(x_BLD), DIRECT, "")
        out: Tensor = x_BLD + self.mlp["outer"](F.gelu(self.mlp["inner"](self.norm_mlp(x_BLD))))
        return out


class ViTDecoder(nn.Module):
    """Tokens behind one learned token, with fixed positions, to patches of pixels."""

    def __init__(self, config: ViTDecoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Linear(c.latent_channels, c.width)
        self.token = nn.Parameter(torch.zeros(c.width))
        self.blocks = nn.ModuleList(DecoderBlock(c.width, c.hidden, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=EPS)
        self.out = nn.Linear(c.width, c.patch**2 * c.channels)

    def forward(self, z: Tensor, checkpointing: bool = False) -> Tensor:
        """Decode z [B, C, h, w] to pictures [B, channels, H, W]; another grid than the config's is resampled first.

        Args:
            checkpointing: compute blocks again in the backward pass.

        Raises:
            ShapeError: other channels than the config's.
        """
        c = self.config
        if z.ndim != 4 or z.shape[1] != c.latent_channels:
            raise ShapeError(f"ViTDecoder: latents {list(z.shape)} should be [B, {c.latent_channels}, h, w]")
        if tuple(z.shape[2:]) != c.grid:
            z = F.interpolate(z, c.grid, mode="bilinear", align_corners=False)
        grid = Grid.of(c.grid, 1)
        x_BLD = self.embed(z.flatten(2).mT)
        x_BLD = x_BLD + self.positions(x_BLD.device).to(x_BLD.dtype)
        x_BLD = torch.cat([self.token.to(x_BLD.dtype).expand(len(z), 1, -1), x_BLD], 1)
        for block in self.blocks:
            x_BLD = checkpoint(block, x_BLD, use_reentrant=False) if checkpointing else block(x_BLD)
        return unpatchify(self.out(self.norm(x_BLD))[:, 1:], grid, c.patch)

    def positions(self, device: torch.device) -> Tensor:
        """Return the fixed positions of the grid, [L, D], columns in the first half of the channels."""
        c = self.config
        grid = Grid.of(c.grid, 1)
        if c.step == 1:
            return sincos_table(grid, c.width, device)
        half = c.width // 4
        frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        places = c.step * grid.coordinates()[:, [2, 1]].to(device, torch.float64)
        angles = places[..., None] * frequency
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()
