"""Squared error of the network's prediction: flow matching, or DDPM's simple loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditkit.core.path import spread
from ditkit.train.objective import Batch, Term


@dataclass(frozen=True)
class Regression(Term):
    """mean (target - prediction)^2, where the target is what the model's convention says that it predicts.

    On velocity this is flow matching (Lipman et al. 2023, eq. 14); on noise, DDPM's L_simple (Ho et al. 2020,
    eq. 14). On score it is DDPM's loss too: the error is weighted by sigma^2, as SiT does, since the target
    -noise / sigma grows without bound towards the data.
    """

    weight: float = 1.0

    def loss(self, batch: Batch) -> Tensor:
        return residual(batch).square().flatten(1).mean(1)


def residual(batch: Batch) -> Tensor:
    """What a perfect network would make zero, [B, ...]."""
    kind, t = batch.convention.prediction, batch.t.to(batch.data.dtype)
    if kind == "score":
        return batch.noise + batch.path.at(spread(t, batch.x)).sigma * batch.prediction
    if kind == "velocity":
        return batch.path.velocity(batch.data, batch.noise, t) - batch.prediction
    return (batch.data if kind == "data" else batch.noise) - batch.prediction
