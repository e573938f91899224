"""Forecasts longer or shorter than the number of frames that a model says at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Denoiser, Model
from ditkit.core.policy import with_inherent
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory


def forecast(model: Model, observed: Tensor, horizon: int) -> Tensor:
    """Forecast the `horizon` frames after `observed`.

    Predicted frames are fed back, and the last pass is cut (PredFormer).

    Args:
        observed: [B, C, T, H, W], on any device.

    Returns:
        [B, C, horizon, H, W], made on the model's device, on that of `observed`.

    Raises:
        ConfigError: the horizon is no positive integer, or the model needs noise.
        ShapeError: `observed` is no batch of clips.
    """
    horizon = integer("horizon", horizon, least=1)
    if isinstance(model, Denoiser):
        raise ConfigError(f"forecast: a {type(model).__name__} makes frames from noise; use sample")
    if observed.ndim != 5 or not observed.shape[2]:
        raise ShapeError(f"forecast: observed {list(observed.shape)} should be [B, C, T, H, W]")
    place = next((parameter.device for parameter in model.parameters()), observed.device)
    past, passes = observed.to(place), list[Tensor]()
    total = len(range(0, horizon, observed.shape[2]))
    inherent = with_inherent(model, ())
    trajectory = Trajectory(model.sites(), inherent, total, learned=model.learned) if inherent else None
    for index in range(total):
        given = passes[-1] if passes else past
        if trajectory is None:
            passes.append(model(given))
            continue
        layout, times = model.layout(tuple(given.shape[1:])), torch.zeros(len(given), device=place)
        call = Call(index, total, 0.0, layout=layout, times=times)
        passes.append(trajectory.leave(call, model(given, run=trajectory.run(call))))
    return torch.cat(passes, 2)[:, :, :horizon].to(observed.device)
