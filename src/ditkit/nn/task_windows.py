"""Windows of channels or experts that slide with the noise: of each task, the active ones (DTR, arXiv 2310.07138)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ditkit.core.ddpm import DISCRETE, DiscretePath
from ditkit.core.path import PATHS

TASKS = 1000
"""DDPM's indices, 0 the cleanest."""


def active(channels: int, share: float) -> int:
    """Return the number of channels of a task, floor(share channels)."""
    return int(channels * share)


def offsets(index: Tensor, channels: int, share: float, alpha: float, tasks: int = TASKS) -> Tensor:
    """Compute the first active channel of each task: round((channels - active) (index / (tasks - 1))^alpha)."""
    return _slid(index, channels - active(channels, share), alpha, tasks)


def windows(index: Tensor, channels: int, share: float, alpha: float, tasks: int = TASKS) -> Tensor:
    """Whether a channel is active, bool [B, channels], for the tasks `index` [B]."""
    first = offsets(index, channels, share, alpha, tasks)
    return _window(first, active(channels, share), channels)


def prior(index: Tensor, depth: int, experts: int, chosen: int, alpha: float, tasks: int = TASKS) -> Tensor:
    """Whether a task has an expert, bool [B, depth experts]: a window over the slots of all blocks (Switch-DiT)."""
    slots, count = depth * experts, depth * chosen
    return _window(_slid(index, slots - count, alpha, tasks), count, slots)


def _slid(index: Tensor, slack: int, alpha: float, tasks: int) -> Tensor:
    return (slack * (index.double() / (tasks - 1)) ** alpha).round().long()


def _window(first: Tensor, count: int, channels: int) -> Tensor:
    channel = torch.arange(channels, device=first.device)
    return (channel >= first[:, None]) & (channel < first[:, None] + count)


def tasks_of(path: str, times: Tensor) -> Tensor:
    """Return the tasks, int64 [B], of noise-times [B] of a path by its name.

    Of a discrete path its index; of a continuous one, the DDPM index (linear betas) whose ratio of signal to noise is
    nearest, so that windows slide with the noise, not with a solver's clock.
    """
    if path in DISCRETE:
        return (times.double() * TASKS).round().long().sub(1).clamp(0, TASKS - 1)
    c = PATHS[path]().at(times.double())
    ratio = (c.alpha.clamp_min(1e-12).log() - c.sigma.clamp_min(1e-12).log()) * 2
    return (ratio[:, None] - _log_snr().to(times.device)).abs().argmin(1)


@cache
def _log_snr() -> Tensor:
    """Logarithm of signal to noise of each task, [1000]: of DDPM with linear betas."""
    abar = DiscretePath.linear().abar
    return (abar / (1 - abar)).log()
