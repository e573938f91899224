"""Windows of channels that slide with the noise: of each task, the active ones (DTR, arXiv 2310.07138)."""

from __future__ import annotations

import torch
from torch import Tensor

TASKS = 1000
"""DDPM's indices, 0 the cleanest."""


def active(channels: int, share: float) -> int:
    """How many channels a task has, floor(share channels)."""
    return int(channels * share)


def offsets(index: Tensor, channels: int, share: float, alpha: float, tasks: int = TASKS) -> Tensor:
    """Compute the first active channel of each task: round((channels - active) (index / (tasks - 1))^alpha)."""
    slack = channels - active(channels, share)
    return (slack * (index.double() / (tasks - 1)) ** alpha).round().long()


def windows(index: Tensor, channels: int, share: float, alpha: float, tasks: int = TASKS) -> Tensor:
    """Whether a channel is active, bool [B, channels], for the tasks `index` [B]."""
    first = offsets(index, channels, share, alpha, tasks)[:, None]
    channel = torch.arange(channels, device=index.device)
    return (channel >= first) & (channel < first + active(channels, share))
