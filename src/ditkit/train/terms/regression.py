"""Squared error of the network's prediction: flow matching, or DDPM's simple loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditkit.train.objective import Batch, Term


@dataclass(frozen=True)
class Regression(Term):
    """mean (target - prediction)^2, where the target is what the model's convention says that it predicts.

    On velocity this is flow matching (Lipman et al. 2023, eq. 14); on noise, DDPM's L_simple (Ho et al. 2020,
    eq. 14).
    """

    weight: float = 1.0

    def loss(self, batch: Batch) -> Tensor:
        return (target(batch) - batch.prediction).square().flatten(1).mean(1)


def target(batch: Batch) -> Tensor:
    """What a perfect network would predict, [B, ...]."""
    kind, t = batch.convention.prediction, batch.t.to(batch.data.dtype)
    if kind == "velocity":
        return batch.path.velocity(batch.data, batch.noise, t)
    if kind == "data":
        return batch.data
    return batch.path.convert(batch.noise, batch.x, t, "noise", kind)
