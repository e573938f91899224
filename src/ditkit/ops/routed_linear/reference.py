"""The slow, obvious twin: every layer on every sample, those that were not chosen weighted by 0."""

from __future__ import annotations

import torch
from torch import Tensor


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """Compute sum_m G_bm (x_b W_m + a_m), G the gates at their layers and 0 elsewhere; shapes as in `operation`."""
    full = gate.new_zeros(len(x), len(weight)).scatter(1, index, gate)
    every = torch.einsum("bld,mde->bmle", x, weight) + bias[:, None]
    return torch.einsum("bm,bmle->ble", full, every)
