"""Experts: linear layers of which a gate by noise-time chooses a few for all tokens of a sample (Switch-DiT).

B batch, L tokens, D width, M experts, k active.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditkit.ops.routed_linear import routed_linear


def chosen(p: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Return the `active` largest of probabilities [..., M], not normalised again, and their experts.

    Of equal ones the first counts as larger, on every device and rank.
    """
    gate, index = p.sort(dim=-1, descending=True, stable=True)
    return gate[..., :active], index[..., :active]


def choices(p: Tensor, active: int) -> Tensor:
    """Whether an expert is chosen, bool as `p` [..., M]."""
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, chosen(p, active)[1], True)


class Experts(nn.Module):
    """M linear layers D to D with bias, all zero at first; those that a sample does not choose are not computed."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width, width))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x_BLD: Tensor, p_BM: Tensor, active: int) -> Tensor:
        """Compute the sum of the chosen experts, weighted by their probabilities, [B, L, D]."""
        gate, index = chosen(p_BM, active)
        kind, dtype = x_BLD.device.type, x_BLD.dtype
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        out: Tensor = routed_linear(
            x_BLD.to(dtype), self.weight.to(dtype), self.bias.to(dtype), gate.to(dtype), index
        )
        return out
