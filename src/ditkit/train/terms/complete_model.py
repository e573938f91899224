"""The loss of the model with nothing left out, beside that of the model that leaves some out (DyDiT++)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import Ask
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


@dataclass(frozen=True)
class CompleteModel(Term):
    """The objective of the same x, t and labels under no policy: regression, and the bound where a variance is learned.

    It holds the weights that all routes share to what they were (arXiv 2504.06803), at a second forward pass.
    """

    weight: Weight = 1.0

    def asks(self, batch: NoisyBatch) -> Ask:
        return Ask(student=True, policies=())

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        whole = replace(batch, prediction=batch.taught.out, fraction=batch.taught.fraction)
        loss = Regression().loss(whole)
        if batch.convention.discrete and batch.convention.extra == "variance":
            loss = loss + VariationalBound().loss(whole)
        return loss
