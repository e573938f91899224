"""Forecasts longer or shorter than the number of frames that a model says at once, and paths drawn from its law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Denoiser, Model
from ditkit.core.policy import with_inherent
from ditkit.core.run import DIRECT, Call, Run
from ditkit.core.trajectory import Trajectory

MOST_ROWS = 1024
"""Windows that are forecast at a time while paths are drawn."""


def horizon_of(model: Model) -> int:
    """Return the frames that a model says at once: its config's `horizon`, or as many as it looks at."""
    return int(getattr(model.config, "horizon", 0) or model.config.frames)


def forecast(model: Model, observed: Tensor, horizon: int) -> Tensor:
    """Forecast the `horizon` frames after `observed`.

    Predicted frames are fed back, the oldest left out, and the last pass is cut (PredFormer, TEMPO).

    Args:
        observed: [B, C, T, H, W], on any device.

    Returns:
        [B, C, horizon, H, W], made on the model's device, on that of `observed`.

    Raises:
        ConfigError: the horizon is no positive integer, or the model needs noise.
        ShapeError: `observed` is no batch of clips.
    """
    passes = [out for _, out in rolled(model, observed, horizon, model)]
    return torch.cat(passes, 2)[:, :, :horizon].to(observed.device)


def rolled(
    model: Model, observed: Tensor, horizon: int, answer: Callable[..., Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the frames that each pass looks at, and those that it says, on the model's device.

    Args:
        answer: (frames) or, under policies, (frames, run=) to the frames that follow.
    """
    horizon = integer("horizon", horizon, least=1)
    if isinstance(model, Denoiser):
        raise ConfigError(f"forecast: a {type(model).__name__} makes frames from noise; use sample")
    if observed.ndim != 5 or not observed.shape[2]:
        raise ShapeError(f"forecast: observed {list(observed.shape)} should be [B, C, T, H, W]")
    place = next((parameter.device for parameter in model.parameters()), observed.device)
    given, frames = observed.to(place), observed.shape[2]
    config: Any = getattr(model, "config", None)
    total = len(range(0, horizon, getattr(config, "horizon", 0) or frames))
    inherent = with_inherent(model, ())
    trajectory = Trajectory(model.sites(), inherent, total, learned=model.learned) if inherent else None
    for index in range(total):
        if trajectory is None:
            out = answer(given)
        else:
            layout, times = model.layout(tuple(given.shape[1:])), torch.zeros(len(given), device=place)
            call = Call(index, total, 0.0, layout=layout, times=times)
            out = trajectory.leave(call, answer(given, run=trajectory.run(call)))
        yield given, out
        given = torch.cat([given, out.to(place)], 2)[:, :, -frames:]


@torch.no_grad()
def draw_paths(model: Any, observed: Tensor, horizon: int, count: int, seed: int = 0) -> Tensor:
    """Draw `count` futures of one sample from the law of a model; each is fed back to itself beyond one pass.

    Args:
        observed: [1, C, T, H, W].
        seed: of the draws, which take nothing from torch's own generators and leave them as they are.

    Returns:
        [count, C, horizon, H, W].

    Raises:
        ConfigError: the model has no law (`law_of`), or a number is out of range.
    """
    count = integer("paths", count, least=1)
    generator = torch.Generator().manual_seed(seed)

    def drawn(given: Tensor, run: Run = DIRECT) -> Tensor:
        parts = [model.law_of(rows, run=run).draw(1, generator)[0] for rows in given.split(MOST_ROWS)]
        return torch.cat(parts)

    def first(given: Tensor, run: Run = DIRECT) -> Tensor:
        sample: Tensor = model.law_of(given, run=run).draw(count, generator)
        return sample.flatten(0, 1)

    passes = [next(out for _, out in rolled(model, observed, 1, first))]
    known = torch.cat([observed.expand(count, -1, -1, -1, -1), passes[0].to(observed)], 2)
    if (left := horizon - passes[0].shape[2]) > 0:
        again = known[:, :, -observed.shape[2] :]
        passes += [out for _, out in rolled(model, again, left, drawn)]
    return torch.cat(passes, 2)[:, :, :horizon].to(observed.device)
