"""Distillation of a shallower student that leaves outliers among its features out (TinyFusion, arXiv 2412.01199)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ditkit.core.config import Count, Fraction
from ditkit.core.ddpm import DiscretePath
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.core.run import Site
from ditkit.train.denoising import NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight, weight_at
from ditkit.train.teacher import Ask, SelfTeacher, Teacher
from ditkit.train.terms.variational_bound import discretised_log_likelihood, gaussian_kl

TEACHER = SelfTeacher()


@dataclass(frozen=True)
class MaskedDistillation(Term):
    """share (mean (prediction - teacher's)^2 + bound) + features mean over pairs of mean (M_s h_s - M_t h_t)^2.

    The bound is KL(teacher's posterior || the student's) in bits, from which only the variance learns, at t = 0 the
    data's -log p; a model without learned variance has none. h are outputs of paired blocks, M leaves out what is two
    standard deviations or more from a sample's mean, in student and teacher apart (section 3.3). TinyFusion adds the
    model's own loss with the rest of the share, 0.1.

    Args:
        share: of the prediction. features: of the outputs of blocks, 0.01 falling to 0 over the run in the paper.
        every: student's block i is paired with the last of the teacher's i-th group of as many blocks.
        pairs: instead, numbers of a student's and a teacher's block each.
        stack: whose blocks they are.
        deviations: from the mean, within which an output counts.
        teacher: the deep model; by default as it was before this run's transforms.
    """

    weight: Weight = 1.0
    share: Fraction = 0.9
    features: Weight = 0.01
    every: Count = 2
    pairs: tuple[tuple[int, int], ...] = ()
    stack: str = "blocks"
    deviations: float = 2.0
    teacher: Teacher = TEACHER

    def paired(self, sites: Sequence[Site]) -> dict[str, str]:
        """Map the teacher's blocks by the student's."""
        depth = sum(site.kind == "block" and site.name.rpartition(".")[0] == self.stack for site in sites)
        default = [(i, self.every * i + self.every - 1) for i in range(depth)]
        return {f"{self.stack}.{own}": f"{self.stack}.{other}" for own, other in self.pairs or default}

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return list(self.paired(sites))

    def asks(self, batch: NoisyBatch) -> Ask:
        wanted = self.paired(batch.sites).values() if weight_at(self.features, batch.step) else ()
        return Ask(taps=tuple(wanted))

    def check(self, model: Model) -> str:
        return "" if self.paired(model.sites()) else f"blocks of {self.stack!r}"

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        taught = batch.taught.out
        error = batch.counted(batch.prediction - taught).square().flatten(1).mean(1)
        total = self.share * (error + self.bound(batch, taught, batch.taught.fraction))
        weight = weight_at(self.features, batch.step)
        return total + weight * self.unlike(batch, batch.taught.taps) if weight else total

    def bound(self, batch: NoisyBatch, taught: Tensor, fraction: Tensor | None) -> Tensor:
        """KL of the posteriors in bits a dimension, [B]; zeros where there is no learned variance."""
        if fraction is None or batch.fraction is None:
            return torch.zeros_like(batch.prediction.flatten(1)[:, 0])
        path, t, kind = cast(DiscretePath, batch.path), batch.t, batch.convention.prediction

        def posterior(prediction: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            guess = path.convert(prediction, batch.x, t.to(batch.x.dtype), kind, "data")
            return path.posterior_mean(batch.x, guess, t), path.log_variance(share, t, batch.x)

        own = posterior(batch.prediction.detach(), batch.fraction)
        kl = batch.counted(gaussian_kl(*posterior(taught, fraction), *own))
        likelihood = batch.counted(discretised_log_likelihood(batch.data, *own))
        nats = torch.where(t == 0, -likelihood.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2)

    def unlike(self, batch: NoisyBatch, taught: Mapping[str, Tensor]) -> Tensor:
        """Compute the mean over pairs of the squared difference of masked outputs, [B], in float32 or wider."""
        errors = []
        for own, other in self.paired(batch.sites).items():
            if other not in taught:
                raise ConfigError("MaskedDistillation: the teacher has no " + unknown("block", other, taught))
            streams = zip(tree_leaves(batch.taps[own]), tree_leaves(taught[other]), strict=True)
            both = [self.inside(a).flatten(1) - self.inside(b).flatten(1) for a, b in streams]
            errors.append(torch.cat(both, 1).square().mean(1))
        return torch.stack(errors).mean(0)

    def inside(self, h: Tensor) -> Tensor:
        """h [B, L, D] with zeros in the place of outliers of its sample."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        deviation, mean = torch.std_mean(wide.detach(), (1, 2), keepdim=True)
        return wide * ((wide.detach() - mean).abs() < self.deviations * deviation)
