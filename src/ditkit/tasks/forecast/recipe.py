"""Recipes of forecasting: later frames of clips, later fields, later values of series."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.codecs.standardised import Standardised
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.data.clips import ClipSet
from ditkit.data.fields import FieldSet, Parts, Scaling
from ditkit.data.loading import load_clips, load_fields
from ditkit.tasks.forecast.figures import clip_examples, field_examples, write_sheet
from ditkit.tasks.recipe import Prepared, Recipe
from ditkit.train.forecasting import Forecasting
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG

SQUARED_ERROR = Forecasting()


@dataclass(frozen=True, kw_only=True)
class ForecastRecipe(Recipe):
    """A network that says as many frames as it has seen, in one pass."""

    task: ClassVar[str] = "forecast"
    objective: Objective = SQUARED_ERROR

    def example(self, model: Model) -> tuple[Any, ...]:
        return (torch.empty(1, *model.sample_shape),)


@dataclass(frozen=True, kw_only=True)
class ClipForecastRecipe(ForecastRecipe):
    """Later frames of clips.

    Args:
        data: a named set of clips, or a folder of video files.
        model: its channels are taken from the data.
    """

    sources: ClassVar[str] = "A named set of clips (moving-digits, vizdoom), or a folder of video files."

    def prepared(self) -> Prepared:
        clips = load_clips(self.data, self.model.size, frames=2 * self.model.frames, **self.loading)
        return Prepared(
            replace(self, model=replace(self.model, channels=clips.channels)), ForecastDataset(clips)
        )

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, ForecastDataset)
        clips, (height, width) = samples.clips, samples.clips.size
        return (
            f"{len(clips)} clips [{clips.channels}, {clips.frames}, {height}, {width}], half of each observed"
        )

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, ForecastDataset)
        return partial(write_sheet, folder, partial(clip_examples, samples.clips, 0, self.model.frames))


@dataclass(frozen=True, kw_only=True)
class FieldForecastRecipe(ForecastRecipe):
    """Later fields or values of series; the mean and deviation of the training part go with the weights.

    Args:
        data: a named set of fields, a netCDF file, or a CSV file of series.
        model: its channels and size are taken from the data.
        validation, test: the last parts in time, which are not trained on; a share, or a number of steps.
    """

    sources: ClassVar[str] = "A named set of fields (winds, rain), a netCDF file, or a CSV file of series."
    validation: float = 0.1
    test: float = 0.2

    def prepared(self) -> Prepared:
        fields = load_fields(self.data, **self.loading)
        training = fields.split(self.validation, self.test).training
        scaling = training.fit_scaling()
        codec = Standardised.of(fields.variables, fields.units, scaling.mean, scaling.std, str(fields.step))
        samples = Windows(training.normalised(scaling).padded(self.model.patch), self.model.frames)
        _, channels, height, width = samples.fields.values.shape
        model = replace(self.model, channels=channels, size=(height, width))
        return Prepared(replace(self, model=model), samples, codec)

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, Windows)
        fields = samples.fields
        return f"{len(fields)} steps of {list(fields.values.shape[1:])} ({', '.join(fields.variables)}) to train on"

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, Windows)
        frames = samples.frames
        return partial(write_sheet, folder, partial(field_examples, samples.fields, 0, frames, frames))


class ForecastDataset:
    """Clips as training samples of forecasting: the first half is observed, in [0, 1]."""

    def __init__(self, clips: ClipSet) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def pair(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Observed frames and those that follow, [n, C, T, H, W] each, in [0, 1]."""
        given, target = ((self.clips.clips(indices) + 1) / 2).chunk(2, dim=2)
        return given.contiguous(), target.contiguous()

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        given, target = self.pair(indices)
        return target, Cond(context=given)


class Windows:
    """Every window of a set of fields as a training sample; cells that hold no data do not count."""

    def __init__(self, fields: FieldSet, frames: int) -> None:
        self.fields, self.frames = fields, frames
        self.count = fields.count(frames, frames)

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        given, target = self.fields.batch(indices.tolist(), self.frames, self.frames)
        valid = self.fields.valid
        mask = None if valid is None else valid[None, :, None].expand(len(given), -1, -1, -1, -1)
        return target, Cond(context=given, mask=mask)


def is_per_series(model: Model) -> bool:
    """Return whether a forecaster takes any series, each by itself."""
    return bool(getattr(model.config, "per_series", False))


def takes_counts(model: Model) -> bool:
    """Return whether a forecaster takes counts as they are, without a mean and a deviation."""
    return bool(getattr(model.config, "distribution", "none") == "negative-binomial")


def scaling_for(model: Model, known: FieldSet) -> Scaling:
    """Return the statistics of what is known of a set, for a forecaster of any series; counts stay as they are.

    Raises:
        ConfigError: the set has another step of time than the model was trained on.
    """
    steps = model.config.steps
    if steps and str(known.step) not in steps:
        raise ConfigError(
            f"{known.name} has a value every {known.step}, the model was trained on one every "
            f"{' or '.join(steps)}; expected data of such a step"
        )
    if takes_counts(model):
        none = torch.zeros(len(known.variables), dtype=torch.float64)
        return Scaling(none, none + 1)
    return known.fit_scaling()


def scaling_with(model: Model) -> Scaling:
    """Return the statistics that a forecaster of fields was trained with.

    Raises:
        ConfigError: it was trained on clips.
    """
    if not isinstance(model.codec, Standardised):
        raise ConfigError("this forecaster was trained on clips, expected one of fields or series")
    return Scaling(model.codec.mean, model.codec.std)


def fitting(model: Model, fields: FieldSet) -> FieldSet:
    """Return the model's variables of a set, in its order, normalised as in training and padded to its patches.

    Raises:
        ConfigError: the model was trained on clips, on other variables, units or steps of time, or on another grid.
    """
    if is_per_series(model):
        return fields.normalised(scaling_for(model, fields))
    scaling, trained = scaling_with(model), model.codec.config
    if not set(trained.variables) <= set(fields.variables):
        raise ConfigError(
            f"{fields.name} has {fields.variables}, the model was trained on {trained.variables}"
        )
    fields = fields.chosen(trained.variables)
    if trained.step and str(fields.step) != trained.step:
        raise ConfigError(
            f"{fields.name} has a value every {fields.step}, the model was trained on one every {trained.step}; "
            "expected data of that step"
        )
    for name, unit, own in zip(fields.variables, fields.units, trained.units, strict=True):
        if unit and own and unit != own:
            raise ConfigError(
                f"{fields.name} has {name!r} in {unit}, the model was trained on it in {own}; expected data in "
                "that unit"
            )
    found = fields.normalised(scaling).padded(model.config.patch)
    height, width = found.values.shape[2:]
    if (height, width) != tuple(model.config.size):
        raise ConfigError(
            f"{fields.name} has {height} x {width} cells, the model was trained on "
            f"{' x '.join(map(str, model.config.size))}"
        )
    return found


def held_out(model: Model, fields: FieldSet, validation: float, test: float) -> Parts:
    """Return the parts of a set in time, as the model wants them.

    Raises:
        ConfigError: as `fitting` does.
    """
    if is_per_series(model):
        parts = fields.split(validation, test, lead_in=model.config.frames)
        scaling = scaling_for(model, parts.training)
        return Parts(*(part.normalised(scaling) for part in parts))
    return fitting(model, fields).split(validation, test, lead_in=model.config.frames)
