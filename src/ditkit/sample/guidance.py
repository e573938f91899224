"""Guidance: combinations of a model's branches into one prediction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from torch import Tensor

from ditkit.core.config import Checked, Count, Finite, Fraction, check_value
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser

Branches = Callable[..., tuple[Tensor, ...]]
"""`branches("cond", "uncond")` runs the named branches and returns their predictions, each [B, C, ...].

A name is a branch of the sampled model (`Denoiser.branches`), or "NET:BRANCH" one of a network of `Guidance.networks`;
the network's name alone stands for its "cond".
"""


class Guidance(Checked, ABC):
    """A frozen dataclass; called once an evaluation. A branch that it does not ask for is not computed."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.sample",)

    @abstractmethod
    def __call__(self, branches: Branches, t: float) -> Tensor:
        """Return the guided prediction at noise-time `t`, [B, C, ...], in the form the model predicts."""

    @abstractmethod
    def networks(self) -> Mapping[str, Denoiser]:
        """Networks beside the sampled one, by name."""


@final
@dataclass(frozen=True)
class Unguided(Guidance):
    """The conditional branch alone."""

    def __call__(self, branches: Branches, t: float) -> Tensor:
        return branches("cond")[0]

    def networks(self) -> Mapping[str, Denoiser]:
        return {}


@final
@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """u + scale (c - u) (Ho and Salimans 2022), inside an interval of noise-time (Kynkaanniemi et al. 2024).

    Outside the interval, and at scale 1, only the conditional branch runs.

    Args:
        scale: 1 is no guidance.
        channels: guide only the first so many and leave the others conditional; DiT's code guides 3 of 4.
        interval: lowest and highest noise-time that is guided, both included; a discrete path's index i of S
            counts as (i + 1) / S.
    """

    scale: Finite
    channels: Count | None = None
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval[0] > self.interval[1]:
            raise ConfigError(f"ClassifierFree: interval={self.interval} should be (low, high) within [0, 1]")

    def __call__(self, branches: Branches, t: float) -> Tensor:
        low, high = self.interval
        if self.scale == 1 or not low <= t <= high:
            return branches("cond")[0]
        cond, uncond = branches("cond", "uncond")
        return extrapolate(cond, uncond, self.scale, self.channels)

    def networks(self) -> Mapping[str, Denoiser]:
        return {}


@final
@dataclass(frozen=True)
class PowerCosine(Guidance):
    """u + w(t) (c - u), w = 1 + (scale - 1) (1 - cos(pi (1 - t)^power)) / 2: weak at high noise (DiMR).

    Args:
        scale: at the data; 1 is no guidance. power: how late it rises.
    """

    scale: Finite
    power: Annotated[float, Interval(gt=0, lt=math.inf)] = 4.0

    def __call__(self, branches: Branches, t: float) -> Tensor:
        if self.scale == 1:
            return branches("cond")[0]
        cond, uncond = branches("cond", "uncond")
        return extrapolate(cond, uncond, self.at(t))

    def at(self, t: float) -> float:
        """Return the scale at noise-time t."""
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * (1 - t) ** self.power)) / 2

    def networks(self) -> Mapping[str, Denoiser]:
        return {}


@final
@dataclass(frozen=True)
class Autoguidance(Guidance):
    """g + scale (c - g), g a weaker model's conditional prediction (Karras et al. 2024, arXiv 2406.02507).

    Args:
        scale: 1 is no guidance, and the guide is not run.
        guide: a model with the path and the prediction of the sampled one.
    """

    scale: Finite
    guide: Denoiser = field(repr=False)

    def __call__(self, branches: Branches, t: float) -> Tensor:
        if self.scale == 1:
            return branches("cond")[0]
        cond, guide = branches("cond", "guide")
        return extrapolate(cond, guide, self.scale)

    def networks(self) -> Mapping[str, Denoiser]:
        return {"guide": self.guide}


def guided(given: float | Guidance) -> Guidance:
    """Return a guidance as it is, a number as the scale of classifier-free guidance; 1 is none.

    Raises:
        ConfigError: neither, or a scale that is not finite.
    """
    if isinstance(given, Guidance):
        return given
    check_value("guidance", given, Finite)
    return Unguided() if given == 1 else ClassifierFree(given)


def extrapolate(strong: Tensor, weak: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Return weak + scale (strong - weak) on the first `channels` of axis 1, `strong` on the others.

    Raises:
        ConfigError: there are fewer channels than that.
    """
    guided = weak + scale * (strong - weak)
    if channels is None:
        return guided
    if channels > strong.shape[1]:
        raise ConfigError(f"guidance on channels={channels}, but the model predicts {strong.shape[1]}")
    return torch.cat([guided[:, :channels], strong[:, channels:]], dim=1)
