"""Distances of the directions of tokens: their lengths do not count (PPCL).

B batch, L tokens, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def direction(x: Tensor) -> Tensor:
    """Return x / |x| of each token, in float32 or wider; a token of zeros stays one."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x^ - y^|^2 of each token, x^ its direction: 2 - 2 cos, [B, L]."""
    return (direction(x) - direction(y)).square().sum(-1)


def absolute_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x^ - y^|_1 of each token, [B, L]: the sum over channels."""
    return (direction(x) - direction(y)).abs().sum(-1)
