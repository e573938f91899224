"""Distance of the network's prediction from a teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ditkit.train.objective import Batch, Term


@dataclass(frozen=True)
class PredictionDistillation(Term):
    """mean (prediction - teacher's)^2, L_pred of CLEAR (arXiv 2412.16112, whose weight is the default).

    The mean is over all elements, given ones counted as 0.
    """

    compares: ClassVar[bool] = True
    weight: float = 0.5

    def loss(self, batch: Batch) -> Tensor:
        assert batch.teacher is not None
        return batch.counted(batch.prediction - batch.teacher.out).square().flatten(1).mean(1)
