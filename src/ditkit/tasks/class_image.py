"""Class-conditional images: data, network and objective bound together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.model import Model, parameter_count
from ditkit.data.images import ImageSet
from ditkit.data.loading import load
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.loop import Sheet, train
from ditkit.train.objective import Objective, Term
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression


@dataclass(frozen=True)
class ClassImageRecipe:
    """A network, a set and a training run.

    Args:
        data: a named set, a folder of class folders, or a folder of images with captions, which are trained as
            one class of the folder's name; nothing takes the captions in.
        model: its channels, classes and class names are taken from the data.
        settings: of the run. terms: of the objective, one of each kind.
        max_bad: damaged files of a folder to leave out; None for the loader's own limit.
    """

    data: str
    model: DiTConfig
    settings: Settings
    terms: tuple[Term, ...] = (Regression(),)
    max_bad: int | None = None

    def images(self) -> ImageSet:
        """The data, at the model's size."""
        options = {} if self.max_bad is None else {"max_bad": self.max_bad}
        return load(self.data, self.model.size, **options)

    def resolved(self, images: ImageSet) -> ClassImageRecipe:
        """With the model's classes and channels as the data has them."""
        names = images.classes or (images.name,)
        model = replace(self.model, channels=images.images.shape[1], classes=len(names), class_names=names)
        return replace(self, model=model)


class Labelled:
    """An image set as training samples."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Cond]:
        return self.images.images_float(indices), Cond(label=self.images.labels[indices])


def train_recipe(
    recipe: ClassImageRecipe, folder: Path, *, resume: bool = False, sheet: Sheet | None = None
) -> Model:
    """Train as the recipe says; weights, state, losses and snapshots go to `folder`.

    Raises:
        ConfigError: resuming with another recipe than the folder's, or any of `train`'s reasons.
    """
    images = recipe.images()
    recipe = recipe.resolved(images)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.settings.seed)
        model = DiT(recipe.model)
    return train(
        model,
        Labelled(images),
        Objective(recipe.terms),
        recipe.settings,
        folder,
        about={"data": recipe.data},
        resume=resume,
        sheet=sheet,
    )


def describe(recipe: ClassImageRecipe) -> str:
    """The resolved recipe and what it costs, in lines; loads the data, trains nothing.

    Raises:
        ConfigError, DataError: what `train_recipe` would refuse before its first step.
    """
    images = recipe.images()
    recipe = recipe.resolved(images)
    with torch.device("meta"):
        model = DiT(recipe.model)
    objective, run = Objective(recipe.terms), recipe.settings
    objective.check(model)
    parameters, forward = parameter_count(model), macs(recipe.model)
    passes = 4 if run.gradient_checkpointing else 3  # backward takes two; checkpointing repeats the forward
    copies = 3 + len(run.averages)  # weights, two moments, averages
    lines = {
        "data": f"{recipe.data}, {len(images)} images {list(images.images.shape[1:])}, "
        f"{recipe.model.classes} classes, {images.images.nbytes / 1e6:.1f} MB in memory",
        **{f"model.{k}": v for k, v in vars(recipe.model).items() if k != "class_names"},
        "terms": objective.terms,
        **{f"settings.{k}": v for k, v in vars(run).items()},
        "parameters": f"{parameters:,}",
        "MACs of a sample": f"{forward:,} forward, {passes * forward:,} in training",
        "MACs of a step": f"{passes * forward * run.batch:,}",
        "state": f"{4 * copies * parameters / 1e6:.1f} MB on disk, "
        f"{4 * (copies + 1) * parameters / 1e6:.1f} MB in memory with gradients",
        "length": f"{run.steps} steps x {run.batch} = {run.steps * run.batch / len(images):.1f} epochs",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def macs(config: DiTConfig) -> int:
    """Multiply-accumulates of a forward pass of one sample (the papers' "GFLOPs" are these).

    Attention's two products cost N^2 d each; the embeddings and the head are the small rest.
    """
    tokens, d = (config.size // config.patch) ** 2, config.width
    pixels = config.patch**2 * config.channels
    out = pixels * (1 if config.convention.extra == "none" else 2)
    block = 12 * tokens * d**2 + 2 * tokens**2 * d + 6 * d**2
    time = 256 * d + d**2
    return config.depth * block + tokens * pixels * d + time + 2 * d**2 + tokens * d * out
