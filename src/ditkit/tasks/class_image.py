"""Class-conditional images: data, network and objective bound together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ditkit.core.checkpoint import read_json, write_json
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.data.images import ImageSet
from ditkit.data.loading import load
from ditkit.models.dit import DiT, DiTConfig
from ditkit.train.loop import Sheet, train
from ditkit.train.objective import Objective
from ditkit.train.settings import Settings
from ditkit.train.terms.regression import Regression

RECIPE = "recipe.json"


@dataclass(frozen=True)
class ClassImageRecipe:
    """A network, a set and a training run.

    Args:
        data: a named set or a folder of class folders.
        model: its size, channels, classes and class names are taken from the data.
        settings: of the run. regression: weight of the squared error.
    """

    data: str
    model: DiTConfig
    settings: Settings
    regression: Regression = Regression()

    def resolved(self, images: ImageSet) -> ClassImageRecipe:
        """With the model's classes and channels as the data has them."""
        model = replace(
            self.model, channels=images.images.shape[1], classes=len(images.classes), class_names=images.classes
        )
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
    """Train as the recipe says; weights, state, losses and samples go to `folder`.

    Raises:
        ConfigError: resuming with another recipe than the folder's.
    """
    images = load(recipe.data, recipe.model.size)
    recipe = recipe.resolved(images)
    described = asdict(recipe)
    if resume:
        _same_run(folder / RECIPE, described)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECIPE, described)
    torch.manual_seed(recipe.settings.seed)
    model = DiT(recipe.model)
    objective = Objective((recipe.regression,))
    return train(model, Labelled(images), objective, recipe.settings, folder, resume=resume, sheet=sheet)


def _same_run(path: Path, described: dict[str, object]) -> None:
    """Refuse to go on with another model, data or seed; how long to train and what to write may change."""
    before = read_json(path)
    for key, value in described.items():
        if key != "settings" and before.get(key) != _jsonable(value):
            raise ConfigError(f"{path} was trained with another {key}; resume needs the same")


def _jsonable(value: object) -> object:
    import json

    return json.loads(json.dumps(value))
