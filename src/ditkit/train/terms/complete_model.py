"""The loss of the model with nothing left out, beside that of the model that leaves some out (DyDiT++)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ditkit.core.model import Model
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight
from ditkit.train.taps import WHOLE
from ditkit.train.teacher import Ask
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound


@dataclass(frozen=True)
class CompleteModel(Term):
    """The objective of the same x, t and labels with nothing left out: regression, and the bound of a learned variance.

    It holds the weights that all routes share to what they were (arXiv 2504.06803), at a second forward pass. Policies
    are at their `whole` settings, so that updates of the weights, such as TD-LoRA's, stay.
    """

    weight: Weight = 1.0

    def asks(self, batch: NoisyBatch) -> Ask:
        return Ask(student=True, policies=WHOLE)

    def check_trained(self, model: Model) -> str:
        weights = {name.partition(".")[0] for name, w in model.named_parameters() if w.requires_grad}
        acting = any(policy.whole() != policy.exact() for policy in model.policies)
        if weights == {"learned"} and not acting:
            names = ", ".join(str(policy) for policy in model.policies)
            return (
                f"weights to train that are there when {names} leaves nothing out; train more than the routes, or "
                "updates beside them: dydit:rank=16"
            )
        return ""

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        whole = replace(batch, prediction=batch.taught.out, fraction=batch.taught.fraction)
        loss = Regression().loss(whole)
        if batch.convention.discrete and batch.convention.extra == "variance":
            loss = loss + VariationalBound().loss(whole)
        return loss
