"""Training on the latents of a codec."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ditkit.core.codec import IDENTITY, Codec, encode_given
from ditkit.core.cond import Cond
from ditkit.train.loop import TrainingSet
from ditkit.train.randomness import SampleRNG


class LatentDataset:
    """Samples as a codec's latents, drawn anew at every step (DiT, section 4)."""

    def __init__(self, samples: TrainingSet, codec: Codec) -> None:
        self.samples, self.codec = samples, codec

    def __len__(self) -> int:
        return len(self.samples)

    @torch.no_grad()
    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        data, cond = self.samples.batch(indices, rng)
        noise = rng.of_codec(self.codec.latent_shape(tuple(data.shape[1:])))
        return self.codec.encode(data, noise), encode_given(self.codec, cond)


def load_codec(folder: str) -> Codec:
    """Load the codec in `folder`; the identity where none is named.

    Raises:
        CheckpointError: what is there is no codec, or damaged.
    """
    return Codec.load(Path(folder)) if folder else IDENTITY


def signals(samples: TrainingSet) -> TrainingSet:
    """Return the samples under a codec."""
    return samples.samples if isinstance(samples, LatentDataset) else samples


def coded(samples: TrainingSet, codec: Codec) -> TrainingSet:
    """Encode `samples` as the codec's latents; return them as they are for the identity."""
    return samples if codec is IDENTITY else LatentDataset(samples, codec)
