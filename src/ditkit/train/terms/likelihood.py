"""Likelihood of what followed, under a forecaster's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditkit.core.model import Model
from ditkit.core.run import Site, named
from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class Likelihood(Term):
    """-log p(what followed), a mean over lead times: of Student's t, or of counts a negative binomial."""

    weight: Weight = 1.0

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return named(sites, "head")

    def check(self, model: Model) -> str:
        if getattr(model.config, "distribution", "none") != "none":
            return ""
        return f"a network with a distribution, such as distribution=student-t; this {type(model).__name__} has none"

    def loss(self, batch: Batch) -> Tensor:
        (law,) = batch.taps.values()
        followed = batch.data.movedim(2, -1).flatten(1, -2)  # [B, C H W, T]
        error = -law.law.log_prob(followed.flatten(0, 1).to(law.mean))
        return error.unflatten(0, followed.shape[:2]).flatten(1).mean(1)
