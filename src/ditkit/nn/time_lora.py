"""TD-LoRA (DyDiT++, arXiv 2504.06803): low-rank updates of a layer, mixed by the time.

D width of the embedding of time, r rank, Q updates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ditkit.nn.routes import Update


class TimeLoRA(nn.Module):
    """Update W by (alpha / r) sum_q w_q(t) B_q A, with w = softmax of a router on e(t); every B_q is 0 at first.

    One A is shared; Q = 1 is LoRA. The paper names it and publishes no code: this form is ours.

    Args:
        width: D. ins, outs: of the layer. rank, updates: r and Q. alpha: the scale, times r.
    """

    def __init__(self, width: int, ins: int, outs: int, rank: int, updates: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.router = nn.Linear(width, updates)
        self.down = nn.Parameter(torch.empty(rank, ins))
        self.up = nn.Parameter(torch.zeros(updates, outs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as peft draws LoRA's

    def forward(self, e_BD: Tensor) -> Update:
        """Return the update at times of embeddings e [B, D]; of one row it can be merged into the weight."""
        return Update(self.down, self.scale * torch.tensordot(self.router(e_BD).softmax(-1), self.up, 1))
