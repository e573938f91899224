"""Data, network, objective and a training run bound together: what `ditkit train` takes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ditkit.api.compress import drawn_for
from ditkit.bench.macs import count_macs
from ditkit.core.catalog import every
from ditkit.core.codec import FINGERPRINT, IDENTITY, Codec, fingerprint
from ditkit.core.errors import ConfigError
from ditkit.core.inherit import Inherit, inherit
from ditkit.core.loading import load
from ditkit.core.model import Model, parameter_count
from ditkit.core.policy import Policy, with_inherent
from ditkit.core.spec import spec
from ditkit.core.task import task_named
from ditkit.core.transform import Transform
from ditkit.data.content import content_digest
from ditkit.data.frames import is_in_memory
from ditkit.data.loading import PART, dataset_name
from ditkit.tasks.latent import signals
from ditkit.train.loop import Sheet, TrainingSet, train
from ditkit.train.objective import Objective
from ditkit.train.optimizers import moments_of, optimizers_of
from ditkit.train.parts import train_only
from ditkit.train.record import CONTENT
from ditkit.train.settings import Settings
from ditkit.train.state import STATE

LOG = logging.getLogger(__name__)
OFTEN = 2000
"""Epochs beyond which a run says that it repeats its samples; the recipes of small sets come to about half."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A network, a set and a training run; a subclass is one task.

    Args:
        data: a named set, or a user's own folder or file; of fields also a table of pandas or a data set of xarray.
        model: the network's config; what of it the data decide is taken from them.
        settings: of the run. objective: what it minimises.
        max_bad: damaged files of a folder to leave out; None for the loader's own limit.
        options: of the set's own loader.
        codec: folder of a trained codec, whose latents are learned instead of the data themselves.
        init: a trained model to go on from, as `ditkit.load` takes it; `model` is then its config.
        inherit: how a network of `model` takes its weights from `init`, which may be of another class or size.
        transforms: put on the network before it is trained, in order.
        policies: that the network is trained under.
    """

    sources: ClassVar[str] = "A named set, or a folder."
    """The possible values of `data`, for a person who types it."""
    latent: ClassVar[bool] = False
    """True if latents of a codec can be learned."""
    has_sites: ClassVar[bool] = True
    """True if the network is a model, which policies act on, and which `init` finds."""
    one_forward: ClassVar[bool] = False
    """True if all samples of a step share a forward pass, of which `example` is then."""
    task: ClassVar[str]
    """The name of the task of the trained model, and so of every config that `model` may be."""

    data: Any
    model: Any
    settings: Settings
    objective: Objective
    max_bad: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    codec: str = ""
    init: str = ""
    inherit: Inherit | None = None
    transforms: tuple[Transform, ...] = ()
    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        if (task := getattr(self.model, "task", "none")) != self.task:
            kinds = every(Model)  # type: ignore[type-abstract]
            fitting = [kind.__name__ for kind in kinds if getattr(kind.Config, "task", "none") == self.task]
            raise ConfigError(
                f"model={type(self.model).__name__} is of task {task!r}, expected {self.task!r}: {', '.join(fitting)}"
            )
        if self.codec and not self.latent:
            raise ConfigError(
                f"codec={self.codec!r}: a {type(self).__name__} learns no latents, expected none"
            )
        if self.inherit and not self.init:
            raise ConfigError("inherit is how weights are taken from init, expected init, got none")
        if not self.has_sites and (self.init or self.policies or self.transforms):
            given = f"init={self.init!r}" if self.init else f"policies={self.policies}"
            raise ConfigError(f"{given}: a {type(self).__name__} trains no model with sites, expected none")

    @abstractmethod
    def prepared(self) -> Prepared:
        """With everything that the data decide, and the data as training samples.

        Raises:
            DataError, ConfigError: the data are missing or damaged, or do not fit the network.
        """

    def network(self) -> Model:
        """Build a network of `model` under `policies`, with fresh weights of torch's global generator."""
        model = self.blank()
        return _put_on(model, self, next(model.parameters()).is_meta)

    def blank(self) -> Model:
        """Build a network of `model` before its transforms and policies."""
        kinds = every(Model)  # type: ignore[type-abstract]
        kind = next(kind for kind in kinds if kind.Config is type(self.model))
        model: Model = kind(self.model)  # type: ignore[call-arg]
        return model

    @property
    def then(self) -> str:
        """The command that takes the trained model."""
        return task_named(self.task).command

    @property
    def then_data(self) -> bool:
        """Return whether that command cannot do without data."""
        return self.has_sites and not task_named(self.task).generates

    @property
    def next_data(self) -> str:
        """The data that this command is shown with."""
        return self.data

    @property
    def loading(self) -> dict[str, Any]:
        """Options of the loader."""
        return {**self.options, **({} if self.max_bad is None else {"max_bad": self.max_bad})}

    @abstractmethod
    def facts(self, samples: TrainingSet) -> str:
        """Describe the data in one line; of a codec's latents, the data under them."""

    @abstractmethod
    def example(self, model: Model) -> tuple[Any, ...]:
        """Arguments of a forward pass on one sample, on the meta device."""

    def finish(self, model: Model, samples: TrainingSet) -> None:  # noqa: B027
        """Do what is left with a trained model before it is saved; nothing, for most."""

    @abstractmethod
    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet | None:
        """Return the function that writes a picture of the progress of training into `folder`, if there is one."""


