"""Distributions that a forecaster gives for each later value, by their parameters.

N windows, T lead times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution
from torch.distributions import NegativeBinomial as TorchNegativeBinomial
from torch.distributions import StudentT as TorchStudentT


class StudentT(NamedTuple):
    """Student's t of location `mu`, scale `sigma` > 0 and `nu` > 2 degrees of freedom, each [N, T]."""

    mu: Tensor
    sigma: Tensor
    nu: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def law(self) -> Distribution:
        """Return it as a distribution of torch."""
        return TorchStudentT(self.nu, self.mu, self.sigma, validate_args=False)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw [count, N, T] by a generator of the CPU: the same values on every device."""
        mu, sigma, nu = (_repeated(part, count) for part in self)
        normal = torch.randn(mu.shape, generator=generator, dtype=mu.dtype)
        chi_square = 2 * torch._standard_gamma(nu / 2, generator=generator)
        return (mu + sigma * normal * (nu / chi_square).sqrt()).to(self.mu)


class NegativeBinomial(NamedTuple):
    """Counts of mean `mu` > 0 and variance mu + alpha mu^2, each [N, T]."""

    mu: Tensor
    alpha: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def law(self) -> Distribution:
        """Return it as a distribution of torch."""
        return TorchNegativeBinomial(1 / self.alpha, logits=(self.alpha * self.mu).log(), validate_args=False)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw [count, N, T] by a generator of the CPU: Poisson counts of a gamma's rates."""
        mu, alpha = (_repeated(part, count) for part in self)
        rate = torch._standard_gamma(1 / alpha, generator=generator) * alpha * mu
        return torch.poisson(rate, generator=generator).to(self.mu)


Law = StudentT | NegativeBinomial


def _repeated(part: Tensor, count: int) -> Tensor:
    """Repeat on the CPU, [count, N, T], at least in float32."""
    fine = torch.promote_types(part.dtype, torch.float32)
    return part.detach().to("cpu", fine).expand(count, *part.shape).contiguous()
