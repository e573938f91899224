"""Guidance by any number of branches, each given more than the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from ditkit.core.config import Finite
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.sample.guidance import Branches, Guidance


@final
@dataclass(frozen=True)
class Nested(Guidance):
    """b_0 + sum of s_i (b_i - b_{i-1}): branches that are given more and more, a scale each (arXiv 2211.09800, eq. 3).

    Args:
        scales: one for each branch after the first.
        branches: of the model, from the one that is given least; ("uncond", "cond") is classifier-free guidance.
    """

    scales: tuple[Finite, ...]
    branches: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.branches) < 2 or len(self.scales) != len(self.branches) - 1:
            raise ConfigError(
                f"Nested: scales={self.scales} for branches={self.branches}, expected a scale for each branch "
                "after the first"
            )

    def __call__(self, branches: Branches, t: float) -> Tensor:
        if all(scale == 1 for scale in self.scales):
            return branches(self.branches[-1])[0]
        first, *others = branches(*self.branches)
        out = first
        for scale, weak, strong in zip(self.scales, (first, *others), others, strict=False):
            out = out + scale * (strong - weak)
        return out

    def networks(self) -> Mapping[str, Denoiser]:
        return {}
