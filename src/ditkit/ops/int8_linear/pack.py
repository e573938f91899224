"""Numbers of four bits, two a byte."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pack4(q: Tensor) -> Tensor:
    """Pack uint8 [N, K] of 0 to 15 into uint8 [N, ceil(K / 2)]; of two neighbours the first is the low half."""
    even = F.pad(q, (0, q.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


def unpack4(packed: Tensor, width: int) -> Tensor:
    """Unpack them again, [N, width]."""
    halves = packed.new_empty((*packed.shape, 2))
    halves[..., 0], halves[..., 1] = packed & 15, packed >> 4
    return halves.flatten(-2)[..., :width]
