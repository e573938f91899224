"""Squared error weighted towards much noise (P2, arXiv 2204.00227)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor

from ditkit.core.model import Model
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class P2(Term):
    """mean (noise - prediction)^2 / (k + SNR)^gamma, SNR = alpha^2 / sigma^2 (eq. 8, for predicted noise).

    Args:
        k: keeps the weight finite where there is no signal. gamma: strength; 0 is the plain error.
    """

    weight: Weight = 1.0
    k: Annotated[float, Gt(0)] = 1.0
    gamma: Annotated[float, Ge(0)] = 1.0

    def check(self, model: Model) -> str:
        kind = model.config.convention.prediction
        return "" if kind == "noise" else f"a prediction of noise; the model predicts {kind}"

    def loss(self, batch: NoisyBatch) -> Tensor:
        c = batch.path.at(batch.t.to(batch.data.dtype))
        error = batch.counted(batch.residual()).square().flatten(1).mean(1)
        return error / (self.k + c.alpha**2 / c.sigma**2) ** self.gamma
