"""Absolute error of the network's prediction: the reconstruction loss of latent diffusion's autoencoders."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditkit.train.objective import Batch, Term


@dataclass(frozen=True)
class AbsoluteError(Term):
    """mean |target - prediction| (arXiv 2112.10752, section G). The mean is over all elements, given ones counted
    as 0."""

    weight: float = 1.0

    def loss(self, batch: Batch) -> Tensor:
        return batch.counted(batch.residual()).abs().flatten(1).mean(1)
