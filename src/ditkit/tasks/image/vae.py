"""Autoencoding of images: a codec of a user's own pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.codecs.image_vae import ImageVae
from ditkit.data.loading import load_images
from ditkit.report.sheet import grid, write_png
from ditkit.tasks.image.recipe import ClassDataset
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.train.autoencoding import Autoencoding
from ditkit.train.loop import Samples, Sheet
from ditkit.train.objective import Objective
from ditkit.train.terms.latent_kl import LatentKL
from ditkit.train.terms.regression import AbsoluteError

LATENT_DIFFUSION = Autoencoding((AbsoluteError(), LatentKL()))
SHEET_PICTURES = 8
MEASURED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class ImageVaeRecipe(Recipe):
    """A VAE of an image set; its statistics are measured on all of the set when training is done.

    Args:
        data: a named set, or a folder of images as `ditkit.data.folder` takes it.
        model: its channels are taken from the data.
    """

    sources: ClassVar[str] = "A named set of images (emoji, fashion), or a folder of images."
    then: ClassVar[str] = "ditkit train emoji --codec"
    has_sites: ClassVar[bool] = False
    task: ClassVar[str] = "image-vae"
    objective: Objective = LATENT_DIFFUSION

    def prepared(self) -> Prepared:
        images = load_images(self.data, self.model.size, **self.loading)
        model = replace(self.model, channels=images.images.shape[1])
        return Prepared(replace(self, model=model), ClassDataset(images))

    def network(self) -> Any:
        return ImageVae(self.model)

    def facts(self, samples: Samples) -> str:
        assert isinstance(samples, ClassDataset)
        images = samples.images.images
        return f"{len(images)} images {list(images.shape[1:])}, {images.nbytes / 1e6:.1f} MB in memory"

    def example(self, model: Any) -> tuple[Any, ...]:
        shape = (self.model.channels, self.model.size, self.model.size)
        return torch.empty(1, *shape), torch.empty(1, *model.latent_shape(shape))

    def sheet(self, folder: Path, samples: Samples) -> Sheet:
        assert isinstance(samples, ClassDataset)
        places = torch.linspace(0, len(samples) - 1, min(SHEET_PICTURES, len(samples))).long()
        return partial(write_sheet, folder, samples.images.images_float(places))

    def finish(self, model: Any, samples: Samples) -> None:
        """Measure the statistics of a trained codec, before it is saved."""
        assert isinstance(samples, ClassDataset)
        parts = torch.arange(len(samples)).split(MEASURED_AT_ONCE)
        device = next(model.parameters()).device
        model.fit_statistics(samples.images.images_float(part).to(device) for part in parts)


@torch.no_grad()
def write_sheet(folder: Path, pictures: Tensor, codec: ImageVae, step: int) -> None:
    """Pictures above what the codec makes of them, as `folder`/STEP.png."""
    device = next(codec.parameters()).device
    again = codec.decode(codec.encode(pictures.to(device))).cpu()
    write_png(folder / f"{step:06d}.png", grid(torch.cat([pictures, again]), columns=len(pictures)))
