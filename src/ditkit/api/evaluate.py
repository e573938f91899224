"""`evaluate`: the figures of a trained model on data, as its task measures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ditkit.core.codec import Codec
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.core.task import Evaluation, Progress, task_of
from ditkit.sample.sampler import Sampling

DEFAULT = Sampling(batch_size=50)


def evaluate(
    model: Model | Codec,
    data: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    sampling: Sampling = DEFAULT,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a trained model on data.

    Args:
        data: a named set, or a user's own folder or file; by default the one that the model was trained on last.
        options: of the data's loader.
        sampling: settings of a model that draws.
        progress: called with (stage, done, total).
        settings: words of `Sampling` that differ, `count` of samples, and words of the task's own
            (`Task.settings`), such as `real_count` of pictures and `horizon` of forecasts.

    Raises:
        ConfigError: no data, data that do not fit the model, a word that the task does not have, or a number out of
            range. DataError: the data are missing or damaged.
    """
    task = task_of(model)
    words = {f.name: settings.pop(f.name) for f in fields(Sampling) if f.name in settings}
    if not task.generates and (words or sampling != DEFAULT):
        raise ConfigError(
            f"evaluate: a model of {task.noun}s of data has no settings of sampling, expected none"
        )
    for name in settings:
        if name not in task.settings:
            raise ConfigError(unknown(f"setting of evaluating {task.noun}s", name, task.settings))
    return task.evaluate(
        model,
        trained_on(model) if data is None else data,
        sampling=sampling.changed(**words),
        options=options or {},
        progress=progress,
        **settings,
    )


def trained_on(model: Model | Codec) -> str:
    """Return the name of the data that a model was trained on last.

    Raises:
        ConfigError: the model does not say.
    """
    if model.last_training is None:
        raise ConfigError("evaluate: the model does not say what it was trained on, expected --data")
    return str(model.last_training["trained"])
