"""DDPM's discrete tables: linear betas, respacing, and the posterior with a learned variance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError
from ditkit.core.path import Coefficients, Path, Time, spread


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
        beta = torch.linspace(first, last, steps, dtype=torch.float64)
        return cls((1 - beta).cumprod(0), torch.arange(steps))

    def respaced(self, index: Tensor) -> DiscretePath:
        """Only the steps `index`; betas follow from the retained abar."""
        return DiscretePath(self.abar[index], self.index[index])

    @property
    def steps(self) -> int:
        return len(self.abar)

    def evenly(self, steps: int) -> Tensor:
        """`steps` indices at equal fractional strides, both ends included (250: 0, 4, 8 ... 995, 999).

        Raises:
            ConfigError: more steps than the schedule has.
        """
        self._check(steps)
        stride = (self.steps - 1) / max(steps - 1, 1)
        return torch.tensor([round(i * stride) for i in range(steps)])

    def strided(self, steps: int) -> Tensor:
        """`steps` indices with one integer stride, from 0 (DDIM; 50: 0, 20 ... 980, never 999)."""
        self._check(steps)
        return torch.arange(steps) * (self.steps // steps)

    def _check(self, steps: int) -> None:
        if not 1 <= steps <= self.steps:
            raise ConfigError(f"steps={steps} should lie between 1 and the schedule's {self.steps}")

    def times(self, steps: int) -> Tensor:
        return torch.cat([self.strided(steps).flip(0), torch.tensor([-1])]).double()

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
        """log beta~ with the zero at t = 0 replaced by the value at t = 1."""
        clipped = self.posterior_variance.clone()
        clipped[0] = self.posterior_variance[1] if self.steps > 1 else self.beta[0]
        return clipped.log()

    def posterior_mean(self, x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0); `t` [B] integer places in this schedule (Ho et al. 2020, eq. 7)."""
        on_data = self.abar_before.sqrt() * self.beta / (1 - self.abar)
        on_x = (1 - self.beta).sqrt() * (1 - self.abar_before) / (1 - self.abar)
        return self.gather(on_data, t, x) * data + self.gather(on_x, t, x) * x

    def log_variance(self, fraction: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """f log beta + (1 - f) log beta~; without a learned fraction, the fixed log beta~."""
        low, high = self.gather(self.log_posterior_variance, t, like), self.gather(self.beta.log(), t, like)
        return low if fraction is None else fraction * high + (1 - fraction) * low

    def gather(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """A table's entries at `t` [B], shaped to broadcast against `like`, in its dtype."""
        return spread(table.to(t.device)[t.long()], like).to(like.dtype)
