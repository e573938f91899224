"""Distance of the network's prediction from a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ditkit.core.config import Count, Natural
from ditkit.core.model import Model
from ditkit.core.run import Site, attended
from ditkit.train.objective import Batch, Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import SelfTeacher, Teacher


@dataclass(frozen=True)
class PredictionDistillation(Term):
    """mean (prediction - teacher's)^2, L_pred of CLEAR (arXiv 2412.16112, whose weight is the default).

    The mean is over all elements, given ones counted as 0.
    """

    teacher: ClassVar[Teacher] = SelfTeacher()  # type: ignore[misc]
    weight: Weight = 0.5

    def loss(self, batch: Batch) -> Tensor:
        assert batch.taught is not None
        return batch.counted(batch.prediction - batch.taught.out).square().flatten(1).mean(1)


@dataclass(frozen=True)
class AttentionDistillation(Term):
    """The mean over some attentions of mean (output - teacher's)^2, before the output's projection.

    L_attn of CLEAR (arXiv 2412.16112, whose weight and `every` are the defaults).

    Args:
        every: attentions are compared whose place in the model divides by it.
        first: the least place compared: for FLUX 19, as its blocks of two streams are not.
    """

    teacher: ClassVar[Teacher] = SelfTeacher()  # type: ignore[misc]
    weight: Weight = 0.5
    every: Count = 4
    first: Natural = 0

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        places = enumerate(attended(sites))
        return [name for place, name in places if place >= self.first and place % self.every == 0]

    def check(self, model: Model) -> str:
        cores = len(attended(model.sites()))
        return (
            "" if self.taps(model.sites()) else f"attention from place {self.first} on; the model has {cores}"
        )

    def loss(self, batch: Batch) -> Tensor:
        assert batch.taught is not None
        pairs = [(batch.taps[name], batch.taught.taps[name]) for name in self.taps(batch.sites)]
        errors = [(own.float() - taught.float()).square().flatten(1).mean(1) for own, taught in pairs]
        return torch.stack(errors).mean(0)
