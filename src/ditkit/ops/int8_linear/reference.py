"""The slow twin: numbers are rounded and kept as floats, which is what the paper's code runs.

M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def quantise(x: Tensor, scale: Tensor | float, zero: Tensor | float, bits: int) -> Tensor:
    """Compute clamp(round(x / s) + z, 0, 2^b - 1): whole numbers in the type of x."""
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1)


def dequantise(q: Tensor, scale: Tensor | float, zero: Tensor | float) -> Tensor:
    """Compute s (q - z)."""
    return (q - zero) * scale


def linear_reference(
    x: Tensor,
    scale: Tensor | float,
    zero: Tensor | float,
    bits: int,
    q: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute x^ w^T + bias from the rounded numbers of both.

    Args:
        x: [..., K]. scale, zero: of one row each, or of all. bits: of x.
        q: whole numbers [N, K]. weight_scale, weight_zero: [N].
    """
    whole = quantise(x, scale, zero, bits)
    weight = dequantise(q.to(x.dtype), weight_scale[:, None].to(x.dtype), weight_zero[:, None].to(x.dtype))
    return F.linear(dequantise(whole, scale, zero), weight, bias)
