"""Heads that tell given pictures from decoded ones by the tokens of a frozen network (RAE, arXiv 2510.11690).

B batch, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SLOPE, EPS = 0.2, 1e-6


class TokenHead(nn.Module):
    """A logit for each token: a layer, a residual layer over its neighbours, and one to a number, spectrally normed.

    Its norms are over the tokens of one sample, as the published batch norm with groups of one sample is.

    Args:
        width: of the tokens. kernel: tokens that the second layer sees, which follow one another around the end.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.inner, self.residual = _layer(width, 1), _layer(width, kernel)
        self.out = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the logits [B, L] of tokens [B, L, D]."""
        h = self.inner(x_BLD.mT)
        h = (self.residual(h) + h) / math.sqrt(2)
        out: Tensor = self.out(h).squeeze(1)
        return out


class TokenHeads(nn.Module):
    """A `TokenHead` for the tokens after each of several blocks."""

    def __init__(self, width: int, kernel: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(width, kernel) for _ in range(count))

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return all logits [B, heads L]."""
        return torch.cat([head(x) for head, x in zip(self.heads, tokens, strict=True)], 1)


def _layer(width: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    norm = nn.InstanceNorm1d(width, eps=EPS, affine=True)
    return nn.Sequential(spectral_norm(conv), norm, nn.LeakyReLU(SLOPE))


def augmented(x: Tensor, u: Tensor) -> Tensor:
    """Shift and recolour pictures, with gradients (DiffAugment, arXiv 2006.10738), each by its own numbers.

    Args:
        x: [B, C, H, W]. u: [B, 5] uniform numbers: of the shifts down and right, by up to an eighth of a side; and of
            brightness, saturation and contrast.
    """
    u = u.to(x)[..., None, None, None]
    x = _shifted(_shifted(x, u[:, 0], 2), u[:, 1], 3)
    x = x + (u[:, 2] - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * u[:, 3]) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u[:, 4] + 0.5) + mean


def _shifted(x: Tensor, u: Tensor, axis: int) -> Tensor:
    """Move each picture along an axis by up to an eighth of it, and fill by 0."""
    side = x.shape[axis]
    most = round(side / 8)
    by = (u.flatten() * (2 * most + 1)).floor().long() - most
    at = torch.arange(side, device=x.device) + by[:, None]  # [B, side]
    inside = (at >= 0) & (at < side)
    view = [len(x), 1, 1, 1]
    view[axis] = side
    index = at.clamp(0, side - 1).view(view).expand_as(x)
    return x.gather(axis, index) * inside.view(view)
