"""Squared error of the network's prediction: flow matching, DDPM's simple loss, or a forecast's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class Regression(Term):
    """mean (target - prediction)^2, where the target is what the model's convention says that it predicts.

    On velocity this is flow matching (Lipman et al. 2023, eq. 14); on noise, DDPM's L_simple (Ho et al. 2020,
    eq. 14); on score it is weighted to be that too. The mean is over all elements, given ones counted as 0 (VDT).
    """

    weight: Weight = 1.0

    def loss(self, batch: Batch) -> Tensor:
        return batch.counted(batch.residual()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class AbsoluteError(Term):
    """The mean of |target - prediction| (arXiv 2112.10752, section G).

    The mean is over all elements, given ones counted as 0.
    """

    weight: Weight = 1.0

    def loss(self, batch: Batch) -> Tensor:
        return batch.counted(batch.residual()).abs().flatten(1).mean(1)