class Prepared(NamedTuple):
    """A recipe with what the data decide, its samples, and the codec that makes them of signals."""

    recipe: Recipe
    samples: TrainingSet
    codec: Codec = IDENTITY


class Started(NamedTuple):
    """A prepared recipe, the model that it goes on from, if any, under its transforms and policies, and a digest."""

    prepared: Prepared
    model: Model | None
    digest: str = ""


def started(recipe: Recipe, resume: bool = False) -> Started:
    """Complete the recipe with what the data and `init` decide.

    Args:
        resume: transforms are not applied again, only their structure: a state brings the values.

    Raises:
        ConfigError: `init` is no model of the recipe's kind, the data need another than it is, it was trained under
            policies and the recipe has none, or it is missing and a term compares with it.
        CheckpointError: what is there is damaged.
        DataError: the data are missing or damaged.
    """
    model = load(recipe.init) if recipe.init else None
    if model is None:
        ready = recipe.prepared()
        if comparing := [type(term).__name__ for term in recipe.objective.active if term.needs_teacher]:
            raise ConfigError(
                f"{comparing[0]} compares with the trained model that it goes on from; expected init, got none"
            )
        return Started(ready, None)
    if recipe.inherit is not None:
        ready = recipe.prepared()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(recipe.settings.seed)
            student = replace(ready.recipe, transforms=(), policies=()).network()
        inherit(student, model, recipe.inherit)
        return Started(ready, _put_on(student, recipe, resume), fingerprint(model.state_dict()))
    if type(model.config) is not type(recipe.model):
        expected = type(recipe.model).__name__.removesuffix("Config")
        raise ConfigError(f"init={recipe.init!r} is a {type(model).__name__}, expected a {expected}")
    if model.policies and not recipe.policies:
        under = " ".join(map(spec, model.policies))
        neutral = " ".join(spec(policy.exact()) for policy in model.policies)
        raise ConfigError(
            f"init={recipe.init!r} was trained under {under}; got no policies, expected some, if only {neutral}"
        )
    ready = replace(recipe, model=model.config).prepared()
    for f in fields(model.config):
        own, needed = getattr(model.config, f.name), getattr(ready.recipe.model, f.name)
        if own != needed:
            raise ConfigError(f"init={recipe.init!r} has {f.name}={own!r}, the data need {needed!r}")
    digest = fingerprint(model.state_dict()) if recipe.transforms else ""
    model = _put_on(model, recipe, resume)
    return Started(ready, model, digest or fingerprint(model.state_dict()))


def _put_on(model: Model, recipe: Recipe, resume: bool) -> Model:
    """Put the recipe's transforms, or their structure alone, and its policies on the model."""
    policies = with_inherent(model, recipe.policies)
    if resume and recipe.transforms:
        model.adopt(()).shaped(recipe.transforms)
    else:
        for transform in recipe.transforms:
            if transform.is_open:
                raise ConfigError(
                    f"{type(transform).__name__}: a run cannot be resumed from what is still to be found from samples; "
                    "apply it by ditkit compress, which writes what it found into config.json, and name that"
                )
            model.transform(transform, drawn_for(model, transform))
    return model.adopt(policies)


def train_recipe(recipe: Recipe, folder: Path, *, resume: bool = False) -> Model:
    """Train as the recipe says; weights, state, losses, samples and snapshots go to `folder`.

    Raises:
        ConfigError: resuming with another recipe than the folder's, or any of `train`'s and `started`'s reasons.
        DataError: the data are missing or damaged.
    """
    goes_on = resume and (folder / STATE).exists()
    (recipe, samples, codec), start, digest = started(recipe, goes_on)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.settings.seed)
        model = recipe.network() if start is None else start
    model.codec, model.task = codec, recipe.task
    run = recipe.settings
    if too_often := repeats(run, len(samples)):
        LOG.warning("%d steps x %d of %d samples%s", run.steps, run.batch, len(samples), too_often)
    model.history += (training_of(recipe.data, recipe.options, run.steps, run.batch),)
    return train(
        model,
        samples,
        recipe.objective,
        recipe.settings,
        folder,
        about={
            "data": dataset_name(recipe.data) if is_in_memory(recipe.data) else str(recipe.data),
            CONTENT: content_digest(recipe.data),
            "options": dict(recipe.options),
            "codec": {"folder": recipe.codec, FINGERPRINT: fingerprint(codec.state_dict())},
            "init": {"folder": recipe.init, FINGERPRINT: digest or fingerprint({})},
            "policies": [spec(policy) for policy in recipe.policies],
            "task": _own(recipe),
        },
        resume=resume,
        sheet=recipe.sheet(folder / "samples", signals(samples)),
        finish=lambda trained: recipe.finish(trained, samples),
        start=None if start is None else partial(load, recipe.init),
    )


