"""Class-conditional images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.cond import Cond
from ditkit.core.labels import resolve_labels
from ditkit.core.model import Model
from ditkit.data.images import ImageSet
from ditkit.data.loading import load_images
from ditkit.report.sheet import grid, write_png
from ditkit.tasks.latent import coded, load_codec
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.train.denoising import Denoising
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG

SHEET_CLASSES, SHEET_EACH, SHEET_STEPS = 8, 4, 25
FLOW_MATCHING = Denoising()


@dataclass(frozen=True, kw_only=True)
class ClassImageRecipe(Recipe):
    """A network that draws the classes of an image set.

    Args:
        data: a named set, a folder of class folders, or a folder of images with captions, which are trained as
            one class of the folder's name; nothing takes the captions in.
        model: its channels, classes and class names are taken from the data.
    """

    sources: ClassVar[str] = (
        "A named set (emoji, fashion), or a folder with a folder of images for each class, or with a metadata.jsonl of "
        "captions; those images are all trained as one class, named as the folder."
    )
    latent: ClassVar[bool] = True
    task: ClassVar[str] = "image"
    objective: Objective = FLOW_MATCHING

    def prepared(self) -> Prepared:
        codec = load_codec(self.codec)
        images = load_images(self.data, self.model.size, **self.loading)
        recipe = self.fitting(images)
        channels, size, _ = codec.latent_shape(images.images.shape[1:])
        recipe = replace(recipe, model=replace(recipe.model, channels=channels, size=size))
        return Prepared(recipe, coded(ClassDataset(images), codec, self.objective), codec)

    def fitting(self, images: ImageSet) -> Self:
        """With the model's classes and channels as the data has them."""
        names = images.classes or (images.name,)
        model = replace(self.model, channels=images.images.shape[1], classes=len(names), class_names=names)
        return replace(self, model=model)

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, ClassDataset)
        images = samples.images
        return (
            f"{len(images)} images {list(images.images.shape[1:])}, {self.model.classes} classes, "
            f"{images.images.nbytes / 1e6:.1f} MB in memory"
        )

    def example(self, model: Model) -> tuple[Any, ...]:
        return (
            torch.empty(1, *model.sample_shape),
            torch.empty(1),
            Cond(label=torch.zeros(1, dtype=torch.long)),
        )

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        return partial(write_sheet, folder)


class ClassDataset:
    """An image set as training samples."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        return self.images.images_float(indices), Cond(label=self.images.labels[indices])


def write_sheet(folder: Path, model: Model, step: int) -> None:
    """Draw samples of classes spread over all of them, a row each, as `folder`/STEP.png."""
    classes = resolve_labels(model, None, SHEET_CLASSES)
    labels = None if classes is None else [c for c in classes for _ in range(SHEET_EACH)]
    drawn = generate(
        model,
        labels,
        seeds=range(SHEET_CLASSES * SHEET_EACH),
        steps=SHEET_STEPS,
        batch_size=16,
        policies=model.policies,
    )
    write_png(folder / f"{step:06d}.png", grid(drawn.samples, columns=SHEET_EACH))
