"""adaLN-single (PixArt-alpha, arXiv 2310.00426): one modulation for all blocks, and a table of each one's own.

B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.modulation import modulate


class AddedModulation(nn.Module):
    """adaLN-single (PixArt-alpha): parts that all blocks have in common, and a table of the block's own.

    The common six are an attention's and the MLP's; every attention takes the former.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.attentions = branches - 1
        self.table = nn.Parameter(torch.empty(3 * branches, width))

    def forward(self, common_B1E: Tensor) -> Tensor:
        """[B, 1, 6 D] to [B, 1, 3 D] for each branch."""
        attention, mlp = common_B1E.chunk(2, -1)
        return torch.cat([*[attention] * self.attentions, mlp], -1) + self.table.flatten()


class AddedHead(nn.Module):
    """Final layer of adaLN-single: layer norm, shift and scale of a table and the time's embedding, then one layer."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.table = nn.Parameter(torch.empty(2, width))
        self.out = nn.Linear(width, channels)

    def forward(self, x_BLD: Tensor, c_BD: Tensor, run: Run = DIRECT, at: str = "head") -> Tensor:
        shift, scale = (self.table + c_BD[:, None]).chunk(2, 1)
        out: Tensor = self.out(modulate(self.norm(x_BLD), shift, scale))
        return out

    def sites(self, at: str = "head", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call."""
        return [Site(at, "head", "image", self.norm.normalized_shape[0], 0, stage)]
