"""Denoising losses weighted by learned uncertainties of parts of noise-time (ANT-UW, arXiv 2306.00354)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditkit.core.config import Count
from ditkit.core.ddpm import DiscretePath
from ditkit.core.model import Model
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound

RATE = 0.025
"""Learning rate of the log variances; that of a run's weights is 1e-4 (DTR's code)."""


class LogVariances(nn.Module):
    """Learn s_i, the logarithm of the uncertainty of each of `clusters` parts of noise-time, at first 0."""

    def __init__(self, clusters: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(clusters))


@dataclass(frozen=True)
class UncertaintyWeighting(Term):
    """sum_i (exp(-s_i) l_i + s_i) / 2, l_i = a cluster's mean loss / clusters, s_i learned (ANT, section 4.2).

    Clusters are equal parts of noise-time, and a batch holds as many samples of each: it goes with the clock
    Stratified(strata). The loss is the squared error and, where a variance is learned, its bound, both weighted; it
    stands in their place. The s_i learn at a rate of their own, 0.025 in the paper: `Group("uncertaintyweighting",
    RATE / learning_rate)`.

    Args:
        strata: number of clusters.
    """

    weight: Weight = 1.0
    strata: Count = 8

    def modules(self, model: Model) -> nn.Module:
        return LogVariances(self.strata)

    def cluster(self, batch: NoisyBatch) -> Tensor:
        """Return the cluster of each sample, int64 [B]."""
        if isinstance(batch.path, DiscretePath):
            return batch.t.long() * self.strata // batch.path.steps
        return (batch.t * self.strata).long().clamp(0, self.strata - 1)

    def loss(self, batch: NoisyBatch) -> Tensor:
        error = Regression().loss(batch)
        if batch.fraction is not None:
            error = error + VariationalBound().loss(batch)
        s = batch.own.s
        return (torch.exp(-s[self.cluster(batch)]) * error + s.sum()) / 2
