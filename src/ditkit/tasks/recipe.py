"""Data, network, objective and a training run bound together: what `ditkit train` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ditkit.core.catalog import every
from ditkit.core.codec import FINGERPRINT, IDENTITY, Codec, fingerprint
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model, parameter_count
from ditkit.evaluate.macs import count_macs
from ditkit.tasks.latent import signals
from ditkit.train.loop import Samples, Sheet, train
from ditkit.train.objective import Objective
from ditkit.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A network, a set and a training run; a subclass is one task.

    Args:
        data: a named set, or a user's own folder or file.
        model: the network's config; what of it the data decide is taken from them.
        settings: of the run. objective: what it minimises.
        max_bad: damaged files of a folder to leave out; None for the loader's own limit.
        options: of the set's own loader.
        codec: folder of a trained codec, whose latents are learned instead of the data themselves.
    """

    sources: ClassVar[str] = "A named set, or a folder."
    """What `data` may be, for a person who types it."""
    then: ClassVar[str] = "ditkit generate"
    """The command that takes the trained model."""
    latent: ClassVar[bool] = False
    """Whether latents of a codec can be learned."""
    Network: ClassVar[type]
    """A dataclass of those fields of `model` that do not follow from the data; their flags."""

    data: str
    model: Any
    settings: Settings
    objective: Objective
    max_bad: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    codec: str = ""

    def __post_init__(self) -> None:
        if self.codec and not self.latent:
            raise ConfigError(
                f"codec={self.codec!r}: a {type(self).__name__} learns no latents, expected none"
            )

    @abstractmethod
    def prepared(self) -> Prepared:
        """With everything that the data decide, and the data as training samples.

        Raises:
            DataError, ConfigError: the data are missing or damaged, or do not fit the network.
        """

    def network(self) -> Model:
        """A network of `model`, with fresh weights of torch's global generator."""
        kinds = every(Model)  # type: ignore[type-abstract]
        return next(kind for kind in kinds if kind.Config is type(self.model))(self.model)

    @property
    def loading(self) -> dict[str, Any]:
        """Options of the loader."""
        return {**self.options, **({} if self.max_bad is None else {"max_bad": self.max_bad})}

    @abstractmethod
    def facts(self, samples: Samples) -> str:
        """What the data are, in one line; of a codec's latents, the data under them."""

    @abstractmethod
    def example(self, model: Model) -> tuple[Any, ...]:
        """Arguments of a forward pass on one sample, on the meta device."""

    def finish(self, model: Model, samples: Samples) -> None:  # noqa: B027
        """What is left to do with a trained model before it is saved; nothing, for most."""

    @abstractmethod
    def sheet(self, folder: Path, samples: Samples) -> Sheet | None:
        """What writes a picture of how far training is into `folder`, now and then."""


class Prepared(NamedTuple):
    """A recipe with what the data decide, its samples, and the codec that makes them of signals."""

    recipe: Recipe
    samples: Samples
    codec: Codec = IDENTITY


def train_recipe(recipe: Recipe, folder: Path, *, resume: bool = False) -> Model:
    """Train as the recipe says; weights, state, losses, samples and snapshots go to `folder`.

    Raises:
        ConfigError: resuming with another recipe than the folder's, or any of `train`'s reasons.
        DataError: the data are missing or damaged.
    """
    recipe, samples, codec = recipe.prepared()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.settings.seed)
        model = recipe.network()
    model.codec = codec
    return train(
        model,
        samples,
        recipe.objective,
        recipe.settings,
        folder,
        about={
            "data": recipe.data,
            "options": dict(recipe.options),
            "codec": {"folder": recipe.codec, FINGERPRINT: fingerprint(codec.state_dict())},
        },
        resume=resume,
        sheet=recipe.sheet(folder / "samples", signals(samples)),
        finish=lambda trained: recipe.finish(trained, samples),
    )


def describe(recipe: Recipe) -> str:
    """The resolved recipe and what it costs, in lines; loads the data, trains nothing.

    Raises:
        ConfigError, DataError: what `train_recipe` would refuse before its first step.
    """
    recipe, samples, _ = recipe.prepared()
    with torch.device("meta"):
        model = recipe.network().eval()
    recipe.objective.check(model)
    run, parameters, forward = recipe.settings, parameter_count(model), forward_macs(recipe)
    passes = 4 if run.gradient_checkpointing else 3  # backward takes two; checkpointing repeats the forward
    copies = 3 + len(run.averages)  # weights, two moments, averages
    lines = {
        "data": f"{recipe.data}, {recipe.facts(signals(samples))}",
        **({"codec": f"{recipe.codec}, latents {list(model.sample_shape)}"} if recipe.codec else {}),
        **{f"model.{k}": v for k, v in vars(recipe.model).items() if k != "class_names"},
        **{f"objective.{k}": v for k, v in vars(recipe.objective).items()},
        **{f"settings.{k}": v for k, v in vars(run).items()},
        "parameters": f"{parameters:,}",
        "MACs of a sample": f"{forward:,} forward, {passes * forward:,} in training",
        "MACs of a step": f"{passes * forward * run.batch:,}",
        "state": f"{4 * copies * parameters / 1e6:.1f} MB on disk, "
        f"{4 * (copies + 1) * parameters / 1e6:.1f} MB in memory with gradients",
        "length": f"{run.steps} steps x {run.batch} = {run.steps * run.batch / len(samples):.1f} epochs",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def forward_macs(recipe: Recipe) -> int:
    """Multiply-accumulates of a forward pass of one sample, counted on the meta device."""
    with torch.device("meta"), torch.no_grad():
        model = recipe.network().eval()
        return count_macs(model, *recipe.example(model)).total


def with_network(recipe: Recipe, network: Any) -> Recipe:
    """The recipe with the fields of `network`, one of `recipe.Network`, in its model."""
    return replace(recipe, model=replace(recipe.model, **vars(network)))


def network_of(recipe: Recipe) -> Any:
    """The fields of the recipe's model that have flags."""
    names = [f.name for f in fields(recipe.Network)]
    return recipe.Network(**{name: getattr(recipe.model, name) for name in names})
