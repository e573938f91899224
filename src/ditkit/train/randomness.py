"""Randomness belongs to the sample: seed, step and place in the global batch fix noise, time and dropout.

So a run that is resumed, or split over processes, draws what a single uninterrupted run draws.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of integers."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The permutation [size] of the data in one epoch; kept, not to be drawn anew at every step."""
    return torch.randperm(size, generator=generator(seed, 0, epoch))


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Samples of the global batch of `step`, [batch]; epochs follow one another without a short batch."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epoch, place = places // size, places % size
    return torch.cat([epoch_order(size, seed, e)[place[epoch == e]] for e in epoch.unique().tolist()])


def draws(places: range, shape: tuple[int, ...], seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each place of the global batch: noise [n, *shape], uniform numbers for time and dropout, [n]."""
    noise, time, drop = [], [], []
    for place in places:
        g = generator(seed, 1, step, place)
        time.append(torch.rand((), generator=g, dtype=torch.float64))
        drop.append(torch.rand((), generator=g))
        noise.append(torch.randn(shape, generator=g))
    return torch.stack(noise), torch.stack(time), torch.stack(drop)
