"""Linear attention over all rows, and the convolution of values beside it (LiT, arXiv 2501.12976).

B batch, L rows, N heads of the model, H heads of linear attention, D width, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditkit.core.grid import Grid
from ditkit.nn.convolution import MapConv

LEAST = 1e-6
"""The least divisor of a row: one whose features are all zero, or meet only zeros, gives 0."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute q (k^T v) / (q sum k) of features q, k [B, H, L, K] and values [B, H, M, Kv], features not negative.

    Two products with a state of K x Kv a head: linear in the rows, quadratic in the head's width. Sums over thousands
    of rows, and the quotient, are taken in float32 (float64 for float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    device = "cpu" if q.is_meta else q.device.type  # shapes alone have no autocast
    with torch.autocast(device, enabled=False):
        q, k, values = q.to(wide), k.to(wide), v.to(wide)
        total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        out = q @ (k.mT @ values) / total.clamp_min(LEAST)
    return out.to(v.dtype)


def regrouped(x: Tensor, heads: int) -> Tensor:
    """Cut the channels of all heads [B, N, L, K], side by side, into `heads` others, [B, H, L, N K / H]."""
    rows = x.transpose(1, 2).flatten(2)
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


class ValueConv(nn.Module):
    """A depth-wise convolution of the values [B, H, L, K] laid out on their grid, zeros around it, with bias.

    Its weights begin at zero, so that attention begins as linear attention alone.

    Args:
        width: of all heads together. heads: of the values. kernel: side, odd.
        shared: one filter for each channel of a head, the same in all heads.
    """

    def __init__(self, width: int, heads: int, kernel: int = 5, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        channels = width // heads if shared else width
        self.conv = MapConv(channels, channels, kernel, groups=channels)
        nn.init.zeros_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, v: Tensor, grid: Grid) -> Tensor:
        """Convolve; in and out [B, H, L, K]."""
        if self.shared:
            return self.conv(v.flatten(0, 1), grid).unflatten(0, v.shape[:2])
        rows = self.conv(v.transpose(1, 2).flatten(2), grid)
        return rows.unflatten(2, (v.shape[1], -1)).transpose(1, 2)
