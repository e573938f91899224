"""Scores of forecasts on held-out data, beside baselines that cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.codecs.standardised import Standardised
from ditkit.core.checkpoint import replacing
from ditkit.core.codec import fingerprint
from ditkit.core.config import MOST_STEPS, integer
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.task import Evaluation, Progress
from ditkit.data.calendar import Step
from ditkit.data.clips import ClipSet, spread
from ditkit.data.components import period_of
from ditkit.data.fields import Parts
from ditkit.data.loading import load_fields, load_held_out
from ditkit.metrics.forecast import (
    PERSISTENCE,
    ForecastReport,
    ForecastScore,
    Quantity,
    compare_forecasts,
    mean,
    persistence,
    score,
    seasonal_naive,
)
from ditkit.metrics.video import frame_psnr_db, frame_ssim
from ditkit.report.example import Example, lead_unit
from ditkit.report.leadtime import LeadTimePlot
from ditkit.sample.forecast import forecast, horizon_of
from ditkit.tasks.forecast.figures import clip_examples, field_examples, write_pictures
from ditkit.tasks.forecast.recipe import held_out, is_per_series, takes_counts

if TYPE_CHECKING:
    from ditkit.core.terminal import Table

Forecaster = Callable[[Tensor], Tensor]
Advance = Callable[[int, int], None]  # (clips done, clips in all)
BRIGHTNESS = Quantity("brightness")


@dataclass(frozen=True)
class ClipForecastScore:
    """Errors of later frames by lead time, [T], averaged over clips (PredFormer, Table 2).

    Squared and absolute errors are summed over the pixels of a frame in [0, 1]; PSNR and SSIM are of frames
    clipped to [0, 1].
    """

    error: ForecastScore
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**self.error.as_dict(), "psnr_db": self.psnr_db, "ssim": self.ssim}


def score_clips(
    models: Mapping[str, Model],
    clips: ClipSet,
    observed: int,
    batch_size: int = 16,
    progress: Advance | None = None,
) -> dict[str, ClipForecastScore]:
    """Each model, then persistence, on the frames after the first `observed` of every clip.

    Raises:
        ConfigError: no frame is left to forecast, or other channels than the models'.
    """
    horizon = clips.frames - observed
    if horizon < 1:
        raise ConfigError(
            f"{clips.name}: clips of {clips.frames} frames leave none after observed={observed}"
        )
    for name, model in models.items():
        if model.config.channels != clips.channels:
            raise ConfigError(
                f"{clips.name} has {clips.channels} channels, {name} takes {model.config.channels}"
            )
    makers: dict[str, Forecaster] = {
        name: partial(forecast, m, horizon=horizon) for name, m in models.items()
    }
    makers[PERSISTENCE] = partial(persistence, horizon=horizon)
    return {name: _score(make, clips, observed, batch_size, progress) for name, make in makers.items()}


@torch.no_grad()
def _score(
    make: Forecaster, clips: ClipSet, observed: int, batch_size: int, progress: Advance | None
) -> ClipForecastScore:
    per_clip: list[tuple[Tensor, Tensor]] = []

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(clips)).split(batch_size):
            frames = (clips.clips(index) + 1) / 2
            predicted, truth = make(frames[:, :, :observed]), frames[:, :, observed:]
            ends = predicted.clamp(0, 1) * 2 - 1, truth * 2 - 1  # both measures are of values in [-1, 1]
            per_clip.append((frame_psnr_db(*ends), frame_ssim(*ends)))
            if progress is not None:
                progress(int(index[-1]) + 1, len(clips))
            yield predicted, truth

    error = score(pairs(), (BRIGHTNESS,) * clips.channels, per="frame")
    psnr, ssim = (torch.cat(part).mean(0).tolist() for part in zip(*per_clip, strict=True))
    return ClipForecastScore(error, tuple(psnr), tuple(ssim))


@dataclass(frozen=True)
class ClipForecasts:
    """Models and persistence on the same clips, of which number `show` is drawn."""

    models: Mapping[str, Model]
    clips: ClipSet
    observed: int
    scores: Mapping[str, ClipForecastScore]
    show: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        settings = {"data": self.clips.name, "clips": len(self.clips), "observed": self.observed}
        return {"settings": settings, "scores": {name: s.as_dict() for name, s in self.scores.items()}}

    def table(self) -> Table:
        """Means over lead times, for a terminal of 80 columns."""
        from rich import box

        from ditkit.core.terminal import Table

        horizon = self.clips.frames - self.observed
        table = Table(
            title=f"{len(self.clips)} clips, {self.observed} frames to {horizon}; MSE and MAE summed over a frame",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("forecast", max_width=30)
        for head in ("MSE", "MAE", "PSNR, dB", "SSIM", "MSE of\npersistence"):
            table.add_column(head, justify="right", no_wrap=True)
        still = mean(self.scores[PERSISTENCE].error.mse_all)
        for name, found in self.scores.items():
            mse = mean(found.error.mse_all)
            cells = (mse, mean(found.error.mae_all))
            shares = f"{mean(found.psnr_db):.2f}", f"{mean(found.ssim):.3f}", f"{mse / still:.1%}"
            table.add_row(name, *(f"{value:.1f}" for value in cells), *shares)
        return table

    def plot(self) -> LeadTimePlot:
        """Squared error by lead time."""
        curves = {name: found.error.mse_all for name, found in self.scores.items()}
        lead = range(1, self.clips.frames - self.observed + 1)
        return LeadTimePlot(
            curves,
            list(lead),
            "MSE, summed over a frame (lower is better)",
            "frames",
            title=f"Forecasts of {self.clips.name}",
            baselines=[PERSISTENCE],
        )

    def examples(self) -> Iterator[tuple[str, Example]]:
        """Yield the clip to show under each model, by the name of its files."""
        for name, model in self.models.items():
            make = partial(forecast, model, horizon=self.clips.frames - self.observed)
            for example in clip_examples(self.clips, self.show, self.observed, make):
                yield file_name(name), example


@dataclass(frozen=True)
class FieldForecasts:
    """Models, persistence and climatology on the same windows of the test part, of which number `show` is drawn."""

    models: Mapping[str, Model]
    parts: Parts
    observed: int
    horizon: int
    report: ForecastReport
    show: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.report.as_dict()

    def table(self) -> Table:
        """Normalised MAE by lead time, for a terminal of 80 columns."""
        return self.report.table()

    def plot(self) -> LeadTimePlot:
        """Normalised MAE by lead time."""
        count, unit = lead_unit(self.parts.test.step)
        return LeadTimePlot(
            {name: found.mae_all for name, found in self.report.scores.items()},
            [count * (lead + 1) for lead in range(self.horizon)],
            "normalised MAE (lower is better)",
            unit,
            title=f"Forecasts of {self.parts.test.name}",
            baselines=list(self.report.baselines),
        )

    def examples(self) -> Iterator[tuple[str, Example]]:
        """Yield the window to show under each model, one a variable, by the name of its files."""
        for name, model in self.models.items():
            make = partial(forecast, model, horizon=self.horizon)
            for example in field_examples(self.parts.test, self.show, self.observed, self.horizon, make):
                yield file_name(f"{name}-{example.variable}"), example


@dataclass(frozen=True)
class ForecastEvaluation(Evaluation):
    """Forecasts of held-out data, their plot over lead time, and one of each model as pictures."""

    found: ClipForecasts | FieldForecasts

    def as_dict(self) -> dict[str, Any]:
        return self.found.as_dict()

    def table(self) -> Table:
        return self.found.table()

    @torch.no_grad()
    def save(self, folder: Path) -> list[list[str]]:
        with replacing(folder / "leadtime.png") as draft:
            draft.write_bytes(self.found.plot().png())
        return [
            ["leadtime.png"],
            *(write_pictures(folder, name, example) for name, example in self.found.examples()),
        ]


def evaluate_forecasts(
    models: Mapping[str, Model],
    data: str,
    *,
    options: Mapping[str, Any],
    horizon: int | None = None,
    count: int = 64,
    validation: float = 0.1,
    test: float = 0.2,
    show: int = 0,
    progress: Progress | None = None,
) -> ForecastEvaluation:
    """Forecast data that were not trained on, by each of some models and by what needs no model.

    Args:
        horizon: frames to forecast; None for the first model's own.
        count: clips, at most; of fields, every window of the test part is forecast.
        validation, test: of fields, the last parts in time, as in training.
        show: number of the clip or window that is drawn.

    Raises:
        ConfigError: as `clip_forecasts` and `field_forecasts` do. DataError: the data are missing or damaged.
    """
    first = next(iter(models.values()))
    horizon = (
        horizon_of(first) if horizon is None else integer("--horizon", horizon, least=1, most=MOST_STEPS)
    )
    if forecasts_fields(models):
        return ForecastEvaluation(field_forecasts(models, data, horizon, validation, test, show, options))
    integer("--count", count, least=1)
    stage = None if progress is None else partial(progress, "forecasting")
    return ForecastEvaluation(clip_forecasts(models, data, horizon, count, show, options, stage))


def forecasts_fields(models: Mapping[str, Model]) -> bool:
    """Return whether the models forecast fields or series, rather than clips.

    Raises:
        ConfigError: some do and others do not.
    """
    kinds = {
        name: isinstance(model.codec, Standardised) or is_per_series(model) for name, model in models.items()
    }
    if len(set(kinds.values())) > 1:
        one, other = (next(name for name, k in kinds.items() if k is kind) for kind in (True, False))
        raise ConfigError(f"{one} forecasts fields and {other} clips, expected models for the same data")
    return next(iter(kinds.values()))


def clip_forecasts(
    models: Mapping[str, Model],
    data: str,
    horizon: int,
    count: int,
    show: int,
    options: Mapping[str, Any],
    progress: Advance | None = None,
) -> ClipForecasts:
    """Models on at most `count` held-out clips of a set that has such a split, else of the whole set.

    Raises:
        ConfigError: models of different sizes or lengths, data that do not fit them, or no clip number `show`.
        DataError: the data are missing or damaged.
    """
    config = same(models, "frames", "size")
    clips = load_held_out(data, config.size, config.frames + horizon, **options)
    chosen = spread(clips, min(count, len(clips)))
    integer("--show", show, least=0, most=len(chosen) - 1)
    scores = score_clips(models, chosen, config.frames, progress=progress)
    return ClipForecasts(models, chosen, config.frames, scores, show)


def field_forecasts(
    models: Mapping[str, Model],
    data: str,
    horizon: int,
    validation: float,
    test: float,
    show: int,
    options: Mapping[str, Any],
) -> FieldForecasts:
    """Models on every window of the test part of a set.

    Raises:
        ConfigError: models of different lengths or statistics, models of counts beside others, other variables than
            the data's, or no window number `show`.
        DataError: the data are missing, damaged, or too short.
    """
    config = same(models, "frames")
    scaled_alike(models)
    bound = {name: model for name, model in models.items() if not is_per_series(model)}
    if bound:
        same(bound, "patch")
        standardised_alike(bound)
    fields = load_fields(data, **options)
    # a forecaster of any series takes the statistics of one that learned its own
    ordered = [*bound.values(), *(model for model in models.values() if is_per_series(model))]
    parts, *_ = [held_out(model, fields, validation, test) for model in ordered]
    integer("--show", show, least=0, most=parts.test.count(config.frames, horizon) - 1)
    makers: dict[str, Forecaster] = {
        name: partial(forecast, model, horizon=horizon) for name, model in models.items()
    }
    if len(bound) < len(models):
        makers |= seasonal_baseline(parts.test.step, config.frames, horizon)
    with torch.no_grad():
        report = compare_forecasts(makers, parts.training, parts.test, config.frames, horizon)
    return FieldForecasts(models, parts, config.frames, horizon, report, show)


def seasonal_baseline(step: Step, observed: int, horizon: int) -> dict[str, Forecaster]:
    """Return the forecaster that repeats the last cycle, by its name; none where no whole cycle is observed."""
    try:
        period = period_of(step)
    except ConfigError:
        return {}
    if period > observed:
        return {}
    return {f"seasonal naive ({period})": partial(seasonal_naive, horizon=horizon, period=period)}


def same(models: Mapping[str, Model], *names: str) -> Any:
    """Return the first model's config, whose fields of these names all models share.

    Raises:
        ConfigError: they differ.
    """
    (first, one), *others = models.items()
    for other, model in others:
        for name in names:
            a, b = getattr(one.config, name), getattr(model.config, name)
            if a != b:
                raise ConfigError(f"{first} has {name}={a} and {other} has {name}={b}, expected the same")
    return one.config


def standardised_alike(models: Mapping[str, Model]) -> None:
    """Raise ConfigError unless the models learned numbers of one mean and one deviation: errors are in these."""
    (first, one), *others = ((name, fingerprint(model.codec.state_dict())) for name, model in models.items())
    for name, other in others:
        if other != one:
            raise ConfigError(
                f"{first} and {name} standardise by other means or deviations, expected models of the same data"
            )


def scaled_alike(models: Mapping[str, Model]) -> None:
    """Raise ConfigError where some models take counts as they are and others standardised values: errors differ."""
    counts = [name for name, model in models.items() if takes_counts(model)]
    others = [name for name in models if name not in counts]
    if counts and others:
        raise ConfigError(
            f"{counts[0]} takes counts as they are (distribution=negative-binomial) and {others[0]} standardised "
            "values, expected models that can be measured in one unit"
        )


def called(folders: Sequence[str]) -> list[str]:
    """Name some distinct model folders by as many last parts of their paths as tell them apart."""
    parts = [[part for part in Path(folder).parts if part not in ("model", "/", "..")] for folder in folders]
    for kept in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-kept:]) for own in parts]
        if len(set(names)) == len(names) and all(names):
            return names
    return list(folders)


def file_name(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")
