"""Forecasters of single series: trained on several sets at once, each series by itself, and taken to any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.model import Model
from ditkit.data.components import check_stl, period_of, stl
from ditkit.data.fields import FieldSet
from ditkit.data.language_body import language_body
from ditkit.data.loading import joined, load_several_fields
from ditkit.models.tempo import SENTENCES, Tempo, TempoConfig
from ditkit.nn.language_body import LanguageBody
from ditkit.tasks.forecast.figures import field_examples, write_sheet
from ditkit.tasks.forecast.recipe import ForecastRecipe
from ditkit.tasks.recipe import Prepared
from ditkit.train.forecasting import Forecasting
from ditkit.train.loop import Sheet, TrainingSet
from ditkit.train.objective import Objective
from ditkit.train.randomness import SampleRNG, generator
from ditkit.train.terms.decomposition import TARGETS, DecompositionLoss
from ditkit.train.terms.likelihood import Likelihood
from ditkit.train.terms.regression import Regression

PUBLISHED_LOSS = Forecasting(terms=(Regression(), DecompositionLoss()))
Smoothed = Literal["training", "window"]
"""The steps that STL sees for the targets of the components: all of the training part, or each window alone."""
UNSCALED = "negative-binomial"
"""The distribution of counts, which are not standardised."""


@dataclass(frozen=True, kw_only=True)
class SeriesForecastRecipe(ForecastRecipe):
    """Later values of series, each by itself; several sets are sampled equally.

    Args:
        data: sets of series joined by a plus.
        validation, test: the last parts in time of each set, which are not trained on; a share, or a number of steps.
        body: the language model whose first blocks a Tempo has: "smollm2", or one of GPT-2's kind as transformers finds
            it; without, it begins anew.
        smoothed: what STL sees. The published code gives it the whole series, validation and test too.
        period: steps of the cycle that STL takes out; 0 for that of a day, of days a week, of months a year.
    """

    sources: ClassVar[str] = (
        "Sets of series joined by a plus: named ones (electricity, traffic, beijing, solar), CSV or netCDF files."
    )
    objective: Objective = PUBLISHED_LOSS
    validation: float = 0.1
    test: float = 0.2
    body: str = ""
    smoothed: Smoothed = "training"
    period: int = 0

    def prepared(self) -> Prepared:
        ready = self._with_body() if self.body else self
        ready = replace(ready, objective=_learning(ready.objective, ready.model))
        sets = load_several_fields(self.data, **self.loading)
        known = any(isinstance(term, DecompositionLoss) for term in ready.objective.active)
        samples = [ready._windows(fields, known) for fields in sets]
        model = replace(ready.model, steps=tuple(dict.fromkeys(str(fields.step) for fields in sets)))
        return Prepared(replace(ready, model=model), Mixed(samples, self.settings.seed))

    def _with_body(self) -> SeriesForecastRecipe:
        """With the sizes of the language model."""
        if not isinstance(self.model, TempoConfig):
            raise ConfigError(f"body={self.body!r}: a {type(self.model).__name__} has none, expected none")
        return replace(self, model=replace(self.model, **self._body().sizes))

    def _body(self) -> LanguageBody:
        return language_body(self.body, self.model.depth, SENTENCES)

    def _windows(self, fields: FieldSet, known: bool) -> SeriesWindows:
        """Windows of the training part of a set, with their components if a term asks for them."""
        training = fields.split(self.validation, self.test).training
        counts = getattr(self.model, "distribution", "none") == UNSCALED
        scaled = check_counts(training) if counts else training.normalised(training.fit_scaling())
        period = period_of(fields.step, self.period) if known else 0
        c = self.model
        return SeriesWindows(scaled, c.frames, c.horizon, period, self.smoothed)

    def blank(self) -> Model:
        model = super().blank()
        if self.body and isinstance(model, Tempo) and not next(model.parameters()).is_meta:
            model.take_body(self._body())
        return model

    @property
    def next_data(self) -> str:
        return joined(self.data)[0]

    def facts(self, samples: TrainingSet) -> str:
        assert isinstance(samples, Mixed)
        return f"{len(samples)} windows, {samples.each} of each of {len(samples.parts)}: " + "; ".join(
            f"{part.fields.name}, {len(part.fields)} steps of {part.count_series} series"
            for part in samples.parts
        )

    def sheet(self, folder: Path, samples: TrainingSet) -> Sheet:
        assert isinstance(samples, Mixed)
        first, c = samples.parts[0].fields, self.model
        return partial(write_sheet, folder, partial(field_examples, first, 0, c.frames, c.horizon))


def _learning(objective: Objective, config: object) -> Objective:
    """Return the objective with what the network can learn by: a distribution by its likelihood; components, if any."""
    terms = list(objective.terms)
    if getattr(config, "distribution", "none") != "none":
        terms = [Likelihood(term.weight) if isinstance(term, Regression) else term for term in terms]
    if not getattr(config, "decomposed", False):
        terms = [term for term in terms if not isinstance(term, DecompositionLoss)]
    return replace(objective, terms=tuple(terms))


def check_counts(fields: FieldSet) -> FieldSet:
    """Return counts as they are, in float32.

    Raises:
        DataError: a value is negative or no whole number.
    """
    wrong = (fields.values < 0) | (fields.values != fields.values.round())
    if wrong.any():
        n, c, *_ = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{fields.name}: {fields.variables[c]!r} is {fields.values[n, c, 0, 0]:g} at {fields.times[n]}, expected "
            "counts, as distribution=negative-binomial is of"
        )
    return replace(fields, values=fields.values.float())


class SeriesWindows:
    """Windows of each series of a set as training samples, [1, L, 1, 1] and [1, H, 1, 1]; components beside them.

    Args:
        period: of STL; 0 for no components.
        smoothed: over all steps at once, or over each window alone.

    Raises:
        DataError: STL has fewer than two periods of what it is to smooth. ConfigError: statsmodels is not installed.
    """

    def __init__(
        self, fields: FieldSet, frames: int, horizon: int, period: int = 0, smoothed: Smoothed = "training"
    ) -> None:
        self.fields, self.frames, self.horizon, self.period = fields, frames, horizon, period
        self.windows = fields.count(frames, horizon)
        held = torch.ones_like(fields.values[0], dtype=torch.bool) if fields.valid is None else fields.valid
        self.values = fields.values[:, held]  # [steps, series]
        self.count_series = self.values.shape[1]
        whole = bool(period) and smoothed == "training"
        if period:
            check_stl(len(fields) if whole else frames, period)
        self.components = stl(self.values, period) if whole else None

    def __len__(self) -> int:
        return self.windows * self.count_series

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        start, series = indices // self.count_series, indices % self.count_series
        steps = start[:, None] + torch.arange(self.frames + self.horizon)
        given, target = self.values[steps, series[:, None]].split([self.frames, self.horizon], 1)
        streams = {}
        if self.period:
            streams[TARGETS] = self._components(steps[:, : self.frames], series, given)
        return target[:, None, :, None, None], Cond(context=given[:, None, :, None, None], streams=streams)

    def _components(self, steps: Tensor, series: Tensor, given: Tensor) -> Tensor:
        """Trend, season and residual of windows, [n, 3, L]."""
        if self.components is None:
            return stl(given.mT, self.period).permute(2, 1, 0)
        return self.components[steps, :, series[:, None]].mT


class Mixed:
    """Samples of several sets, as many of each: those of the smallest, and as many drawn once of every other.

    Each is drawn without replacement; sample i is of set i mod K.
    """

    def __init__(self, parts: Sequence[SeriesWindows], seed: int = 0) -> None:
        self.parts, self.each = list(parts), min(map(len, parts))
        self.chosen = [
            torch.randperm(len(part), generator=generator(seed, MIXING, i))[: self.each]
            for i, part in enumerate(parts)
        ]

    def __len__(self) -> int:
        return self.each * len(self.parts)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        of = indices % len(self.parts)
        order, found = list[Tensor](), list[tuple[Tensor, Cond]]()
        for k, part in enumerate(self.parts):
            places = (of == k).nonzero()[:, 0]
            if len(places):
                order.append(places)
                found.append(part.batch(self.chosen[k][indices[places] // len(self.parts)], rng))
        back = torch.cat(order).argsort()
        data, cond = torch.cat([data for data, _ in found]), Cond.cat([cond for _, cond in found])
        return data[back], cond.rows(back)


MIXING = 5
"""The use of randomness of what is drawn of each set; others: `ditkit.train.randomness`."""
