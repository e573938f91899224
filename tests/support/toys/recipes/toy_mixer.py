"""A recipe of the toy backbone."""

from __future__ import annotations

from ditkit.models.toy_mixer import ToyMixerConfig  # type: ignore[import-not-found]

from ditkit.tasks.image.recipe import ClassImageRecipe
from ditkit.train.settings import Settings


def toy_mixer() -> ClassImageRecipe:
    """A toy; seconds."""
    return ClassImageRecipe(data="emoji", model=ToyMixerConfig(), settings=Settings(steps=2, batch=2))
