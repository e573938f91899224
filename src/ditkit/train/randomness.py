"""Randomness belongs to the sample: seed, step and place in the global batch fix noise, time and dropout.

So a run that is resumed, or split over processes, draws what a single uninterrupted run draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError

TERMS = 1000
"""Uses of randomness from here on belong to names."""


def seed_of(*key: int) -> int:
    """Derive a seed of 63 bits from a tuple of integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """Make a CPU generator seeded by a tuple of integers."""
    return torch.Generator().manual_seed(seed_of(*key))


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation [size] of the data in one epoch; kept, not to be drawn anew at every step."""
    return torch.randperm(size, generator=generator(seed, 0, epoch))


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the samples of the global batch of `step`, [batch]; epochs follow one another without a short batch."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epoch, place = places // size, places % size
    return torch.cat([epoch_order(size, seed, e)[place[epoch == e]] for e in epoch.unique().tolist()])


def ordered_indices(size: int, batch: int, step: int) -> Tensor:
    """List the samples of the global batch of `step` where the order of the data is kept, [batch].

    No batch reaches over the end of an epoch. What is left there, fewer samples than a batch, is left out; in every
    second epoch it is what comes first, so that every sample has its turn.

    Raises:
        ConfigError: there are fewer samples than one batch.
    """
    if size < batch:
        raise ConfigError(
            f"training: batch={batch} of {size} samples that are kept in order, expected no more"
        )
    epoch, number = divmod(step, size // batch)
    first = number * batch + (size % batch if epoch % 2 else 0)
    return torch.arange(first, first + batch)


@dataclass(frozen=True)
class SampleRNG:
    """All that is random about some places of the global batch of one step."""

    seed: int
    step: int
    places: range

    def draws(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """For each place: noise [n, *shape], uniform numbers for time (float64) and dropout, [n]."""
        noise, time, drop = [], [], []
        for g in self._generators(1):
            time.append(torch.rand((), generator=g, dtype=torch.float64))
            drop.append(torch.rand((), generator=g))
            noise.append(torch.randn(shape, generator=g))
        return torch.stack(noise), torch.stack(time), torch.stack(drop)

    def of_term(self, name: str, n: int = 1) -> Tensor:
        """For each place, `n` uniform numbers that belong to a name: other terms, or none, change none of them."""
        use = TERMS + zlib.crc32(name.encode())
        return torch.stack([torch.rand(n, generator=g, dtype=torch.float64) for g in self._generators(use)])

    def of_data(self) -> Iterator[torch.Generator]:
        """Yield a generator a place, for what the data themselves draw: masks, crops."""
        return self._generators(2)

    def of_codec(self, shape: tuple[int, ...]) -> Tensor:
        """For each place, the noise of a codec that draws from its latents, [n, *shape]."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators(4)])

    @contextmanager
    def of_network(self, device: torch.device) -> Iterator[None]:
        """Inside, what a network draws itself (dropout) follows from the step and the first place."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.seed, 3, self.step, self.places.start))
            yield

    def _generators(self, use: int) -> Iterator[torch.Generator]:
        return (generator(self.seed, use, self.step, place) for place in self.places)
