"""One recipe for any denoiser: what the data decide of its config, its samples, and what travels beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ditkit.core.codec import SIDE
from ditkit.core.cond import Cond, check_cond, listed
from ditkit.core.config import network
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.model import Model
from ditkit.tasks.latent import coded, load_codec
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.train.denoising import Denoising
from ditkit.train.loop import TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG

FLOW_MATCHING = Denoising()
CLIP = 4
"""Axes of the shape of one clip, (C, T, H, W)."""


@dataclass(frozen=True, kw_only=True)
class DenoiserRecipe(Recipe):
    """A network that undoes the noise of samples, or of a codec's latents of them; a subclass is one kind of data."""

    latent: ClassVar[bool] = True
    objective: Objective = FLOW_MATCHING

    @abstractmethod
    def read(self) -> Any:
        """Load the data, at the size of the network.

        Raises:
            DataError, ConfigError: those of the loader.
        """

    @abstractmethod
    def signal_shape(self, data: Any) -> tuple[int, ...]:
        """Return the shape of one sample of the data, without the batch axis."""

    @abstractmethod
    def decided(self, data: Any) -> Mapping[str, Any]:
        """Return the fields of the network's config that the data decide, beside its channels and size.

        Raises:
            ConfigError: the data do not fit the network.
        """

    @abstractmethod
    def dataset(self, data: Any) -> TrainingSet:
        """Return the data as the training samples that the network takes, with what it is to be given.

        Raises:
            DataError: the data do not have what the network needs.
        """

    def fitting(self, data: Any, codec: Any = None) -> Self:
        """Return the recipe with the network's config as the data, and the codec, have it."""
        shape = self.signal_shape(data)
        shape = shape if codec is None else codec.latent_shape(shape)
        size = tuple(shape[-2:]) if len(shape) == CLIP else shape[-1]
        model = replace(self.model, channels=shape[0], size=size, **self.decided(data))
        return replace(self, model=model)

    def prepared(self) -> Prepared:
        codec, data = load_codec(self.codec), self.read()
        recipe = self.fitting(data, codec)
        conditions = recipe.model.conditions
        if (
            codec.side_shape(codec.latent_shape(self.signal_shape(data))) is not None
            and SIDE not in conditions
        ):
            raise ConfigError(
                f"codec={self.codec!r} has a side value, which a {network(self.model)} cannot be given; it takes "
                f"{listed(conditions)}, expected {SIDE!r} too"
            )
        samples = coded(recipe.dataset(data), codec, conditions=conditions)
        if any(not condition.optional for condition in conditions.values()):
            recipe.check_needs(samples)
        return Prepared(recipe, samples, codec)

    def check_needs(self, samples: TrainingSet) -> None:
        """Refuse data without what the network cannot do without, before the first step.

        Raises:
            ConfigError, ShapeError: names what is missing, or of another shape.
        """
        _, cond = samples.batch(torch.tensor([0]), SampleRNG(0, 0, range(1)))
        try:
            check_cond(network(self.model), self.model.conditions, cond, 1)
        except DitkitError as error:
            raise type(error)(f"data={self.data!r}: {error}") from error

    def example(self, model: Model) -> tuple[Any, ...]:
        return torch.empty(1, *model.sample_shape), torch.empty(1), example_cond(self.model)


def example_cond(config: Any) -> Cond:
    """Return what one sample of a network of `config` is given, as zeros; a text of the most tokens it may have."""
    plain: dict[str, Any] = {}
    streams: dict[str, Tensor] = {}
    for name, condition in config.conditions.items():
        if name == "label":
            plain[name] = torch.zeros(1, dtype=torch.long)
        elif name == "text":
            plain[name] = torch.zeros(1, config.text_tokens, config.text_width)
        else:
            value = torch.zeros(1, *(1 if n is None else n for n in condition.shape or ()))
            (plain if name in Cond.__dataclass_fields__ else streams)[name] = value
    return Cond(**plain, streams=streams)
