"""Likeness of a forecaster's queries to its pool's keys (TEMPO, arXiv 2310.04948)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditkit.core.model import Model
from ditkit.core.run import Site, named
from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class PromptSimilarity(Term):
    """-(sum of the cosines of the chosen keys with a component's query, over components).

    The published code computes it and leaves it out of its total; so do the recipes.
    """

    weight: Weight = 0.001

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return named(sites, "tokens")

    def check(self, model: Model) -> str:
        pool = getattr(model.config, "prompt", "") == "pool"
        return "" if pool else f"a network with prompt=pool; this {type(model).__name__} has none"

    def loss(self, batch: Batch) -> Tensor:
        (sentence,) = batch.taps.values()
        return -sentence.similarity
