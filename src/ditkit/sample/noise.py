"""Randomness belongs to the sample: seed 7 draws the same numbers alone, in a batch, or in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized

import torch
from torch import Tensor

from ditkit.core.config import MOST_SAMPLES, integer
from ditkit.core.errors import ConfigError

LAST_SEED = 2**32 - 1
"""torch's CPU generator reads 32 bits: a larger seed would repeat the noise of a smaller one."""


class SampleNoise:
    """Standard normal draws, one CPU generator a sample: no draw depends on the batch or the device.

    Args:
        seeds: one a sample, all different.
        shape: of one sample, without the batch axis.
        weave: what a codec's side value makes of each draw [B, *shape]; None leaves it white.

    Raises:
        ConfigError: as `distinct` does.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], weave: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.weave = weave
        self.seeds = distinct(seeds)
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def draw(self, device: torch.device | str = "cpu") -> Tensor:
        """Draw the next float32 noise of every sample, [B, *shape]."""
        drawn = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(device)
        return drawn if self.weave is None else self.weave(drawn)


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Draw the first states of the trajectories of `seeds`: float32 [len(seeds), *shape] on the CPU."""
    return SampleNoise(seeds, shape).draw()


def distinct(seeds: Sequence[int]) -> tuple[int, ...]:
    """`seeds` as a tuple.

    Raises:
        ConfigError: there is none, or one is no integer from 0 to `LAST_SEED` or stands twice; the message
            quotes it.
    """
    if not isinstance(seeds, Iterable):
        raise ConfigError(f"seeds={seeds!r} should be a sequence, one seed a sample")
    if isinstance(seeds, Sized) and len(seeds) > MOST_SAMPLES:
        raise ConfigError(f"{len(seeds):,} seeds, expected at most {MOST_SAMPLES:,}")
    unique: dict[int, None] = {}
    for given in seeds:
        seed = integer("seed", given, least=0, most=LAST_SEED)
        if seed in unique:
            raise ConfigError(f"seed {seed} is given twice; expected different seeds, one a sample")
        unique[seed] = None
    if not unique:
        raise ConfigError("seeds is empty; expected one seed a sample")
    return tuple(unique)
