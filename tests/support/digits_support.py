"""Squares that stand for the handwritten digits of Moving MNIST, which are a download."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.data.sets.moving_digits import SPLITS


def squares(split: str) -> Tensor:
    """Draw ten grey squares inside a black rim, uint8 [10, 28, 28], no two alike; the splits share none."""
    greys = 100 + 10 * torch.arange(10, dtype=torch.uint8) + 5 * SPLITS.index(split)
    return torch.nn.functional.pad(greys[:, None, None].expand(10, 16, 16), (6, 6, 6, 6))
