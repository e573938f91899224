"""Training on the latents of a codec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ditkit.core.codec import IDENTITY, Codec, encode_given
from ditkit.core.cond import Cond
from ditkit.train.loop import TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG


class LatentDataset:
    """Samples as a codec's latents, drawn anew at every step (DiT, section 4).

    Args:
        objective: where it looks at the signals, at a step, they come along as `Cond.pixels`.
    """

    def __init__(self, samples: TrainingSet, codec: Codec, objective: Objective | None = None) -> None:
        self.samples, self.codec, self.objective = samples, codec, objective

    def __len__(self) -> int:
        return len(self.samples)

    @torch.no_grad()
    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        data, cond = self.samples.batch(indices, rng)
        noise = rng.of_codec(self.codec.latent_shape(tuple(data.shape[1:])))
        if self.objective is not None and self.objective.reads_pixels(rng.step):
            cond = replace(cond, pixels=data)
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


def coded(samples: TrainingSet, codec: Codec, objective: Objective | None = None) -> TrainingSet:
    """Encode `samples` as the codec's latents; return them as they are for the identity."""
    return samples if codec is IDENTITY else LatentDataset(samples, codec, objective)
