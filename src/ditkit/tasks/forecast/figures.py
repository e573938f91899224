"""Figures of forecasts: each variable's, or a clip's, as lines, as a strip and as films."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditkit.core.checkpoint import replacing
from ditkit.core.model import Model
from ditkit.data.clips import ClipSet
from ditkit.data.fields import FieldSet
from ditkit.report.example import Example
from ditkit.report.film import write_film
from ditkit.report.forecast_pictures import forecast_film, forecast_strip, series_plot
from ditkit.report.legend import below_each_other
from ditkit.report.sheet import png
from ditkit.sample.forecast import forecast, horizon_of

if TYPE_CHECKING:
    from PIL import Image

Forecaster = Callable[[Tensor], Tensor]  # observed frames [1, C, T, H, W] -> [1, C, T', H, W]
STEPS_A_SECOND = 4.0
"""The rate of films of fields, which have none of their own."""
MOST_VARIABLES = 4
"""On a sheet of training, below each other."""


def clip_examples(clips: ClipSet, index: int, observed: int, forecaster: Forecaster) -> Iterator[Example]:
    """Yield the example of clip number `index`, in [0, 1]."""
    frames = (clips.clips(torch.tensor([index])) + 1) / 2
    past, followed = frames.tensor_split([observed], dim=2)
    yield Example(past[0], followed[0], forecaster(past.contiguous())[0], fps=clips.fps)


def field_examples(
    fields: FieldSet, start: int, observed: int, horizon: int, forecaster: Forecaster
) -> Iterator[Example]:
    """One for each variable, in its unit, of window number `start` of normalised fields."""
    past, followed = fields.batch([start], observed, horizon)
    parts = [past, followed, forecaster(past)]
    if fields.scaling is not None:
        parts = [fields.scaling.restore(x) for x in parts]
    # with those of what was seen
    times = fields.clock.civil(fields.target_times(start - observed, observed, observed + horizon))
    for i, variable in enumerate(fields.variables):
        observed_i, followed_i, said_i = (x[0, i : i + 1] for x in parts)
        yield Example(
            observed_i,
            followed_i,
            said_i,
            variable=variable,
            unit=fields.units[i],
            step=fields.step,
            times=times,
            valid=None if fields.valid is None else fields.valid[i],
            fps=STEPS_A_SECOND,
        )


def page(example: Example) -> Image.Image:
    """Lines over time of a series, a strip of frames of anything else."""
    return series_plot(example) if example.is_series else forecast_strip(example)


def write_pictures(folder: Path, name: str, example: Example) -> list[str]:
    """NAME.png, and of what is no series NAME.mp4 where PyAV is installed and NAME.gif; the file names.

    A GIF of more than 50 frames a second is slowed down to them.

    Raises:
        ConfigError: a file cannot be written.
    """
    with replacing(folder / f"{name}.png") as draft:
        draft.write_bytes(png(page(example)))
    if example.is_series:
        return [f"{name}.png"]
    return [f"{name}.png", *write_film(folder, name, forecast_film(example), example.fps)]


@torch.no_grad()
def write_sheet(
    folder: Path, examples: Callable[[Forecaster], Iterator[Example]], model: Model, step: int
) -> None:
    """Write the model's forecast of one training sample, of the first variables, as `folder`/STEP.png."""
    forecaster = partial(forecast, model, horizon=horizon_of(model))
    pages = [page(example) for example in islice(examples(forecaster), MOST_VARIABLES)]
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{step:06d}.png") as draft:
        draft.write_bytes(png(below_each_other(pages)))
