"""A model, or the transformers of a diffusers pipeline, made smaller or fitted to something new."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ditkit.compress.calibration import Calibration, recording
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser, Model
from ditkit.core.spec import component
from ditkit.core.transform import Transform
from ditkit.sample.sampler import Sampler

Network = TypeVar("Network")
CALIBRATED = 64
"""Samples that are drawn at once as calibration."""


def compress(model_or_pipe: Network, *transforms: Transform | str, calibration: Any = None) -> Network:
    """Apply `transforms` in order to a copy of a model, or in place to the transformers of a pipeline.

    The result saves and loads like any other: it lists its transforms, which are replayed. A transformer of diffusers
    stays an ordinary one where diffusers can open the result; where not, its `save_pretrained` says so and how to save.

    Args:
        transforms: objects, or texts such as "kept:blocks=0+2+3".
        calibration: samples, for transforms whose values follow from what is seen. Calls of the network
            (`ditkit.compress.recording`) for those that quantise; a model that samples draws them itself.

    Raises:
        ConfigError, ConflictError: a transform does not fit; names the field and what would. Models are as they were.
    """
    chosen = as_transforms(transforms)
    if isinstance(model_or_pipe, Model):
        copy: Any = model_or_pipe.with_weights(model_or_pipe.state_dict(), "copy").train(
            model_or_pipe.training
        )
        for transform in chosen:
            given = drawn_for(copy, transform) if calibration is None else calibration
            copy.transform(transform, given)
        return copy
    from ditkit.hosts.hosted import transform_in_place

    for transformer in _transformers(model_or_pipe):
        transform_in_place(transformer, chosen, calibration)
    return model_or_pipe


def drawn_for(model: Model, transform: Transform) -> Calibration | None:
    """Return calls of trajectories that `transform` is fitted to; None if it needs none, or nothing can be drawn."""
    wanted = transform.draws()
    if wanted is None or transform == transform.exact() or not isinstance(model, Denoiser):
        return None
    transform.check(model)  # before any work
    seeds = tuple(range(wanted.seed, wanted.seed + wanted.samples))
    training = model.training
    try:
        with recording(model.eval(), CALIBRATED) as calls:
            Sampler.of(model, seeds=seeds, steps=wanted.steps, batch_size=CALIBRATED).draw()
    finally:
        model.train(training)
    return Calibration(tuple(calls))


def adapt(model_or_pipe: Network, *transforms: Transform | str, calibration: Any = None) -> Network:
    """`compress` under the name for what adds to a model, such as `LoRA(rank=8)`, before it is trained further."""
    return compress(model_or_pipe, *transforms, calibration=calibration)


def as_transforms(given: Iterable[Transform | str]) -> tuple[Transform, ...]:
    """Return transforms, of which each is given itself or as its text.

    Raises:
        ConfigError: none, something else, or a text that describes no transform.
    """
    chosen: list[Transform] = []
    for one in given:
        found: Any = component(Transform, one) if isinstance(one, str) else one  # type: ignore[type-abstract]
        if not isinstance(found, Transform):
            raise ConfigError(f"got {one!r}, expected a Transform or a text such as 'kept:blocks=0+2+3'")
        chosen.append(found)
    if not chosen:
        raise ConfigError("compress: got no transform, expected at least one, such as Kept(blocks=(0, 2, 3))")
    return tuple(chosen)


def _transformers(pipe: Any) -> list[nn.Module]:
    """List the transformers, of a pipeline or given alone, that have a view."""
    from ditkit.hosts.family import families, family, is_known

    families()
    parts = getattr(pipe, "components", None)
    candidates = list(parts.values()) if isinstance(parts, dict) else [pipe]
    found = [part for part in candidates if isinstance(part, nn.Module) and is_known(part)]
    if not found:
        named = getattr(pipe, "transformer", pipe)
        if isinstance(named, nn.Module):
            family(named)
        raise ConfigError(
            f"got {type(pipe).__name__}, expected a model, or a pipeline of diffusers with a transformer"
        )
    return found
