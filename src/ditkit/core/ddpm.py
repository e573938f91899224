"""DDPM's discrete tables: betas by name, respacing, and the posterior with a learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, unknown
from ditkit.core.path import Coefficients, Path, Time, spread
from ditkit.core.time_grid import EVEN, TimeGrid

Spacing = Literal["strided", "even", "trailing"]
"""Indices of an even grid: one stride from 0 up (DDIM), both ends (DiT's scripts), or one stride from the last down."""


@dataclass(frozen=True, eq=False)
class DiscretePath(Path):
    """alpha = sqrt(abar), sigma = sqrt(1 - abar) at integer times; time -1 is data (Ho et al. 2020).

    Args:
        abar: cumulative products of 1 - beta at the retained steps, [S] float64, falling.
        index: the retained steps' places in the schedule the network was trained on, [S] int64.
    """

    abar: Tensor
    index: Tensor

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> DiscretePath:
        """Build the path whose betas lie at equal distances (Ho et al. 2020, section 4)."""
        return cls.of_betas(torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> DiscretePath:
        """Build the path whose betas have square roots at equal distances (Stable Diffusion; DiMR)."""
        root = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64)
        return cls.of_betas(root**2)

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> DiscretePath:
        """Build the path of abar = cos^2((t + offset) / (1 + offset) pi / 2), betas cut at `most`.

        Nichol and Dhariwal 2021 (Improved DDPM), eq. 17.
        """
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls.of_betas((1 - abar[1:] / abar[:-1]).clamp(max=most))

    @classmethod
    def of_betas(cls, beta: Tensor) -> DiscretePath:
        """Build the path of a schedule of betas, [S] float64."""
        return cls((1 - beta).cumprod(0), torch.arange(len(beta)))

    def respaced(self, index: Tensor) -> DiscretePath:
        """Only the steps `index`; betas follow from the retained abar."""
        return DiscretePath(self.abar[index], self.index[index])

    @property
    def steps(self) -> int:
        return len(self.abar)

    def evenly(self, steps: int) -> Tensor:
        """Return `steps` indices at equal fractional strides, both ends included (250: 0, 4, 8 ... 995, 999).

        Raises:
            ConfigError: more steps than the schedule has.
        """
        self._check(steps)
        stride = (self.steps - 1) / max(steps - 1, 1)
        return torch.tensor([round(i * stride) for i in range(steps)])

    def strided(self, steps: int) -> Tensor:
        """Return `steps` indices with one integer stride, from 0 (DDIM; 50: 0, 20 ... 980, never 999)."""
        self._check(steps)
        return torch.arange(steps) * (self.steps // steps)

    def _check(self, steps: int) -> None:
        if not 1 <= steps <= self.steps:
            raise ConfigError(f"steps={steps} should lie between 1 and the schedule's {self.steps}")

    def trailing(self, steps: int) -> Tensor:
        """Return `steps` indices with one fractional stride down from the last (50: 19, 39 ... 979, 999)."""
        self._check(steps)
        return (torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:] * self.steps).round().long() - 1

    def times(self, steps: int, grid: TimeGrid = EVEN, spacing: Spacing = "strided") -> Tensor:
        """Return the indices visited, falling, then -1: of `spacing` on the even grid, else those nearest to `grid`.

        Raises:
            ConfigError: more steps than the schedule has, or than the grid has different indices for; an unknown
                spacing, or one that another grid leaves no room for.
        """
        choices = {"strided": self.strided, "even": self.evenly, "trailing": self.trailing}
        if spacing not in choices:
            raise ConfigError(unknown("spacing", spacing, get_args(Spacing)))
        if grid == EVEN:
            index = choices[spacing](steps).flip(0)
            return torch.cat([index, index.new_tensor([-1])]).double()
        if spacing != "strided":
            raise ConfigError(f"spacing={spacing!r} is of the grid Even(); {grid} has indices of its own")
        self._check(steps)
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        times = (grid.warp(even) * self.steps).round() - 1
        different = len(times.unique()) - 1
        if different < steps:
            raise ConfigError(
                f"steps={steps}: {grid} has {different} different indices of {self.steps}; take fewer"
            )
        return times

    def place(self, u: Tensor) -> Tensor:
        return (u * self.steps).floor().clamp(max=self.steps - 1).long()

    def noise_time(self, t: Time) -> Time:
        return (t + 1) / self.steps

    def at(self, t: Tensor) -> Coefficients:
        """Coefficients at integer times (as float or int); the rates of a discrete path are NaN."""
        table = torch.cat([self.abar.new_ones(1), self.abar])
        abar = table.to(t.device)[t.round().long() + 1]
        none = torch.full_like(abar, torch.nan)
        dtype = t.dtype if t.is_floating_point() else torch.float32
        return Coefficients(*(c.to(dtype) for c in (abar.sqrt(), (1 - abar).sqrt(), none, none)))

    @cached_property
    def beta(self) -> Tensor:
        return 1 - self.abar / self.abar_before

    @cached_property
    def abar_before(self) -> Tensor:
        return torch.cat([self.abar.new_ones(1), self.abar[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta~: variance of q(x_{t-1} | x_t, x_0), zero at t = 0."""
        return self.beta * (1 - self.abar_before) / (1 - self.abar)

    @cached_property
    def log_posterior_variance(self) -> Tensor:
        """Return log beta~ with the zero at t = 0 replaced by the value at t = 1."""
        clipped = self.posterior_variance.clone()
        clipped[0] = self.posterior_variance[1] if self.steps > 1 else self.beta[0]
        return clipped.log()

    def posterior_mean(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0); `t` [B] integer places in this schedule (Ho et al. 2020, eq. 7)."""
        on_data = self.abar_before.sqrt() * self.beta / (1 - self.abar)
        on_x = (1 - self.beta).sqrt() * (1 - self.abar_before) / (1 - self.abar)
        return self.gather(on_data, t, x) * data + self.gather(on_x, t, x) * x

    def log_variance(self, fraction: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """Return f log beta + (1 - f) log beta~; without a learned fraction, the fixed log beta~."""
        low, high = self.gather(self.log_posterior_variance, t, like), self.gather(self.beta.log(), t, like)
        return low if fraction is None else fraction * high + (1 - fraction) * low

    def gather(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Return a table's entries at `t` [B], shaped to broadcast against `like`, in its dtype."""
        return spread(table.to(t.device)[t.long()], like).to(like.dtype)


DISCRETE: dict[str, Callable[[], DiscretePath]] = {
    "ddpm": DiscretePath.linear,
    "ddpm-sd": DiscretePath.scaled_linear,
    "ddpm-cosine": DiscretePath.cosine,
}
