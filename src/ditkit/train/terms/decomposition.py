"""Distance of learned components of a series from those of a known decomposition (TEMPO, arXiv 2310.04948)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditkit.core.model import Model
from ditkit.core.run import Site, named
from ditkit.nn.decomposition import Components
from ditkit.nn.revin import standardised
from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight

TARGETS = "components"
"""The stream of the known components, [N, 3, L]: trend, season and residual of the observed steps."""


@dataclass(frozen=True)
class DecompositionLoss(Term):
    """MSE(trend) + MSE(season) + MSE(residual), each against the known one, standardised over its own window.

    The learned components sum to the window, the standardised targets need not: with a large weight the two pull apart.
    The weight is that of the published scripts.
    """

    weight: Weight = 0.001

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return [f"{name}:in" for name in named(sites, "tokens")]

    def check(self, model: Model) -> str:
        return (
            ""
            if getattr(model.config, "decomposed", False)
            else f"a network that decomposes; a {type(model).__name__} with this config does not"
        )

    def loss(self, batch: Batch) -> Tensor:
        (learned,) = batch.taps.values()
        assert isinstance(learned, Components) and batch.cond is not None
        known = batch.cond.streams[TARGETS].to(learned.trend)
        errors = [
            (own - standardised(target)).square().mean(1)
            for own, target in zip(learned, known.unbind(1), strict=True)
        ]
        return torch.stack(errors).sum(0)
