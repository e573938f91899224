"""Distributions that a forecaster gives for each later value, by their parameters.

N windows, T lead times.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
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


Law = StudentT | NegativeBinomial
