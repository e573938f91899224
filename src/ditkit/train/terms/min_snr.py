"""Squared error weighted by the ratio of signal to noise (Min-SNR, arXiv 2303.09556)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from ditkit.core.model import Model
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class MinSNR(Term):
    """min(SNR, k) / SNR mean (noise - prediction)^2, SNR = alpha^2 / sigma^2 (section 3.4, for predicted noise).

    A learned variance has its bound beside, which is not weighted (DTR's code).

    Args:
        most: k.
    """

    weight: Weight = 1.0
    most: Annotated[float, Gt(0)] = 5.0

    def check(self, model: Model) -> str:
        kind = model.config.convention.prediction
        return "" if kind == "noise" else f"a prediction of noise; the model predicts {kind}"

    def loss(self, batch: NoisyBatch) -> Tensor:
        c = batch.path.at(batch.t.to(batch.data.dtype))
        ratio = c.alpha**2 / c.sigma**2
        return (
            ratio.clamp(max=self.most) / ratio * batch.counted(batch.residual()).square().flatten(1).mean(1)
        )
