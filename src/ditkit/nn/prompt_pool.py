"""A pool of learned prompts, of which each sample takes those whose keys are most like it (TEMPO, arXiv 2310.04948).

N samples, P tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
"""Under the square of a norm."""


class Chosen(NamedTuple):
    """Prompts of samples.

    Args:
        prompts: [N, chosen x length, D]. similarity: [N], summed over the chosen keys. places: [N, chosen].
    """

    prompts: Tensor
    similarity: Tensor
    places: Tensor


class PromptPool(nn.Module):
    """Keys [size, D] and values [size, length, D]; a sample's query is one weighted sum of its tokens.

    Args:
        tokens: P. width: D.
        size: of the pool. length: tokens of a value. chosen: values a sample takes.
        mixed: form the query as the published code does, which reads [N, P, D] in the order of memory as rows of P
            numbers, and so mixes places and channels.
    """

    def __init__(
        self, tokens: int, width: int, size: int = 30, length: int = 3, chosen: int = 3, mixed: bool = False
    ) -> None:
        super().__init__()
        self.chosen, self.mixed = chosen, mixed
        self.keys = nn.Parameter(torch.randn(size, width))
        self.values = nn.Parameter(torch.randn(size, length, width))
        self.query = nn.Linear(tokens, 1)

    def forward(self, x_NPD: Tensor) -> Chosen:
        rows = x_NPD.reshape(len(x_NPD), x_NPD.shape[2], -1) if self.mixed else x_NPD.transpose(1, 2)
        query = _unit(self.query(rows)[..., 0])
        likeness = query @ _unit(self.keys).to(query.dtype).mT
        best = likeness.topk(self.chosen, dim=1)
        return Chosen(self.values[best.indices].flatten(1, 2), best.values.sum(1), best.indices)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=EPS**0.5)
