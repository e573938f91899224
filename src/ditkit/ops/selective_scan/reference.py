"""The definition of the selective scan (Mamba, arXiv 2312.00752): a loop over tokens, slow, the truth for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """h_l = exp(Delta_l A) h_{l-1} + Delta_l B_l x_l and y_l = <C_l, h_l> + D x_l, Delta = softplus(delta + bias).

    Shapes are those of `selective_scan`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, delta, A, B, C, D, bias = (v.to(wide) for v in (x, delta, A, B, C, D, bias))
    step = F.softplus(delta + bias[:, None])
    h = x.new_zeros(*x.shape[:2], x.shape[3], A.shape[2])
    out = []
    for i in range(x.shape[2]):
        decay = torch.exp(step[:, :, i, :, None] * A)
        h = decay * h + (step[:, :, i] * x[:, :, i])[..., None] * B[:, :, i, None, :]
        out.append((h * C[:, :, i, None, :]).sum(-1) + D * x[:, :, i])
    return torch.stack(out, 2)
