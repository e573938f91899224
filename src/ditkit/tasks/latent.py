"""Training on the latents of a codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ditkit.core.codec import IDENTITY, NO_CONDITIONS, SIDE, Codec, encode_given
from ditkit.core.cond import Cond
from ditkit.core.condition import Condition
from ditkit.train.loop import TrainingSet
from ditkit.train.randomness import SampleRNG

PIXELS = "pixels"
"""The stream of signals under latents, for a model that declares it."""


class LatentDataset:
    """Samples as a codec's latents, drawn anew at every step (DiT, section 4).

    A codec's side value comes along as a stream. Labels, texts, maps and other streams come along as they are; streams
    that the model declares as signals are coded.

    Args:
        conditions: what the model can be given; a stream `pixels` among them is the very signal that is coded.
    """

    def __init__(
        self, samples: TrainingSet, codec: Codec, conditions: Mapping[str, Condition] = NO_CONDITIONS
    ) -> None:
        self.samples, self.codec, self.conditions = samples, codec, conditions

    def __len__(self) -> int:
        return len(self.samples)

    @torch.no_grad()
    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        data, cond = self.samples.batch(indices, rng)
        noise = rng.of_codec(self.codec.latent_shape(tuple(data.shape[1:])))
        cond = encode_given(self.codec, cond, self.conditions)
        if PIXELS in self.conditions:
            cond = replace(cond, streams={**cond.streams, PIXELS: data})
        found = self.codec.code(data, noise)
        if found.side is not None:
            cond = replace(cond, streams={**cond.streams, SIDE: found.side})
        return found.z, cond


def load_codec(folder: str) -> Codec:
    """Load the codec in `folder`; the identity where none is named.

    Raises:
        CheckpointError: what is there is no codec, or damaged.
    """
    return Codec.load(Path(folder)) if folder else IDENTITY


def signals(samples: TrainingSet) -> TrainingSet:
    """Return the samples under a codec."""
    return samples.samples if isinstance(samples, LatentDataset) else samples


def coded(
    samples: TrainingSet, codec: Codec, *, conditions: Mapping[str, Condition] = NO_CONDITIONS
) -> TrainingSet:
    """Encode `samples` as the codec's latents; return them as they are for the identity.

    Args:
        conditions: what the model can be given.
    """
    return samples if codec is IDENTITY else LatentDataset(samples, codec, conditions)
