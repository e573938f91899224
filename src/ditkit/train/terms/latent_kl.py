"""KL divergence of an autoencoder's latents from a standard normal (arXiv 1312.6114)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditkit.core.codec import VariationalCodec
from ditkit.core.model import Model
from ditkit.train.autoencoding import CodedBatch
from ditkit.train.objective import Term
from ditkit.train.schedules import Weight


@dataclass(frozen=True)
class LatentKL(Term):
    """KL(N(mean, variance) || N(0, 1)) of a sample's latents (Kingma and Welling 2014, appendix B).

    It is in nats divided by the number of values in the signal.

    Latent diffusion sums both this and the reconstruction error over a sample: its weight, 1e-6, means the same here.
    """

    weight: Weight = 1e-6

    def check(self, model: Model) -> str:
        return (
            ""
            if isinstance(model, VariationalCodec)
            else f"a codec's latents; a {type(model).__name__} has none"
        )

    def loss(self, batch: CodedBatch) -> Tensor:
        nats = batch.mean.square() + batch.log_variance.exp() - 1 - batch.log_variance
        return 0.5 * nats.flatten(1).sum(1) / batch.data[0].numel()
