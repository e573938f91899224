"""Training of the decoder of a representation autoencoder, on a user's own pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ditkit.codecs.representation import RepresentationCodec, decided
from ditkit.data.loading import load_images
from ditkit.tasks.image.recipe import ClassDataset
from ditkit.tasks.image.vae import ImageVaeRecipe
from ditkit.tasks.recipe import Prepared
from ditkit.train.autoencoding import Decoding
from ditkit.train.objective import Objective
from ditkit.train.terms.regression import AbsoluteError

DECODING = Decoding((AbsoluteError(),))


@dataclass(frozen=True, kw_only=True)
class RepresentationRecipe(ImageVaeRecipe):
    """A ViT that decodes a frozen encoder's tokens; statistics of each position are measured when training is done.

    Args:
        model: its channels are taken from the data, its latents from the encoder.
    """

    objective: Objective = DECODING

    def prepared(self) -> Prepared:
        images = load_images(self.data, self.model.size, **self.loading)
        model = decided(self.model, images.images.shape[1])
        return Prepared(replace(self, model=model), ClassDataset(images))

    def network(self) -> Any:
        return RepresentationCodec(self.model)

    def example(self, model: Any) -> tuple[Any, ...]:
        return (*super().example(model), torch.empty(1))