def repeats(run: Settings, samples: int) -> str:
    """Say how often each sample is seen and what keeps a network from learning it by heart; empty if it is seldom."""
    epochs = run.steps * run.batch / samples
    if epochs <= OFTEN:
        return ""
    steps = max(1, round(OFTEN * samples / run.batch))
    return f": each is seen {epochs:,.0f} times, and will be learned by heart; fewer steps, about {steps}, or more data"


def training_of(data: Any, options: Mapping[str, Any], steps: int, batch: int) -> dict[str, Any]:
    """Return a run's entry in a model's history; of the loader's options, those of how the data look."""
    look = {name: value for name, value in options.items() if name not in PART}
    return {"trained": dataset_name(data), "options": look, "steps": steps, "batch": batch}


def _own(recipe: Recipe) -> dict[str, Any]:
    """Return what a task's recipe has beside what all have: masks, parts in time."""
    whole = asdict(replace(recipe, data=""))
    return {name: whole[name] for name in whole if name not in Recipe.__dataclass_fields__}


def describe(recipe: Recipe) -> str:
    """Describe the resolved recipe and its cost, in lines; load the data, train nothing.

    Raises:
        ConfigError, DataError: what `train_recipe` would refuse before its first step.
    """
    (recipe, samples, _), _, _ = started(recipe)
    with torch.device("meta"):
        model = recipe.network().eval()
    recipe.objective.check(model)
    run = recipe.settings
    recipe.objective.check_batch(run.batch)
    lines = {
        "data": f"{dataset_name(recipe.data) if is_in_memory(recipe.data) else recipe.data}, "
        f"{recipe.facts(signals(samples))}",
        **{f"data.{k}": v for k, v in recipe.loading.items()},
        **({"codec": f"{recipe.codec}, latents {list(model.sample_shape)}"} if recipe.codec else {}),
        **({"init": recipe.init} if recipe.init else {}),
        **({"inherit": recipe.inherit} if recipe.inherit else {}),
        **({"policies": " ".join(map(spec, recipe.policies))} if recipe.policies else {}),
        **{f"model.{k}": v for k, v in vars(recipe.model).items() if k != "class_names"},
        **{f"objective.{k}": v for k, v in vars(recipe.objective).items()},
        **{f"settings.{k}": v for k, v in vars(run).items()},
        **_cost(recipe, model),
        "length": f"{run.steps} steps x {run.batch} = {run.steps * run.batch / len(samples):.1f} epochs"
        + repeats(run, len(samples)),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _cost(recipe: Recipe, model: Model) -> dict[str, str]:
    """Lines on weights, work and memory of training `model`, a network of the recipe."""
    run, parameters, forward = recipe.settings, parameter_count(model), forward_macs(recipe)
    train_only(model, run.trained)
    trained = parameter_count(model)
    teachers = int(any(term.needs_teacher for term in recipe.objective.active))
    # backward takes two; checkpointing repeats the forward, and a teacher runs one of its own
    passes = 3 + run.gradient_checkpointing + teachers
    # all in float32; frozen weights are no part of the state, but of the memory
    kept = 4 * ((1 + len(run.averages)) * trained + moments_of(optimizers_of(model, run)))
    memory = kept + 4 * (parameters + teachers * parameters)
    counted = ", without policies" if recipe.policies else ""
    return {
        "parameters": f"{parameters:,}",
        **({} if trained == parameters else {"trained parameters": f"{trained:,}"}),
        f"MACs of a {'step' if recipe.one_forward else 'sample'}": (
            f"{forward:,} forward, {passes * forward:,} in training{counted}"
        ),
        **({} if recipe.one_forward else {"MACs of a step": f"{passes * forward * run.batch:,}{counted}"}),
        "state": f"{kept / 1e6:.1f} MB on disk, {memory / 1e6:.1f} MB in memory with gradients"
        + (" and the teacher" if teachers else ""),
    }


def forward_macs(recipe: Recipe) -> int:
    """Multiply-accumulates of a forward pass of one sample, counted on the meta device."""
    with torch.device("meta"), torch.no_grad():
        model = recipe.network().eval()
        return count_macs(model, *recipe.example(model)).total
